//! Compiles the portable crates for the systems other than Linux that are to run them.
//!
//! `cargo check` needs a target's standard library and no linker. If rustup has installed the library,
//! it is used. Otherwise cargo compiles it from its sources, with the compiler that builds the eBPF
//! object.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::toolchain::Compiler;
use crate::{process, workspace};

/// The crates without code for Linux only.
const CRATES: [&str; 4] = ["egress-dns", "egress-policy", "egress-api", "egress-import"];

/// The operating systems of laptops.
const TARGETS: [&str; 2] = ["x86_64-pc-windows-gnu", "aarch64-apple-darwin"];

/// Checks that [`CRATES`] compile for [`TARGETS`].
pub(super) fn check() -> Result<()> {
    for target in TARGETS {
        let mut command = if has_library(target) {
            process::cargo()
        } else {
            Compiler::with_library_sources()?.cargo_with_library()
        };
        command.args(["check", "--locked", "--target", target]);
        for name in CRATES {
            command.args(["--package", name]);
        }
        command.env(
            "CARGO_TARGET_DIR",
            workspace::root().join("target/portable"),
        );
        process::long(&mut command, &format!("checking for {target}"))
            .with_context(|| format!("{} must compile for {target}", CRATES.join(" and ")))?;
    }
    Ok(())
}

/// Whether the workspace's own compiler has the standard library of this target.
fn has_library(target: &str) -> bool {
    let mut rustc = Command::new("rustc");
    rustc.args(["--print", "target-libdir", "--target", target]);
    process::output(&mut rustc).is_ok_and(|path| Path::new(path.trim()).is_dir())
}
