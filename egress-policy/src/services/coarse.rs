//! Rules for Services that are too many for a policy.
//!
//! The author of a Service chooses its ports and external addresses. So that these do not decide how much room the
//! Services of others have, the namespaces that need most are closed first: their rules then deny more than their
//! endpoints demand, at their own addresses.

use std::collections::{BTreeMap, BTreeSet};

use egress_common::records::PortClass;

use super::added::{Added, EVERYTHING, Of, Place};
use crate::prefix::{Prefix, from_mapped};

/// Most classes that the Services of one namespace have before they are closed.
const CLASSES: usize = 16;
/// Most prefixes of one family that they have. From these on, their prefixes get wider.
const PREFIXES: usize = 256;
/// Most different ports of node ports and external addresses, before all between the lowest and the highest node port
/// and all ports of the external addresses are denied.
const PORTS: usize = 16;

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
pub(super) fn close(added: &[Added], namespaces: &BTreeSet<&str>) -> Vec<Added> {
    let mut closed: BTreeMap<&str, Vec<&Added>> = BTreeMap::new();
    let mut rules = Vec::new();
    for one in added {
        if !namespaces.contains(one.namespace()) {
            rules.push(one.clone());
        } else if one.is_denial {
            closed.entry(one.namespace()).or_default().push(one);
        }
    }
    rules.extend(
        closed
            .values()
            .flat_map(|denials| closed_namespace(denials)),
    );
    rules
}

fn closed_namespace(denials: &[&Added]) -> Vec<Added> {
    let of_ports = denials.iter().filter(|one| one.of != Of::ClusterIp);
    let ports: BTreeSet<PortClass> = of_ports.map(|one| one.class).collect();
    let node_ports = denials.iter().filter(|one| one.of == Of::NodePort);
    let node_ports = node_ports
        .map(|one| one.class)
        .reduce(|all, one| PortClass {
            port_min: all.port_min.min(one.port_min),
            port_max: all.port_max.max(one.port_max),
            protocols: all.protocols | one.protocols,
            ..PortClass::NONE
        });
    let are_few = ports.len() <= PORTS;
    let of_cluster = Lengths::of(denials, Of::ClusterIp);
    let of_external = Lengths::of(denials, Of::External);
    let closed = denials.iter().map(|one| {
        let class = match one.of {
            Of::External | Of::NodePort if are_few => one.class,
            Of::ClusterIp | Of::External => EVERYTHING,
            Of::NodePort => node_ports.unwrap_or(one.class),
        };
        let to = one.to.iter().map(|prefix| match one.of {
            Of::NodePort => *prefix,
            Of::ClusterIp => of_cluster.cut(prefix),
            Of::External => of_external.cut(prefix),
        });
        Added {
            to: to.collect(),
            class,
            place: Place::Before(0),
            ..(*one).clone()
        }
    });
    closed.collect()
}

/// The greatest lengths that leave no more than [`PREFIXES`] prefixes of each family. Those of IPv4 are lengths in mapped
/// addresses.
struct Lengths {
    v4: u32,
    v6: u32,
}

impl Lengths {
    fn of(denials: &[&Added], of: Of) -> Self {
        let denials = denials.iter().filter(|one| one.of == of);
        let prefixes: BTreeSet<Prefix> = denials.flat_map(|one| &one.to).copied().collect();
        let [v4, v6] = [true, false].map(|is_v4| {
            let mut length = u128::BITS;
            loop {
                let of_family = prefixes.iter().filter(|prefix| prefix.is_v4() == is_v4);
                let cut: BTreeSet<Prefix> = of_family.map(|prefix| cut(prefix, length)).collect();
                if cut.len() <= PREFIXES {
                    return length;
                }
                length -= 1;
            }
        });
        Self { v4, v6 }
    }

    fn cut(&self, prefix: &Prefix) -> Prefix {
        cut(prefix, if prefix.is_v4() { self.v4 } else { self.v6 })
    }
}

/// The prefix of at most this length that contains a prefix.
fn cut(prefix: &Prefix, length: u32) -> Prefix {
    if prefix.prefix_len() <= length {
        return *prefix;
    }
    let of_mapping = if prefix.is_v4() { 96 } else { 0 };
    let address = from_mapped(&prefix.network());
    Prefix::containing(address, length.saturating_sub(of_mapping))
}
