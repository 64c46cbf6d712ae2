//! Interfaces whose pods are not known.
//!
//! Each is enforced like a pod, under a policy that allows nothing external. When its pod is known, the pod takes
//! the interface over, and no packet passes in between. If that pod is not to be enforced, the interface is
//! released.

use std::collections::BTreeMap;

use egress_common::ids::IfIndex;

use super::InForce;
use crate::{
    host::Links,
    pods::{ObjectsOf, Pod},
    report::Subject,
};
use egress_policy::objects::Objects;

/// The problem of an interface that stays in quarantine.
pub(in crate::control) const CLOSED: &str = "closed to the outside: it leads into another network namespace, and \
                                 no pod of this node is known to be there. If it is no pod's, name \
                                 it in quarantine.exclude";

/// The names and indexes of the interfaces in quarantine when it cannot be found out which interfaces have no pod:
/// those in quarantine now, and with `links` all others that are enforced. Interfaces of pods that are gone are among
/// them.
pub(super) fn as_before(
    enforced: &BTreeMap<Subject, InForce>,
    links: Option<&Links>,
) -> Vec<(String, IfIndex)> {
    let interfaces = enforced.iter().flat_map(|(subject, in_force)| {
        let name = match subject {
            Subject::Interface(name) => Some(&name.0),
            Subject::Pod(_) => None,
        };
        let interfaces = in_force.wanted.interfaces.iter();
        interfaces.filter_map(move |&ifindex| {
            let link = || links.and_then(|links| Some(links.get(ifindex)?.name.clone()));
            Some((name.cloned().or_else(link)?, ifindex))
        })
    });
    interfaces.collect()
}

/// The stand-in for the unknown pod of an interface.
pub(in crate::control) fn stand_in(interface: &str) -> (Subject, Pod) {
    let pod = Pod {
        namespace: String::new(),
        name: interface.to_owned(),
        uid: "quarantine".to_owned(),
        interface: Some(interface.to_owned()),
        cgroup_uid: None,
        addresses: Vec::new(),
        further: Vec::new(),
        annotations: BTreeMap::new(),
        namespace_annotations: BTreeMap::new(),
        namespace_known: true,
        objects: Objects::default(),
        objects_of: ObjectsOf::Known,
        host_network: false,
        is_pending: false,
        node_name: None,
        origin: format!("interface {interface}"),
    };
    (Subject::interface(interface), pod)
}
