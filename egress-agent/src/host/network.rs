//! Network namespaces of pods: finds the one behind an interface, and reads the sockets in it.

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

use egress_common::ids::IfIndex;
use nix::sched::{CloneFlags, setns};

use super::{
    Link,
    conntrack::Conntrack,
    netlink::Netlink,
    process::Process,
    sockets::{self, Bounds, Direction, OpenSocket, OpenSockets, SocketProtocol, Unasked},
};

/// Directory of named network namespaces (`ip netns`, container runtimes).
const NAMED: &str = "/run/netns";
/// How many processes' network namespaces are examined.
const PROCESSES: usize = 65_536;
/// How many named network namespaces are examined.
const NAMES: usize = 4_096;

/// The network namespace of a pod, held open to read the sockets in it.
#[derive(Debug)]
pub struct SocketsOf(OwnedFd);

impl SocketsOf {
    pub(super) fn new(namespace: OwnedFd) -> Self {
        Self(namespace)
    }

    /// Reads the sockets and the flows they belong to. Call this in the host's network namespace.
    ///
    /// A thread enters the pod's namespace and then ends, because the kernel reports a connection's progress
    /// only from within. The host's connection tracking confirms the connections that look inbound.
    /// The work is bounded ([`OpenSockets::cut_short`]).
    ///
    /// # Errors
    ///
    /// When the namespace may not be entered (`CAP_SYS_ADMIN`), or the kernel does not answer.
    pub fn read(&self) -> io::Result<OpenSockets> {
        let namespace = self.0.as_fd();
        thread::scope(|scope| {
            let reader = thread::Builder::new().name("sockets".into());
            let reader = reader.spawn_scoped(scope, || {
                // The socket stays in the host's namespace.
                let conntrack = Conntrack::open();
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                sockets::read_current_namespace(|found, bounds| confirm(conntrack, found, bounds))
            })?;
            reader
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread that reads sockets panicked")))
        })
    }
}

/// Asks the node's connection tracking which side opened the connections that look inbound. A connection that
/// it does not confirm, for whatever reason, is unconfirmed. Returns why it was not asked about all of them, if it
/// was not.
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

/// The network namespace behind an interface, if it has a name or a process.
///
/// # Errors
///
/// When the kernel does not answer.
pub(super) fn find_behind(
    netlink: &mut Netlink,
    proc: &Path,
    own: u64,
    ifindex: IfIndex,
) -> io::Result<Option<OwnedFd>> {
    let mut seen = HashSet::from([own]);
    let named = fs::read_dir(NAMED).into_iter().flatten().flatten();
    for entry in named.take(NAMES) {
        // A name that is being created is still a plain file, for which the kernel has no number.
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
        // Skip a process that has ended or that may not be examined.
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

/// Whether the other end of an interface is in this namespace. While the descriptor is open, the kernel does
/// not reuse the namespace's number.
fn leads_to(netlink: &mut Netlink, ifindex: IfIndex, namespace: impl AsFd) -> io::Result<bool> {
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
