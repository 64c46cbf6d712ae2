//! Network namespaces of pods: finding the one behind an interface, and reading what is in one.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    thread,
};

use nix::sched::{CloneFlags, setns};

use super::{
    Link,
    conntrack::Conntrack,
    netlink::Netlink,
    process::Process,
    sockets::{self, Bounds, Direction, OpenSocket, OpenSockets, SocketProtocol, Unasked},
};

/// Where programs name network namespaces (`ip netns`, container runtimes).
const NAMED: &str = "/run/netns";
/// Processes whose network namespaces are looked at.
const PROCESSES: usize = 65_536;
/// Named network namespaces that are looked at.
const NAMES: usize = 4_096;

/// The network namespace of a pod, held open to read the sockets in it.
#[derive(Debug)]
pub struct SocketsOf(OwnedFd);

impl SocketsOf {
    pub(super) fn new(namespace: OwnedFd) -> Self {
        Self(namespace)
    }

    /// The conversations that the sockets are in. To be called in the host's network namespace.
    ///
    /// A thread enters the pod's namespace for this and ends with it: the kernel tells of a connection's
    /// progress only from within. What looks inbound there is confirmed by the host's connection tracking.
    /// The work is bounded ([`OpenSockets::cut_short`]).
    ///
    /// # Errors
    ///
    /// When the namespace may not be entered (`CAP_SYS_ADMIN`), or the kernel does not tell.
    pub fn read(&self) -> io::Result<OpenSockets> {
        let namespace = self.0.as_fd();
        thread::scope(|scope| {
            let reader = thread::Builder::new().name("sockets".into());
            let reader = reader.spawn_scoped(scope, || {
                // It stays a socket of the host's namespace.
                let conntrack = Conntrack::open();
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                sockets::here(|found, bounds| confirm(conntrack, found, bounds))
            })?;
            reader
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread that reads sockets panicked")))
        })
    }
}

/// Asks the node's connection tracking who opened what looks inbound. What it does not confirm, for whatever
/// reason, is unconfirmed. Returns why it was not asked about all of them, if it was not.
fn confirm(
    conntrack: io::Result<Conntrack>,
    sockets: &mut [OpenSocket],
    bounds: &Bounds,
) -> Option<Unasked> {
    let looks_inbound = |socket: &&mut OpenSocket| {
        (socket.protocol, socket.direction) == (SocketProtocol::Tcp, Direction::Inbound)
    };
    let mut asked: Vec<&mut OpenSocket> = sockets.iter_mut().filter(looks_inbound).collect();
    for socket in &mut asked {
        socket.direction = Direction::Unconfirmed;
    }
    if asked.is_empty() {
        return None;
    }
    let no_answer = |error: io::Error| Some(Unasked::NoAnswer(error.to_string()));
    let mut conntrack = match conntrack {
        Ok(conntrack) => conntrack,
        Err(error) => return no_answer(error),
    };
    let count = asked.len();
    for (at, socket) in asked.into_iter().enumerate() {
        if bounds.is_over() {
            return Some(Unasked::TimeOver(count - at));
        }
        match conntrack.is_opened_by(socket.remote, socket.local) {
            Ok(true) => socket.direction = Direction::Inbound,
            Ok(false) => {}
            Err(error) => return no_answer(error),
        }
    }
    None
}

/// The network namespace that an interface leads to, if anything refers to it by a name or runs in it.
///
/// # Errors
///
/// When the kernel does not answer.
pub(super) fn behind(
    netlink: &mut Netlink,
    proc: &Path,
    own: u64,
    ifindex: u32,
) -> io::Result<Option<OwnedFd>> {
    let mut seen = HashSet::from([own]);
    let named = fs::read_dir(NAMED).into_iter().flatten().flatten();
    for entry in named.take(NAMES) {
        // One that is being made is a plain file, and of a plain file the kernel knows no number.
        if let Ok(file) = File::open(entry.path())
            && let Ok(status) = file.metadata()
            && seen.insert(status.ino())
            && leads_to(netlink, ifindex, &file)?
        {
            return Ok(Some(file.into()));
        }
    }
    let entries = fs::read_dir(proc)?.flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids.take(PROCESSES) {
        // A process that has ended, or that may not be looked at, tells nothing.
        let Ok(process) = Process::open(proc, pid) else {
            continue;
        };
        let Ok(inode) = process.network() else {
            continue;
        };
        if !seen.insert(inode) {
            continue;
        }
        if let Ok((namespace, _)) = process.open_network()
            && leads_to(netlink, ifindex, &namespace)?
        {
            return Ok(Some(namespace));
        }
    }
    Ok(None)
}

/// Whether the other end of an interface is in this namespace. While the namespace is held, its number
/// stays its own.
fn leads_to(netlink: &mut Netlink, ifindex: u32, namespace: impl AsFd) -> io::Result<bool> {
    let nsid = match netlink.nsid(namespace) {
        Ok(Some(nsid)) => nsid,
        Ok(None) => return Ok(false),
        // Not a network namespace.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(false),
        Err(error) => return Err(error),
    };
    let link = netlink.link(ifindex)?.map(|raw| Link::new(raw, None));
    Ok(link
        .is_some_and(|link| link.is_host_end() && link.peer.is_some_and(|peer| peer.nsid == nsid)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn when_the_time_is_over_that_is_why_connections_are_unconfirmed() {
        let socket = OpenSocket {
            protocol: SocketProtocol::Tcp,
            local: "10.1.1.2:8080".parse().unwrap(),
            remote: "203.0.113.9:40000".parse().unwrap(),
            direction: Direction::Inbound,
        };
        let opened = OpenSocket {
            direction: Direction::Outbound,
            ..socket
        };
        let over = Bounds {
            until: Duration::ZERO,
            ..Bounds::new()
        };
        let mut sockets = [socket, opened, socket];
        let unasked = confirm(Conntrack::open(), &mut sockets, &over);
        assert_eq!(unasked, Some(Unasked::TimeOver(2)));
        let directions = sockets.map(|socket| socket.direction);
        let unconfirmed = Direction::Unconfirmed;
        assert_eq!(directions, [unconfirmed, Direction::Outbound, unconfirmed]);

        // Where there is nothing to ask about, the time does not matter.
        assert_eq!(confirm(Conntrack::open(), &mut [opened], &over), None);
        let refused = Err(io::Error::from_raw_os_error(libc::EPERM));
        let unasked = confirm(refused, &mut [socket], &Bounds::new());
        assert!(matches!(unasked, Some(Unasked::NoAnswer(why)) if why.contains("not permitted")));
    }
}
