//! Interfaces through which a pod's packets leave without passing a host end.
//!
//! They are in the pod's namespace or in the host's. A pod with `CAP_NET_ADMIN` and no user namespace of its
//! own can move an interface to the host's namespace (`IFLA_TARGET_NETNSID`). The host then receives whatever
//! arrives for that interface in the pod, for example at the socket of a VXLAN. The kernel shows those in the
//! host's list ([`Links::carriers`](super::Links::carriers)). The rest of this file is about the others.
//!
//! A macvlan, an ipvlan or a virtual function in a pod's network namespace has no other end on the
//! host, so none of the agent's programs sees what is sent there. An interface is judged by where it leads,
//! not by its kind: a pod that may configure its network creates dummies, bridges, tunnels and namespaces
//! of its own, and packets sent through those leave by an interface that counts, or not at all.
//!
//! ```text
//!  leads to                                  kernel attributes                 an exit
//!  an interface of the same namespace        IFLA_LINK                         no: that one counts
//!  the host, by a veth with a host end       IFLA_LINK_NETNSID is the host's   unless it is enforced
//!  the host, otherwise (macvlan, ipvlan, …)  IFLA_LINK_NETNSID is the host's   yes
//!  another namespace                         IFLA_LINK_NETNSID                 if that one has an exit
//!  hardware                                  no IFLA_LINK, no kind             yes
//!  nothing (dummy, bridge, tunnel, tun, …)   no IFLA_LINK, a kind              no
//! ```

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs::File,
    io,
};

use egress_common::ids::IfIndex;

use super::{
    Link,
    netlink::{Netlink, RawLink},
};

/// How many interfaces of one namespace are examined. A pod can create any number of them.
const LINKS: usize = 512;

/// How many namespaces are followed from one pod.
const NAMESPACES: usize = 64;

/// How often a walk begins again because interfaces changed during it.
const ATTEMPTS: usize = 3;

/// How many exits of one pod are named; the rest are only counted.
const NAMED: usize = 4;

/// Longest name of an interface (`IFNAMSIZ`), and of a kind, that is reported.
const NAME: usize = 16;

/// Kinds whose target the kernel does not report: a virtual switch in the host's namespace, a port of an
/// InfiniBand device.
const UNNAMED: [&str; 2] = ["openvswitch", "ipoib"];

/// Where an exit leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeadsTo {
    /// An interface of the host's namespace.
    Host,
    /// Another network namespace, which has an exit itself.
    Namespace,
    /// A device.
    Hardware,
    /// The interface itself is in the host's namespace and receives what is sent in the pod's.
    OnHost,
}

impl LeadsTo {
    /// Text for status and log lines.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Namespace => "namespace",
            Self::Hardware => "hardware",
            Self::OnHost => "on_host",
        }
    }
}

/// An interface that leads out of a pod's network namespace without passing an enforced host end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its name in its own namespace; unusual characters are replaced.
    pub name: String,
    /// The kernel's name for its kind; empty for hardware.
    pub kind: String,
    /// Where it leads.
    pub to: LeadsTo,
}

impl Exit {
    /// The exit for an interface in the host's namespace that belongs to a pod's namespace.
    pub fn on_host(link: &Link) -> Self {
        Self {
            name: printable(&link.name),
            kind: printable(&link.kind),
            to: LeadsTo::OnHost,
        }
    }
}

/// All exits of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exits {
    /// The first of them, by name.
    pub named: Vec<Exit>,
    /// How many more exits there are.
    pub more: usize,
    /// Whether the pod has more interfaces than are examined, so that there may be further exits.
    pub unseen: bool,
}

impl Exits {
    /// Adds other exits in front of these.
    #[must_use]
    pub fn with(&self, mut first: Vec<Exit>) -> Self {
        first.extend(self.named.iter().cloned());
        let beyond = first.len().saturating_sub(NAMED);
        first.truncate(NAMED);
        Self {
            named: first,
            more: self.more + beyond,
            unseen: self.unseen,
        }
    }

    /// Whether the pod has no known exit and none can be hidden.
    pub fn is_empty(&self) -> bool {
        self.named.is_empty() && !self.unseen
    }
}

/// Finds exits in the network namespaces at the other ends of the host's interfaces.
pub struct ExitFinder {
    netlink: Netlink,
    /// The host's namespace.
    host: File,
}

/// Where an interface leads, according to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// An interface of the host.
    Host { index: IfIndex, has_host_end: bool },
    /// The namespace with this number on the host.
    Namespace(i32),
    /// A device, or a target without a number.
    Hardware,
}

impl ExitFinder {
    /// Opens a socket to the kernel, in the network namespace of the calling thread: the host's.
    ///
    /// # Errors
    ///
    /// When netlink or /proc is not available.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            netlink: Netlink::open()?,
            host: File::open("/proc/thread-self/ns/net")?,
        })
    }

    /// The exits of the namespaces that these host ends lead to. `is_enforced` tells whether another host end
    /// that leads to the same namespace is enforced too.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer, or the interfaces change during the walk.
    pub fn exits(
        &mut self,
        ends: &[IfIndex],
        is_enforced: impl Fn(IfIndex) -> bool,
    ) -> io::Result<Exits> {
        for _ in 1..ATTEMPTS {
            let exits = self.exits_now(ends, &is_enforced);
            // The end of a pod changes them once. Only a pod that changes them on purpose does so all the time.
            let is_changing = |error: &io::Error| error.kind() == io::ErrorKind::Interrupted;
            if !exits.as_ref().is_err_and(is_changing) {
                return exits;
            }
        }
        self.exits_now(ends, &is_enforced)
    }

    fn exits_now(
        &mut self,
        ends: &[IfIndex],
        is_enforced: impl Fn(IfIndex) -> bool,
    ) -> io::Result<Exits> {
        let own = self.namespaces_behind(ends)?;
        let mut walk = Walk {
            host: self.netlink.nsid(&self.host)?,
            netlink: &mut self.netlink,
            own: &own,
            lists: HashMap::new(),
        };
        let (mut found, mut unseen) = (Vec::new(), false);
        for &nsid in &own {
            let Some(targets) = walk.targets(nsid)? else {
                unseen = true;
                continue;
            };
            for (link, target) in targets {
                let to = match target {
                    Target::Host {
                        index,
                        has_host_end,
                    } => {
                        let is_enforced =
                            has_host_end && (ends.contains(&index) || is_enforced(index));
                        (!is_enforced).then_some(LeadsTo::Host)
                    }
                    Target::Namespace(other) => {
                        walk.has_exit(other, ends)?.then_some(LeadsTo::Namespace)
                    }
                    Target::Hardware => Some(LeadsTo::Hardware),
                };
                found.extend(to.map(|to| Exit {
                    name: printable(&link.name),
                    kind: printable(&link.kind),
                    to,
                }));
            }
        }
        // The kernel reuses a namespace's number only after the namespace and its interfaces are gone.
        if self.namespaces_behind(ends)? != own {
            return Err(io::Error::new(
                io::ErrorKind::Interrupted,
                "the interfaces changed while they were read",
            ));
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        let more = found.len().saturating_sub(NAMED);
        found.truncate(NAMED);
        Ok(Exits {
            named: found,
            more,
            unseen,
        })
    }

    /// The host's numbers for the namespaces that these interfaces lead to.
    fn namespaces_behind(&mut self, ends: &[IfIndex]) -> io::Result<BTreeSet<i32>> {
        let mut numbers = BTreeSet::new();
        for &end in ends {
            let link = self.netlink.link(end)?;
            numbers.extend(link.and_then(|link| link.nsid).filter(|nsid| *nsid >= 0));
        }
        Ok(numbers)
    }
}

/// A walk from a pod's namespaces to the namespaces connected with them.
struct Walk<'a> {
    netlink: &'a mut Netlink,
    /// The host's number for itself, if it has one.
    host: Option<i32>,
    /// The pod's namespaces.
    own: &'a BTreeSet<i32>,
    /// The interfaces that lead out of each namespace; `None` if it has too many interfaces.
    lists: HashMap<i32, Option<Vec<(RawLink, Target)>>>,
}

impl Walk<'_> {
    /// The interfaces of a namespace that lead out of it.
    fn targets(&mut self, nsid: i32) -> io::Result<Option<Vec<(RawLink, Target)>>> {
        if let Some(known) = self.lists.get(&nsid) {
            return Ok(known.clone());
        }
        let links = self.netlink.links_in(nsid, LINKS)?;
        let targets = links.map(|links| {
            let indexes: HashSet<u32> = links.iter().map(|link| link.index).collect();
            let with_target = |link: RawLink| {
                let target = target(&link, &indexes, self.host)?;
                let is_own = matches!(target, Target::Namespace(to) if self.own.contains(&to));
                (!is_own).then_some((link, target))
            };
            links.into_iter().filter_map(with_target).collect()
        });
        self.lists.insert(nsid, targets);
        Ok(self.lists[&nsid].clone())
    }

    /// Whether a namespace, or one connected with it, has an exit. A namespace that cannot be followed to its
    /// end counts as having one.
    fn has_exit(&mut self, from: i32, ends: &[IfIndex]) -> io::Result<bool> {
        let mut seen = HashSet::from([from]);
        let mut next = vec![from];
        while let Some(nsid) = next.pop() {
            let Some(targets) = self.targets(nsid)? else {
                return Ok(true);
            };
            for (_, target) in targets {
                match target {
                    Target::Host {
                        index,
                        has_host_end,
                    } if has_host_end && ends.contains(&index) => {}
                    Target::Host { .. } | Target::Hardware => return Ok(true),
                    Target::Namespace(other) => {
                        if seen.insert(other) {
                            next.push(other);
                        }
                    }
                }
            }
            if seen.len() > NAMESPACES {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Where an interface leads out of its namespace. `indexes` are the interfaces of that namespace; `host` is
/// the host's number for itself.
fn target(link: &RawLink, indexes: &HashSet<u32>, host: Option<i32>) -> Option<Target> {
    if link.loopback {
        return None;
    }
    // Without another interface the kernel gives 0 or the interface's own number. In another namespace that number
    // is another interface's.
    let is_other = |lower: &u32| *lower != 0 && (*lower != link.index || link.nsid.is_some());
    let lower = link.lower.filter(is_other);
    match (link.nsid, lower) {
        // The other namespace is being removed.
        (Some(..0), _) => None,
        (Some(nsid), lower) if host == Some(nsid) => Some(Target::Host {
            index: lower.map_or(IfIndex::NONE, IfIndex::new),
            has_host_end: link.has_host_end(),
        }),
        (Some(nsid), _) => Some(Target::Namespace(nsid)),
        (None, Some(lower)) if indexes.contains(&lower) => None,
        // It is based on an interface of another namespace, which this kind does not report.
        (None, Some(_)) => Some(Target::Hardware),
        (None, None) => {
            let is_unnamed = link.kind.is_empty() || UNNAMED.contains(&link.kind.as_str());
            is_unnamed.then_some(Target::Hardware)
        }
    }
}

/// Makes a text that the pod chose safe for a log line.
fn printable(text: &str) -> String {
    text.chars()
        .take(NAME)
        .map(|c| if c.is_ascii_graphic() { c } else { '?' })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, kind: &str) -> RawLink {
        RawLink {
            index,
            name: format!("x{index}"),
            kind: kind.into(),
            ..RawLink::default()
        }
    }

    #[test]
    fn an_interface_is_judged_by_where_it_leads() {
        const HOST: i32 = 7;
        let indexes = HashSet::from([1, 2, 3]);
        let on = |kind, lower| RawLink {
            lower: Some(lower),
            ..link(2, kind)
        };
        let into = |kind, lower, nsid| RawLink {
            nsid: Some(nsid),
            ..on(kind, lower)
        };
        let lo = RawLink {
            loopback: true,
            ..link(1, "")
        };
        let host = |index, has_host_end| {
            Some(Target::Host {
                index: IfIndex::new(index),
                has_host_end,
            })
        };
        for (link, expected) in [
            (lo, None),
            (link(2, "dummy"), None),
            (link(2, "tun"), None),
            (link(2, ""), Some(Target::Hardware)),
            (link(2, "openvswitch"), Some(Target::Hardware)),
            // A tunnel without a lower device, and a VLAN on an interface of the same namespace.
            (on("ipip", 0), None),
            (on("vlan", 3), None),
            (on("veth", 3), None),
            (on("ipoib", 40), Some(Target::Hardware)),
            (into("veth", 40, HOST), host(40, true)),
            // Numbers are those of a namespace.
            (into("veth", 2, HOST), host(2, true)),
            (on("vxlan", 2), None),
            (into("macvlan", 40, HOST), host(40, false)),
            (into("gre", 0, HOST), host(0, false)),
            (into("veth", 40, 3), Some(Target::Namespace(3))),
            (into("veth", 40, -1), None),
        ] {
            assert_eq!(target(&link, &indexes, Some(HOST)), expected, "{link:?}");
        }
    }

    #[test]
    fn an_interface_name_chosen_by_a_pod_cannot_break_a_line() {
        assert_eq!(printable("net1"), "net1");
        assert_eq!(printable("a\u{1b}[2J\nb\u{e9}"), "a?[2J?b?");
        assert_eq!(printable(&"x".repeat(99)).len(), NAME);
    }
}
