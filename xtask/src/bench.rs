//! `cargo xtask bench`: measures the costs of the agent on this machine.

use anyhow::{Context as _, Result};

use crate::build::{self, Warnings};
use crate::{process, setup, workspace};

/// Measures the cost of enforcement against the same work without it, and prints tables
/// (docs/performance.md).
///
/// Other programs that run at the same time distort the numbers, the ratios least.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Runs only this benchmark: changes, cluster, policies, services, reports, dns, neighbour, tcp, connections,
    /// datapath, throughput or memory
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
