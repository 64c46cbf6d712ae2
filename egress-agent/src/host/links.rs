//! The interfaces of the host's network namespace.

use std::collections::HashMap;

use egress_common::ids::IfIndex;

use super::{
    HardwareAddress,
    netlink::{RawLink, links_in_notices},
};

/// Kinds of interfaces that learn the port of each hardware address.
const BRIDGES: [&str; 2] = ["bridge", "openvswitch"];

/// The name of an interface of this thread's network namespace; `None` if no interface has this index.
///
/// Call this instead of nix: `if_indextoname` of nix 0.31 returns an empty name when the C function fails.
#[expect(clippy::disallowed_methods, reason = "checked here for everybody")]
pub fn interface_name(ifindex: IfIndex) -> Option<String> {
    let name = nix::net::if_::if_indextoname(ifindex.get()).ok()?;
    let name = name.to_string_lossy().into_owned();
    (!name.is_empty()).then_some(name)
}

/// An interface of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub ifindex: IfIndex,
    /// Its name.
    pub name: String,
    /// The kernel's name for its kind (`veth`, `bridge`); empty for hardware.
    pub kind: String,
    /// Name of the bridge, bond or VRF it is in.
    pub master: Option<String>,
    /// Index of the master, if it is a bridge.
    pub bridge: Option<IfIndex>,
    /// Its own hardware address.
    pub hardware: Option<HardwareAddress>,
    /// Its other end, if that end is in another network namespace.
    pub peer: Option<Peer>,
    /// Whether it is up.
    pub up: bool,
}

/// The other end of an interface, in another network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The host's number for that namespace. The kernel may give the number to another namespace after this
    /// one is gone.
    pub nsid: i32,
    /// The interface's index in that namespace.
    pub ifindex: u32,
}

impl Link {
    /// The new or changed interfaces in the kernel's notifications (`RTMGRP_LINK`).
    pub(super) fn in_notices(notices: &[u8]) -> impl Iterator<Item = Self> {
        let links = links_in_notices(notices).into_iter();
        links.map(|raw| Self::new(raw, None))
    }

    /// Whether this is the host end of an interface in another namespace.
    pub fn is_host_end(&self) -> bool {
        self.peer.is_some() && matches!(self.kind.as_str(), "veth" | "netkit")
    }

    pub(super) fn new(raw: RawLink, master: Option<String>) -> Self {
        let RawLink {
            index,
            up,
            name,
            kind,
            lower,
            nsid,
            hardware,
            ..
        } = raw;
        let peer = nsid
            .filter(|nsid| *nsid >= 0)
            .zip(lower)
            .map(|(nsid, ifindex)| Peer { nsid, ifindex });
        Self {
            ifindex: IfIndex::new(index),
            name,
            kind,
            master,
            bridge: None,
            hardware,
            peer,
            up,
        }
    }
}

/// A snapshot of the host's interfaces.
#[derive(Clone, Debug, Default)]
pub struct Links {
    all: Vec<Link>,
    /// Positions in `all` of the host ends whose peer is in the namespace with this number.
    by_namespace: HashMap<i32, Vec<usize>>,
}

impl Links {
    pub(super) fn new(raw: Vec<RawLink>) -> Self {
        let masters: HashMap<u32, (String, bool)> = raw
            .iter()
            .map(|link| {
                let is_bridge = BRIDGES.contains(&link.kind.as_str());
                (link.index, (link.name.clone(), is_bridge))
            })
            .collect();
        let all: Vec<Link> = raw
            .into_iter()
            .map(|raw| {
                let index = raw.master;
                let master = index.and_then(|index| masters.get(&index));
                let is_bridge = master.is_some_and(|(_, is_bridge)| *is_bridge);
                Link {
                    bridge: index.filter(|_| is_bridge).map(IfIndex::new),
                    ..Link::new(raw, master.map(|(name, _)| name.clone()))
                }
            })
            .collect();
        let mut by_namespace: HashMap<i32, Vec<usize>> = HashMap::new();
        for (at, link) in all.iter().enumerate() {
            if let Some(peer) = link.peer.filter(|_| link.is_host_end()) {
                by_namespace.entry(peer.nsid).or_default().push(at);
            }
        }
        Self { all, by_namespace }
    }

    /// Every interface.
    pub fn iter(&self) -> impl Iterator<Item = &Link> {
        self.all.iter()
    }

    /// Interfaces of the host that are not host ends and belong to another network namespace, with the number
    /// of that namespace. The host receives whatever arrives for them there, in a tunnel's packets or on the
    /// lower interface.
    pub fn carriers(&self) -> impl Iterator<Item = (i32, &Link)> {
        let others = self.all.iter().filter(|link| !link.is_host_end());
        others.filter_map(|link| Some((link.peer?.nsid, link)))
    }

    /// The interface with this index.
    pub fn get(&self, ifindex: IfIndex) -> Option<&Link> {
        self.all.iter().find(|link| link.ifindex == ifindex)
    }

    /// The host ends that may belong to pods: their other end is in another namespace, and no pattern excludes
    /// their own name or that of their bridge. `*` in a pattern stands for any text.
    pub fn pod_like<'a>(&'a self, exclude: &'a [String]) -> impl Iterator<Item = &'a Link> {
        self.all.iter().filter(|link| {
            let named = |pattern: &String| {
                let mut names = [Some(&link.name), link.master.as_ref()].into_iter();
                names.any(|name| name.is_some_and(|name| matches(pattern, name)))
            };
            link.is_host_end() && !exclude.iter().any(named)
        })
    }

    /// The host ends whose other end is in the namespace with this number.
    pub(super) fn leading_to(&self, nsid: i32) -> impl Iterator<Item = &Link> {
        let positions = self.by_namespace.get(&nsid).into_iter().flatten();
        positions.map(|&at| &self.all[at])
    }
}

/// Whether the whole text matches the pattern; `*` stands for any text, including the empty one.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return rest.is_empty();
    };
    for part in parts {
        let Some(at) = rest.find(part) else {
            return false;
        };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_without_an_interface_has_no_name() {
        assert_eq!(interface_name(IfIndex::new(1)).as_deref(), Some("lo"));
        assert_eq!(interface_name(IfIndex::new(i32::MAX as u32)), None);
    }

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, text, expected) in [
            ("docker*", "docker0", true),
            ("docker*", "docker", true),
            ("docker*", "mydocker0", false),
            ("br-*", "br-0a1b", true),
            ("lxc_health", "lxc_health", true),
            ("lxc_health", "lxc_health1", false),
            ("*", "anything", true),
            ("*0", "veth0", true),
            ("*0", "veth01", false),
            ("v*t*0", "veth0", true),
            ("v*t*0", "veh0", false),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("a**b", "axb", true),
            ("", "x", false),
            ("", "", true),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern:?} {text:?}");
        }
    }

    fn raw(index: u32, name: &str, kind: &str) -> RawLink {
        RawLink {
            index,
            name: name.into(),
            kind: kind.into(),
            ..RawLink::default()
        }
    }

    #[test]
    fn pod_interfaces_are_recognised_by_kind_peer_and_pattern() {
        let to = |nsid, link| RawLink {
            nsid: Some(nsid),
            lower: Some(2),
            ..link
        };
        let links = Links::new(vec![
            raw(1, "lo", ""),
            raw(2, "eth0", ""),
            raw(3, "docker0", "bridge"),
            to(0, raw(4, "veth4", "veth")),
            RawLink {
                master: Some(3),
                ..to(1, raw(5, "veth5", "veth"))
            },
            // Both ends on the host.
            RawLink {
                lower: Some(7),
                ..raw(6, "veth6", "veth")
            },
            to(2, raw(8, "nk8", "netkit")),
            to(3, raw(9, "lxc_health", "veth")),
            // A tunnel that was created in another namespace.
            to(0, raw(10, "gre1", "gre")),
        ]);
        let exclude = ["docker*".to_owned(), "lxc_health".to_owned()];
        let found: Vec<&str> = links
            .pod_like(&exclude)
            .map(|link| link.name.as_str())
            .collect();
        assert_eq!(found, ["veth4", "nk8"]);
        assert_eq!(links.pod_like(&[]).count(), 4);
        assert_eq!(
            links.get(IfIndex::new(5)).unwrap().master.as_deref(),
            Some("docker0")
        );
        assert_eq!(
            links.get(IfIndex::new(5)).unwrap().bridge,
            Some(IfIndex::new(3))
        );
        assert_eq!(links.get(IfIndex::new(4)).unwrap().bridge, None);
        let found: Vec<IfIndex> = links.leading_to(0).map(|link| link.ifindex).collect();
        assert_eq!(found, [IfIndex::new(4)]);
        let found: Vec<_> = links
            .carriers()
            .map(|(nsid, link)| (nsid, link.ifindex))
            .collect();
        assert_eq!(found, [(0, IfIndex::new(10))]);
    }
}
