//! Rules for Services that are too many for a policy.
//!
//! The author of a Service chooses its ports and external addresses. So that these do not decide how much room the
//! Services of others have, the namespaces that need most are closed first: their rules then deny more than their
//! endpoints demand, at their own addresses.

use std::collections::{BTreeMap, BTreeSet};

use egress_common::{address::Address, records::PortClass};

use super::{
    added::{Added, EVERYTHING, Of, Place},
    cover::cover,
    port_ranges::port_ranges,
};
use crate::prefix::Prefix;

/// Most classes that the Services of one namespace have before they are closed.
const CLASSES: usize = 16;
/// Most prefixes of one family that they have before they are closed.
const PREFIXES: usize = 256;
/// Most different ports of node ports and external addresses, before node ports are denied in ranges, and the external
/// addresses at all ports.
const PORTS: usize = 16;

/// How much room closed namespaces leave to others.
pub(super) struct Room<'a> {
    /// Most prefixes of all rules together.
    pub(super) prefixes: usize,
    /// Most ranges of node ports of a closed namespace and protocol.
    pub(super) ranges: usize,
    /// The cluster IPs of others, in order.
    pub(super) addresses: &'a [Address],
    /// The node ports of others.
    pub(super) ports: &'a BTreeSet<u16>,
}

impl Room<'_> {
    pub(super) const RANGES: usize = PORTS;
}

/// What the Services of a namespace need.
#[derive(Default)]
struct Need {
    classes: BTreeSet<(Place, PortClass)>,
    prefixes: BTreeSet<Prefix>,
}

/// The namespaces whose Services need more than one namespace may while the policy exceeds its limits.
pub(super) fn greedy(added: &[Added]) -> BTreeSet<&str> {
    let mut needs: BTreeMap<&str, Need> = BTreeMap::new();
    for one in added {
        let need = needs.entry(one.namespace()).or_default();
        need.classes.insert((one.place, one.class));
        if one.of != Of::NodePort {
            need.prefixes.extend(&one.to);
        }
    }
    let is_greedy = |need: &Need| need.classes.len() > CLASSES || need.prefixes.len() > PREFIXES;
    let greedy = needs.into_iter().filter(|(_, need)| is_greedy(need));
    greedy.map(|(namespace, _)| namespace).collect()
}

/// The rules, of which those of these namespaces are in a form that takes few classes and prefixes. Denials come before
/// all rules then, and nothing is opened.
///
/// The addresses of a namespace stay as they are if there is room. If not, the namespaces with most addresses get wider
/// prefixes, which contain few of those of others. So it is with node ports.
pub(super) fn close(added: &[Added], namespaces: &BTreeSet<&str>, room: &Room<'_>) -> Vec<Added> {
    let mut closed: BTreeMap<&str, Vec<&Added>> = BTreeMap::new();
    let mut rules = Vec::new();
    for one in added {
        if !namespaces.contains(one.namespace()) {
            rules.push(one.clone());
        } else if one.is_denial {
            closed.entry(one.namespace()).or_default().push(one);
        }
    }
    let at_nodes = closed
        .values()
        .flatten()
        .filter(|one| one.of == Of::NodePort);
    let fixed: BTreeSet<&Prefix> = at_nodes
        .copied()
        .chain(&rules)
        .flat_map(|one| &one.to)
        .collect();
    let most = room.prefixes.saturating_sub(fixed.len());
    let mut wanted: BTreeMap<Addresses<'_>, BTreeSet<Prefix>> = BTreeMap::new();
    for (namespace, denials) in &closed {
        for one in denials.iter().filter(|one| one.of != Of::NodePort) {
            for prefix in &one.to {
                let of = (*namespace, one.of == Of::External, prefix.is_v4());
                wanted.entry(of).or_default().insert(*prefix);
            }
        }
    }
    let shares = shares(&wanted, most);
    let covers: BTreeMap<Addresses<'_>, Vec<Prefix>> = wanted
        .iter()
        .map(|(of, prefixes)| {
            let share = shares.get(of).copied().unwrap_or_default();
            (*of, cover(prefixes, share, room.addresses))
        })
        .collect();
    for (namespace, denials) in &closed {
        rules.extend(closed_namespace(namespace, denials, &covers, room));
    }
    rules
}

/// The external addresses or the cluster IPs of a namespace, of one family.
type Addresses<'a> = (&'a str, bool, bool);

/// How many prefixes each gets: as many as it wants, unless it wants more than others that have to share as well.
fn shares<'a>(
    wanted: &BTreeMap<Addresses<'a>, BTreeSet<Prefix>>,
    most: usize,
) -> BTreeMap<Addresses<'a>, usize> {
    let mut sizes: Vec<(usize, Addresses<'a>)> = wanted
        .iter()
        .map(|(of, prefixes)| (cover(prefixes, usize::MAX, &[]).len(), *of))
        .collect();
    sizes.sort_unstable();
    let (mut left, mut count) = (most, sizes.len());
    let shares = sizes.into_iter().map(|(size, of)| {
        let share = size.min(left / count).max(1);
        left = left.saturating_sub(share);
        count -= 1;
        (of, share)
    });
    shares.collect()
}

fn closed_namespace(
    namespace: &str,
    denials: &[&Added],
    covers: &BTreeMap<Addresses<'_>, Vec<Prefix>>,
    room: &Room<'_>,
) -> Vec<Added> {
    let of_ports = denials.iter().filter(|one| one.of != Of::ClusterIp);
    let ports: BTreeSet<PortClass> = of_ports.map(|one| one.class).collect();
    let mut node_ports: BTreeMap<u8, BTreeSet<u16>> = BTreeMap::new();
    for one in denials.iter().filter(|one| one.of == Of::NodePort) {
        let of_protocol = node_ports.entry(one.class.protocols).or_default();
        of_protocol.extend([one.class.port_min, one.class.port_max]);
    }
    let ranges: BTreeMap<u8, Vec<(u16, u16)>> = node_ports
        .into_iter()
        .map(|(protocol, ports)| (protocol, port_ranges(&ports, room.ranges, room.ports)))
        .collect();
    let are_few = ports.len() <= PORTS;
    let closed = denials.iter().map(|one| {
        let class = match one.of {
            Of::External | Of::NodePort if are_few => one.class,
            Of::ClusterIp | Of::External => EVERYTHING,
            Of::NodePort => within(&ranges, one.class),
        };
        let to = one.to.iter().map(|prefix| {
            let of = (namespace, one.of == Of::External, prefix.is_v4());
            let covers = covers.get(&of).filter(|_| one.of != Of::NodePort);
            covers.map_or(*prefix, |covers| containing(covers, prefix))
        });
        let to: BTreeSet<Prefix> = to.collect();
        Added {
            to: to.into_iter().collect(),
            class,
            place: Place::Before(0),
            ..(*one).clone()
        }
    });
    closed.collect()
}

/// The range of its protocol that contains a port.
fn within(ranges: &BTreeMap<u8, Vec<(u16, u16)>>, class: PortClass) -> PortClass {
    let mut of_protocol = ranges.get(&class.protocols).into_iter().flatten();
    let found = of_protocol.find(|(min, max)| (min..=max).contains(&&class.port_min));
    found.map_or(class, |&(port_min, port_max)| PortClass {
        port_min,
        port_max: port_max.max(class.port_max),
        ..class
    })
}

/// The one of these prefixes, which are in order, that contains another.
fn containing(covers: &[Prefix], prefix: &Prefix) -> Prefix {
    let after = covers.partition_point(|cover| cover.network() <= prefix.network());
    let cover = after.checked_sub(1).and_then(|place| covers.get(place));
    cover.copied().unwrap_or(*prefix)
}
