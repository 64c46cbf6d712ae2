//! `cargo xtask fuzz`: feeds random inputs to the agent's parsers.
//!
//! The targets are in `fuzz/`, in the layout of `cargo fuzz`, which needs a nightly compiler.
//! Here the stable compiler builds them: the flags that count the branches that an input reaches are stable.
//! A sanitizer would find only errors that safe Rust excludes.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{build, process, setup, workspace};

/// The targets, each a file of `fuzz/fuzz_targets/` and a directory of `fuzz/seeds/`.
const TARGETS: [&str; 8] = [
    "frame",
    "question",
    "answer",
    "chain",
    "fragments",
    "in_kernel",
    "policy",
    "stream",
];

/// The compiler flags of `cargo fuzz`, without the sanitizer.
const FLAGS: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg=fuzzing",
];

/// Longest input in bytes, and longest time for one in seconds.
const LIMITS: [&str; 2] = ["-max_len=4096", "-timeout=10"];

/// Searches for messages and frames that make the agent panic or return a wrong result.
///
/// Inputs that reach new branches are kept in target/fuzz/corpus, where the next run continues. Inputs that
/// fail are written to target/fuzz/failures.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// frame, question, answer, chain, fragments, `in_kernel`, policy or stream; without it, all of them one
    /// after the other
    target: Option<String>,
    /// How long each target runs
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::ensure(setup::Purpose::Test)?;
    build::ebpf(build::Warnings::Show)?;
    let chosen: Vec<&str> = match &options.target {
        None => TARGETS.to_vec(),
        Some(name) => match TARGETS.iter().find(|target| *target == name) {
            Some(target) => vec![target],
            None => bail!("no target {name}: there are {}", TARGETS.join(", ")),
        },
    };
    each(&chosen, options.seconds)
}

/// Runs every target for a short time, as part of the tests.
pub(crate) fn briefly() -> Result<()> {
    const SECONDS: u32 = 10;
    each(&TARGETS, SECONDS)
}

fn each(targets: &[&str], seconds: u32) -> Result<()> {
    let built = compile()?;
    for target in targets {
        let mut directories = Vec::new();
        for kind in ["corpus", "failures"] {
            let directory = workspace::target().join("fuzz").join(kind).join(target);
            fs::create_dir_all(&directory)
                .with_context(|| format!("cannot create {}", directory.display()))?;
            directories.push(directory);
        }
        let [corpus, failures] = directories.as_slice() else {
            bail!("two directories were created");
        };
        let mut command = Command::new(built.join(target));
        command
            .args(LIMITS)
            .args(["-verbosity=0", "-print_final_stats=1"])
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-artifact_prefix={}/", failures.display()))
            .arg(corpus)
            .arg(workspace::root().join("fuzz/seeds").join(target));
        println!("fuzzing {target} for {seconds} s");
        // libFuzzer's progress is for its developers; print only the number of inputs.
        let output = command
            .output()
            .with_context(|| format!("cannot run {}", built.join(target).display()))?;
        let log = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            bail!(
                "{log}\nfuzzing {target} found a failure; the input is in {}: pass the file to {} \
                 to reproduce it",
                failures.display(),
                built.join(target).display()
            );
        }
        let tried = log
            .lines()
            .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
            .context("libFuzzer does not report the number of inputs")?;
        println!("{} inputs, no failure", tried.trim());
    }
    Ok(())
}

/// Builds the targets; returns their directory.
fn compile() -> Result<PathBuf> {
    let version = process::output(Command::new("rustc").arg("-vV"))?;
    let host = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .context("rustc does not report its host target")?;
    let directory = workspace::target().join("fuzz");
    let mut command = process::cargo();
    command
        .args(["build", "--release", "--locked", "--manifest-path"])
        .arg(workspace::root().join("fuzz/Cargo.toml"))
        // Named explicitly, so that build scripts are built without these flags.
        .args(["--target", host, "--target-dir"])
        .arg(&directory)
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));
    process::run(&mut command)?;
    Ok(directory.join(host).join("release"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_source_and_seeds() {
        let fuzz = workspace::root().join("fuzz");
        for target in TARGETS {
            assert!(fuzz.join(format!("fuzz_targets/{target}.rs")).exists());
            let seeds = fs::read_dir(fuzz.join("seeds").join(target)).expect("seeds");
            assert!(seeds.count() > 0, "{target}");
        }
        let sources = fs::read_dir(fuzz.join("fuzz_targets")).expect("targets");
        assert_eq!(sources.count(), TARGETS.len());
    }
}
