//! Paths in the workspace.
//!
//! The workspace is found at run time. The compiler's `env!` would name the directory where this program was
//! first built. A moved or copied checkout has that program in its target directory, and it would then build
//! in the old directory.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context as _, Result};

/// Files in the workspace's top directory, and in no directory below it.
const MARKS: [&str; 2] = ["Cargo.lock", "xtask/Cargo.toml"];

static ROOT: OnceLock<PathBuf> = OnceLock::new();

/// Finds the workspace: from the package that `cargo run` has started, otherwise from the current directory.
///
/// # Errors
///
/// Fails outside the workspace.
pub(crate) fn find() -> Result<()> {
    let here = env::current_dir().context("there is no current directory")?;
    let package = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let found = package.as_deref().and_then(above).or_else(|| above(&here));
    let found = found.with_context(|| {
        format!(
            "neither {} nor a directory above it is the workspace of egress-agent: run `cargo xtask` \
             in it",
            here.display()
        )
    })?;
    ROOT.get_or_init(|| found.to_owned());
    Ok(())
}

/// The first directory from this one upwards that is the workspace's top directory.
fn above(directory: &Path) -> Option<&Path> {
    let is_root = |directory: &&Path| MARKS.iter().all(|mark| directory.join(mark).is_file());
    directory.ancestors().find(is_root)
}

/// The workspace's top directory. Call [`find`] first; in a unit test this calls it.
pub(crate) fn root() -> &'static Path {
    if ROOT.get().is_none() {
        let found = find();
        assert!(found.is_ok(), "{found:?}");
    }
    ROOT.get().map_or(Path::new("."), PathBuf::as_path)
}

/// Cargo's directory for the host's builds; `CARGO_TARGET_DIR` moves it.
pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// The directory for the project's own tools of the eBPF toolchain.
pub(crate) fn tools() -> PathBuf {
    root().join("target/tools")
}

/// The finished eBPF object, which `egress-agent/build.rs` embeds.
pub(crate) fn ebpf_object() -> PathBuf {
    root().join("target/ebpf/egress-ebpf")
}

/// The directory for Kubernetes' programs of this version, which cargo does not manage.
pub(crate) fn kubernetes(version: &str) -> PathBuf {
    root().join("target/kubernetes").join(version)
}

/// The release binary of the agent.
pub(crate) fn agent() -> PathBuf {
    target().join("release/egress-agent")
}

/// The agent built without optimisation, with the dependencies that the tests are built with.
pub(crate) fn debug_agent() -> PathBuf {
    target().join("debug/egress-agent")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_is_found_from_any_directory_in_it() {
        let own = root();
        assert_eq!(above(own), Some(own));
        assert_eq!(above(&own.join("xtask/src/kernels")), Some(own));
        assert_eq!(above(Path::new("/proc")), None);
    }

    #[test]
    fn a_copy_of_the_workspace_is_a_workspace_of_its_own() {
        let copy = env::temp_dir().join(format!("egress-workspace-{}", std::process::id()));
        std::fs::create_dir_all(copy.join("xtask/src")).unwrap();
        for mark in MARKS {
            std::fs::write(copy.join(mark), "").unwrap();
        }
        let found = above(&copy.join("xtask/src")).map(Path::to_owned);
        std::fs::remove_dir_all(&copy).unwrap();
        assert_eq!(found, Some(copy));
    }
}
