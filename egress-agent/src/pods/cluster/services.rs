//! The cluster's Services and their endpoints.
//!
//! Every endpoint counts, ready or not: each node chooses which ones it uses.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use egress_policy::{
    Prefix, prefix,
    services::{Passed, Service, ServiceName, ServicePort, Services, Transport},
};
use k8s_openapi::api::{core::v1, discovery::v1 as discovery};

use super::{
    facts::NodeFacts,
    health::{Health, Watched},
    moments::{self, Address, Moments, Part},
    passed::{self, Candidate},
    table::Table,
};

/// Most endpoints, each at one port, of a Service, and of all Services of a namespace. Both objects that they come from
/// may have thousands of ports, and the product of ports and addresses must not decide how much memory the agent takes.
const ENDPOINTS: usize = 65_536;
const OF_NAMESPACE: usize = 262_144;
/// Most ports of a Service, and of all Services of a namespace, except for those with few: each pod may need a rule for
/// each port.
const PORTS: usize = 4_096;
const PORTS_OF_NAMESPACE: usize = 16_384;
const FEW_PORTS: usize = 16;

/// The label of a slice with the name of its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// A Service with an address or a node port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServiceFacts {
    name: Arc<ServiceName>,
    cluster: Vec<IpAddr>,
    external: Vec<IpAddr>,
    ports: Vec<PortFacts>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PortFacts {
    pub(super) name: Box<str>,
    pub(super) transport: Transport,
    pub(super) port: u16,
    pub(super) node_port: Option<u16>,
}

/// An `EndpointSlice`, or an Endpoints object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EndpointFacts {
    service: ServiceName,
    groups: Vec<Group>,
}

/// Addresses with the same ports.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    addresses: Vec<IpAddr>,
    /// The name of the Service's port, and the number. Without a number it is that of the Service.
    ports: Vec<(Box<str>, Option<u16>)>,
}

impl ServiceFacts {
    /// Reduces a Service; `None` for one that no node translates: without a cluster IP, or for a name elsewhere.
    pub(super) fn read(service: v1::Service) -> Option<Self> {
        let spec = service.spec?;
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let cluster = spec
            .cluster_ips
            .into_iter()
            .flatten()
            .chain(spec.cluster_ip);
        let cluster = addresses(cluster);
        let status = service.status.and_then(|status| status.load_balancer);
        let ingress = status.and_then(|balancer| balancer.ingress);
        let ingress = ingress.into_iter().flatten().filter_map(|one| one.ip);
        let external = spec.external_ips.into_iter().flatten().chain(ingress);
        let external = addresses(external);
        let ports: Vec<PortFacts> = spec
            .ports
            .into_iter()
            .flatten()
            .filter_map(PortFacts::read)
            .collect();
        // Nodes skip headless Services, whatever other addresses these have.
        if cluster.is_empty() {
            return None;
        }
        Some(Self {
            name: Arc::new(ServiceName {
                namespace: service.metadata.namespace?.into(),
                name: service.metadata.name?.into(),
            }),
            cluster,
            external,
            ports,
        })
    }

    pub(super) fn cluster(&self) -> impl Iterator<Item = IpAddr> {
        self.cluster.iter().copied()
    }

    pub(super) fn external(&self) -> impl Iterator<Item = IpAddr> {
        self.external.iter().copied()
    }

    pub(super) fn ports(&self) -> impl Iterator<Item = &PortFacts> {
        self.ports.iter()
    }

    /// How many endpoints its ports have together. This joins nothing.
    fn size(&self, endpoints: &[&EndpointFacts]) -> usize {
        let sizes = passed::sizes(endpoints);
        let of_ports = self.ports.iter().filter_map(|port| sizes.get(&*port.name));
        of_ports.fold(0, |sum, one| sum.saturating_add(*one))
    }

    /// The Service with the endpoints of its ports. If they are too many, it has none of them.
    fn with(&self, endpoints: &[&EndpointFacts], is_too_large: bool) -> Service {
        let ports = self.ports.iter().map(|port| {
            let endpoints = if is_too_large { &[] } else { endpoints };
            let mut found: Vec<SocketAddr> = endpoints.iter().flat_map(|of| of.at(port)).collect();
            found.sort_unstable();
            found.dedup();
            ServicePort {
                transport: port.transport,
                port: port.port,
                node_port: port.node_port,
                endpoints: found,
            }
        });
        Service {
            name: Arc::clone(&self.name),
            cluster: self.cluster.clone(),
            external: self.external.clone(),
            ports: ports.collect(),
            has_more: is_too_large,
        }
    }
}

impl PortFacts {
    fn read(port: v1::ServicePort) -> Option<Self> {
        Some(Self {
            name: port.name.unwrap_or_default().into(),
            transport: match port.protocol.as_deref().unwrap_or("TCP") {
                "TCP" => Transport::Tcp,
                "UDP" => Transport::Udp,
                "SCTP" => Transport::Sctp,
                _ => return None,
            },
            port: number(port.port)?,
            node_port: port.node_port.and_then(number),
        })
    }
}

impl EndpointFacts {
    /// Reduces a slice; `None` for one of no Service.
    pub(super) fn of_slice(slice: discovery::EndpointSlice) -> Option<Self> {
        let metadata = slice.metadata;
        let service = ServiceName {
            namespace: metadata.namespace?.into(),
            name: metadata.labels?.remove(SERVICE_NAME)?.into(),
        };
        let ports = slice.ports.into_iter().flatten();
        let group = Group {
            addresses: addresses(slice.endpoints.into_iter().flat_map(|one| one.addresses)),
            ports: ports
                .map(|port| {
                    (
                        port.name.unwrap_or_default().into(),
                        port.port.and_then(number),
                    )
                })
                .collect(),
        };
        Some(Self {
            service,
            groups: vec![group],
        })
    }

    /// The names of ports, each with how many addresses have it.
    pub(super) fn sizes(&self) -> impl Iterator<Item = (&str, usize)> {
        self.groups.iter().flat_map(|group| {
            let ports = group.ports.iter();
            ports.map(|(name, _)| (&**name, group.addresses.len()))
        })
    }

    /// The endpoints of a Service's port.
    pub(super) fn at(&self, port: &PortFacts) -> impl Iterator<Item = SocketAddr> {
        self.groups.iter().flat_map(|group| group.at(port))
    }

    /// Reduces an Endpoints object.
    pub(super) fn of_endpoints(endpoints: v1::Endpoints) -> Option<Self> {
        let metadata = endpoints.metadata;
        let service = ServiceName {
            namespace: metadata.namespace?.into(),
            name: metadata.name?.into(),
        };
        let groups = endpoints.subsets.into_iter().flatten().map(|subset| {
            let ready = subset.addresses.into_iter().flatten();
            let all = ready.chain(subset.not_ready_addresses.into_iter().flatten());
            let ports = subset.ports.into_iter().flatten();
            Group {
                addresses: addresses(all.map(|address| address.ip)),
                ports: ports
                    .map(|port| (port.name.unwrap_or_default().into(), number(port.port)))
                    .collect(),
            }
        });
        Some(Self {
            service,
            groups: groups.collect(),
        })
    }
}

impl Group {
    /// The endpoints of a Service's port.
    fn at(&self, port: &PortFacts) -> impl Iterator<Item = SocketAddr> {
        let named = self.ports.iter().filter(|(name, _)| *name == port.name);
        let numbers = named.map(|(_, number)| number.unwrap_or(port.port));
        numbers.flat_map(|number| {
            let addresses = self.addresses.iter();
            addresses.map(move |address| SocketAddr::new(*address, number))
        })
    }
}

fn number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}

/// The addresses of these texts, each once. A headless Service has "None", which is not an address.
fn addresses(texts: impl Iterator<Item = String>) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = texts
        .filter_map(|text| text.parse::<IpAddr>().ok())
        .map(|address| address.to_canonical())
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Notes what a Service had that was replaced.
fn note_service(facts: &ServiceFacts, moments: &mut Moments, at: Instant) {
    let addresses = facts.cluster.iter().map(|ip| Address::Cluster(*ip));
    let external = facts.external.iter().map(|ip| Address::External(*ip));
    moments.note_addresses(&facts.name, addresses.chain(external), at);
    let ports = facts.ports.iter().cloned().map(Part::Port);
    moments.note_parts(&facts.name, ports, at);
}

/// Notes what a slice had that was replaced.
fn note_endpoints(facts: &EndpointFacts, moments: &mut Moments, at: Instant) {
    let sizes = facts.sizes().map(|(_, addresses)| addresses);
    if sizes.fold(0, usize::saturating_add) > moments::MOST {
        moments.note_more(&facts.service, at);
        return;
    }
    let parts = facts.groups.iter().flat_map(|group| {
        let ports = group.ports.iter();
        ports.flat_map(|(name, number)| {
            let addresses = group.addresses.iter();
            addresses.map(|address| Part::Endpoint(name.clone(), *number, *address))
        })
    });
    moments.note_parts(&facts.service, parts, at);
}

/// The Services and endpoints of the API server, joined.
#[derive(Debug)]
pub(super) struct ServiceTables {
    pub(super) services: Table<ServiceFacts>,
    pub(super) endpoints: Table<EndpointFacts>,
    /// The Services in force.
    current: Arc<Services>,
    /// The versions of the objects that `current` was built from.
    made_from: Option<MadeFrom>,
    /// The revisions of the tables that count: endpoints come and go often.
    revisions: [u64; 2],
}

#[derive(Debug, PartialEq, Eq)]
struct MadeFrom {
    revisions: [u64; 2],
    are_complete: bool,
    nodes: u64,
}

impl Default for ServiceTables {
    fn default() -> Self {
        Self {
            services: Table::noting_replaced(note_service),
            endpoints: Table::noting_replaced(note_endpoints),
            current: Arc::default(),
            made_from: None,
            revisions: [0; 2],
        }
    }
}

impl ServiceTables {
    /// Builds `current` from the Services and endpoints that are known now.
    pub(super) fn renew(&mut self) {
        self.revisions = [self.services.revision(), self.endpoints.revision()];
    }

    fn are_complete(&self) -> bool {
        self.services.is_complete() && self.endpoints.is_complete()
    }

    /// Whether a start need not wait for them: without them a pod could reach a Service whose endpoints are denied.
    pub(super) fn are_ready(&self, health: &Health) -> bool {
        [
            (self.services.is_complete(), Watched::Services),
            (self.endpoints.is_complete(), Watched::ServiceEndpoints),
        ]
        .into_iter()
        .all(|(is_complete, watched)| is_complete || health.is_not_offered(watched))
    }

    /// The Services with their endpoints; none until both lists are known.
    pub(super) fn current(&mut self, nodes: &Table<NodeFacts>) -> Arc<Services> {
        let are_complete = self.are_complete();
        if self
            .made_from
            .as_ref()
            .is_none_or(|from| from.are_complete != are_complete)
        {
            self.renew();
        }
        let from = MadeFrom {
            revisions: self.revisions,
            are_complete,
            nodes: nodes.revision(),
        };
        if self.made_from.as_ref() == Some(&from) {
            return Arc::clone(&self.current);
        }
        self.made_from = Some(from);
        let now = Instant::now();
        self.services.forget_moments(now);
        self.endpoints.forget_moments(now);
        let made = if are_complete {
            self.make(nodes)
        } else {
            Services::default()
        };
        if *self.current != made {
            self.current = Arc::new(made);
        }
        Arc::clone(&self.current)
    }

    fn make(&self, nodes: &Table<NodeFacts>) -> Services {
        let mut endpoints: HashMap<&ServiceName, Vec<&EndpointFacts>> = HashMap::new();
        for facts in self.endpoints.values() {
            endpoints.entry(&facts.service).or_default().push(facts);
        }
        let too_large = self.too_large(&endpoints);
        let services = self.services.values().map(|facts| {
            let endpoints = endpoints.get(&*facts.name).map_or(&[][..], Vec::as_slice);
            let made = facts.with(endpoints, too_large.contains(&facts.name));
            match self.current.get(&facts.name) {
                // The same object in memory is compared at once.
                Some(former) if **former == made => Arc::clone(former),
                _ => Arc::new(made),
            }
        });
        let hosts: Vec<Prefix> = nodes
            .values()
            .flat_map(|node| node.all_addresses.iter().copied().map(Prefix::host))
            .collect();
        let mut made = Services::new(services, prefix::merge(&hosts));
        made.note_passed(self.passed(&endpoints));
        made
    }

    /// The Services with more ports or endpoints than the agent judges. Of each namespace they are the largest ones.
    fn too_large(
        &self,
        endpoints: &HashMap<&ServiceName, Vec<&EndpointFacts>>,
    ) -> HashSet<Arc<ServiceName>> {
        let sized = self.services.values().map(|facts| {
            let endpoints = endpoints.get(&*facts.name).map_or(&[][..], Vec::as_slice);
            (facts.ports.len(), facts.size(endpoints), &facts.name)
        });
        let mut too_large = HashSet::new();
        let mut of_namespaces: HashMap<&str, [usize; 2]> = HashMap::new();
        let mut sized: Vec<_> = sized.collect();
        sized.sort_unstable_by_key(|(ports, size, name)| (*ports, *size, Arc::clone(name)));
        for &(ports, _, name) in &sized {
            let [of_namespace, _] = of_namespaces.entry(&name.namespace).or_default();
            *of_namespace = of_namespace.saturating_add(ports);
            if ports > PORTS || ports > FEW_PORTS && *of_namespace > PORTS_OF_NAMESPACE {
                too_large.insert(Arc::clone(name));
            }
        }
        sized.sort_unstable_by_key(|(_, size, name)| (*size, Arc::clone(name)));
        for &(_, size, name) in &sized {
            let [_, of_namespace] = of_namespaces.entry(&name.namespace).or_default();
            *of_namespace = of_namespace.saturating_add(size);
            if size > ENDPOINTS || *of_namespace > OF_NAMESPACE {
                too_large.insert(Arc::clone(name));
            }
        }
        too_large
    }

    /// What Services had for a moment. Nodes may have seen it although no snapshot has it.
    fn passed(&self, endpoints: &HashMap<&ServiceName, Vec<&EndpointFacts>>) -> Vec<Passed> {
        let of_tables = [self.services.moments(), self.endpoints.moments()];
        let names: BTreeSet<_> = of_tables
            .iter()
            .flatten()
            .flat_map(|of| of.names())
            .collect();
        let all = names.into_iter().filter_map(|name| {
            Candidate::new(
                name,
                of_tables.map(|of| of.and_then(|of| of.get(name))),
                self.services.get(&name.namespace, &name.name),
                endpoints.get(name).map_or(&[][..], Vec::as_slice),
            )
        });
        passed::within_limits(all.collect())
    }
}

#[cfg(test)]
#[path = "services_tests.rs"]
mod tests;
