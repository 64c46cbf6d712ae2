//! The kinds of addresses on a node, as the kernel's maps `ranges` and `tunnels` have them.

use std::{collections::HashMap, net::IpAddr};

use egress_common::{
    address::Address,
    classes::ClassSet,
    records::{Policy, RANGE_INTERNAL, RANGE_PROTECTED, Range, TunnelKey},
    translation::{embedded_v4, prefix_len},
    verdict::{Destination, Translated, is_dns},
};

use super::{
    Transport,
    whole::{Endpoint, Whole},
};
use crate::{
    Cidr,
    prefix::{Prefix, mask, to_mapped},
};

/// Finds the longest prefix that contains an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Trie<T> {
    entries: HashMap<(u32, Address), T>,
    /// The lengths that there are, the longest first.
    lengths: Vec<u32>,
}

impl<T: Copy + Default> Trie<T> {
    /// `entries` are as a map of the kernel has them: each has the bits of all prefixes that contain it.
    pub(super) fn new(entries: impl IntoIterator<Item = (Address, u32, T)>) -> Self {
        let entries = entries.into_iter();
        let entries: HashMap<_, _> = entries
            .map(|(network, length, value)| ((length, network), value))
            .collect();
        let mut lengths: Vec<u32> = entries.keys().map(|(length, _)| *length).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.dedup();
        Self { entries, lengths }
    }

    pub(super) fn of_cidrs(cidrs: &[Cidr]) -> Trie<ClassSet> {
        let entries = cidrs.iter();
        Trie::new(entries.map(|cidr| (cidr.network, cidr.prefix_len, cidr.classes)))
    }

    pub(super) fn get(&self, address: &Address) -> T {
        self.within(address, u128::BITS)
    }

    /// The value of all addresses of this prefix.
    pub(super) fn within(&self, network: &Address, prefix_len: u32) -> T {
        let lengths = self.lengths.iter().filter(|length| **length <= prefix_len);
        let mut found =
            lengths.filter_map(|length| self.entries.get(&(*length, mask(*network, *length))));
        found.next().copied().unwrap_or_default()
    }
}

/// The kinds of addresses on a node, and the tunnels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    ranges: Trie<Range>,
    tunnels: Vec<TunnelKey>,
    /// Internal addresses that are not those of Services: a node may translate node ports there.
    pub(super) with_node_ports: Vec<Prefix>,
}

impl Places {
    /// `ranges` and `tunnels` are the entries of the kernel's maps; `internal` are the internal prefixes without those of
    /// Services.
    pub fn new(
        ranges: Vec<(Address, u32, Range)>,
        tunnels: Vec<TunnelKey>,
        internal: Vec<Prefix>,
    ) -> Self {
        Self {
            ranges: Trie::new(ranges),
            tunnels,
            with_node_ports: internal,
        }
    }

    /// Whether packets to this address and port are queries to a resolver, which the gate decides.
    pub(super) fn is_resolver(&self, address: &Address, transport: Transport, port: u16) -> bool {
        let range = self.ranges.get(address);
        transport != Transport::Sctp && range.is_resolver_at(port)
    }

    /// The kind of an address.
    pub(super) fn range(&self, address: IpAddr) -> Range {
        self.ranges.get(&to_mapped(address))
    }

    /// The entries of the maps for an address of this kind under a policy with these prefixes.
    pub(super) fn destination(
        &self,
        policy: &Policy,
        cidrs: &Trie<ClassSet>,
        address: &Address,
        range: Range,
        (transport, port): (Transport, u16),
    ) -> Destination {
        let tunnel = self.is_tunnel(transport, port);
        let mut destination = Destination {
            cidr: cidrs.get(address),
            ranges: range.kinds,
            tunnel: tunnel.into(),
            ..Destination::default()
        };
        if let Some(v4) = embedded_v4(address, range.kinds) {
            let translated = Translated {
                cidr: cidrs.get(&v4),
                ranges: self.ranges.get(&v4).kinds,
            };
            destination.add_translated(policy, translated);
        }
        destination
    }

    fn is_tunnel(&self, transport: Transport, port: u16) -> bool {
        let key = TunnelKey::new(transport.bit(), port);
        self.tunnels.contains(&key)
    }

    /// Whether port and protocol make a difference to an internal address.
    pub(super) fn is_special(&self, transport: Transport, port: u16) -> bool {
        is_dns(transport.bit(), port) || self.is_tunnel(transport, port)
    }

    fn is_internal(&self, address: IpAddr) -> bool {
        self.range(address).kinds & RANGE_INTERNAL != 0
    }

    /// Whether an endpoint of the Service may be denied without a rule while the Service is not.
    pub(super) fn are_suspect(&self, service: &Whole) -> bool {
        let mut external = service.external.iter();
        service.is_closed
            || external.any(|address| !self.is_internal(*address))
            || service.ports.iter().any(|port| {
                let mut endpoints = port.endpoints.iter();
                endpoints.any(|endpoint| {
                    !is_plain(self.range_of(endpoint))
                        || self.is_special(port.route.transport, endpoint.at.port())
                })
            })
    }

    /// The kind of an endpoint's address.
    pub(super) fn range_of(&self, endpoint: &Endpoint) -> Range {
        let lost = endpoint.lost;
        lost.unwrap_or_else(|| self.range(endpoint.at.ip()))
    }
}

/// Whether nothing but an internal address that nothing distinguishes is there.
pub(super) fn is_plain(range: Range) -> bool {
    range.kinds & (RANGE_INTERNAL | RANGE_PROTECTED) == RANGE_INTERNAL
        && prefix_len(range.kinds) == 0
}
