//! `cargo xtask lint`: checks formatting, the structure of the sources, links of documents, licences, and runs clippy.
//!
//! Clippy also checks the eBPF crate, compiled for the host: the eBPF compiler has no clippy that accepts the
//! prebuilt core, and clippy's results are the same for both targets. Warnings of the eBPF compiler itself
//! are errors when the object is built here.

mod code;
mod links;
mod portable;
mod structure;

use std::env;

use anyhow::{Result, bail};

use crate::build::{self, Warnings};
use crate::{manifests, process, workspace};

/// Checks formatting, structure, links and licences, compiles the portable crates for other systems, and runs
/// clippy; every warning is an error.
#[derive(clap::Args)]
pub(crate) struct Options {}

pub(crate) fn run(_: &Options) -> Result<()> {
    structure::run()?;
    links::check()?;
    manifests::check()?;
    process::run(process::cargo().args(["fmt", "--all", "--check"]))?;
    // fuzz/ is a workspace of its own.
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
    // Its flags differ, so a shared directory would discard the host's builds.
    ebpf.env(
        "CARGO_TARGET_DIR",
        workspace::root().join("target/ebpf-clippy"),
    );
    process::run(&mut ebpf)
}

/// Checks the dependencies against deny.toml. Only the advisories need their database besides the registry.
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
