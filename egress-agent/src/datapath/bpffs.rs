//! The BPF file system of the pins.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{FsType, statfs},
};

/// `BPF_FS_MAGIC`, `include/uapi/linux/magic.h`.
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

/// Ensures that `path` is a BPF file system: mounts one if it is an ordinary directory.
///
/// # Errors
///
/// When the path cannot be created or mounted; the message names the command that would do it.
pub fn mount_if_missing(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).with_context(|| {
        format!(
            "cannot create {}, where bpffs is to be mounted",
            path.display()
        )
    })?;
    if is_bpffs(path)? {
        return Ok(());
    }
    let how = format!("mount -t bpf bpf {}", path.display());
    if let Err(error) = mount(
        Some("bpf"),
        path,
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    ) {
        bail!(
            "{} is not a BPF file system and cannot be mounted ({error}): run `{how}` as root, or \
             in a container mount the host's /sys/fs/bpf with mountPropagation: Bidirectional",
            path.display()
        );
    }
    tracing::info!(path = %path.display(), "bpffs was not mounted; mounted it");
    Ok(())
}

/// Whether `path` is on a BPF file system.
pub(super) fn is_bpffs(path: &Path) -> Result<bool> {
    let found = statfs(path)
        .with_context(|| format!("cannot read the file system of {}", path.display()))?;
    Ok(found.filesystem_type() == BPF_FS_MAGIC)
}
