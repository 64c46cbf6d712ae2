//! The project's own commands, run as `cargo xtask <command>`.
#![forbid(unsafe_code)]

mod bench;
mod build;
mod crds;
mod demo;
mod e2e;
mod fuzz;
mod image;
mod kernels;
mod leftovers;
mod lint;
mod manifests;
mod process;
mod setup;
mod test;
mod toolchain;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Sets up, builds, checks and shows egress-agent.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Setup(setup::Options),
    Build(build::Options),
    Test(test::Options),
    Fuzz(fuzz::Options),
    Demo(demo::Options),
    Kernels(kernels::Options),
    E2e(e2e::Options),
    Bench(bench::Options),
    Image(image::Options),
    Manifests(manifests::Options),
    Crds(crds::Options),
    Lint(lint::Options),
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let result = workspace::find().and_then(|()| run(command));
    if let Err(error) = result {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Setup(options) => setup::run(&options),
        Command::Build(options) => build::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Kernels(options) => kernels::run(&options),
        Command::E2e(options) => e2e::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Image(options) => image::run(&options),
        Command::Manifests(options) => manifests::run(&options),
        Command::Crds(options) => crds::run(&options),
        Command::Lint(options) => lint::run(&options),
    }
}
