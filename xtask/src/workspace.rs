//! Where things are in the workspace.

use std::env;
use std::path::{Path, PathBuf};

/// The workspace's top directory.
pub(crate) fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// Where cargo puts what it builds for the host; `CARGO_TARGET_DIR` moves it.
pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// What everything of the eBPF toolchain that is not the user's goes into.
pub(crate) fn tools() -> PathBuf {
    root().join("target/tools")
}

/// The finished eBPF object, which `egress-agent/build.rs` embeds.
pub(crate) fn ebpf_object() -> PathBuf {
    root().join("target/ebpf/egress-ebpf")
}

/// Where Kubernetes' own programs of this version are, which are not cargo's to clean up.
pub(crate) fn kubernetes(version: &str) -> PathBuf {
    root().join("target/kubernetes").join(version)
}

/// The release binary of the agent.
pub(crate) fn agent() -> PathBuf {
    target().join("release/egress-agent")
}
