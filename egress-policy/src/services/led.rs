//! Connections that a node translates: whether a policy denies where they lead.
//!
//! The rules for Services come after a Service has changed, and a node knows connections that are older. So each of these
//! is judged by the endpoint that it really has.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
};

use egress_common::{
    classes::ClassSet,
    protocol,
    records::RANGE_SERVICES,
    verdict::{Verdict, judge},
};

use super::{Known, Services, Transport, added::Of, judge::Judge, whole::Endpoint};
use crate::{Resolver, compile::Compiled, prefix::to_mapped};

/// A connection of a pod whose destination a node translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Led {
    /// The pod's address.
    pub from: IpAddr,
    /// The protocol.
    pub transport: Transport,
    /// The address and port to which the pod sends.
    pub to: SocketAddr,
    /// Those to which the node sends instead.
    pub endpoint: SocketAddr,
}

/// The classes of names that a pod has resolved to an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Learned {
    /// All of them.
    pub all: ClassSet,
    /// Those that count even if the address is internal.
    pub internal: ClassSet,
}

impl Transport {
    /// The transport of a protocol's number.
    pub const fn of_protocol(protocol: u8) -> Option<Self> {
        match protocol {
            protocol::TCP => Some(Self::Tcp),
            protocol::UDP => Some(Self::Udp),
            protocol::SCTP => Some(Self::Sctp),
            _ => None,
        }
    }
}

/// The addresses and ports of Services.
struct ServiceAddresses {
    cluster: HashSet<IpAddr>,
    /// With the places in `ports` of the Services that have each.
    external: HashMap<IpAddr, Vec<usize>>,
    /// The ports of each Service with external addresses.
    ports: Vec<HashSet<(Transport, u16)>>,
    node_ports: HashSet<(Transport, u16)>,
}

impl ServiceAddresses {
    fn of(services: &Services) -> Self {
        let mut addresses = Self {
            cluster: HashSet::new(),
            external: HashMap::new(),
            ports: Vec::new(),
            node_ports: HashSet::new(),
        };
        for service in services
            .names()
            .into_iter()
            .filter_map(|name| services.whole(name))
        {
            addresses
                .cluster
                .extend(service.cluster.iter().map(|cluster| cluster.ip));
            for ip in &service.external {
                let places = addresses.external.entry(*ip).or_default();
                places.push(addresses.ports.len());
            }
            let routes = || service.ports.iter().map(|port| port.route);
            if !service.external.is_empty() {
                let ports = routes().map(|route| (route.transport, route.port));
                addresses.ports.push(ports.collect());
            }
            let at_nodes = routes().filter_map(|route| Some((route.transport, route.node_port?)));
            addresses.node_ports.extend(at_nodes);
        }
        addresses
    }

    fn has_external(&self, transport: Transport, at: SocketAddr) -> bool {
        let places = self.external.get(&at.ip()).into_iter().flatten();
        let mut ports = places.filter_map(|place| self.ports.get(*place));
        ports.any(|ports| ports.contains(&(transport, at.port())))
    }
}

/// Connections through addresses of Services, and which kinds of addresses these were. A Service may lose an address
/// while connections through it last.
#[derive(Debug, Default)]
pub struct Through(HashMap<Led, Of>);

impl Through {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Forgets a connection that is ended. Another may look like it, and go through no Service's address.
    pub fn forget(&mut self, led: &Led) {
        self.0.remove(led);
    }
}

/// Judges connections that a node translates.
pub struct Connections<'a> {
    known: &'a Known,
    addresses: ServiceAddresses,
    through: Through,
}

impl<'a> Connections<'a> {
    /// Of a cluster with these Services.
    /// `present` are all connections that are to be judged or remembered, and `before` those through Services of the
    /// last time.
    pub fn new(known: &'a Known, before: &Through, present: impl Iterator<Item = Led>) -> Self {
        let mut connections = Self {
            addresses: ServiceAddresses::of(&known.services),
            known,
            through: Through::default(),
        };
        let kinds = present.filter_map(|led| {
            let kind = connections.kind(&led);
            Some((led, kind.or_else(|| before.0.get(&led).copied())?))
        });
        let through = kinds.collect();
        connections.through = Through(through);
        connections
    }

    /// The connections through Services.
    pub fn into_through(self) -> Through {
        self.through
    }

    /// The connections out of these that lead to an endpoint which the policy denies, and not because of an entry for the
    /// Service. `policy` is the one without rules for Services. Each connection comes with the classes, in this policy, of
    /// names that the pod has resolved to the address to which it sends. They count as for the programs, but do not
    /// expire.
    ///
    /// Connections through an address that was never a Service's while they lasted stay: the agent judges the address to
    /// which the pod sends.
    pub fn denied(
        &self,
        policy: &Compiled,
        connections: impl Iterator<Item = (Led, Learned)>,
    ) -> Vec<Led> {
        let judge = Judge::new(policy, self.known);
        connections
            .filter(|(led, learned)| self.is_denied(&judge, led, *learned))
            .map(|(led, _)| led)
            .collect()
    }

    /// Which address of a Service the connection goes to; `None` if it goes to none.
    fn kind(&self, led: &Led) -> Option<Of> {
        let kinds = self.known.places.range(led.to.ip()).kinds;
        let address = to_mapped(led.to.ip());
        if kinds & RANGE_SERVICES != 0 || self.addresses.cluster.contains(&led.to.ip()) {
            Some(Of::ClusterIp)
        } else if self.addresses.has_external(led.transport, led.to) {
            Some(Of::External)
        } else if self
            .addresses
            .node_ports
            .contains(&(led.transport, led.to.port()))
            && self.known.nodes().any(|node| node.contains(&address))
        {
            Some(Of::NodePort)
        } else {
            None
        }
    }

    /// Whether the node leads queries to a resolver elsewhere: not to one of the resolvers, and not to an endpoint of the
    /// Service whose cluster IP the resolver has. Where the endpoints of a cluster IP are not known, it is not elsewhere.
    pub fn leads_elsewhere(&self, led: &Led, resolvers: &[Resolver]) -> bool {
        let are_resolvers = |at: SocketAddr| {
            resolvers.contains(&Resolver {
                address: at.ip(),
                port: at.port(),
            })
        };
        if led.transport == Transport::Sctp || !are_resolvers(led.to) || are_resolvers(led.endpoint)
        {
            return false;
        }
        let ip = led.to.ip();
        let kinds = self.known.places.range(ip).kinds;
        if kinds & RANGE_SERVICES == 0 && !self.addresses.cluster.contains(&ip) {
            return true;
        }
        let services = &self.known.services;
        let names = services.names().into_iter();
        let endpoints: HashSet<SocketAddr> = names
            .filter_map(|name| services.whole(name))
            .filter(|service| service.cluster.iter().any(|cluster| cluster.ip == ip))
            .flat_map(|service| service.ports)
            .filter(|port| port.route.transport == led.transport)
            .filter(|port| port.route.port == led.to.port())
            .flat_map(|port| port.of_family(ip.is_ipv4()))
            .map(|endpoint| endpoint.at)
            .collect();
        !endpoints.is_empty() && !endpoints.contains(&led.endpoint)
    }

    fn is_denied(&self, judged_by: &Judge<'_>, led: &Led, learned: Learned) -> bool {
        let Led {
            from: _,
            transport,
            to,
            endpoint,
        } = *led;
        let Some(&of) = self.through.0.get(led) else {
            return false;
        };
        let at = (transport, to.port());
        // The gate decides about queries to resolvers.
        if judged_by.is_resolver(to, transport) {
            return false;
        }
        let record = &judged_by.policy.record;
        let endpoint = Endpoint {
            at: endpoint,
            lost: None,
        };
        let destination = judged_by.endpoint(&endpoint, transport);
        if judge(record, &destination, transport.bit(), endpoint.at.port()) == Verdict::Pass {
            return false;
        }
        let mut service = judged_by.destination(to.ip(), at);
        (service.learned, service.learned_internal) = (learned.all, learned.internal);
        let matching = record.ports.matching(transport.bit(), to.port());
        let learned_here = service.learned_classes(record).and(matching);
        let seen = match of {
            Of::ClusterIp => {
                let mut seen = judged_by.seen_at(to.ip(), at);
                seen.exact |= learned_here;
                seen
            }
            Of::External => judged_by.seen_at_external(to.ip(), at),
            Of::NodePort => judged_by.seen_at_nodes(to.is_ipv4(), at),
        };
        if judged_by.denial(&seen, transport, &[endpoint]).is_some() {
            return true;
        }
        // Nothing denies the endpoint that does not deny the Service. So the Service decides, unless it is open because of
        // its endpoints.
        judge(record, &service, transport.bit(), to.port()) != Verdict::Pass
    }
}
