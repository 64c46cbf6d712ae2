//! The agent's program; everything is in the library.

use std::process::ExitCode;

use clap::Parser as _;
use egress_agent::cli::Cli;

fn main() -> ExitCode {
    Cli::parse().run()
}
