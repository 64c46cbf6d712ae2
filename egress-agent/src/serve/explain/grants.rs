//! The lists to which an entry has to be added before it takes effect.

use egress_common::reason::Reason;

use crate::serve::published::Written;
use egress_policy::{
    Annotations, Inputs, PodAnnotations, PolicyError, Settings,
    annotations::PREFIX,
    explain::{Entries, EntryMatch, List, Target, To},
};

/// The lists of a pod and of its namespace, each read alone.
pub(super) struct Grants {
    power: PodAnnotations,
    /// The pod's list, if it has an `allow`. Without one, its namespace's list applies.
    pod: Option<Entries>,
    namespace: Entries,
}

impl Grants {
    /// Reads each of the two as if the other did not exist.
    ///
    /// # Errors
    ///
    /// When an annotation cannot be read.
    pub(super) fn read(written: &Written, settings: &Settings) -> Result<Self, PolicyError> {
        let alone = Settings {
            pod_annotations: PodAnnotations::Grant,
            ..settings.clone()
        };
        let none = Annotations::default();
        let pod = written.own.allow.is_some();
        let pod = pod.then(|| Entries::read(Inputs::annotations(&written.own, &none), &alone));
        Ok(Self {
            power: settings.pod_annotations,
            pod: pod.transpose()?,
            namespace: Entries::read(Inputs::annotations(&none, &written.namespace), &alone)?,
        })
    }

    /// The advice "add `entry` to …": the annotations that lack the entry, and why it belongs there.
    pub(super) fn add(&self, entry: &str, target: &Target, reason: Option<Reason>) -> String {
        let allow = format!("{PREFIX}{}", List::Allow.as_str());
        match self.power {
            PodAnnotations::Grant => format!("add {entry} to {allow}"),
            PodAnnotations::Ignore => format!(
                "add {entry} to {allow} of the namespace: the pod's own list grants nothing \
                 (podAnnotations: ignore)"
            ),
            PodAnnotations::Narrow => {
                let Some(pod) = &self.pod else {
                    return format!("add {entry} to {allow} of the namespace");
                };
                match (
                    lists(pod, target, reason),
                    lists(&self.namespace, target, reason),
                ) {
                    (true, false) => format!(
                        "add {entry} to {allow} of the namespace: the pod's own list has it, which \
                         counts only where the namespace's list covers it (podAnnotations: narrow)"
                    ),
                    (false, true) => {
                        format!("add {entry} to {allow} of the pod: the namespace's list covers it")
                    }
                    // If both have it, the entries are two patterns whose intersection cannot be expressed.
                    (false, false) | (true, true) => format!(
                        "add {entry} to {allow} of the namespace and to that of the pod \
                         (podAnnotations: narrow)"
                    ),
                }
            }
        }
    }
}

/// Whether an allow list opens the target.
fn lists(entries: &Entries, target: &Target, reason: Option<Reason>) -> bool {
    // Only an entry with an address opens these.
    let by_address = matches!(
        reason,
        Some(Reason::Protected | Reason::Tunnel | Reason::DnsElsewhere)
    );
    let opens = |entry: &EntryMatch| {
        entry.list == List::Allow
            && !(by_address && (entry.is_any || entry.is_name))
            && match (reason, target.protocol) {
                // For a query, only the name counts.
                (Some(Reason::DnsName), _) | (_, None) => true,
                (_, Some(protocol)) => entry.covers_port(protocol, target.port.unwrap_or_default()),
            }
    };
    let matches = match &target.to {
        To::Name(name) => entries.matching_name(name),
        To::Address(address) => entries.matching_address(address),
    };
    matches.iter().any(opens)
}
