//! Who has which address, as far as it is known.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
};

use super::{locations::Location, machine::Machine};
use crate::{pods::Pod, report::Subject};
use egress_policy::Prefix;

/// The addresses that somebody has, and that no other pod may send from.
#[derive(Clone, Debug, Default)]
pub(in crate::control) struct Owners {
    /// The pods that have an address in their status, and whether each has been found.
    pub(in crate::control) pods: HashMap<IpAddr, Vec<(Subject, bool)>>,
    /// The node's own addresses.
    pub(in crate::control) node: HashSet<IpAddr>,
    /// Those of the gateways that its routes lead through.
    pub(in crate::control) gateways: HashSet<IpAddr>,
    /// Protected prefixes.
    pub(in crate::control) protected: Vec<Prefix>,
}

impl Owners {
    pub(super) fn new(
        pods: &BTreeMap<Subject, Cow<'_, Pod>>,
        locations: &BTreeMap<Subject, Location>,
        machine: &Machine,
        protected: &[Prefix],
    ) -> Self {
        let mut owners = Self {
            pods: HashMap::new(),
            node: machine.addresses.clone(),
            gateways: machine.gateways.clone(),
            protected: protected.to_vec(),
        };
        for (subject, pod) in pods {
            let is_found = matches!(locations.get(subject), Some(Location::Found(_)));
            for &address in &pod.addresses {
                let of = owners.pods.entry(address).or_default();
                of.push((subject.clone(), is_found));
            }
        }
        owners
    }
}
