//! `cargo xtask kernels`: runs the agent on other kernels than this machine's.
//!
//! Each kernel boots in a virtual machine, from a file system with little more than the
//! agent. Its first process, `init.sh`, creates a pod and checks what the pod can reach. Its
//! output on the serial console decides whether the agent passes.

mod archive;
mod contents;
mod machine;
mod modules;
mod package;

use std::env;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::build::{self, Warnings};
use crate::process;
use crate::setup::{self, Program, Purpose};
use crate::workspace;
use machine::Machine;
use package::{Kernel, Series};

/// The programs that this command needs besides those of `cargo xtask setup`.
const PROGRAMS: [Program; 3] = [
    Program {
        name: "qemu-system-x86_64",
        packages: &["qemu-system-x86"],
        purpose: "machines for other kernels",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "busybox",
        packages: &["busybox-static"],
        purpose: "programs inside them",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "xz",
        packages: &["xz-utils"],
        purpose: "unpacking kernel modules",
        needed_for: Purpose::Test,
        services: &[],
    },
];

/// The system tests that run in the machine: those that depend most on the kernel. `init.sh` selects their
/// modules.
const TESTS: &str = "packets";

/// The first series with tcx; below it, programs are attached as clsact filters.
const TCX: Series = Series::new(6, 6);

/// Boots the agent on other kernels, in emulated machines, and checks that it enforces there.
///
/// The kernels are Debian's, fetched with apt into target/kernels and not installed: on Debian 12,
/// 6.1 (where programs are attached as clsact filters) and 6.12 (through tcx). Each needs two minutes and has
/// a limit of ten. `cargo xtask test` does not include this. Root is needed only to install
/// qemu and busybox if they are missing.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Uses the newest kernel of this series, such as 6.1; may be given several times; without
    /// it, every series that apt offers
    #[arg(long = "kernel", value_name = "SERIES", num_args = 1..)]
    kernels: Vec<Series>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if env::consts::ARCH != "x86_64" {
        bail!("only kernels for x86-64 can be booted, and this machine has another architecture");
    }
    setup::ensure(Purpose::Test)?;
    setup::programs(&PROGRAMS)?;
    let series = if options.kernels.is_empty() {
        package::offered()?
    } else {
        options.kernels.clone()
    };
    build::ebpf(Warnings::Show)?;
    build::agent(false)?;

    let cache = workspace::root().join("target/kernels");
    fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let tests = tests(&cache)?;
    let mut failed = Vec::new();
    for series in series {
        let result =
            package::newest(series, &cache).and_then(|kernel| try_on(&kernel, &tests, &cache));
        match result {
            Ok(checks) => println!("kernel {series}: all {checks} checks passed"),
            Err(error) => {
                eprintln!("kernel {series}: {error:#}");
                failed.push(series.to_string());
            }
        }
    }
    if !failed.is_empty() {
        bail!("the agent does not pass on kernel {}", failed.join(", "));
    }
    Ok(())
}

/// Builds the tests and strips the program, because its symbols would fill the machine's memory.
fn tests(directory: &Path) -> Result<PathBuf> {
    let stripped = directory.join(TESTS);
    let program = build::tests(TESTS)?;
    process::run(Command::new("strip").arg("-o").args([&stripped, &program]))?;
    Ok(stripped)
}

/// Boots the agent on a kernel. Returns the number of checks, all of which have passed.
fn try_on(kernel: &Kernel, tests: &Path, directory: &Path) -> Result<usize> {
    let attach = if kernel.series < TCX { "clsact" } else { "tcx" };
    println!(
        "booting {}, where programs are attached through {attach}",
        kernel.release
    );
    let initramfs = Temporary(directory.join(format!("{}.cpio", kernel.series)));
    fs::write(&initramfs.0, contents::archive(kernel, tests)?)
        .with_context(|| format!("cannot write {}", initramfs.0.display()))?;
    let settings = format!("EXPECT_ATTACH={attach}");
    let machine = Machine::boot(&kernel.image(), &initramfs.0, &settings)?;

    let log = directory.join(format!("{}.log", kernel.series));
    follow(machine, &log).with_context(|| format!("its console is in {}", log.display()))
}

/// A file that is removed on drop; if this process is killed, the next run overwrites the file.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // The file may never have been written.
        let _ = fs::remove_file(&self.0);
    }
}

/// Shows the machine's console and writes it to `log`, until the machine is switched off.
fn follow(mut machine: Machine, log: &Path) -> Result<usize> {
    let mut file = File::create(log).context("cannot write the log")?;
    let mut outcome = Outcome::default();
    while let Some(line) = machine.line()? {
        println!("  {line}");
        writeln!(file, "{line}").context("cannot write the log")?;
        outcome.add(&line);
    }
    outcome.judge()
}

/// The result of a console's lines.
#[derive(Default)]
struct Outcome {
    ok: usize,
    failed: usize,
    /// The number of checks in the machine's last line.
    finished: Option<usize>,
}

impl Outcome {
    fn add(&mut self, line: &str) {
        match line.split_once(' ') {
            Some(("ok", _)) => self.ok += 1,
            Some(("FAILED", _)) => self.failed += 1,
            Some(("finished", count)) => self.finished = count.parse().ok(),
            _ => {}
        }
    }

    /// The number of checks, if all of them were made and passed.
    fn judge(&self) -> Result<usize> {
        let Self {
            ok,
            failed,
            finished,
        } = *self;
        match finished {
            None => bail!("the machine ended after {} checks", ok + failed),
            Some(0) => bail!("the machine made no checks"),
            Some(count) if ok == count => Ok(count),
            Some(count) => bail!(
                "{} of {count} checks did not pass",
                count.saturating_sub(ok)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(console: &str) -> Result<usize> {
        let mut outcome = Outcome::default();
        console.lines().for_each(|line| outcome.add(line));
        outcome.judge()
    }

    #[test]
    fn every_check_must_pass() {
        assert_eq!(
            judged("noise\nok      a\nok      b\nfinished 2").expect("passed"),
            2
        );
        for (console, reason) in [
            ("", "the machine ended after 0 checks"),
            ("ok      a\nFAILED  b", "the machine ended after 2 checks"),
            (
                "ok      a\nFAILED  b\nfinished 2",
                "1 of 2 checks did not pass",
            ),
            ("ok      a\nfinished 2", "1 of 2 checks did not pass"),
            ("finished 0", "the machine made no checks"),
        ] {
            let error = judged(console).expect_err(reason);
            assert_eq!(error.to_string(), reason);
        }
    }
}
