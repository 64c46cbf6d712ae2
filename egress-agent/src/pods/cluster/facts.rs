//! What Services, endpoints, Nodes and service ranges say of the cluster's addresses.

use std::net::IpAddr;

use k8s_openapi::api::{core::v1, discovery::v1 as discovery, networking::v1 as networking};

use crate::policy::Prefix;

/// What is needed of the agent's own Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NodeFacts {
    pub(super) uid: String,
    /// `spec.podCIDRs`.
    pub(super) pod_prefixes: Vec<Prefix>,
    /// `status.addresses` of type `InternalIP`.
    pub(super) addresses: Vec<IpAddr>,
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
        }
    }
}

/// The cluster IPs of a Service, of both families.
pub(super) fn of_service(service: v1::Service) -> Vec<IpAddr> {
    let spec = service.spec.unwrap_or_default();
    let all = spec.cluster_ips.unwrap_or_default();
    // "None" of a headless Service is no address.
    machine_addresses(all.iter().chain(&spec.cluster_ip).map(String::as_str))
}

/// The addresses of an `EndpointSlice`, ready or not: one that is starting may already be asked,
/// and one that is ending still answers.
pub(super) fn of_slice(slice: &discovery::EndpointSlice) -> Vec<IpAddr> {
    if slice.address_type == "FQDN" {
        return Vec::new();
    }
    let addresses = slice.endpoints.iter().flat_map(|one| &one.addresses);
    machine_addresses(addresses.map(String::as_str))
}

/// The addresses of an Endpoints object, ready or not.
pub(super) fn of_endpoints(endpoints: v1::Endpoints) -> Vec<IpAddr> {
    let subsets = endpoints.subsets.unwrap_or_default();
    let addresses = subsets.iter().flat_map(|subset| {
        let ready = subset.addresses.iter().flatten();
        ready.chain(subset.not_ready_addresses.iter().flatten())
    });
    machine_addresses(addresses.map(|address| &*address.ip))
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

/// The readable prefixes; not one that holds every address of its family, which would make all of
/// the internet internal.
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
