//! Which addresses a pod may send from.
//!
//! Those in `status.podIPs`, and those that its interfaces had when they were made, unless they may
//! be somebody else's: whoever sends in another's name draws their traffic, or forges a resolver's
//! responses. An annotation, which the pod's author writes, gives nobody an address.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use egress_common::limits::OWN_ADDRESSES;

use crate::control::{
    observe::locations::{Found, Place, Pods},
    reconcile::Reconciler,
};
use crate::{pods::Pod, report::Subject};
use egress_policy::{Prefix, prefix::to_mapped};

/// Whose addresses are known, at one reconcile.
#[derive(Default)]
pub(in crate::control) struct Owners {
    /// The pods that have an address in their status, and whether each has been found.
    pods: HashMap<IpAddr, Vec<(Subject, bool)>>,
    /// The node's own addresses.
    node: HashSet<IpAddr>,
    /// Those of the gateways that its routes lead through.
    gateways: HashSet<IpAddr>,
    /// Protected prefixes.
    protected: Vec<Prefix>,
}

/// How much is known of the pod that an address is to be the own one of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    /// Nobody has said which pod it is.
    Nothing,
    /// The pod, but no address of it.
    Pod,
    /// The pod, and addresses that are in its status; this would be a further one.
    Addresses,
}

impl Reconciler {
    /// Takes note of whose addresses are known.
    pub(in crate::control) fn note_owners(
        &mut self,
        pods: &Pods<'_>,
        places: &std::collections::BTreeMap<Subject, Place>,
    ) {
        let mut owners = Owners {
            node: self.places.node_addresses().clone(),
            gateways: self.places.gateways().clone(),
            protected: self.readings.settings().protected.clone(),
            ..Owners::default()
        };
        for (key, pod) in pods {
            let is_found = matches!(places.get(key), Some(Place::Found(_)));
            for &address in &pod.addresses {
                let of = owners.pods.entry(address).or_default();
                of.push((key.clone(), is_found));
            }
        }
        self.owners = owners;
    }

    /// The pod's own addresses, and what is wrong with others that it has or claims.
    pub(in crate::control) fn own_addresses(
        &self,
        key: &Subject,
        pod: &Pod,
        found: &Found,
    ) -> (Vec<IpAddr>, Vec<String>) {
        let mut own = pod.addresses.clone();
        let mut notes = Vec::new();
        let (known, first) = if key.is_interface() {
            (Known::Nothing, &found.first.seen)
        } else if own.is_empty() {
            (Known::Pod, &found.first.seen)
        } else {
            (Known::Addresses, &found.first.made)
        };
        let mut refused = HashSet::new();
        for &address in first {
            if own.contains(&address) {
                continue;
            }
            let whose = self.refuses(address, key, known).or_else(|| {
                let is_full = own.len() >= OWN_ADDRESSES;
                is_full.then(|| format!("one more than the {OWN_ADDRESSES} that a pod may have"))
            });
            match whose {
                None => own.push(address),
                Some(whose) => {
                    refused.insert(address);
                    notes.push(format!(
                        "the address {address} of its interface is {whose}: it is not taken for the \
                         pod's own"
                    ));
                }
            }
        }
        for address in &pod.further {
            if !own.contains(address) && !refused.contains(address) {
                notes.push(format!(
                    "the address {address} in its network status is not one that its interfaces were \
                     seen to be made with: it is not taken for the pod's own"
                ));
            }
        }
        (own, notes)
    }

    /// Why an address that an interface was made with may be somebody else's.
    fn refuses(&self, address: IpAddr, key: &Subject, known: Known) -> Option<String> {
        let mapped = to_mapped(address);
        let mut resolvers = self.config.dns.resolvers.iter();
        if resolvers.any(|resolver| resolver.address == address) {
            return Some("a resolver's".to_owned());
        }
        if self.owners.protected.iter().any(|p| p.contains(&mapped)) {
            return Some("protected".to_owned());
        }
        if self.owners.node.contains(&address) {
            return Some("the node's".to_owned());
        }
        if self.owners.gateways.contains(&address) {
            return Some("that of a gateway of the node".to_owned());
        }
        let others = self.owners.pods.get(&address).into_iter().flatten();
        // An interface whose pod is not known may be that of a pod that has not been found.
        let mut others = others
            .filter(|(other, is_found)| other != key && (*is_found || known != Known::Nothing));
        if let Some((other, _)) = others.next() {
            return Some(format!("that of pod {}", other));
        }
        if self.facts.pods.iter().any(|p| p.contains(&mapped)) {
            return None;
        }
        let named = self
            .facts
            .internal
            .iter()
            .find(|(p, _)| p.contains(&mapped));
        if let Some((prefix, origin)) = named {
            return Some(format!("in {prefix} ({origin})"));
        }
        if known != Known::Addresses {
            return None;
        }
        // From here on it is a further address, of which only the interface speaks.
        let internal = &self.configured.ranges.internal;
        if let Some(prefix) = internal.iter().find(|p| p.contains(&mapped)) {
            return Some(format!(
                "in {prefix} (ranges.internal), where it may be that of another node's pod"
            ));
        }
        (self.facts.pods.is_empty() && internal.is_empty()).then(|| {
            "perhaps that of another node's pod, because nothing says where those are (set \
             ranges.internal)"
                .to_owned()
        })
    }
}
