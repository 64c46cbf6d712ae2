//! Services that have, or have lost, more than the agent remembers.
//!
//! Any address may be among the endpoints that are not known. So the Service is denied before all rules, at all of its
//! addresses and node ports, until it has less and nodes have followed.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use egress_common::records::PortClass;

use super::{
    Known, Transport,
    added::{About, Added, EVERYTHING, Of, Place},
    port_ranges::port_ranges,
    whole::Whole,
};
use crate::{
    annotations::At,
    compile::EntrySource,
    error::Origin,
    prefix::{Prefix, merge},
};

/// Most ranges of node ports that are denied, of each protocol.
const NODE_PORTS: usize = 64;

/// What stands in place of an entry.
const ENTRY: &str = "more endpoints than are remembered";

/// The endpoint of a Service if it is not known any more.
pub(super) fn unknown_endpoint(address: IpAddr) -> SocketAddr {
    let ip: IpAddr = if address.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    SocketAddr::new(ip, 0)
}

/// The rules that deny a Service.
pub(super) fn rules(service: &Whole, known: &Known) -> Vec<Added> {
    let mut addresses: BTreeMap<(bool, bool), Vec<IpAddr>> = BTreeMap::new();
    let cluster = service.cluster.iter().map(|cluster| (cluster.ip, false));
    for (ip, is_external) in cluster.chain(service.external.iter().map(|ip| (*ip, true))) {
        let alike = addresses.entry((is_external, ip.is_ipv4())).or_default();
        alike.push(ip);
    }
    let addresses = addresses.into_iter().map(|((is_external, _), ips)| {
        let about = about(service, ips[0], Transport::Tcp);
        let of = if is_external {
            Of::External
        } else {
            Of::ClusterIp
        };
        let to = ips.into_iter().map(Prefix::host);
        denial(&about, to.collect(), EVERYTHING, of)
    });
    let mut rules: Vec<Added> = addresses.collect();
    let mut by_transport: BTreeMap<Transport, BTreeSet<u16>> = BTreeMap::new();
    for port in &service.ports {
        let of_transport = by_transport.entry(port.route.transport).or_default();
        of_transport.extend(port.route.node_port);
    }
    let nodes = known.places.with_node_ports.iter();
    let nodes: Vec<Prefix> = nodes.chain(known.services.nodes()).copied().collect();
    let own = BTreeSet::from([&*service.name.namespace]);
    let others = known.services.node_ports_but(&own);
    for unspecified in [
        IpAddr::from(Ipv4Addr::UNSPECIFIED),
        Ipv6Addr::UNSPECIFIED.into(),
    ] {
        let of_family = nodes.iter().copied();
        let of_family = of_family.filter(|node| node.is_v4() == unspecified.is_ipv4());
        let to = merge(&of_family.collect::<Vec<_>>());
        if to.is_empty() {
            continue;
        }
        for (transport, ports) in &by_transport {
            let about = about(service, unspecified, *transport);
            rules.extend(
                classes(*transport, ports, &others)
                    .map(|class| denial(&about, to.clone(), class, Of::NodePort)),
            );
        }
    }
    rules
}

fn classes(
    transport: Transport,
    ports: &BTreeSet<u16>,
    others: &BTreeSet<u16>,
) -> impl Iterator<Item = PortClass> {
    let ranges = port_ranges(ports, NODE_PORTS, others).into_iter();
    ranges.map(move |(port_min, port_max)| PortClass {
        port_min,
        port_max,
        protocols: transport.bit(),
        ..PortClass::NONE
    })
}

fn about(service: &Whole, address: IpAddr, transport: Transport) -> Arc<About> {
    Arc::new(About {
        service: Arc::clone(&service.name),
        endpoint: unknown_endpoint(address),
        transport,
    })
}

fn denial(about: &Arc<About>, to: Vec<Prefix>, class: PortClass, of: Of) -> Added {
    Added {
        to,
        class,
        place: Place::Before(0),
        is_denial: true,
        of,
        source: EntrySource {
            text: ENTRY.into(),
            origin: Origin::Service(Arc::clone(&about.service)),
            at: At::default(),
        },
        about: Arc::clone(about),
    }
}
