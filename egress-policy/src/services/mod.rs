//! The rules of a policy for the addresses of Services, which nodes translate.
//!
//! A node replaces the address of a Service by that of an endpoint only behind the pod's interface, so the programs
//! see the Service's address. A packet to it counts as one to each endpoint. [`judge`] finds the Services for which
//! that makes a difference, and [`added`] has the rules that are added for these.
//!
//! | an endpoint of a Service's port | then the Service's port is |
//! |---|---|
//! | is denied by a rule | denied, where that rule is |
//! | is outside, protected, a tunnel or a DNS server, and no entry allows it | denied after all rules |
//!
//! Before such a denial an entry counts that has exactly the Service's address, or a name that led there. A wider entry
//! does not: it was not written for this Service.
//!
//! If entries with their addresses allow all endpoints, the Service's own address is allowed, too: where the last of
//! these entries is.
//!
//! | file | subject |
//! |---|---|
//! | `places` | the kinds of addresses on the node |
//! | `candidates` | which Services a policy may be about |
//! | [`judge`] | what the policy says of their endpoints |
//! | [`added`] | the rules that follow |
//! | `needed` | which of them a policy gets |
//! | `closed` | what denies a Service that has, or has lost, more than is remembered |
//! | `port_ranges` | few ranges for many ports |
//! | `coarse` | what stands for them if they are too many |
//! | `cover` | few prefixes for many addresses |
//! | [`led`] | connections that a node translates |
//! | [`lost`] | what Services have lost within the last minute |
//! | `whole` | a Service with what it has lost |
//! | `resolvers` | resolvers whose address a Service claims |

pub mod added;
mod candidates;
mod closed;
mod coarse;
mod cover;
pub mod judge;
pub mod led;
pub mod lost;
mod needed;
mod places;
mod port_ranges;
mod resolvers;
#[cfg(test)]
mod tests;
mod whole;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{Arc, OnceLock},
};

use egress_common::{address::Address, protocol::bits};
use serde::{Deserialize, Serialize};

use super::prefix::{Prefix, to_mapped};
pub use added::About;
use candidates::Index;
pub use judge::Known;
pub use led::{Connections, Learned, Led, Through};
use lost::Lost;
pub use lost::{Losses, Overflown};
pub use needed::needed;
pub use places::Places;
pub use resolvers::Claim;
use whole::Whole;

/// Namespace and name of a Service. Displayed as `shop/web`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServiceName {
    /// `metadata.namespace`.
    pub namespace: Box<str>,
    /// `metadata.name`.
    pub name: Box<str>,
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The protocol of a Service's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Transport {
    /// The one bit of [`bits`] for it.
    pub const fn bit(self) -> u8 {
        match self {
            Self::Tcp => bits::TCP,
            Self::Udp => bits::UDP,
            Self::Sctp => bits::SCTP,
        }
    }

    /// As entries have it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// A port of a Service, and where packets to it go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// The protocol.
    pub transport: Transport,
    /// The port at the Service's addresses.
    pub port: u16,
    /// The port at the addresses of nodes.
    pub node_port: Option<u16>,
    /// The endpoints, of both families, in order, each once.
    pub endpoints: Vec<SocketAddr>,
}

/// A Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its name.
    pub name: Arc<ServiceName>,
    /// Its cluster IPs, out of the ranges that the API server has for them. Nothing else has them.
    pub cluster: Vec<IpAddr>,
    /// Addresses of load balancers and external IPs. Who writes the Service may choose them.
    pub external: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Whether it has more endpoints or ports than these. It is [closed](closed) then.
    #[serde(default)]
    pub has_more: bool,
}

/// What a Service had for a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passed {
    /// The Service, with the addresses, ports and endpoints that it had.
    pub service: Arc<Service>,
    /// Whether it had more ports or endpoints than these.
    pub had_more: bool,
    /// Whether it had more external addresses than these.
    pub had_more_addresses: bool,
}

impl From<Arc<Service>> for Passed {
    fn from(service: Arc<Service>) -> Self {
        Self {
            service,
            had_more: false,
            had_more_addresses: false,
        }
    }
}

/// All Services of a cluster.
#[derive(Debug, Default)]
pub struct Services {
    all: BTreeMap<Arc<ServiceName>, Arc<Service>>,
    /// What some have lost lately.
    lost: BTreeMap<Arc<ServiceName>, Lost>,
    /// What some had for a moment.
    passed: Vec<Passed>,
    /// Addresses of nodes, where Services have node ports.
    nodes: Vec<Prefix>,
    index: OnceLock<Index>,
}

impl PartialEq for Services {
    fn eq(&self, other: &Self) -> bool {
        self.all == other.all
            && self.lost == other.lost
            && self.passed == other.passed
            && self.nodes == other.nodes
    }
}

impl Eq for Services {}

impl Known {
    /// The Services of the cluster, with what they have lost lately.
    pub fn services(&self) -> &Services {
        &self.services
    }
}

impl Services {
    /// These Services, in a cluster whose nodes have these addresses.
    pub fn new(services: impl IntoIterator<Item = Arc<Service>>, nodes: Vec<Prefix>) -> Self {
        let services = services.into_iter();
        Self {
            all: services
                .map(|service| (Arc::clone(&service.name), service))
                .collect(),
            lost: BTreeMap::new(),
            passed: Vec::new(),
            nodes,
            index: OnceLock::new(),
        }
    }

    fn with_lost(&self, lost: BTreeMap<Arc<ServiceName>, Lost>) -> Self {
        Self {
            all: self.all.clone(),
            lost,
            passed: Vec::new(),
            nodes: self.nodes.clone(),
            index: OnceLock::new(),
        }
    }

    /// Notes what Services had for a moment: it counts as what they [have lost](lost) now.
    pub fn note_passed(&mut self, passed: Vec<Passed>) {
        self.passed = passed;
    }

    /// What Services had for a moment.
    pub fn passed(&self) -> &[Passed] {
        &self.passed
    }

    /// The Service of this name.
    pub fn get(&self, name: &ServiceName) -> Option<&Arc<Service>> {
        self.all.get(name)
    }

    /// The Service of this name with what it has lost lately.
    fn whole(&self, name: &ServiceName) -> Option<Whole> {
        let (service, lost) = (self.all.get_key_value(name), self.lost.get_key_value(name));
        let names = [service.map(|(name, _)| name), lost.map(|(name, _)| name)];
        let name = names.into_iter().flatten().next()?;
        let service = service.map(|(_, service)| &**service);
        Some(Whole::new(name, service, lost.map(|(_, lost)| lost)))
    }

    /// The names of all, also of those that are gone since a moment ago.
    fn names(&self) -> BTreeSet<&Arc<ServiceName>> {
        self.all.keys().chain(self.lost.keys()).collect()
    }

    /// These, with what they have lost as if it were still there.
    fn only(&self, names: &BTreeSet<&Arc<ServiceName>>) -> Self {
        let services = names.iter().filter_map(|name| match self.lost.get(*name) {
            Some(_) => self.whole(name).map(|whole| Arc::new(whole.into_service())),
            None => self.all.get(*name).cloned(),
        });
        Self::new(services, self.nodes.clone())
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.all.values()
    }

    /// The cluster IPs of Services that are in none of these namespaces, in order.
    fn cluster_ips_but(&self, namespaces: &BTreeSet<&str>) -> Vec<Address> {
        let others = self.all.values();
        let others = others.filter(|service| !namespaces.contains(&*service.name.namespace));
        let mut addresses: Vec<Address> = others
            .flat_map(|service| &service.cluster)
            .map(|ip| to_mapped(*ip))
            .collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }

    /// The node ports of Services that are in none of these namespaces.
    fn node_ports_but(&self, namespaces: &BTreeSet<&str>) -> BTreeSet<u16> {
        let others = self.all.values();
        let others = others.filter(|service| !namespaces.contains(&*service.name.namespace));
        let ports = others.flat_map(|service| &service.ports);
        ports.filter_map(|port| port.node_port).collect()
    }

    /// Addresses of nodes.
    pub fn nodes(&self) -> &[Prefix] {
        &self.nodes
    }

    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.all.is_empty() && self.lost.is_empty()
    }

    fn index(&self) -> &Index {
        self.index.get_or_init(|| Index::new(self))
    }

    /// The names of Services that are not the same in both.
    fn changed(&self, other: &Self) -> BTreeSet<Arc<ServiceName>> {
        let differs = |name: &&Arc<ServiceName>| {
            self.all.get(*name) != other.all.get(*name)
                || self.lost.get(*name) != other.lost.get(*name)
        };
        let here = self.all.keys().chain(self.lost.keys());
        let there = other.all.keys().chain(other.lost.keys());
        here.chain(there).filter(differs).cloned().collect()
    }
}
