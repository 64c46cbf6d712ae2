//! A Service with what it has lost lately.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use egress_common::records::Range;

use super::{Service, ServiceName, ServicePort, Transport, lost::Lost};

/// Most external addresses, each at one port, of a Service that is not closed, with those that it has lost.
const EXTERNAL: usize = 8_192;

/// Where packets to a port of a Service arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Route {
    pub(super) transport: Transport,
    pub(super) port: u16,
    pub(super) node_port: Option<u16>,
}

/// Whether a Service is closed because of what it has.
pub(super) fn is_too_large(service: &Service) -> bool {
    service.has_more || are_too_many(service.external.len(), service.ports.len())
}

fn are_too_many(external: usize, ports: usize) -> bool {
    external.saturating_mul(ports) > EXTERNAL
}

impl ServicePort {
    pub(super) fn route(&self) -> Route {
        Route {
            transport: self.transport,
            port: self.port,
            node_port: self.node_port,
        }
    }
}

/// An endpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct Endpoint {
    pub(super) at: SocketAddr,
    /// If the Service has lost it: the kind of its address before.
    pub(super) lost: Option<Range>,
}

/// A port with its endpoints.
#[derive(Debug)]
pub(super) struct WholePort {
    pub(super) route: Route,
    pub(super) endpoints: Vec<Endpoint>,
}

impl WholePort {
    /// The endpoints of one family.
    pub(super) fn of_family(&self, is_v4: bool) -> Vec<Endpoint> {
        let endpoints = self.endpoints.iter().copied();
        endpoints
            .filter(|endpoint| endpoint.at.is_ipv4() == is_v4)
            .collect()
    }
}

/// A Service with what it has lost lately.
#[derive(Debug)]
pub(super) struct Whole {
    pub(super) name: Arc<ServiceName>,
    pub(super) cluster: Vec<ClusterIp>,
    pub(super) external: Vec<IpAddr>,
    pub(super) ports: Vec<WholePort>,
    /// Whether it has, or has lost, more than is known.
    pub(super) is_closed: bool,
}

/// A cluster IP.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClusterIp {
    pub(super) ip: IpAddr,
    pub(super) is_lost: bool,
}

impl Whole {
    /// At least one of the two has to be given.
    pub(super) fn new(
        name: &Arc<ServiceName>,
        service: Option<&Service>,
        lost: Option<&Lost>,
    ) -> Self {
        let mut whole = Self {
            name: Arc::clone(name),
            cluster: Vec::new(),
            external: Vec::new(),
            ports: Vec::new(),
            is_closed: false,
        };
        if let Some(service) = service {
            let is_lost = false;
            let cluster = service.cluster.iter();
            whole
                .cluster
                .extend(cluster.map(|ip| ClusterIp { ip: *ip, is_lost }));
            whole.external.extend(&service.external);
            whole.is_closed = is_too_large(service);
            whole.ports.extend(service.ports.iter().map(|port| {
                let endpoints = port.endpoints.iter();
                WholePort {
                    route: port.route(),
                    endpoints: endpoints
                        .map(|at| Endpoint {
                            at: *at,
                            lost: None,
                        })
                        .collect(),
                }
            }));
        }
        if let Some(lost) = lost {
            let is_lost = true;
            let cluster = lost.cluster.iter();
            whole
                .cluster
                .extend(cluster.map(|ip| ClusterIp { ip: *ip, is_lost }));
            whole.external.extend(&lost.external);
            let mut places: BTreeMap<Route, usize> =
                whole.ports.iter().map(|port| port.route).zip(0..).collect();
            let mut place_of = |whole: &mut Self, route: &Route| {
                *places.entry(*route).or_insert_with(|| {
                    whole.ports.push(WholePort {
                        route: *route,
                        endpoints: Vec::new(),
                    });
                    whole.ports.len() - 1
                })
            };
            whole.is_closed |= lost.closed.is_some();
            for route in lost.closed.iter().flatten() {
                place_of(&mut whole, route);
            }
            for (route, at, range) in &lost.endpoints {
                let place = place_of(&mut whole, route);
                whole.ports[place].endpoints.push(Endpoint {
                    at: *at,
                    lost: Some(*range),
                });
            }
        }
        // Each port at each of these addresses gets a rule.
        whole.is_closed |= are_too_many(whole.external.len(), whole.ports.len());
        whole
    }

    /// A Service that has the lost parts beside the present ones.
    pub(super) fn into_service(self) -> Service {
        let cluster = self.cluster.into_iter();
        let ports = self.ports.into_iter().map(|port| {
            let endpoints = port.endpoints.into_iter();
            let mut endpoints: Vec<SocketAddr> = endpoints.map(|endpoint| endpoint.at).collect();
            endpoints.sort_unstable();
            let Route {
                transport,
                port,
                node_port,
            } = port.route;
            ServicePort {
                transport,
                port,
                node_port,
                endpoints,
            }
        });
        Service {
            name: self.name,
            cluster: cluster.map(|cluster| cluster.ip).collect(),
            external: self.external,
            ports: ports.collect(),
            has_more: self.is_closed,
        }
    }
}
