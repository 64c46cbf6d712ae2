//! `cargo xtask demo`: shows allowed and denied pods on this machine, step by step.
//!
//! The demonstration itself is an example of the tests' laboratory, because it needs root and this
//! program does not.

use anyhow::{Context as _, Result};

use crate::build::{self, Warnings};
use crate::{process, setup, workspace};

/// Creates a small internet, two pods and an agent, and shows what each pod can reach.
///
/// Every step is checked: the command fails if one has another result than announced.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Leaves everything running at the end, and says how to use it
    #[arg(long)]
    keep: bool,
    /// Removes what a killed demonstration has left behind
    #[arg(long, conflicts_with = "keep")]
    remove: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let Options { keep, remove } = options;
    // Checked before anything takes minutes.
    let runner = process::root_runner()?;
    setup::ensure(setup::Purpose::Demo)?;
    build::ebpf(Warnings::Show)?;
    // It shares its dependencies with the demonstration: an optimised agent would be built from nothing.
    build::agent(true)?;
    let mut command = process::cargo();
    command.args([
        "run",
        "--quiet",
        "--package",
        "egress-tests",
        "--example",
        "demo",
        "--locked",
    ]);
    command.args(runner);
    command.env("EGRESS_AGENT", workspace::debug_agent());
    command.arg("--");
    command
        .args(keep.then_some("--keep"))
        .args(remove.then_some("--remove"));
    process::run(&mut command).context("demonstration")
}
