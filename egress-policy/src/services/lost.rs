//! What Services have lost within the last minute.
//!
//! A node follows the API server with some delay, and translates connections that it knows as before. So what a Service
//! has lost denies for [`LASTS`] as if it were still there. It opens nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use egress_common::records::Range;

use super::{Places, Service, ServiceName, Services, Transport, whole::Route};
use crate::Resolver;

/// How long a lost part counts at least. A node needs some seconds to follow (kube-proxy tries again after 30 seconds,
/// `--iptables-sync-period`).
const LASTS: Duration = Duration::from_secs(60);

/// A part of a Service that it can lose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Cluster(IpAddr),
    External(IpAddr),
    Endpoint(Route, SocketAddr),
}

/// What a Service has lost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lost {
    pub(super) cluster: Vec<IpAddr>,
    pub(super) external: Vec<IpAddr>,
    /// Endpoints, each with the kind of its address when it was lost: the address may have been a pod's or a node's that
    /// is gone.
    pub(super) endpoints: Vec<(Route, SocketAddr, Range)>,
}

impl Lost {
    fn add(&mut self, part: Part, range: Range) {
        match part {
            Part::Cluster(ip) => self.cluster.push(ip),
            Part::External(ip) => self.external.push(ip),
            Part::Endpoint(route, endpoint) => self.endpoints.push((route, endpoint, range)),
        }
    }
}

fn parts(service: &Service) -> BTreeSet<Part> {
    let cluster = service.cluster.iter().map(|ip| Part::Cluster(*ip));
    let external = service.external.iter().map(|ip| Part::External(*ip));
    let endpoints = service.ports.iter().flat_map(|port| {
        let endpoints = port.endpoints.iter();
        endpoints.map(|endpoint| Part::Endpoint(port.route(), *endpoint))
    });
    cluster.chain(external).chain(endpoints).collect()
}

/// Where packets to a Service arrive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    ips: BTreeSet<IpAddr>,
    ports: BTreeSet<(Transport, u16)>,
    node_ports: BTreeSet<(Transport, u16)>,
}

impl Addresses {
    /// Those of a resolver.
    pub fn of_resolver(resolver: &Resolver) -> Self {
        let Resolver { address, port } = *resolver;
        let transports = [Transport::Udp, Transport::Tcp];
        Self {
            ips: [address].into(),
            ports: transports.map(|transport| (transport, port)).into(),
            node_ports: BTreeSet::new(),
        }
    }

    /// Whether this address and port are the Service's. A node port is at any address.
    pub fn contain(&self, transport: Transport, at: SocketAddr) -> bool {
        let port = (transport, at.port());
        self.node_ports.contains(&port) || self.ports.contains(&port) && self.ips.contains(&at.ip())
    }
}

/// The Services of the API server, and what these have lost.
#[derive(Debug)]
pub struct Losses {
    present: Arc<Services>,
    /// Since when each part is lost, and the kind of an endpoint's address before.
    lost: BTreeMap<Arc<ServiceName>, BTreeMap<Part, (Instant, Range)>>,
    with_lost: Arc<Services>,
}

impl Losses {
    /// No Service has lost anything.
    pub fn new(present: Arc<Services>) -> Self {
        Self {
            with_lost: Arc::clone(&present),
            present,
            lost: BTreeMap::new(),
        }
    }

    /// The Services with what they have lost.
    pub fn services(&self) -> &Arc<Services> {
        &self.with_lost
    }

    /// The Services as the API server has them.
    pub fn present(&self) -> &Arc<Services> {
        &self.present
    }

    /// Takes the Services as the API server has them at this time. `places` are the kinds of addresses until now.
    pub fn take(&mut self, services: &Arc<Services>, places: &Places, now: Instant) {
        if Arc::ptr_eq(&self.present, services) {
            return;
        }
        for name in services.changed(&self.present) {
            let of = |services: &Services| services.get(&name).map(|service| parts(service));
            let after = of(services).unwrap_or_default();
            let lost = self.lost.entry(Arc::clone(&name)).or_default();
            for part in of(&self.present).unwrap_or_default() {
                if !after.contains(&part) {
                    let range = match part {
                        Part::Cluster(_) | Part::External(_) => Range::default(),
                        Part::Endpoint(_, endpoint) => places.range(endpoint.ip()),
                    };
                    lost.insert(part, (now, range));
                }
            }
            lost.retain(|part, _| !after.contains(part));
            if lost.is_empty() {
                self.lost.remove(&name);
            }
        }
        self.present = Arc::clone(services);
        self.renew();
    }

    /// The Services of which something has been lost for so long that it may be forgotten.
    pub fn due(&self, now: Instant) -> Vec<Arc<ServiceName>> {
        let is_due = |(since, _): &(Instant, Range)| now.duration_since(*since) >= LASTS;
        let lost = self.lost.iter();
        lost.filter(|(_, parts)| parts.values().any(is_due))
            .map(|(name, _)| Arc::clone(name))
            .collect()
    }

    /// Where packets arrive that a node translates for this Service, or has translated lately.
    pub fn addresses(&self, name: &ServiceName) -> Addresses {
        let mut addresses = Addresses::default();
        if let Some(service) = self.with_lost.whole(name) {
            addresses
                .ips
                .extend(service.cluster.iter().map(|cluster| cluster.ip));
            addresses.ips.extend(&service.external);
            for port in &service.ports {
                let Route {
                    transport,
                    port,
                    node_port,
                } = port.route;
                addresses.ports.insert((transport, port));
                addresses
                    .node_ports
                    .extend(node_port.map(|port| (transport, port)));
            }
        }
        addresses
    }

    /// Forgets what these Services have lost and that is [due](Self::due).
    pub fn forget(&mut self, names: &[Arc<ServiceName>], now: Instant) {
        for name in names {
            if let Some(lost) = self.lost.get_mut(name) {
                lost.retain(|_, (since, _)| now.duration_since(*since) < LASTS);
                if lost.is_empty() {
                    self.lost.remove(name);
                }
            }
        }
        self.renew();
    }

    fn renew(&mut self) {
        let lost = self.lost.iter().map(|(name, parts)| {
            let mut lost = Lost::default();
            for (part, (_, range)) in parts {
                lost.add(*part, *range);
            }
            (Arc::clone(name), lost)
        });
        let lost: BTreeMap<_, _> = lost.collect();
        self.with_lost = if lost.is_empty() {
            Arc::clone(&self.present)
        } else {
            Arc::new(self.present.with_lost(lost))
        };
    }
}
