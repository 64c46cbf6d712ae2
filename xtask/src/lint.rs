//! `cargo xtask lint`: formatting, the structure of the sources, licences, clippy.
//!
//! Clippy sees the eBPF crate too, compiled for the host: its own compiler has no clippy that
//! understands the prebuilt core, and what clippy looks at is the same for both targets. The
//! warnings of the eBPF compiler itself are errors when the object is built here.

mod code;
mod portable;
mod structure;

use std::env;

use anyhow::{Result, bail};

use crate::build::{self, Warnings};
use crate::{manifests, process, workspace};

/// Checks formatting, structure and licences, compiles what is portable for other systems, and runs
/// clippy; every warning is an error.
#[derive(clap::Args)]
pub(crate) struct Options {}

pub(crate) fn run(_: &Options) -> Result<()> {
    structure::run()?;
    manifests::check()?;
    process::run(process::cargo().args(["fmt", "--all", "--check"]))?;
    // A workspace of its own.
    let fuzz = ["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"];
    process::run(process::cargo().args(fuzz))?;
    deny()?;
    build::ebpf(Warnings::Deny)?;
    portable::check()?;
    clippy()
}

fn clippy() -> Result<()> {
    let mut host = process::cargo();
    host.args([
        "clippy",
        "--workspace",
        "--exclude",
        "egress-ebpf",
        "--all-targets",
        "--locked",
    ]);
    process::run(host.args(["--", "-Dwarnings"]))?;

    let mut ebpf = process::cargo();
    ebpf.args([
        "clippy",
        "--package",
        "egress-ebpf",
        "--locked",
        "--",
        "-Dwarnings",
    ]);
    let flags = format!(
        "-Cpanic=abort\x1f--cfg=bpf_target_arch=\"{}\"",
        env::consts::ARCH
    );
    ebpf.env("CARGO_ENCODED_RUSTFLAGS", flags);
    // Its flags are its own, so the host's builds would be thrown away in a shared directory.
    ebpf.env(
        "CARGO_TARGET_DIR",
        workspace::root().join("target/ebpf-clippy"),
    );
    process::run(&mut ebpf)
}

/// Checks the dependencies against deny.toml. Only the advisories need more than the registry.
fn deny() -> Result<()> {
    let deny = || {
        let mut command = process::cargo();
        command.args(["deny", "--workspace", "--locked", "--log-level", "error"]);
        command
    };
    if !process::succeeds(process::cargo().args(["deny", "--version"])) {
        bail!("cargo-deny is missing: run `cargo xtask setup`");
    }
    process::run(deny().args(["check", "bans", "licenses", "sources"]))?;

    if process::succeeds(deny().args(["fetch", "db"])) {
        process::run(deny().args(["check", "advisories"]))
    } else {
        println!(
            "NOT CHECKED: security advisories, because their database cannot be fetched from here"
        );
        Ok(())
    }
}
