//! An enforced pod, with the handles that it needs.

use std::{sync::Arc, time::SystemTime};

use egress_common::ids::{PodId, PolicyId};

use crate::{
    control::plan::wanted::Wanted,
    datapath::{Adoptable, FlowMap, PodPins},
    report::{PodIdentity, Subject},
    serve::{Attached, PodRecord},
};

/// An enforced pod.
pub(in crate::control) struct Enforced {
    pub(in crate::control) wanted: Arc<Wanted>,
    pub(in crate::control) identity: Arc<PodIdentity>,
    /// Its key in `flows`, `meters` and `identities`.
    pub(in crate::control) pod: PodId,
    /// Its key in `policies`, `allow` and `cidrs`.
    pub(in crate::control) policy: PolicyId,
    /// How many versions of its policy there have been.
    pub(in crate::control) version: u64,
    /// Since when this version is in force.
    pub(in crate::control) since: SystemTime,
    pub(in crate::control) pins: PodPins,
    pub(in crate::control) flows: FlowMap,
}

impl Enforced {
    /// The pod's record until the end of the reconcile, which publishes a complete one.
    pub(in crate::control) fn record(&self, subject: &Subject) -> PodRecord {
        PodRecord {
            uid: self.wanted.uid.clone(),
            mode: self.wanted.compiled.mode,
            host_network: false,
            quarantined: subject.is_interface(),
            identity: Some(Arc::clone(&self.identity)),
            attached: Some(Attached {
                pod: self.pod,
                policy: self.policy,
                version: self.version,
                since: self.since,
                interfaces: self.wanted.interfaces.clone(),
                bypassed: false,
            }),
            compiled: Some(Arc::clone(&self.wanted.compiled)),
            written: Arc::default(),
            unreadable: false,
            exits: Arc::default(),
            problem: None,
        }
    }

    /// The pod as one that is left in the kernel and not enforced.
    pub(in crate::control) fn as_left(&self, subject: &Subject) -> Adoptable {
        let (namespace, name) = subject.fields();
        let entry = self.wanted.entry(self.pod, self.policy);
        let interfaces = self.wanted.interfaces.iter();
        Adoptable {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: self.wanted.uid.clone(),
            interfaces: interfaces.map(|&ifindex| (ifindex, entry)).collect(),
        }
    }
}
