//! The interfaces that manifests name.
//!
//! An interface is found by its name only once. After that its index counts, because renaming a host end must
//! not open its pod. A pod leaves an interface when the interface is gone, or when its manifest names another one
//! that is there.

use std::collections::{BTreeMap, HashMap, HashSet};

use egress_common::ids::IfIndex;

use super::locations::{Location, PodLocation};
use crate::{
    datapath::Adoptable,
    host::interface_name,
    pods::{INTERFACE_ANNOTATION, NamespacedName, Pod, Snapshot},
    report::Subject,
};

/// Which interfaces pods have been found on.
#[derive(Default)]
pub(in crate::control) struct Named {
    known: HashMap<NamespacedName, Known>,
}

struct Known {
    uid: String,
    /// The name in the manifest at that time; `None` when an earlier agent found the interfaces.
    name: Option<String>,
    /// In ascending order.
    interfaces: Vec<IfIndex>,
}

impl Named {
    /// Starts with the interfaces that an earlier agent left enforced.
    pub(in crate::control) fn new<'a>(left: impl Iterator<Item = &'a Adoptable>) -> Self {
        let known = left.map(|left| {
            let mut interfaces: Vec<IfIndex> =
                left.interfaces.iter().map(|(index, _)| *index).collect();
            interfaces.sort_unstable();
            interfaces.dedup();
            let known = Known {
                uid: left.uid.clone(),
                name: None,
                interfaces,
            };
            let name = NamespacedName::new(&*left.namespace, &*left.name);
            (name, known)
        });
        Self {
            known: known.collect(),
        }
    }

    /// Where each pod is.
    pub(in crate::control) fn look(&mut self, snapshot: &Snapshot) -> BTreeMap<Subject, Location> {
        // A pod that is missing here may be the one whose manifest cannot be read.
        if !snapshot.unreadable {
            self.known.retain(|key, _| snapshot.pods.contains_key(key));
        }
        let names: HashSet<&str> = snapshot
            .pods
            .values()
            .filter_map(|pod| pod.interface.as_deref())
            .collect();
        let places = snapshot.pods.iter().map(|(key, pod)| {
            let place = self.place(key, pod, &names);
            (key.clone().into(), place)
        });
        places.collect()
    }

    /// Where one pod is; `names` are the interfaces that any manifest names.
    fn place(&mut self, key: &NamespacedName, pod: &Pod, names: &HashSet<&str>) -> Location {
        let Some(name) = &pod.interface else {
            return Location::Nowhere(format!(
                "not enforced: the pod has no annotation {INTERFACE_ANNOTATION}"
            ));
        };
        let known = self.known.remove(key).filter(|known| known.uid == pod.uid);
        let at = nix::net::if_::if_nametoindex(name.as_str())
            .ok()
            .map(IfIndex::new);
        let mut interfaces: Vec<(IfIndex, String)> = Vec::new();
        let mut found_as = None;
        if let Some(known) = known {
            // The manifest names another interface, and that is there: the pod moves.
            let moves = at.is_some() && known.name.as_ref().is_some_and(|was| was != name);
            let there = known.interfaces.iter().filter_map(|&index| {
                let now = interface_name(index)?;
                // An interface of an earlier agent's pod may belong to another pod now.
                let is_anothers =
                    known.name.is_none() && Some(index) != at && names.contains(&*now);
                (!moves && !is_anothers).then_some((index, now))
            });
            interfaces.extend(there);
            found_as = known.name;
        }
        if let Some(index) = at {
            found_as = Some(name.clone());
            if !interfaces.iter().any(|(other, _)| *other == index) {
                interfaces.push((index, name.clone()));
                interfaces.sort_unstable();
            }
        }
        if interfaces.is_empty() {
            return Location::Nowhere(format!(
                "not enforced yet: there is no interface {name}; it will be when it appears"
            ));
        }
        let others: Vec<String> = interfaces
            .iter()
            .filter(|(index, _)| Some(*index) != at)
            .map(|(index, now)| format!("{now} (index {index})"))
            .collect();
        let note = (!others.is_empty()).then(|| {
            let others = others.join(", ");
            let is_there = if at.is_some() {
                "is another"
            } else {
                "is gone"
            };
            format!(
                "the interface {name} {is_there}; the pod stays enforced on {others}, where it was \
                 found by that name: name the right one in {INTERFACE_ANNOTATION}"
            )
        });
        let interfaces: Vec<IfIndex> = interfaces.into_iter().map(|(index, _)| index).collect();
        let known = Known {
            uid: pod.uid.clone(),
            name: found_as,
            interfaces: interfaces.clone(),
        };
        self.known.insert(key.clone(), known);
        Location::Found(PodLocation {
            interfaces,
            note,
            ..PodLocation::default()
        })
    }
}
