//! Where pods are: behind which interfaces of this machine.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use egress_common::ids::IfIndex;

use super::{
    first_addresses::FirstAddresses, machine::Machine, named::Named, new_interfaces::LOOK_AGAIN,
    on_host::OnHost,
};
use crate::{host::Network, pods::Snapshot, report::Subject};

/// Where a pod is.
#[derive(Clone, Debug)]
pub(in crate::control) enum Location {
    /// Behind these interfaces.
    Found(PodLocation),
    /// Nowhere yet; the text says why.
    NotYet(String),
    /// Nothing of the pod runs: it has not begun, or it has ended.
    Nobody {
        /// How that is known.
        why: String,
        /// Whether the pod has a control group.
        has_group: bool,
    },
    /// Nowhere where it could be enforced; the text says why.
    Nowhere(String),
}

impl Location {
    /// The interfaces that the pod is behind; none if it was not found.
    pub(in crate::control) fn interfaces(&self) -> &[IfIndex] {
        match self {
            Self::Found(location) => &location.interfaces,
            Self::NotYet(_) | Self::Nobody { .. } | Self::Nowhere(_) => &[],
        }
    }
}

/// Behind which interfaces a pod is.
#[derive(Clone, Debug, Default)]
pub(in crate::control) struct PodLocation {
    /// Their indexes, in order; never empty.
    pub(in crate::control) interfaces: Vec<IfIndex>,
    /// Whether the pod's end has addresses. Without them its network may be incomplete.
    pub(in crate::control) has_addresses: bool,
    /// The addresses that its interfaces had when they were made.
    pub(in crate::control) first: FirstAddresses,
    /// The network namespaces on their other ends.
    pub(in crate::control) networks: Vec<Network>,
    /// A problem with the location, which counts all the same.
    pub(in crate::control) note: Option<String>,
}

/// How pods are found.
pub(in crate::control) enum PodLocations {
    /// By the interfaces that their manifests name.
    Named(Named),
    /// By their control groups on this machine.
    OnHost(Box<OnHost>),
}

/// The result of one look at the machine.
pub(super) struct Look {
    pub(super) locations: BTreeMap<Subject, Location>,
    /// The names and indexes of interfaces whose pods are not known; `None` when that cannot be
    /// found out now.
    pub(super) unidentified: Option<Vec<(String, IfIndex)>>,
}

impl PodLocations {
    /// Where each pod is, and the interfaces whose pods are not known.
    pub(super) fn look(&mut self, machine: &mut Machine, snapshot: &Snapshot) -> Look {
        machine.look_at_addresses();
        let links = machine.host.links();
        match (self, links) {
            (Self::Named(named), links) => {
                match links {
                    Ok(links) => machine.links = links,
                    Err(error) => tracing::error!(%error, "the interfaces cannot be listed"),
                }
                Look {
                    locations: named.look(snapshot),
                    unidentified: Some(Vec::new()),
                }
            }
            (Self::OnHost(on_host), Ok(links)) => {
                let look = on_host.look(&mut machine.host, &links, snapshot);
                machine.links = links;
                look
            }
            (Self::OnHost(_), Err(error)) => {
                let why = format!("the interfaces cannot be listed: {error:#}");
                let pods = snapshot.pods.keys();
                let locations =
                    pods.map(|name| (name.clone().into(), Location::NotYet(why.clone())));
                Look {
                    locations: locations.collect(),
                    unidentified: None,
                }
            }
        }
    }

    /// The interfaces of the host at the last look; none where manifests name them.
    pub(super) fn there(&self) -> HashSet<IfIndex> {
        match self {
            Self::Named(_) => HashSet::new(),
            Self::OnHost(on_host) => on_host.there().clone(),
        }
    }

    /// Whether interfaces are closed until their pods are known.
    pub(in crate::control) fn has_quarantine(&self) -> bool {
        matches!(self, Self::OnHost(on_host) if on_host.has_quarantine())
    }

    /// The agent is attached to these interfaces.
    pub(super) fn note_attached(&mut self, interfaces: impl IntoIterator<Item = IfIndex>) {
        if let Self::OnHost(on_host) = self {
            on_host.note_attached(interfaces);
        }
    }

    /// Whether some interface has no pod yet.
    pub(super) fn has_unidentified(&self) -> bool {
        matches!(self, Self::OnHost(on_host) if on_host.has_unidentified())
    }

    /// The addresses that an interface had at first sight.
    pub(super) fn first_addresses(&self, ifindex: IfIndex) -> FirstAddresses {
        match self {
            Self::Named(_) => FirstAddresses::default(),
            Self::OnHost(on_host) => on_host.first_addresses(ifindex),
        }
    }

    /// How long to wait before the next look, which would otherwise come `after` this time.
    pub(super) fn look_again(&self, after: Duration) -> Duration {
        match self {
            Self::OnHost(on_host) if on_host.waits_for_networks() => after.min(LOOK_AGAIN),
            _ => after,
        }
    }
}
