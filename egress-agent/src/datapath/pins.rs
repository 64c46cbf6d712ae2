//! The pins, by which enforcement outlives the agent.
//!
//! ```text
//! <bpffs>/egress-agent/v2/            maps that all pods share, by name
//! <bpffs>/egress-agent/v2/links/      <ifindex>_from_pod, <ifindex>_to_pod
//! <bpffs>/egress-agent/v2/pods/       <namespace>_<pod>/allow, names, flows, inbound, opening
//! ```

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

use super::{Datapath, links, stamp_check};

/// Incremented when a pinned map changes its shape; an agent never touches another version's pins.
const VERSION: &str = "v2";

/// The directories of the pins.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    root: PathBuf,
}

impl Layout {
    pub(super) fn new(bpffs: &Path) -> Self {
        Self {
            root: bpffs.join("egress-agent").join(VERSION),
        }
    }

    pub(super) fn create(&self) -> Result<()> {
        for dir in [self.root.clone(), self.links(), self.pods()] {
            fs::create_dir_all(&dir)
                .with_context(|| format!("cannot create the pin directory {}", dir.display()))?;
        }
        Ok(())
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(super) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    pub(super) fn pods(&self) -> PathBuf {
        self.root.join("pods")
    }

    pub(super) fn pod(&self, namespace: &str, name: &str) -> PodPins {
        PodPins {
            dir: self
                .pods()
                .join(format!("{}_{}", escape(namespace), escape(name))),
        }
    }
}

/// Held while an agent uses the pins; a second agent on the same pins is refused.
#[must_use = "the lock is released when it is dropped"]
pub struct Lock(#[expect(dead_code, reason = "held, not read")] Flock<File>);

/// The result of an attempt to lock the pins.
pub enum TryLock {
    /// No other agent uses them.
    Locked(Lock),
    /// Another agent uses them.
    AnothersLock,
    /// They have been removed since this agent opened them.
    Gone,
}

impl TryLock {
    fn or_refuse(self, root: &Path) -> Result<Lock> {
        match self {
            Self::Locked(lock) => Ok(lock),
            Self::AnothersLock => bail!(
                "another egress-agent is running with the pins in {}; stop that one first, or start this one \
                 with --take-over to wait for its end",
                root.display()
            ),
            Self::Gone => bail!(
                "the pins in {} were removed just now; start again",
                root.display()
            ),
        }
    }
}

/// A directory, by its device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirectoryId(u64, u64);

impl Datapath {
    /// Ensures that no other agent uses the same pins.
    ///
    /// # Errors
    ///
    /// When another agent does.
    pub fn lock(&self) -> Result<Lock> {
        self.try_lock()?.or_refuse(&self.layout.root)
    }

    /// The same, for an agent that waits for the end of another one.
    ///
    /// # Errors
    ///
    /// When the pins cannot be locked.
    pub fn try_lock(&self) -> Result<TryLock> {
        Ok(match self.layout.try_lock()? {
            // The pins were removed, and a third agent may have created new ones.
            TryLock::Locked(_) if self.layout.identity()? != self.root => TryLock::Gone,
            tried => tried,
        })
    }
}

impl Layout {
    fn lock(&self) -> Result<Lock> {
        self.try_lock()?.or_refuse(&self.root)
    }

    /// Identifies the directory of the pins.
    pub(super) fn identity(&self) -> Result<DirectoryId> {
        let metadata = fs::metadata(&self.root)
            .with_context(|| format!("cannot read the inode of {}", self.root.display()))?;
        Ok(DirectoryId(metadata.dev(), metadata.ino()))
    }

    /// Waits until no other agent opens or removes the pins, which takes only a moment.
    pub(super) fn lock_top(&self) -> Result<Flock<File>> {
        let top = self.root.parent().context("the pins have no directory")?;
        let cannot = || format!("cannot lock {}", top.display());
        loop {
            fs::create_dir_all(top).with_context(cannot)?;
            let opened = match File::open(top) {
                Ok(opened) => opened,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).with_context(cannot),
            };
            let locked = Flock::lock(opened, FlockArg::LockExclusive);
            let locked = locked.map_err(|(_, error)| error).with_context(cannot)?;
            let is_there = fs::metadata(top)
                .and_then(|there| Ok(there.ino() == locked.metadata()?.ino()))
                .unwrap_or(false);
            if is_there {
                return Ok(locked);
            }
        }
    }

    fn try_lock(&self) -> Result<TryLock> {
        let locked = match File::open(&self.root) {
            Ok(dir) => Flock::lock(dir, FlockArg::LockExclusiveNonblock),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(TryLock::Gone),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot open {}", self.root.display()));
            }
        };
        let locked = match locked {
            Ok(locked) => locked,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(TryLock::AnothersLock),
            Err((_, error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", self.root.display()));
            }
        };
        // Another agent may have removed the directory between the two calls.
        let is_there = fs::metadata(&self.root)
            .and_then(|there| Ok(there.ino() == locked.metadata()?.ino()))
            .unwrap_or(false);
        Ok(if is_there {
            TryLock::Locked(Lock(locked))
        } else {
            TryLock::Gone
        })
    }
}

/// The pins of one pod.
#[derive(Clone, Debug)]
pub struct PodPins {
    dir: PathBuf,
}

impl PodPins {
    /// The directory of the pod's pins.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.dir)
            .with_context(|| format!("cannot create the pin directory {}", self.dir.display()))
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Pins a map, and replaces an earlier pin of the same name atomically.
    pub(super) fn replace(&self, name: &str, map: &aya::maps::MapData) -> Result<()> {
        self.create()?;
        let (path, new) = (self.path(name), self.path(&format!("{name}_new")));
        remove_if_there(&new)?;
        map.pin(&new)
            .with_context(|| format!("cannot pin {}", new.display()))?;
        fs::rename(&new, &path).with_context(|| format!("cannot move {}", path.display()))
    }

    /// Removes a pin, if there is one.
    pub(super) fn remove_one(&self, name: &str) -> Result<()> {
        remove_if_there(&self.path(name))
    }

    /// Removes all of the pod's pins.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => {
                Err(error).with_context(|| format!("cannot remove {}", self.dir.display()))
            }
        }
    }
}

/// Removes every pin, link and clsact filter that an agent of any version left under `bpffs`, and its tables
/// of nf_tables. Returns the number of interfaces that were detached; `None` if there was nothing at all.
/// `held` is the caller's own lock, if the caller is the agent.
///
/// # Errors
///
/// When a part cannot be removed.
pub fn cleanup(bpffs: &Path, held: Option<Lock>) -> Result<Option<usize>> {
    let top = bpffs.join("egress-agent");
    if !top.exists() {
        return Ok(stamp_check::remove()?.then_some(0));
    }
    let layout = Layout::new(bpffs);
    let _only = match held {
        None if layout.root.exists() => Some(layout.lock()?),
        held => held,
    };
    let _opening = layout.lock_top()?;
    // Remove the stamp check first, or it would drop frames once nothing stamps them.
    stamp_check::remove()?;
    let mut detached = 0;
    for version in fs::read_dir(&top).with_context(|| format!("cannot read {}", top.display()))? {
        let version = version?.path();
        detached += links::detach_all(&version.join("links"))?;
        fs::remove_dir_all(&version)
            .with_context(|| format!("cannot remove {}", version.display()))?;
    }
    fs::remove_dir(&top).with_context(|| format!("cannot remove {}", top.display()))?;
    Ok(Some(detached))
}

pub(super) fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot remove {}", path.display())),
    }
}

/// Converts a Kubernetes name to a bpffs name, reversibly: bpffs forbids dots (`bpf_lookup`,
/// kernel/bpf/inode.c), and `_` separates namespace and name. Every character except letters, digits and `-`
/// becomes `~` and two hexadecimal digits.
fn escape(name: &str) -> String {
    let mut escaped = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' {
            escaped.push(char::from(byte));
        } else {
            use std::fmt::Write as _;
            write!(escaped, "~{byte:02x}").expect("writing to a string does not fail");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pins_of_different_pods_have_different_names() {
        let layout = Layout::new(Path::new("/sys/fs/bpf"));
        let pins = layout.pod("shop", "cart.v2-0");
        assert_eq!(
            pins.dir(),
            Path::new("/sys/fs/bpf/egress-agent/v2/pods/shop_cart~2ev2-0")
        );
        assert_ne!(layout.pod("a", "b_c").dir(), layout.pod("a_b", "c").dir());
    }
}
