//! The pods on this machine: control groups, processes, network namespaces, interfaces.
//!
//! ```text
//! pod's UID ─▶ its control group ─▶ its processes ─▶ their network namespaces
//!                                                        │ RTM_GETNSID: the host's number for it
//!                                                        ▼
//!                       the host's interfaces whose other end is in that namespace
//! ```
//!
//! Nothing here asks a container runtime, or depends on the names that one gives. The agent enters another
//! namespace only to read the sockets in it. A pod can influence the names of groups below its own, its
//! processes and its interfaces' addresses. With these it can at worst make itself unfindable; it cannot
//! pass for another pod.
//!
//! [`LinkEvents`], [`FilterEvents`] and [`RulesetEvents`] tell when the machine has changed.

mod cgroup;
mod conntrack;
mod exits;
mod hardware;
mod link_local;
mod links;
mod located;
mod netlink;
mod network;
mod notices;
mod process;
mod routes;
mod sockets;
mod taps;
mod tcp_table;
mod transport;
mod uid;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs, io,
    net::IpAddr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use cgroup::{Cgroups, Members};
pub use conntrack::{Translated, forget_translated, translated};
use egress_common::ids::IfIndex;
pub use exits::{Exit, ExitFinder, Exits, LeadsTo};
pub use hardware::{HardwareAddress, gateways};
pub use link_local::taken_link_locals;
pub use links::{Link, Links, Peer, interface_name};
pub use located::{Located, Missing, Network};
use netlink::Netlink;
pub use network::SocketsOf;
pub use notices::{FilterEvents, LinkEvents, RulesetEvents};
use process::Process;
pub use sockets::{Direction, OpenSocket, OpenSockets, SocketProtocol, Unasked};
pub use taps::{TapWatch, Taps};
use uid::Uid;

/// How many network namespaces of one pod are examined. Programs in it may create more, but no interface of
/// those leads to the host unless something on the host created it.
const NETWORKS: usize = 64;

/// How long the result of a search through all processes is used. The search runs only if a pod's group is at
/// none of the known paths.
const SEARCH_EVERY: Duration = Duration::from_secs(1);
/// The same, once a pod's group has been found at a known path.
const SEARCH_SELDOM: Duration = Duration::from_secs(30);

/// Paths of the host's file systems.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// Mount point of the host's proc.
    pub proc: PathBuf,
    /// Mount points of control groups; if empty, those in the agent's own mount table.
    pub cgroups: Vec<PathBuf>,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            cgroups: Vec::new(),
        }
    }
}

/// The machine, seen from the network namespace of the thread that opened this, which is the host's.
pub struct Host {
    proc: PathBuf,
    cgroups: Cgroups,
    netlink: Netlink,
    /// Inode number of the host's network namespace.
    own: u64,
    searched: Option<(Instant, HashMap<Uid, Vec<u32>>)>,
}

/// A network namespace that an open descriptor keeps alive.
struct OpenNetwork {
    network: Network,
    descriptor: OwnedFd,
}

impl Host {
    /// Finds the control groups and opens a socket to the kernel.
    ///
    /// # Errors
    ///
    /// When the mount table cannot be read or netlink is not available.
    pub fn open(options: HostOptions) -> io::Result<Self> {
        let HostOptions { proc, mut cgroups } = options;
        if cgroups.is_empty() {
            cgroups = cgroup::mounts(&fs::read_to_string("/proc/self/mounts")?);
        }
        Ok(Self {
            proc,
            cgroups: Cgroups::new(cgroups),
            netlink: Netlink::open()?,
            own: process::own_network()?,
            searched: None,
        })
    }

    /// Every interface of the host now.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub fn links(&mut self) -> io::Result<Links> {
        self.netlink.links().map(Links::new)
    }

    /// The names of the interfaces of the machine's default routes. They belong to no pod, whatever they look
    /// like.
    ///
    /// # Errors
    ///
    /// When the route tables cannot be read.
    pub fn uplinks(&self) -> io::Result<HashSet<String>> {
        routes::uplinks(&self.proc)
    }

    /// The processes in other network namespaces: the host's number for the namespace, and the id of a process
    /// in it.
    ///
    /// # Errors
    ///
    /// When /proc cannot be read.
    pub fn processes_by_namespace(&mut self) -> io::Result<HashSet<(i32, u32)>> {
        let mut found = HashSet::new();
        for (inode, pids) in process::networks(&self.proc)? {
            if inode == self.own {
                continue;
            }
            // Meanwhile the process may have ended, and another process may have its id.
            let network = pids.iter().find_map(|&pid| {
                let opened =
                    Process::open(&self.proc, pid).and_then(|process| process.open_network());
                opened.ok().filter(|(_, now)| *now == inode)
            });
            let Some((network, _)) = network else {
                continue;
            };
            if let Some(nsid) = self.netlink.nsid(&network)? {
                found.extend(pids.iter().map(|&pid| (nsid, pid)));
            }
        }
        Ok(found)
    }

    /// Finds the pod of this UID among the given interfaces.
    ///
    /// # Errors
    ///
    /// Returns which prerequisite is missing.
    pub fn locate(&mut self, links: &Links, uid: &str) -> Result<Located, Missing> {
        let uid = Uid::new(uid).ok_or_else(|| Missing::Uid(uid.to_owned()))?;
        let members = self.members(&uid)?;
        let networks = self.networks(&uid, &members.pids)?;
        let (mut interfaces, mut addresses, mut namespaces) = (Vec::new(), Vec::new(), Vec::new());
        for OpenNetwork {
            network,
            descriptor,
        } in &networks
        {
            let Some(nsid) = self.netlink.nsid(descriptor)? else {
                continue;
            };
            let before = interfaces.len();
            for link in links.leading_to(nsid) {
                // The number may have meant another namespace when the list was read. It means this one as
                // long as the descriptor is open.
                let now = self.netlink.link(link.ifindex)?;
                let now = now.map(|raw| Link::new(raw, None));
                let Some(peer) = now.and_then(|now| now.peer.filter(|_| now.is_host_end())) else {
                    continue;
                };
                if peer.nsid == nsid {
                    interfaces.push(link.ifindex);
                    addresses.extend(self.addresses(peer)?);
                }
            }
            if interfaces.len() > before {
                namespaces.push(*network);
            }
        }
        if interfaces.is_empty() {
            return Err(self.why_no_host_end(&networks));
        }
        interfaces.sort_unstable();
        addresses.sort_unstable();
        addresses.dedup();
        Ok(Located {
            interfaces,
            addresses,
            namespaces,
        })
    }

    /// A pod's network namespace, to read the sockets in it.
    ///
    /// # Errors
    ///
    /// When the process has ended, or is in another namespace now: locate the pod again.
    pub fn sockets(&self, network: &Network) -> io::Result<SocketsOf> {
        let process = Process::open(&self.proc, network.pid)?;
        let (namespace, inode) = process.open_network()?;
        if inode != network.inode {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("process {} has left the pod's network", network.pid),
            ));
        }
        Ok(SocketsOf::new(namespace))
    }

    /// The network namespace behind an interface of the host, to read the sockets in it.
    ///
    /// # Errors
    ///
    /// When there is no such namespace, as behind a virtual machine's interface; when it has neither a name
    /// nor a visible process through which it can be entered.
    pub fn sockets_behind(&mut self, ifindex: IfIndex) -> io::Result<SocketsOf> {
        let link = self.netlink.link(ifindex)?;
        if !link.is_some_and(|raw| Link::new(raw, None).is_host_end()) {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "the interface leads to no network namespace of this machine",
            ));
        }
        match network::find_behind(&mut self.netlink, &self.proc, self.own, ifindex)? {
            Some(namespace) => Ok(SocketsOf::new(namespace)),
            None => Err(io::Error::new(
                io::ErrorKind::NotFound,
                "its network namespace has no name in /run/netns, and no process in it can be seen",
            )),
        }
    }

    /// The processes of a pod.
    fn members(&mut self, uid: &Uid) -> Result<Members, Missing> {
        let members = match self.cgroups.members(uid) {
            Some(members) => members,
            None => {
                let pids = self.search(uid).ok_or(Missing::Group)?;
                Members {
                    pids,
                    foreign: false,
                }
            }
        };
        match members {
            Members { pids, foreign } if pids.is_empty() => Err(if foreign {
                Missing::ForeignProcesses
            } else {
                Missing::Process
            }),
            members => Ok(members),
        }
    }

    /// The processes in a pod's group, wherever the group is. Adds the layouts that it finds.
    fn search(&mut self, uid: &Uid) -> Option<Vec<u32>> {
        let every = if self.cgroups.settled {
            SEARCH_SELDOM
        } else {
            SEARCH_EVERY
        };
        let fresh = |(when, _): &(Instant, _)| when.elapsed() < every;
        if !self.searched.as_ref().is_some_and(fresh) {
            let (found, layouts) = process::search(&self.proc);
            for layout in layouts {
                self.cgroups.learn(layout);
            }
            self.searched = Some((Instant::now(), found));
        }
        let (_, found) = self.searched.as_ref()?;
        found.get(uid).cloned()
    }

    /// The network namespaces of these processes of a pod, without the host's.
    fn networks(&self, uid: &Uid, pids: &[u32]) -> Result<Vec<OpenNetwork>, Missing> {
        let mut held: Vec<OpenNetwork> = Vec::new();
        let mut seen = HashSet::new();
        let (mut on_host, mut refused) = (false, None);
        for &pid in pids {
            if held.len() == NETWORKS {
                break;
            }
            match look(&self.proc, uid, pid, self.own, &mut seen) {
                Ok(Seen::New(found)) => held.push(found),
                Ok(Seen::Known) => {}
                Ok(Seen::Host) => on_host = true,
                Err(error) if process::has_ended(&error) => {}
                Err(error) => refused = Some(error),
            }
        }
        match refused {
            _ if !held.is_empty() => Ok(held),
            Some(error) => Err(Missing::Unreadable(error)),
            None if on_host => Err(Missing::HostNetwork),
            None => Err(Missing::Process),
        }
    }

    /// The addresses of global scope on the other end of this interface; `None` if the interface is gone.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub fn addresses_of(
        &mut self,
        ifindex: IfIndex,
        peer: Peer,
    ) -> io::Result<Option<Vec<IpAddr>>> {
        let addresses = self.addresses(peer)?;
        // The kernel reuses a namespace's number only after the namespace, and this interface with it, is gone.
        let now = self.netlink.link(ifindex)?.map(|raw| Link::new(raw, None));
        let is_there = now.is_some_and(|now| now.peer == Some(peer));
        Ok(is_there.then_some(addresses))
    }

    /// The hardware address on the other end of this interface; `None` if the interface is gone or has no
    /// hardware address.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub fn hardware_of(
        &mut self,
        ifindex: IfIndex,
        peer: Peer,
    ) -> io::Result<Option<HardwareAddress>> {
        let link = self.netlink.link_in(peer.nsid, peer.ifindex)?;
        // As in `addresses_of`.
        let now = self.netlink.link(ifindex)?.map(|raw| Link::new(raw, None));
        let is_there = now.is_some_and(|now| now.peer == Some(peer));
        Ok(link.filter(|_| is_there).and_then(|link| link.hardware))
    }

    /// Prevents a port from changing the forwarding table of its bridge with frames to link-local addresses
    /// (`01:80:c2:00:00:00` to `0f`). The kernel handles these before any netfilter hook (`br_handle_frame`,
    /// `net/bridge/br_input.c`). With `no_linklocal_learn` the bridge learns nothing from them, and with `guard`
    /// it disables a port that sends spanning tree messages to it.
    ///
    /// An Open vSwitch bridge is left unchanged.
    ///
    /// # Errors
    ///
    /// When the kernel rejects it (kernels before 5.0 do not have the option).
    pub fn protect_bridge(&mut self, bridge: IfIndex, port: IfIndex) -> io::Result<()> {
        let kind = self.netlink.link(bridge)?.map(|link| link.kind);
        if kind.is_some_and(|kind| kind == "bridge") {
            self.netlink.learn_nothing_link_local(bridge)?;
            self.netlink.guard_port(port)?;
        }
        Ok(())
    }

    /// The hardware addresses of the gateways in this machine's routes, as far as the neighbour table has
    /// them.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub fn hardware_of_gateways(&mut self) -> io::Result<BTreeSet<HardwareAddress>> {
        hardware::of_gateways(&mut self.netlink)
    }

    /// The host's own addresses, of any scope.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub fn own_addresses(&mut self) -> io::Result<Vec<IpAddr>> {
        self.netlink.own_addresses()
    }

    /// The prefixes, with their lengths in bits, whose packets the host delivers to itself.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub fn local_routes(&mut self) -> io::Result<Vec<(IpAddr, u8)>> {
        self.netlink.local_routes()
    }

    /// Addresses on the other end of an interface.
    fn addresses(&mut self, peer: Peer) -> io::Result<Vec<IpAddr>> {
        match self.netlink.addresses(peer.nsid, peer.ifindex) {
            // The interface disappeared meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(Vec::new()),
            answer => answer,
        }
    }

    /// The reason why these namespaces have no interface that leads to the host.
    fn why_no_host_end(&self, networks: &[OpenNetwork]) -> Missing {
        let mut names: Vec<String> = networks
            .iter()
            .filter_map(|held| {
                let process = Process::open(&self.proc, held.network.pid).ok()?;
                (process.network().ok()? == held.network.inode).then_some(())?;
                process.interfaces().ok()
            })
            .flatten()
            .filter(|name| name != "lo")
            .collect();
        names.sort_unstable();
        names.dedup();
        if names.is_empty() {
            Missing::Interface
        } else {
            Missing::HostEnd(names)
        }
    }
}

/// The result of examining the network namespace of one process.
enum Seen {
    /// A namespace that no earlier process was in.
    New(OpenNetwork),
    /// A known namespace, or the process does not belong to the pod any more.
    Known,
    /// The host's.
    Host,
}

fn look(proc: &Path, uid: &Uid, pid: u32, own: u64, seen: &mut HashSet<u64>) -> io::Result<Seen> {
    let process = Process::open(proc, pid)?;
    let inode = process.network()?;
    if inode == own {
        return Ok(Seen::Host);
    }
    // Since the group was read, another process may have got the id.
    if seen.contains(&inode) || !process.is_in_pod(uid)? {
        return Ok(Seen::Known);
    }
    let (descriptor, inode) = process.open_network()?;
    if inode == own || !seen.insert(inode) {
        return Ok(Seen::Known);
    }
    Ok(Seen::New(OpenNetwork {
        network: Network { inode, pid },
        descriptor,
    }))
}
