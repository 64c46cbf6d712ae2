//! Copies the eBPF object to where the agent's sources embed it from.
//!
//! The object is built by `cargo xtask build`, with another compiler and for another target than
//! the agent, so this script does not build it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Names an object to embed in place of the one in the workspace's target directory.
const OBJECT_VARIABLE: &str = "EGRESS_EBPF_OBJECT";

fn main() -> ExitCode {
    println!("cargo::rerun-if-env-changed={OBJECT_VARIABLE}");
    // As cargo says it now: the script may have been compiled before the workspace was moved.
    let package = env::var_os("CARGO_MANIFEST_DIR").map_or_else(PathBuf::new, PathBuf::from);
    // Relative to the package: cargo remembers it, and a copied workspace has to look at its own object.
    let named = env::var_os(OBJECT_VARIABLE).unwrap_or_else(|| "../target/ebpf/egress-ebpf".into());
    println!("cargo::rerun-if-changed={}", Path::new(&named).display());
    let object = package.join(named);

    let Some(directory) = env::var_os("OUT_DIR") else {
        println!("cargo::error=OUT_DIR is not set: this script is to be run by cargo");
        return ExitCode::FAILURE;
    };
    if let Err(error) = fs::copy(&object, Path::new(&directory).join("egress-ebpf")) {
        let object = object.display();
        println!(
            "cargo::error=the eBPF object {object} is missing ({error}): run `cargo xtask build`"
        );
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
