//! Which of the rules for Services a policy gets.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use egress_common::records::PortClass;

use super::{
    added::{Added, Place},
    judge::ByService,
};
use crate::prefix::Prefix;

/// Most different ports that a policy opens because of the endpoints behind them. The author of a Service chooses its
/// ports, but must not decide how many classes a policy has.
const OPENED_PORTS: usize = 16;

/// All rules that a policy needs. Nothing is opened that an endpoint denies, of whichever Service. Of the ports that are
/// opened only as many count as a policy may have: first one of each namespace, then a second of each, and so on.
pub fn needed(by_service: &ByService) -> Vec<Added> {
    let openings = || by_service.values().flatten().filter(|one| !one.is_denial);
    let opened: HashSet<&Prefix> = openings().flat_map(|one| &one.to).collect();
    let mut denied: HashMap<&Prefix, Vec<PortClass>> = HashMap::new();
    for one in by_service.values().flatten().filter(|one| one.is_denial) {
        for prefix in one.to.iter().filter(|prefix| opened.contains(prefix)) {
            denied.entry(prefix).or_default().push(one.class);
        }
    }
    let is_denied = |one: &Added| {
        let mut denied = one
            .to
            .iter()
            .filter_map(|prefix| denied.get(prefix))
            .flatten();
        denied.any(|class| meet(*class, one.class))
    };
    let all = || {
        let all = by_service.values().flatten();
        all.filter(|one| one.is_denial || !is_denied(one))
    };
    let mut uses: BTreeMap<&str, HashMap<(Place, PortClass), usize>> = BTreeMap::new();
    for one in all().filter(|one| !one.is_denial) {
        let of_namespace = uses.entry(one.namespace()).or_default();
        *of_namespace.entry((one.place, one.class)).or_default() += 1;
    }
    let mut ranked = Vec::new();
    for uses in uses.into_values() {
        let mut most: Vec<_> = uses.into_iter().collect();
        most.sort_by_key(|(port, uses)| (std::cmp::Reverse(*uses), *port));
        let most = most.into_iter().take(OPENED_PORTS);
        ranked.extend((0_usize..).zip(most.map(|(port, _)| port)));
    }
    ranked.sort_unstable();
    let mut opened: BTreeSet<(Place, PortClass)> = BTreeSet::new();
    for (_, port) in ranked {
        if opened.len() < OPENED_PORTS {
            opened.insert(port);
        }
    }
    all()
        .filter(|one| one.is_denial || opened.contains(&(one.place, one.class)))
        .cloned()
        .collect()
}

fn meet(one: PortClass, other: PortClass) -> bool {
    one.protocols & other.protocols != 0
        && one.port_min <= other.port_max
        && other.port_min <= one.port_max
}
