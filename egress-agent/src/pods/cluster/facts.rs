//! The cluster's addresses, from Services, endpoints, Nodes and service ranges.

use std::{collections::BTreeSet, net::IpAddr};

use k8s_openapi::api::{core::v1, discovery::v1 as discovery, networking::v1 as networking};

use super::peers::CompactLabels;
use egress_common::protocol::DNS_PORT;
use egress_policy::Prefix;

/// The fields of a Node that the agent uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NodeFacts {
    pub(super) uid: String,
    /// `spec.podCIDRs`.
    pub(super) pod_prefixes: Vec<Prefix>,
    /// `status.addresses` of type `InternalIP`.
    pub(super) addresses: Vec<IpAddr>,
    /// All IP addresses in `status.addresses`.
    pub(super) all_addresses: Vec<IpAddr>,
    pub(super) labels: CompactLabels,
}

impl NodeFacts {
    pub(super) fn read(node: v1::Node) -> Self {
        let spec = node.spec.unwrap_or_default();
        let ranges = spec.pod_cidrs.unwrap_or_default();
        let ranges = ranges.iter().chain(&spec.pod_cidr).map(String::as_str);
        let addresses = node.status.and_then(|status| status.addresses);
        let addresses = addresses.unwrap_or_default();
        let internal = addresses
            .iter()
            .filter(|address| address.type_ == "InternalIP");
        Self {
            uid: node.metadata.uid.unwrap_or_default(),
            pod_prefixes: prefixes(ranges),
            addresses: machine_addresses(internal.map(|address| &*address.address)),
            all_addresses: machine_addresses(addresses.iter().map(|address| &*address.address)),
            labels: CompactLabels::of(node.metadata.labels),
        }
    }
}

/// Addresses of a Service or of endpoints, and its ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Served {
    pub(super) addresses: Vec<IpAddr>,
    /// Name and number of each port for TCP or UDP; the name is that of the Service's port.
    pub(super) ports: Vec<(String, u16)>,
}

impl Served {
    /// The names of a Service's ports with number 53. The others, such as the port of metrics, are not for
    /// DNS.
    pub(super) fn dns_port_names(&self) -> impl Iterator<Item = &str> {
        let ports = self.ports.iter();
        ports
            .filter(|(_, port)| *port == DNS_PORT)
            .map(|(name, _)| name.as_str())
    }

    /// The DNS ports of endpoints: those with one of the names. If the Service gives no names, those with a
    /// name that is usual for DNS. Port 53 if there is none.
    pub(super) fn dns_ports(&self, names: &BTreeSet<&str>) -> Vec<u16> {
        let is_usual = |name: &str| {
            name.starts_with("dns") && !name.contains("tls") || matches!(name, "udp-53" | "tcp-53")
        };
        let mut ports: Vec<u16> = self
            .ports
            .iter()
            .filter(|(name, port)| {
                names.contains(name.as_str())
                    || *port == DNS_PORT
                    || (names.is_empty() && is_usual(name))
            })
            .map(|(_, port)| *port)
            .collect();
        ports.sort_unstable();
        ports.dedup();
        if ports.is_empty() {
            ports.push(DNS_PORT);
        }
        ports
    }
}

/// The cluster IPs of a Service, of both families.
pub(super) fn of_service(service: v1::Service) -> Served {
    let spec = service.spec.unwrap_or_default();
    let all = spec.cluster_ips.unwrap_or_default();
    let ports = spec.ports.unwrap_or_default();
    Served {
        // A headless Service has "None", which is not an address.
        addresses: machine_addresses(all.iter().chain(&spec.cluster_ip).map(String::as_str)),
        ports: ports_of(
            ports
                .into_iter()
                .map(|port| (port.name, Some(port.port), port.protocol)),
        ),
    }
}

/// The TCP and UDP ports; the default protocol is TCP.
fn ports_of(
    ports: impl Iterator<Item = (Option<String>, Option<i32>, Option<String>)>,
) -> Vec<(String, u16)> {
    ports
        .filter(|(_, _, protocol)| matches!(protocol.as_deref().unwrap_or("TCP"), "TCP" | "UDP"))
        .filter_map(|(name, port, _)| {
            let port = u16::try_from(port?).ok().filter(|port| *port != 0)?;
            Some((name.unwrap_or_default(), port))
        })
        .collect()
}

/// The addresses of an `EndpointSlice`, ready or not: an endpoint that is starting may already get queries,
/// and one that is terminating still answers.
pub(super) fn of_slice(slice: discovery::EndpointSlice) -> Served {
    if slice.address_type == "FQDN" {
        return Served::default();
    }
    let addresses = slice.endpoints.iter().flat_map(|one| &one.addresses);
    let ports = slice.ports.unwrap_or_default();
    Served {
        addresses: machine_addresses(addresses.map(String::as_str)),
        ports: ports_of(
            ports
                .into_iter()
                .map(|port| (port.name, port.port, port.protocol)),
        ),
    }
}

/// The addresses of an Endpoints object, ready or not.
pub(super) fn of_endpoints(endpoints: v1::Endpoints) -> Served {
    let subsets = endpoints.subsets.unwrap_or_default();
    let addresses = subsets.iter().flat_map(|subset| {
        let ready = subset.addresses.iter().flatten();
        ready.chain(subset.not_ready_addresses.iter().flatten())
    });
    let addresses = machine_addresses(addresses.map(|address| &*address.ip));
    let ports = subsets
        .into_iter()
        .flat_map(|subset| subset.ports.unwrap_or_default());
    Served {
        addresses,
        ports: ports_of(ports.map(|port| (port.name, Some(port.port), port.protocol))),
    }
}

/// The ranges of a `ServiceCIDR`.
pub(super) fn of_service_range(range: networking::ServiceCIDR) -> Vec<Prefix> {
    let ranges = range.spec.and_then(|spec| spec.cidrs).unwrap_or_default();
    prefixes(ranges.iter().map(String::as_str))
}

/// Whether a machine can have this address.
pub(super) fn machine_address(address: &IpAddr) -> bool {
    !address.is_unspecified() && !address.is_multicast() && !address.is_loopback()
}

fn machine_addresses<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for address in texts.filter_map(|text| text.parse().ok()) {
        if machine_address(&address) && !found.contains(&address) {
            found.push(address);
        }
    }
    found
}

/// The valid prefixes, without one that covers its whole address family: that would make all of the internet
/// internal.
fn prefixes<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<Prefix> {
    let mut found: Vec<Prefix> = texts
        .filter_map(|text| Prefix::parse(text).ok())
        .filter(|prefix| !prefix.is_whole_family())
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
#[path = "facts_tests.rs"]
mod tests;
