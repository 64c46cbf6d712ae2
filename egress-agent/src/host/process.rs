//! What /proc says of a process.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::OwnedFd,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::Path,
};

use nix::{
    fcntl::{OFlag, openat, readlinkat},
    sys::stat::Mode,
};

use super::{
    cgroup::{Layout, pod_of},
    uid::Uid,
};

/// Bytes of a process's list of groups that are read.
const GROUPS: u64 = 64 * 1024;
/// Processes that a search looks at.
const SEARCHED: usize = 65_536;

/// A process, held by its directory in /proc: when the process ends and another one gets its id,
/// this stays the one that has ended.
pub(super) struct Process(File);

impl Process {
    pub(super) fn open(proc: &Path, pid: u32) -> io::Result<Self> {
        fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(proc.join(pid.to_string()))
            .map(Self)
    }

    /// Inode number of its network namespace.
    pub(super) fn network(&self) -> io::Result<u64> {
        let link = readlinkat(&self.0, "ns/net").map_err(|error| self.why(error.into()))?;
        network_inode(&link.to_string_lossy())
    }

    /// Its network namespace, which exists at least as long as this is kept, and its inode number.
    pub(super) fn open_network(&self) -> io::Result<(OwnedFd, u64)> {
        let file = self.file("ns/net").map_err(|error| self.why(error))?;
        let inode = file.metadata()?.ino();
        Ok((file.into(), inode))
    }

    /// Whether it is in a group of this pod.
    pub(super) fn is_of(&self, uid: &Uid) -> io::Result<bool> {
        let mut groups = String::new();
        self.file("cgroup")?
            .take(GROUPS)
            .read_to_string(&mut groups)?;
        Ok(pods(&groups).any(|(pod, _)| pod == *uid))
    }

    /// Names of the interfaces in its network.
    pub(super) fn interfaces(&self) -> io::Result<Vec<String>> {
        let mut table = String::new();
        self.file("net/dev")?
            .take(GROUPS)
            .read_to_string(&mut table)?;
        Ok(interface_names(&table))
    }

    /// A file in its directory.
    pub(super) fn file(&self, name: &str) -> io::Result<File> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        Ok(openat(&self.0, name, flags, Mode::empty())?.into())
    }

    /// Why its namespace was refused: the kernel says that it may not be read when the process has
    /// ended too (`proc_ns_readlink`, fs/proc/namespaces.c).
    fn why(&self, refused: io::Error) -> io::Error {
        match self.file("stat") {
            Err(ended) if has_ended(&ended) => ended,
            _ => refused,
        }
    }
}

/// Inode number of the calling thread's network namespace.
pub(super) fn own_network() -> io::Result<u64> {
    let link = fs::read_link("/proc/thread-self/ns/net")?;
    network_inode(&link.to_string_lossy())
}

/// Whether this error means that the process has ended.
pub(super) fn has_ended(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// Which processes are in which pods' groups, and where those are, by looking at every process.
pub(super) fn search(proc: &Path) -> (HashMap<Uid, Vec<u32>>, Vec<Layout>) {
    let mut found: HashMap<Uid, Vec<u32>> = HashMap::new();
    let mut layouts = Vec::new();
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids.take(SEARCHED) {
        // One that has ended is nobody's.
        let Ok(groups) = fs::read_to_string(proc.join(format!("{pid}/cgroup"))) else {
            continue;
        };
        for (uid, layout) in pods(&groups) {
            let pids = found.entry(uid).or_default();
            if pids.last() != Some(&pid) {
                pids.push(pid);
            }
            if let Some(layout) = layout.filter(|layout| !layouts.contains(layout)) {
                layouts.push(layout);
            }
        }
    }
    (found, layouts)
}

/// For each network namespace that a process is in, the processes in it.
pub(super) fn networks(proc: &Path) -> io::Result<HashMap<u64, Vec<u32>>> {
    let mut found: HashMap<u64, Vec<u32>> = HashMap::new();
    let entries = fs::read_dir(proc)?.flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids.take(SEARCHED) {
        // One that has ended is in none.
        let Ok(link) = fs::read_link(proc.join(format!("{pid}/ns/net"))) else {
            continue;
        };
        let inode = network_inode(&link.to_string_lossy())?;
        found.entry(inode).or_default().push(pid);
    }
    Ok(found)
}

/// The pods in whose groups a process is, by its `/proc/<pid>/cgroup`: a line for each hierarchy.
fn pods(groups: &str) -> impl Iterator<Item = (Uid, Option<Layout>)> {
    groups
        .lines()
        .filter_map(|line| pod_of(line.splitn(3, ':').nth(2)?))
}

/// The number in `net:[4026531840]`.
fn network_inode(link: &str) -> io::Result<u64> {
    link.strip_prefix("net:[")
        .and_then(|rest| rest.strip_suffix(']')?.parse().ok())
        .ok_or_else(|| {
            let what = format!("{link:?} is not a network namespace");
            io::Error::new(io::ErrorKind::InvalidData, what)
        })
}

/// The names in a table like /proc/net/dev, which has two lines of headings.
fn interface_names(table: &str) -> Vec<String> {
    table
        .lines()
        .skip(2)
        .filter_map(|line| Some(line.rsplit_once(':')?.0.trim().to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_in_the_pod_that_any_hierarchy_says() {
        let groups = "9:name=systemd:/kubepods/burstable/pod0a-1b/0c\n\
                      4:memory:/kubepods/burstable/pod0a-1b/0c\n\
                      1:net_cls,net_prio:/\n\
                      0::/\n";
        let uids: Vec<String> = pods(groups).map(|(uid, _)| uid.to_string()).collect();
        assert_eq!(uids, ["0a-1b", "0a-1b"]);
    }

    #[test]
    fn interfaces_are_named_in_the_table() {
        let table = "Inter-|   Receive  |  Transmit\n \
                     face |bytes    packets|bytes\n    \
                     lo:       0       0\n  eth0:100 2\neth0:1: 1 1\n";
        assert_eq!(interface_names(table), ["lo", "eth0", "eth0:1"]);
    }

    #[test]
    fn the_test_itself_has_a_network() {
        let pid = std::process::id();
        let process = Process::open(Path::new("/proc"), pid).unwrap();
        let inode = process.network().unwrap();
        assert_eq!(inode, own_network().unwrap());
        assert_eq!(process.open_network().unwrap().1, inode);
        assert!(process.interfaces().unwrap().contains(&"lo".to_owned()));
        assert!(!process.is_of(&Uid::new("0a").unwrap()).unwrap());
    }

    #[test]
    fn a_link_to_anything_else_is_no_network() {
        assert!(network_inode("mnt:[4026531840]").is_err());
        assert!(network_inode("net:[x]").is_err());
        assert_eq!(network_inode("net:[4026531840]").unwrap(), 4_026_531_840);
    }
}
