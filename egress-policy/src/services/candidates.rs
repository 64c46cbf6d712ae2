//! Which Services a policy may be about.

use std::sync::Arc;

use egress_common::{address::Address, classes::ClassSet, protocol::bits, records::PortClass};

use super::{ServiceName, Services};
use crate::{
    compile::Compiled,
    prefix::{Prefix, to_mapped},
};

/// Services by their endpoints.
#[derive(Debug)]
pub(super) struct Index {
    names: Vec<Arc<ServiceName>>,
    /// Each endpoint's address, and the place of its Service in `names`. In order.
    addresses: Vec<(Address, u32)>,
    /// The same for the ports of endpoints that are not the port of the Service.
    moved: Vec<(u16, u32)>,
}

impl Index {
    pub(super) fn new(services: &Services) -> Self {
        let names: Vec<_> = services.names().into_iter().cloned().collect();
        let (mut addresses, mut moved) = (Vec::new(), Vec::new());
        for (name, place) in names.iter().zip(0..) {
            let present = services.all.get(name);
            let present = present.into_iter().flat_map(|service| &service.ports);
            let present = present.flat_map(|port| {
                let endpoints = port.endpoints.iter();
                endpoints.map(|endpoint| (port.route(), *endpoint))
            });
            let lost = services.lost.get(name);
            let lost = lost.into_iter().flat_map(|lost| &lost.endpoints);
            let lost = lost.map(|(route, endpoint, _)| (*route, *endpoint));
            for (route, endpoint) in present.chain(lost) {
                addresses.push((to_mapped(endpoint.ip()), place));
                if endpoint.port() != route.port || route.node_port.is_some() {
                    moved.push((endpoint.port(), place));
                }
            }
        }
        addresses.sort_unstable();
        addresses.dedup();
        moved.sort_unstable();
        moved.dedup();
        Self {
            names,
            addresses,
            moved,
        }
    }

    /// The Services of which a prefix of the policy has an endpoint, or which lead to a port that the policy denies
    /// everywhere. All others have only endpoints of which the policy says the same as of the Service.
    pub(super) fn candidates(&self, policy: &Compiled) -> Vec<&Arc<ServiceName>> {
        let mut places: Vec<u32> = Vec::new();
        let with_entries = policy.cidrs.iter();
        for cidr in with_entries.filter(|cidr| !cidr.classes.is_empty()) {
            let network = Prefix::of_map(cidr.network, cidr.prefix_len);
            let first = self.addresses.partition_point(|(of, _)| *of < cidr.network);
            let endpoints = self.addresses[first..].iter();
            // The addresses of a prefix follow each other. IPv4 addresses may be among those of an IPv6 prefix.
            let endpoints = endpoints.take_while(|(of, _)| network.spans(of));
            places.extend(endpoints.map(|(_, place)| *place));
        }
        let record = &policy.record;
        let denied = record.any.and(record.deny);
        for class in record
            .classes
            .iter()
            .zip(0..)
            .filter_map(|(class, number)| denied.meets(ClassSet::one(number)).then_some(class))
        {
            places.extend(self.moved_to(class));
        }
        places.sort_unstable();
        places.dedup();
        let names = places.into_iter();
        names
            .filter_map(|place| self.names.get(place as usize))
            .collect()
    }

    /// The Services with an endpoint on a port of this class, which is not the port of the Service.
    fn moved_to(&self, class: &PortClass) -> impl Iterator<Item = u32> {
        let PortClass {
            port_min,
            port_max,
            protocols,
            ..
        } = *class;
        let is_narrow = (port_min, port_max) != (0, u16::MAX);
        let concerned = is_narrow && protocols & bits::WITH_PORTS != 0;
        let first = self.moved.partition_point(|(port, _)| *port < port_min);
        let moved = self.moved[first..].iter();
        moved
            .take_while(move |(port, _)| concerned && *port <= port_max)
            .map(|(_, place)| *place)
    }
}
