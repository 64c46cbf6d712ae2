//! Processes in /proc.

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

/// How many bytes of a process's list of groups are read.
const GROUPS: u64 = 64 * 1024;
/// How many processes a search examines.
const SEARCHED: usize = 65_536;

/// A process, referred to by an open descriptor of its directory in /proc. When the process ends and another
/// one gets its id, the descriptor still refers to the one that ended.
pub(super) struct Process(File);

impl Process {
    pub(super) fn open(proc: &Path, pid: u32) -> io::Result<Self> {
        fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(proc.join(pid.to_string()))
            .map(Self)
    }

    /// Inode number of the process's network namespace.
    pub(super) fn network(&self) -> io::Result<u64> {
        let link =
            readlinkat(&self.0, "ns/net").map_err(|error| self.namespace_error(error.into()))?;
        network_inode(&link.to_string_lossy())
    }

    /// The process's network namespace, which the descriptor keeps alive, and its inode number.
    pub(super) fn open_network(&self) -> io::Result<(OwnedFd, u64)> {
        let file = self
            .file("ns/net")
            .map_err(|error| self.namespace_error(error))?;
        let inode = file.metadata()?.ino();
        Ok((file.into(), inode))
    }

    /// Whether the process is in a group of this pod.
    pub(super) fn is_in_pod(&self, uid: &Uid) -> io::Result<bool> {
        let mut groups = String::new();
        self.file("cgroup")?
            .take(GROUPS)
            .read_to_string(&mut groups)?;
        Ok(pods(&groups).any(|(pod, _)| pod == *uid))
    }

    /// Names of the interfaces in the process's network namespace.
    pub(super) fn interfaces(&self) -> io::Result<Vec<String>> {
        let mut table = String::new();
        self.file("net/dev")?
            .take(GROUPS)
            .read_to_string(&mut table)?;
        Ok(interface_names(&table))
    }

    /// Opens a file in the process's directory.
    pub(super) fn file(&self, name: &str) -> io::Result<File> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        Ok(openat(&self.0, name, flags, Mode::empty())?.into())
    }

    /// The reason for an error about its namespace. When the process has ended, the kernel also says that its
    /// namespace may not be read (`proc_ns_readlink`, fs/proc/namespaces.c).
    fn namespace_error(&self, refused: io::Error) -> io::Error {
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

/// Examines every process: returns the processes of each pod's group, and the layouts of those groups.
pub(super) fn search(proc: &Path) -> (HashMap<Uid, Vec<u32>>, Vec<Layout>) {
    let mut found: HashMap<Uid, Vec<u32>> = HashMap::new();
    let mut layouts = Vec::new();
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids.take(SEARCHED) {
        // Skip a process that has ended.
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

/// The processes in each network namespace, by inode number.
pub(super) fn networks(proc: &Path) -> io::Result<HashMap<u64, Vec<u32>>> {
    let mut found: HashMap<u64, Vec<u32>> = HashMap::new();
    let entries = fs::read_dir(proc)?.flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids.take(SEARCHED) {
        // Skip a process that has ended.
        let Ok(link) = fs::read_link(proc.join(format!("{pid}/ns/net"))) else {
            continue;
        };
        let inode = network_inode(&link.to_string_lossy())?;
        found.entry(inode).or_default().push(pid);
    }
    Ok(found)
}

/// The pods whose groups contain a process, from its `/proc/<pid>/cgroup`: one line for each hierarchy.
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

/// The interface names in a table like /proc/net/dev, which begins with two lines of headings.
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
    fn a_process_belongs_to_the_pod_of_any_of_its_hierarchies() {
        let groups = "9:name=systemd:/kubepods/burstable/pod0a-1b/0c\n\
                      4:memory:/kubepods/burstable/pod0a-1b/0c\n\
                      1:net_cls,net_prio:/\n\
                      0::/\n";
        let uids: Vec<String> = pods(groups).map(|(uid, _)| uid.to_string()).collect();
        assert_eq!(uids, ["0a-1b", "0a-1b"]);
    }

    #[test]
    fn interface_names_are_read_from_the_table() {
        let table = "Inter-|   Receive  |  Transmit\n \
                     face |bytes    packets|bytes\n    \
                     lo:       0       0\n  eth0:100 2\neth0:1: 1 1\n";
        assert_eq!(interface_names(table), ["lo", "eth0", "eth0:1"]);
    }

    #[test]
    fn the_network_of_this_process_is_found() {
        let pid = std::process::id();
        let process = Process::open(Path::new("/proc"), pid).unwrap();
        let inode = process.network().unwrap();
        assert_eq!(inode, own_network().unwrap());
        assert_eq!(process.open_network().unwrap().1, inode);
        assert!(process.interfaces().unwrap().contains(&"lo".to_owned()));
        assert!(!process.is_in_pod(&Uid::new("0a").unwrap()).unwrap());
    }

    #[test]
    fn a_link_of_another_kind_is_not_a_network() {
        assert!(network_inode("mnt:[4026531840]").is_err());
        assert!(network_inode("net:[x]").is_err());
        assert_eq!(network_inode("net:[4026531840]").unwrap(), 4_026_531_840);
    }
}
