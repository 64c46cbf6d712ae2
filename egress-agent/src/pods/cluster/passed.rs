//! Services with what they had for a moment, joined from both kinds of objects.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use egress_policy::services::{Passed, Service, ServiceName, ServicePort};

use super::{
    moments::{Address, Had, MOST, OF_NAMESPACE, Part},
    services::{EndpointFacts, PortFacts, ServiceFacts},
};

/// A Service that had something for a moment, before its ports are joined with endpoints.
pub(super) struct Candidate<'a> {
    name: Arc<ServiceName>,
    cluster: BTreeSet<IpAddr>,
    external: BTreeSet<IpAddr>,
    /// Each port, and whether the Service has it now.
    ports: BTreeMap<&'a PortFacts, bool>,
    /// The endpoints that it had, by the name of their port.
    had: HashMap<&'a str, Vec<(Option<u16>, IpAddr)>>,
    /// Those that it has.
    slices: &'a [&'a EndpointFacts],
    had_more: bool,
    had_more_addresses: bool,
}

impl<'a> Candidate<'a> {
    /// `had` is what the Service and its slices had, the rest what they have. `None` if there was no Service.
    pub(super) fn new(
        name: &ServiceName,
        had: [Option<&'a Had>; 2],
        service: Option<&'a ServiceFacts>,
        slices: &'a [&'a EndpointFacts],
    ) -> Option<Self> {
        let had = || had.iter().flatten();
        let mut candidate = Self {
            name: Arc::new(name.clone()),
            cluster: service
                .into_iter()
                .flat_map(ServiceFacts::cluster)
                .collect(),
            external: service
                .into_iter()
                .flat_map(ServiceFacts::external)
                .collect(),
            ports: BTreeMap::new(),
            had: HashMap::new(),
            slices,
            had_more: had().any(|had| had.had_more()),
            had_more_addresses: had().any(|had| had.had_more_addresses()),
        };
        for address in had().flat_map(|had| had.addresses()) {
            match address {
                Address::Cluster(ip) => candidate.cluster.insert(*ip),
                Address::External(ip) => candidate.external.insert(*ip),
            };
        }
        for part in had().flat_map(|had| had.parts()) {
            match part {
                Part::Port(port) => {
                    candidate.ports.insert(port, false);
                }
                Part::Endpoint(name, number, address) => {
                    let of_name = candidate.had.entry(name).or_default();
                    of_name.push((*number, *address));
                }
            }
        }
        let present = service.into_iter().flat_map(ServiceFacts::ports);
        candidate.ports.extend(present.map(|port| (port, true)));
        (!candidate.cluster.is_empty()).then_some(candidate)
    }

    /// How many endpoints of ports the Service gets. This joins nothing.
    fn size(&self) -> usize {
        let present = sizes(self.slices);
        let sizes = self.ports.iter().map(|(port, is_present)| {
            let had = self.had.get(&*port.name).map_or(0, Vec::len);
            let present = present.get(&*port.name).copied();
            had + present.filter(|_| !is_present).unwrap_or_default()
        });
        sizes.fold(0, usize::saturating_add)
    }

    /// What the Service had. If that is too much, its ports have no endpoints.
    fn passed(self, is_too_much: bool) -> Passed {
        let had_more = self.had_more || is_too_much;
        let ports = self.ports.iter().map(|(port, is_present)| {
            let had = self.had.get(&*port.name).into_iter().flatten();
            let had =
                had.map(|(number, address)| SocketAddr::new(*address, number.unwrap_or(port.port)));
            let present = self.slices.iter().filter(|_| !is_present);
            let present = present.flat_map(|slice| slice.at(port));
            let mut endpoints: Vec<SocketAddr> = if had_more {
                Vec::new()
            } else {
                had.chain(present).collect()
            };
            endpoints.sort_unstable();
            endpoints.dedup();
            ServicePort {
                transport: port.transport,
                port: port.port,
                node_port: port.node_port,
                endpoints,
            }
        });
        Passed {
            service: Arc::new(Service {
                ports: ports.collect(),
                name: self.name,
                cluster: self.cluster.into_iter().collect(),
                external: self.external.into_iter().collect(),
                has_more: false,
            }),
            had_more,
            had_more_addresses: self.had_more_addresses,
        }
    }
}

/// How many addresses of these slices have a port of each name.
pub(super) fn sizes<'a>(slices: &[&'a EndpointFacts]) -> HashMap<&'a str, usize> {
    let mut sizes: HashMap<&str, usize> = HashMap::new();
    for (name, addresses) in slices.iter().flat_map(|slice| slice.sizes()) {
        let of_name = sizes.entry(name).or_default();
        *of_name = of_name.saturating_add(addresses);
    }
    sizes
}

/// What these Services had. The largest ones of a namespace are too much if all together are.
pub(super) fn within_limits(candidates: Vec<Candidate<'_>>) -> Vec<Passed> {
    let mut sized: Vec<(usize, Candidate<'_>)> = candidates
        .into_iter()
        .map(|candidate| (candidate.size(), candidate))
        .collect();
    sized.sort_by(|(a, one), (b, other)| (a, &one.name).cmp(&(b, &other.name)));
    let mut of_namespaces: HashMap<Box<str>, usize> = HashMap::new();
    let passed = sized.into_iter().map(|(size, candidate)| {
        let namespace = candidate.name.namespace.clone();
        let of_namespace = of_namespaces.entry(namespace).or_default();
        *of_namespace = of_namespace.saturating_add(size);
        candidate.passed(size > MOST || *of_namespace > OF_NAMESPACE)
    });
    passed.collect()
}
