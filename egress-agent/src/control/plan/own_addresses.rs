//! Which addresses a pod may send from.
//!
//! The addresses in `status.podIPs`, and those that its interfaces had when they were made, unless somebody else may
//! have them. A pod that sends in another's name can draw its traffic, or forge a resolver's responses. The pod's
//! author writes its annotations, so no annotation gives a pod an address.

use std::{collections::HashSet, net::IpAddr};

use egress_common::limits::OWN_ADDRESSES;

use crate::{
    control::{
        observe::{locations::PodLocation, owners::Owners},
        settings::Settings,
    },
    pods::Pod,
    report::Subject,
};
use egress_policy::prefix::to_mapped;

/// How much is known of the pod that sends from an address.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    /// It is not known which pod it is.
    Nothing,
    /// The pod is known, but its status has no address.
    Pod,
    /// The pod is known, and its status has other addresses.
    Addresses,
}

/// The pod's own addresses, and problems with other addresses that it has or claims.
pub(super) fn own_addresses(
    settings: &Settings,
    owners: &Owners,
    subject: &Subject,
    pod: &Pod,
    location: &PodLocation,
) -> (Vec<IpAddr>, Vec<String>) {
    let mut own = pod.addresses.clone();
    let mut notes = Vec::new();
    let (known, first) = if subject.is_interface() {
        (Known::Nothing, &location.first.seen)
    } else if own.is_empty() {
        (Known::Pod, &location.first.seen)
    } else {
        (Known::Addresses, &location.first.made)
    };
    let mut refused = HashSet::new();
    for &address in first {
        if own.contains(&address) {
            continue;
        }
        let whose = somebody_elses(settings, owners, address, subject, known).or_else(|| {
            let is_full = own.len() >= OWN_ADDRESSES;
            is_full.then(|| format!("one more than the {OWN_ADDRESSES} that a pod may have"))
        });
        match whose {
            None => own.push(address),
            Some(whose) => {
                refused.insert(address);
                notes.push(format!(
                    "the address {address} of its interface is {whose}: it does not count as the \
                     pod's own"
                ));
            }
        }
    }
    for address in &pod.further {
        if !own.contains(address) && !refused.contains(address) {
            notes.push(format!(
                "the address {address} in its network status is not one that its interfaces were \
                 seen to be made with: it does not count as the pod's own"
            ));
        }
    }
    (own, notes)
}

/// Why an address that an interface was made with may be somebody else's.
fn somebody_elses(
    settings: &Settings,
    owners: &Owners,
    address: IpAddr,
    subject: &Subject,
    known: Known,
) -> Option<String> {
    let mapped = to_mapped(address);
    let mut resolvers = settings.config.dns.resolvers.iter();
    if resolvers.any(|resolver| resolver.address == address) {
        return Some("a resolver's".to_owned());
    }
    if owners.protected.iter().any(|p| p.contains(&mapped)) {
        return Some("protected".to_owned());
    }
    if owners.node.contains(&address) {
        return Some("the node's".to_owned());
    }
    if owners.gateways.contains(&address) {
        return Some("that of a gateway of the node".to_owned());
    }
    let others = owners.pods.get(&address).into_iter().flatten();
    // An interface whose pod is not known may be that of a pod that has not been found.
    let mut others = others
        .filter(|(other, is_found)| other != subject && (*is_found || known != Known::Nothing));
    if let Some((other, _)) = others.next() {
        return Some(format!("that of pod {other}"));
    }
    if settings.facts.pods.iter().any(|p| p.contains(&mapped)) {
        return None;
    }
    let named = settings
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
    // The pod's status has addresses, and this is not one of them.
    let internal = &settings.configured.ranges.internal;
    if let Some(prefix) = internal.iter().find(|p| p.contains(&mapped)) {
        return Some(format!(
            "in {prefix} (ranges.internal), where it may be that of another node's pod"
        ));
    }
    (settings.facts.pods.is_empty() && internal.is_empty()).then(|| {
        "perhaps that of another node's pod, because nothing says where those are (set \
         ranges.internal)"
            .to_owned()
    })
}
