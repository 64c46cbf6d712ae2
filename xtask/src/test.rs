//! `cargo xtask test`: everything, from set-up to the system tests.

use anyhow::{Context as _, Result};

use crate::build::Warnings;
use crate::leftovers::Inventory;
use crate::{build, fuzz, lint, process, setup, workspace};

/// How many system tests run at once: each has namespaces and an agent of its own, and mostly
/// waits for the network.
const SYSTEM_THREADS: &str = "4";

/// Sets up, builds, lints, and runs every test; with a flag, only what it names.
///
/// The kernel and system tests load programs into the kernel and make network namespaces: they
/// are run as root, through sudo when necessary.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Runs only the unit tests, and the fuzz targets for a moment; they need no root
    #[arg(long)]
    unit: bool,
    /// Runs only the kernel and system tests
    #[arg(long)]
    system: bool,
    /// Runs only tests whose name contains this
    #[arg(long, value_name = "NAME")]
    filter: Option<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let Options {
        unit,
        system,
        filter,
    } = options;
    let all = !unit && !system;
    setup::ensure()?;
    if all && filter.is_none() {
        lint::run(&lint::Options {})?;
    } else {
        build::ebpf(Warnings::Show)?;
    }
    if all || *unit {
        unit_tests(filter.as_deref())?;
        if filter.is_none() {
            fuzz::briefly()?;
        }
    }
    if all || *system {
        // The tests drive the binary that users get.
        build::agent(false)?;
        system_tests(filter.as_deref())?;
    }
    Ok(())
}

fn unit_tests(filter: Option<&str>) -> Result<()> {
    let mut command = process::cargo();
    command.args(["test", "--workspace", "--locked"]);
    command.args(["--exclude", "egress-ebpf", "--exclude", "egress-tests"]);
    command.arg("--").args(filter);
    process::run(&mut command).context("unit tests")
}

fn system_tests(filter: Option<&str>) -> Result<()> {
    let before = Inventory::take()?;
    let mut command = process::cargo();
    command.args([
        "test",
        "--package",
        "egress-tests",
        "--locked",
        "--no-fail-fast",
    ]);
    command.args(process::root_runner()?);
    command.env("EGRESS_AGENT", workspace::agent());
    command
        .args(["--", "--test-threads", SYSTEM_THREADS])
        .args(filter);
    process::run(&mut command).context("kernel and system tests")?;
    before.compare()
}
