//! `cargo xtask test`: runs everything, from the set-up to the system tests.

use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::build::Warnings;
use crate::leftovers::Inventory;
use crate::{build, fuzz, lint, process, setup, workspace};

/// How many system tests run at a time: each has namespaces and an agent of its own, and mostly
/// waits for the network.
const SYSTEM_THREADS: &str = "4";

/// The system tests that run a second time with filters on a clsact qdisc, as on kernels below 6.6: those
/// that depend on how programs are attached, and on what pods notice of it. The others start no agent, or
/// test decisions that do not depend on how the packets arrive.
///
/// Each is a folder of `tests/tests`, and the modules in it that run.
const UNDER_CLSACT: [(&str, &[&str]); 5] = [
    ("cluster", &["pods::", "status::"]),
    ("dns", &["names::", "over_tcp::"]),
    (
        "interfaces",
        &["attachment::", "bandwidth::", "quarantine::"],
    ),
    ("operation", &["lifecycle::", "takeover::"]),
    ("policy", &["entries::"]),
];

/// Makes the laboratory start every agent with `--attach clsact`, except in tests that choose themselves
/// (`tests/src/lab.rs`).
const ATTACH: (&str, &str) = ("EGRESS_TEST_ATTACH", "clsact");

/// The system tests that run a second time with `dns.learn: agent`, in the form of [`UNDER_CLSACT`].
const READ_BY_AGENT: [(&str, &[&str]); 2] = [
    (
        "dns",
        &[
            "answers::",
            "autopath::",
            "clients::",
            "guard::",
            "hostile_answers::",
            "internal_answers::",
            "lifetimes::",
            "names::",
            "real_resolvers::",
            "resolvers::",
        ],
    ),
    ("operation", &["restart_keeps_names::"]),
];

/// Makes the laboratory start every agent with `dns.learn: agent`, except in tests that choose themselves.
const LEARN: (&str, &str) = ("EGRESS_TEST_LEARN", "agent");

/// Sets up, builds, lints, and runs every test; with a flag, only the tests that it names.
///
/// The system tests that depend on how programs are attached are run with tcx and with clsact, and those of DNS
/// also with `dns.learn: agent`. The kernel and system tests load programs into the kernel and create network
/// namespaces: they run as root, through sudo if necessary.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Runs only the unit tests, and the fuzz targets for a short time; they need no root
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
    if all || *system {
        // Checked before anything takes minutes.
        process::root_runner().context(
            "the kernel and system tests need root; `cargo xtask test --unit` runs the others",
        )?;
    }
    setup::ensure(setup::Purpose::Test)?;
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
        // The tests use the program that users get.
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
    let filter = filter.as_slice();
    let mut failed = Vec::new();
    if let Err(error) = process::run(&mut laboratory(&[], filter)?) {
        failed.push(format!("{error:#}"));
    }
    let again = [
        ("under clsact", ATTACH, &UNDER_CLSACT[..]),
        ("with `dns.learn: agent`", LEARN, &READ_BY_AGENT[..]),
    ];
    for (how, (name, value), selected) in again {
        for (folder, modules) in selected {
            let tests = if filter.is_empty() { modules } else { filter };
            let mut tests = laboratory(&["--test", folder], tests)?;
            if let Err(error) = process::run(tests.env(name, value)) {
                failed.push(format!("{how}: {error:#}"));
            }
        }
    }
    before.compare()?;
    if !failed.is_empty() {
        bail!("kernel and system tests: {}", failed.join("; "));
    }
    Ok(())
}

/// The command that runs tests of the laboratory whose names contain one of `names`: those of the folders
/// that `folders` selects with cargo's `--test`, or all.
fn laboratory(folders: &[&str], names: &[&str]) -> Result<Command> {
    let mut command = process::cargo();
    command.args(["test", "--package", "egress-tests", "--locked"]);
    command.arg("--no-fail-fast").args(folders);
    command.args(process::root_runner()?);
    command.env("EGRESS_AGENT", workspace::agent());
    command
        .args(["--", "--test-threads", SYSTEM_THREADS])
        .args(names);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_module_that_runs_a_second_time_exists() {
        for (folder, modules) in UNDER_CLSACT.iter().chain(&READ_BY_AGENT) {
            for module in *modules {
                let file = module.replace("::", ".rs");
                let path = workspace::root()
                    .join("tests/tests")
                    .join(folder)
                    .join(file);
                assert!(path.is_file(), "{}", path.display());
            }
        }
    }
}
