//! What should be done with one pod.

use std::collections::HashMap;

use egress_common::limits::OWN_ADDRESSES;

use super::{
    enforced::{PodKey, Wanted},
    exits,
    place::Place,
    quarantine,
    reconcile::{Reconciler, title},
    waiting::Unfound,
};
use crate::{
    config::{OnDeny, UnenforcedInterfaces},
    host::interface_name,
    pods::Pod,
    policy::Mode,
};

/// What should be done with one pod.
pub(super) enum Plan {
    /// Put it under this; the text says what is wrong all the same.
    Enforce(Box<Wanted>, Option<String>),
    /// Leave it alone, for now or for good; the text says why when it is worth saying.
    Leave(Option<String>),
    /// Keep what is, because what should be cannot be found out; the text says why when it is worth saying.
    Keep(Option<String>),
    /// Keep what is, because it cannot be found any more; the text says why, and is worth saying only if that
    /// lasts: so every pod ends.
    KeepFor(String),
    /// It cannot be found yet.
    Wait(Unfound),
}

impl Reconciler {
    /// What should be done with a pod that is at `place`. `taken` are the interfaces that have their
    /// pod already.
    pub(super) fn plan(
        &mut self,
        key: &PodKey,
        pod: &Pod,
        place: &Place,
        taken: &mut HashMap<u32, PodKey>,
    ) -> Plan {
        let unidentified = quarantine::is_quarantined(key);
        let mut compiled = if unidentified {
            self.readings.unidentified()
        } else if !pod.namespace_known {
            let quarantine = self.config.quarantine.enabled;
            self.readings.without_namespace(pod, quarantine)
        } else {
            self.readings.read(key, pod)
        };
        if compiled.mode == Mode::Off {
            return Plan::Leave(None);
        }
        if pod.host_network {
            // Under `defaultMode` alone nobody has asked for this pod: the agent's own is such a one.
            let is_asked_for =
                !(pod.annotations.is_empty() && pod.namespace_annotations.is_empty());
            return Plan::Leave(is_asked_for.then(|| {
                "not enforced: the pod is in the host's network (hostNetwork)".to_owned()
            }));
        }
        if !pod.namespace_known && self.enforced.contains_key(key) {
            let why = "its namespace is not known; the last good policy stays";
            return Plan::Keep(Some(why.to_owned()));
        }
        let found = match place {
            Place::Found(found) => found,
            // It has ended, and the cluster does not say so yet.
            Place::Nobody { .. } if self.enforced.contains_key(key) => return Plan::Keep(None),
            // Its interfaces may be looked for in vain for a moment only; while it keeps them,
            // nothing passes that should not.
            Place::NotYet(why) | Place::Nowhere(why)
                if pod.cgroup_uid.is_some() && self.enforced.contains_key(key) =>
            {
                return Plan::KeepFor(format!("{why}; enforced on its earlier interfaces"));
            }
            Place::NotYet(why) => {
                return Plan::Wait(Unfound::new(format!("not enforced yet: {why}")));
            }
            Place::Nobody { why, has_group } => {
                let mut unfound = Unfound::new(format!("not enforced yet: {why}"));
                unfound.is_empty = *has_group;
                return Plan::Wait(unfound);
            }
            Place::Nowhere(why) => return Plan::Leave(Some(why.clone())),
        };
        let other = found.interfaces.iter().find_map(|ifindex| {
            let other = taken.get(ifindex).filter(|other| *other != key);
            other.map(|other| (ifindex, other))
        });
        if let Some((ifindex, other)) = other {
            let why = format!(
                "interface {} is already that of pod {}",
                title_of(*ifindex),
                title(other)
            );
            return if self.enforced.contains_key(key) {
                Plan::Keep(Some(format!("{why}; enforced on its earlier interface")))
            } else {
                Plan::Leave(Some(format!("not enforced: {why}")))
            };
        }
        for &ifindex in &found.interfaces {
            taken.insert(ifindex, key.clone());
        }
        let mut notes: Vec<String> = found.note.iter().cloned().collect();
        if !unidentified && pod.namespace_known {
            let (exits, error) = self.exits.of(key, found, pod.cgroup_uid.is_some());
            notes.extend(error);
            if !exits.is_empty() {
                // In audit mode nothing is denied, so nothing is refused either.
                let and = match compiled.mode {
                    Mode::Enforce => self.config.unenforced_interfaces,
                    Mode::Audit | Mode::Off => UnenforcedInterfaces::Report,
                };
                if and == UnenforcedInterfaces::Refuse {
                    compiled = self.readings.refused();
                }
                notes.push(exits::problem(&exits, and));
            }
        }
        let (own, unowned) = self.own_addresses(key, pod, found);
        notes.extend(unowned);
        let on_deny = if unidentified {
            // Whoever is there shall try again, not give up.
            OnDeny::Drop
        } else {
            self.config.on_deny
        };
        let count = own.len();
        if count <= OWN_ADDRESSES {
            let missing = own.is_empty() && !unidentified;
            let wanted = Wanted::new(pod, &own, found, compiled, on_deny, self.ranges);
            notes.extend(missing.then(|| crate::pods::NO_ADDRESS.to_owned()));
            let why = (!notes.is_empty()).then(|| notes.join("; "));
            return Plan::Enforce(Box::new(wanted), why);
        }
        let why = format!(
            "the pod has {count} addresses in status.podIPs; at most {OWN_ADDRESSES} are supported"
        );
        if self.enforced.contains_key(key) {
            return Plan::Keep(Some(format!("{why}; the last good policy stays")));
        }
        let follows = match compiled.mode {
            Mode::Enforce => "everything external is denied",
            Mode::Audit | Mode::Off => "everything external would be denied; nothing is stopped",
        };
        let closed = self.readings.closed(compiled.mode);
        let closed = Wanted::new(pod, &own, found, closed, on_deny, self.ranges);
        Plan::Enforce(Box::new(closed), Some(format!("{why}; {follows}")))
    }
}

/// The interface's name, or its index when it has gone.
fn title_of(ifindex: u32) -> String {
    interface_name(ifindex).unwrap_or_else(|| ifindex.to_string())
}
