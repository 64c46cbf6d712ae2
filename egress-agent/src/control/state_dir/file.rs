//! Files in `stateDir` that one agent writes for the next one.
//!
//! They are written whole or not at all, and only root can read them. A reboot ends the kernel's state, and what
//! these files say about it, so nothing is flushed to the disk.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use serde::{Serialize, de::DeserializeOwned};

/// Most bytes that are read. The saved state of a full node's pods takes about one MiB.
const READ: u64 = 64 << 20;

/// The file's content, or `None` without a file.
///
/// # Errors
///
/// When it cannot be read, or is not what an agent writes.
pub(in crate::control) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let text = match fs::metadata(path) {
        Ok(metadata) if metadata.len() > READ => {
            bail!("{} is longer than {READ} bytes", path.display())
        }
        Ok(_) => fs::read(path).with_context(|| format!("cannot read {}", path.display()))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .with_context(|| format!("{} was not written by an agent", path.display()))
}

/// Writes the file, and its directory if that is missing.
///
/// # Errors
///
/// When it cannot be written; an earlier file is then still there.
pub(in crate::control) fn write(path: &Path, content: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec(content).context("the state cannot be written as JSON")?;
    if let Some(directory) = path.parent() {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory);
        made.with_context(|| format!("cannot create {}", directory.display()))?;
    }
    replace(path, &text).with_context(|| format!("cannot write {}", path.display()))
}

fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    gone(fs::remove_file(&new))?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(text)?;
    fs::rename(new, path)
}

/// Removes the file, if it is there.
///
/// # Errors
///
/// When it cannot be removed.
pub(in crate::control) fn remove(path: &Path) -> Result<()> {
    gone(fs::remove_file(path)).with_context(|| format!("cannot remove {}", path.display()))
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
