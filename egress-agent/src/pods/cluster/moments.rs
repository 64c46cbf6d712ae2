//! What Services had until they were replaced or deleted a moment ago.
//!
//! It is noted when an object is replaced, each part once, however often the object changes. The memory is bounded for
//! each Service and for each namespace: who edits one Service uses up the memory of that Service. What does not fit is
//! noted as such, and [counts as everything](egress_policy::services::Passed::had_more).

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    time::{Duration, Instant},
};

use egress_policy::services::ServiceName;

use super::services::PortFacts;

/// How long each part is remembered.
const REMEMBERED: Duration = Duration::from_secs(5);

/// Most parts of one Service, and most of its external addresses.
pub(super) const MOST: usize = 8_192;
const MOST_EXTERNAL: usize = 4_096;
/// The same of all Services of a namespace. Beyond it those of the Service are forgotten that has most.
pub(super) const OF_NAMESPACE: usize = 32_768;

/// An address of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Address {
    Cluster(IpAddr),
    External(IpAddr),
}

/// A port of a Service, or an address of a slice with the name and the number of its port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Port(PortFacts),
    Endpoint(Box<str>, Option<u16>, IpAddr),
}

/// What a Service had.
#[derive(Debug, Default)]
pub(super) struct Had {
    addresses: BTreeMap<Address, Instant>,
    parts: BTreeMap<Part, Instant>,
    /// When it had more parts than these.
    more: Option<Instant>,
    /// When it had more external addresses than these.
    more_addresses: Option<Instant>,
}

impl Had {
    pub(super) fn addresses(&self) -> impl Iterator<Item = &Address> {
        self.addresses.keys()
    }

    pub(super) fn parts(&self) -> impl Iterator<Item = &Part> {
        self.parts.keys()
    }

    /// Whether it had more parts than these.
    pub(super) fn had_more(&self) -> bool {
        self.more.is_some()
    }

    /// Whether it had more external addresses than these.
    pub(super) fn had_more_addresses(&self) -> bool {
        self.more_addresses.is_some()
    }

    fn forget(&mut self, now: Instant) {
        let lasts = |at: &Instant| now.duration_since(*at) <= REMEMBERED;
        self.addresses.retain(|_, at| lasts(at));
        self.parts.retain(|_, at| lasts(at));
        self.more = self.more.filter(lasts);
        self.more_addresses = self.more_addresses.filter(lasts);
    }

    /// Forgets parts, the ports at nodes last: nothing else denies these.
    fn forget_parts(&mut self, at: Instant) {
        self.more = Some(at);
        let before = self.parts.len();
        let ports = std::mem::take(&mut self.parts).into_iter();
        let at_nodes = ports.filter_map(|(part, at)| match part {
            Part::Port(PortFacts {
                transport,
                node_port: Some(port),
                ..
            }) => {
                let port = PortFacts {
                    name: Box::default(),
                    transport,
                    port,
                    node_port: Some(port),
                };
                Some((Part::Port(port), at))
            }
            _ => None,
        });
        self.parts = at_nodes.collect();
        if self.parts.len() == before || self.parts.len() > MOST {
            self.parts.clear();
        }
    }

    /// Forgets the external addresses that it had first, so that only so many are left.
    fn forget_external(&mut self, most: usize, at: Instant) {
        let external = self.addresses.iter();
        let external = external.filter(|(address, _)| matches!(address, Address::External(_)));
        let mut since: Vec<_> = external.map(|(address, at)| (*at, *address)).collect();
        let surplus = since.len().saturating_sub(most);
        if surplus > 0 {
            self.more_addresses = Some(at);
            since.sort_unstable();
            for (_, address) in since.into_iter().take(surplus) {
                self.addresses.remove(&address);
            }
        }
    }

    fn size(&self) -> [usize; 2] {
        [self.parts.len(), self.addresses.len()]
    }

    fn is_empty(&self) -> bool {
        self.size() == [0, 0] && !self.had_more() && !self.had_more_addresses()
    }
}

/// What Services had until a moment ago.
#[derive(Debug, Default)]
pub(super) struct Moments {
    of: BTreeMap<ServiceName, Had>,
    /// The sizes of each namespace.
    sizes: HashMap<Box<str>, [usize; 2]>,
}

impl Moments {
    pub(super) fn names(&self) -> impl Iterator<Item = &ServiceName> {
        self.of.keys()
    }

    pub(super) fn get(&self, name: &ServiceName) -> Option<&Had> {
        self.of.get(name)
    }

    /// Notes addresses that a Service had until then.
    pub(super) fn note_addresses(
        &mut self,
        name: &ServiceName,
        addresses: impl Iterator<Item = Address>,
        at: Instant,
    ) {
        self.change(name, at, |had| {
            had.addresses.extend(addresses.map(|address| (address, at)));
            if had.addresses.len() > MOST_EXTERNAL {
                had.forget(at);
                had.forget_external(MOST_EXTERNAL, at);
            }
        });
    }

    /// Notes parts that a Service had until then.
    pub(super) fn note_parts(
        &mut self,
        name: &ServiceName,
        parts: impl Iterator<Item = Part>,
        at: Instant,
    ) {
        self.change(name, at, |had| {
            had.parts.extend(parts.map(|part| (part, at)));
            if had.parts.len() > MOST {
                had.forget(at);
            }
            if had.parts.len() > MOST {
                had.forget_parts(at);
            }
        });
    }

    /// Notes that a Service had more parts until then than are looked at.
    pub(super) fn note_more(&mut self, name: &ServiceName, at: Instant) {
        self.change(name, at, |had| had.forget_parts(at));
    }

    fn change(&mut self, name: &ServiceName, at: Instant, change: impl FnOnce(&mut Had)) {
        let had = self.of.entry(name.clone()).or_default();
        let before = had.size();
        change(had);
        let after = had.size();
        let of_namespace = self.sizes.entry(name.namespace.clone()).or_default();
        for (sum, (before, after)) in of_namespace.iter_mut().zip(before.into_iter().zip(after)) {
            *sum = (*sum + after).saturating_sub(before);
        }
        while let Some(index) = of_namespace.iter().position(|sum| *sum > OF_NAMESPACE) {
            let of_namespace_all = self.of.iter_mut();
            let mut of_namespace_all: Vec<_> = of_namespace_all
                .filter(|(other, _)| other.namespace == name.namespace)
                .map(|(_, had)| had)
                .collect();
            let largest = of_namespace_all
                .iter_mut()
                .max_by_key(|had| had.size()[index]);
            let Some(had) = largest.filter(|had| had.size()[index] > 0) else {
                return;
            };
            let before = had.size()[index];
            if index == 0 {
                had.forget_parts(at);
            } else {
                had.forget_external(0, at);
            }
            let freed = before - had.size()[index];
            if freed == 0 {
                return;
            }
            of_namespace[index] -= freed;
        }
    }

    /// Forgets addresses and parts that were noted more than [`REMEMBERED`] before `now`.
    pub(super) fn forget(&mut self, now: Instant) {
        self.sizes.clear();
        let sizes = &mut self.sizes;
        self.of.retain(|name, had| {
            had.forget(now);
            if had.is_empty() {
                return false;
            }
            let of_namespace = sizes.entry(name.namespace.clone()).or_default();
            for (sum, one) in of_namespace.iter_mut().zip(had.size()) {
                *sum += one;
            }
            true
        });
    }
}

#[cfg(test)]
#[path = "moments_tests.rs"]
mod tests;
