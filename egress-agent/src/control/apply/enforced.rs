//! A pod that is enforced, with the handles that it needs.

use std::sync::Arc;

use egress_common::records::Interface;

use crate::{
    control::plan::wanted::Wanted,
    datapath::{FlowMap, PodPins},
    report::PodIdentity,
};

/// A pod that is enforced.
pub(in crate::control) struct Enforced {
    pub(in crate::control) wanted: Arc<Wanted>,
    pub(in crate::control) identity: Arc<PodIdentity>,
    /// Its key in `flows`, `meters` and `identities`.
    pub(in crate::control) pod: u32,
    /// Its key in `policies`, `allow` and `cidrs`.
    pub(in crate::control) policy: u32,
    /// How many versions of its policy there have been.
    pub(in crate::control) version: u64,
    pub(in crate::control) pins: PodPins,
    pub(in crate::control) flows: FlowMap,
}

impl Enforced {
    /// What its interfaces are under.
    pub(in crate::control) fn entries(&self) -> Vec<(u32, Interface)> {
        let entry = self.wanted.entry(self.pod, self.policy);
        let interfaces = self.wanted.interfaces.iter();
        interfaces.map(|&ifindex| (ifindex, entry)).collect()
    }
}
