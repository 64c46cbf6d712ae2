//! `cargo xtask bench`: how much the agent costs, measured on this machine.

use anyhow::{Context as _, Result};

use crate::build::{self, Warnings};
use crate::{process, setup, workspace};

/// Measures what enforcing costs beside not enforcing, and prints tables (docs/performance.md).
///
/// Programs that run at the same time blur the numbers; ratios suffer least.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Runs only this benchmark: changes, cluster, dns, neighbour, tcp, datapath, throughput or memory
    name: Option<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let Options { name } = options;
    setup::ensure(setup::Purpose::Test)?;
    build::ebpf(Warnings::Show)?;
    build::agent(false)?;
    let mut command = process::cargo();
    command.args(["bench", "--package", "egress-tests", "--locked"]);
    match name {
        Some(name) => command.args(["--bench", name]),
        None => command.arg("--benches"),
    };
    command.args(process::root_runner()?);
    command.env("EGRESS_AGENT", workspace::agent());
    process::run(&mut command).context("benchmarks")
}
