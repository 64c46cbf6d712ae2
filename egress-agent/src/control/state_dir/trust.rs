//! `existingConnections: trust`: once on each node, an agent keeps the connections that pods have opened before they
//! were enforced.
//!
//! A file on the node records that it was used. It is written before anything is trusted, so that no second start,
//! after a crash or a reboot, trusts what pods have opened since.

use std::{
    fmt,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::{Context as _, Result, bail};
use nix::sys::statfs::{FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, fstatfs};

use crate::{
    config::{Config, ExistingConnections},
    report::rfc3339,
};

/// The file in `stateDir`.
const USED: &str = "existing-connections-trusted";
/// Bytes of it that are read.
const READ: usize = 256;

/// `RAMFS_MAGIC`, `include/uapi/linux/magic.h`.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// Whether this agent trusts the connections that pods have opened before they were enforced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::control) enum Trust {
    /// The operator wants this instead.
    Unwanted(&'static str),
    /// An agent of this node has used it; the text is its note.
    Used(String),
    /// The note could not be made; the text says why.
    Unnoted(String),
    /// The agent trusts them, for the pods that it finds at its start. This is the note.
    Given(PathBuf),
}

impl Trust {
    /// Decides whether this agent may trust them, and notes on the node that it does.
    pub(in crate::control) fn claim(config: &Config) -> Self {
        match config.existing_connections {
            ExistingConnections::Judge => return Self::Unwanted("judge"),
            ExistingConnections::End => return Self::Unwanted("end"),
            ExistingConnections::Trust => {}
        }
        let path = config.state_dir.join(USED);
        let trust = match note(&config.state_dir, &path, &config.node) {
            Ok(true) => Self::Given(path),
            Ok(false) => Self::Used(read(&path)),
            Err(error) => Self::Unnoted(format!("{error:#}")),
        };
        match &trust {
            Self::Given(path) => tracing::warn!(
                note = %path.display(),
                "existingConnections: trust: connections that pods have open now are kept, this once; \
                 set it to judge when every node has its agent"
            ),
            Self::Unnoted(why) => tracing::error!(
                %why,
                "existingConnections: trust is not used, open connections are judged: it cannot be \
                 noted on this node that it was used"
            ),
            _ => tracing::info!(why = %trust, "open connections are judged"),
        }
        trust
    }

    /// Whether the outbound connections of pods that are found now are kept.
    pub(in crate::control) fn is_given(&self) -> bool {
        matches!(self, Self::Given(_))
    }
}

impl fmt::Display for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unwanted(but) => write!(f, "existingConnections: {but}"),
            Self::Used(when) => write!(
                f,
                "existingConnections: trust was used on this node before: {when}"
            ),
            Self::Unnoted(why) => write!(
                f,
                "existingConnections: trust cannot be noted on this node: {why}"
            ),
            Self::Given(path) => {
                write!(f, "existingConnections: trust, noted in {}", path.display())
            }
        }
    }
}

/// Makes the note; returns whether there was none.
fn note(directory: &Path, path: &Path, node: &str) -> Result<bool> {
    let made = DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory);
    made.with_context(|| format!("cannot create stateDir, {}", directory.display()))?;
    let opened = File::open(directory);
    let opened =
        opened.with_context(|| format!("cannot open stateDir, {}", directory.display()))?;
    let on = fstatfs(&opened)
        .with_context(|| format!("cannot look at stateDir, {}", directory.display()))?
        .filesystem_type();
    for (kind, name) in [
        (TMPFS_MAGIC, "tmpfs"),
        (RAMFS_MAGIC, "ramfs"),
        (OVERLAYFS_SUPER_MAGIC, "overlay"),
    ] {
        if on == kind {
            bail!(
                "stateDir, {}, is on a file system of the kind {name}, which a reboot or the \
                 container's end may empty: name a directory on a disk of the node",
                directory.display()
            );
        }
    }
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let mut file = match file {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot create {}", path.display()));
        }
    };
    let now = rfc3339(SystemTime::now()).unwrap_or_else(|error| error.to_string());
    let written = writeln!(file, "{now}, node {node}")
        .and_then(|()| file.sync_all())
        .and_then(|()| opened.sync_all());
    written.with_context(|| format!("cannot write {}", path.display()))?;
    Ok(true)
}

/// What the note says.
fn read(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(bytes.get(..READ).unwrap_or(&bytes)).into_owned();
    let line = text.lines().next().unwrap_or_default();
    let line: String = line.chars().filter(|c| !c.is_control()).collect();
    if line.is_empty() {
        return format!("says {}", path.display());
    }
    format!("{line}, says {}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(directory: &Path) -> Config {
        Config::from_yaml(&format!(
            "node: n1\nexistingConnections: trust\nstateDir: {}\n",
            directory.display()
        ))
        .expect("a configuration")
    }

    #[test]
    fn trust_is_given_once_on_a_node() {
        // Cargo runs tests in the directory of their package, which is on a disk.
        let package = std::env::current_dir().expect("a current directory");
        let directory = tempfile::tempdir_in(package).expect("a directory");
        let config = config(&directory.path().join("below/it"));
        assert!(Trust::claim(&config).is_given());
        let again = Trust::claim(&config);
        assert!(
            matches!(&again, Trust::Used(when) if when.contains("node n1")),
            "{again:?}"
        );
    }

    #[test]
    fn no_trust_is_given_where_the_note_would_not_survive_a_reboot() {
        let trust = Trust::claim(&config(Path::new("/dev/shm/egress-agent-test")));
        let _ = fs::remove_dir("/dev/shm/egress-agent-test");
        assert!(
            matches!(&trust, Trust::Unnoted(why) if why.contains("tmpfs")),
            "{trust:?}"
        );
    }

    #[test]
    fn no_trust_is_given_where_the_note_cannot_be_written() {
        let trust = Trust::claim(&config(Path::new("/proc/egress-agent")));
        assert!(
            matches!(&trust, Trust::Unnoted(why) if why.contains("stateDir")),
            "{trust:?}"
        );
    }
}
