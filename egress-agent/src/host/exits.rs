//! Interfaces through which a pod's packets leave without passing a host end.
//!
//! They are in the pod's namespace, or in the host's: a pod with `CAP_NET_ADMIN` and no user namespace of
//! its own can move an interface there (`IFLA_TARGET_NETNSID`), and what comes to it in the pod, as to the
//! socket of a VXLAN, is then received by the host. Those the kernel shows in the host's list
//! ([`Links::carriers`](super::Links::carriers)). The following is about the others.
//!
//! A macvlan, an ipvlan or a virtual function in a pod's network namespace has no other end on the
//! host, so no program of ours sees what is sent there. An interface counts by what it leads to, not
//! by its kind: a pod that may configure its network makes dummies, bridges, tunnels and namespaces
//! of its own, and whatever it sends through those leaves by an interface that counts or not at all.
//!
//! ```text
//!  leads to                                  how the kernel says it            an exit
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

use super::{
    Link,
    netlink::{Netlink, RawLink},
};

/// Interfaces of one namespace that are looked at. A pod can make any number of them.
const LINKS: usize = 512;

/// Namespaces that are followed from one pod.
const NAMESPACES: usize = 64;

/// Exits of one pod that are named; the rest are counted.
const NAMED: usize = 4;

/// Longest name of an interface (`IFNAMSIZ`), and of a kind that is told.
const NAME: usize = 16;

/// Kinds that lead to what the kernel does not name: a virtual switch in the host's namespace, a
/// port of an InfiniBand device.
const UNNAMED: [&str; 2] = ["openvswitch", "ipoib"];

/// What an exit leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeadsTo {
    /// An interface of the host's namespace.
    Host,
    /// Another network namespace, which has a way out of its own.
    Namespace,
    /// A device.
    Hardware,
    /// It is itself in the host's namespace, and takes what is sent in the pod's.
    OnHost,
}

impl LeadsTo {
    /// For people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Namespace => "namespace",
            Self::Hardware => "hardware",
            Self::OnHost => "on_host",
        }
    }
}

/// An interface that leads out of a pod's network namespace past every host end that is enforced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its name where it is; unusual characters are replaced.
    pub name: String,
    /// What the kernel calls its kind; empty for hardware.
    pub kind: String,
    /// What it leads to.
    pub to: LeadsTo,
}

impl Exit {
    /// The exit that an interface of the host is which belongs to a pod's namespace.
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
    /// How many more there are.
    pub more: usize,
    /// Whether the pod has more interfaces than are looked at, so that an exit may be among them.
    pub unseen: bool,
}

impl Exits {
    /// These and others, which come first.
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

    /// Whether there is none, as far as can be known.
    pub fn is_empty(&self) -> bool {
        self.named.is_empty() && !self.unseen
    }
}

/// Looks into the network namespaces at the other ends of the host's interfaces.
pub struct ExitFinder {
    netlink: Netlink,
    /// The host's namespace.
    host: File,
}

/// Where an interface leads, as the kernel says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// An interface of the host.
    Host { index: u32, has_host_end: bool },
    /// The namespace that the host knows by this number.
    Namespace(i32),
    /// What has no number.
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

    /// The exits of the namespaces that these host ends lead to. `is_enforced` says of any other
    /// host end that leads there whether it is enforced too.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer, or the interfaces change meanwhile.
    pub fn exits(&mut self, ends: &[u32], is_enforced: impl Fn(u32) -> bool) -> io::Result<Exits> {
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
        // The number of a namespace becomes another's only when it is gone, and its interfaces with it.
        if self.namespaces_behind(ends)? != own {
            return Err(io::Error::new(
                io::ErrorKind::Interrupted,
                "the interfaces changed meanwhile",
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

    /// The host's numbers of the namespaces that these interfaces lead to.
    fn namespaces_behind(&mut self, ends: &[u32]) -> io::Result<BTreeSet<i32>> {
        let mut numbers = BTreeSet::new();
        for &end in ends {
            let link = self.netlink.link(end)?;
            numbers.extend(link.and_then(|link| link.nsid).filter(|nsid| *nsid >= 0));
        }
        Ok(numbers)
    }
}

/// A walk from a pod's namespaces to those they are connected with.
struct Walk<'a> {
    netlink: &'a mut Netlink,
    /// The host's number for itself, if it has one.
    host: Option<i32>,
    /// The pod's namespaces.
    own: &'a BTreeSet<i32>,
    /// What leads out of each namespace; `None` when it has too many interfaces.
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

    /// Whether a namespace, or one that it is connected with, has an exit. What cannot be followed to
    /// its end counts as one.
    fn has_exit(&mut self, from: i32, ends: &[u32]) -> io::Result<bool> {
        let mut seen = HashSet::from([from]);
        let mut next = vec![from];
        while let Some(nsid) = next.pop() {
            let targets = match self.targets(nsid) {
                Ok(Some(targets)) => targets,
                Ok(None) => return Ok(true),
                // It is gone.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => continue,
                Err(error) => return Err(error),
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

/// Where an interface leads out of its namespace, which has interfaces of these indexes. `host` is
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
            index: lower.unwrap_or_default(),
            has_host_end: link.has_host_end(),
        }),
        (Some(nsid), _) => Some(Target::Namespace(nsid)),
        (None, Some(lower)) if indexes.contains(&lower) => None,
        // On an interface of another namespace, which this kind does not name.
        (None, Some(_)) => Some(Target::Hardware),
        (None, None) => {
            let is_unnamed = link.kind.is_empty() || UNNAMED.contains(&link.kind.as_str());
            is_unnamed.then_some(Target::Hardware)
        }
    }
}

/// A text that the pod chose, for a log line.
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
    fn an_interface_counts_by_what_it_leads_to() {
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
                index,
                has_host_end,
            })
        };
        for (link, expected) in [
            (lo, None),
            (link(2, "dummy"), None),
            (link(2, "tun"), None),
            (link(2, ""), Some(Target::Hardware)),
            (link(2, "openvswitch"), Some(Target::Hardware)),
            // A tunnel without a device below, and a VLAN on an interface beside it.
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
    fn what_a_pod_calls_its_interface_cannot_break_a_line() {
        assert_eq!(printable("net1"), "net1");
        assert_eq!(printable("a\u{1b}[2J\nb\u{e9}"), "a?[2J?b?");
        assert_eq!(printable(&"x".repeat(99)).len(), NAME);
    }
}
