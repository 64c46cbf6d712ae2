//! Policy objects, as both sources of pods have them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use egress_api::{Applied, Body, Peers, Policy, Rules, read_set};
use egress_policy::objects::{ObjectKind, ObjectName};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The destinations of every `EgressSet`, by its name.
pub(super) type Sets = BTreeMap<String, Vec<String>>;

/// A version of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObjectVersion {
    /// `metadata.uid`: a new object of the same name begins with the first generation again.
    pub uid: Option<String>,
    /// `metadata.generation`. A manifest need not have one.
    pub generation: Option<i64>,
}

/// The versions of a policy object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyFacts {
    /// The version that was read last.
    pub read: Arc<ObjectVersion>,
    /// The version that [`Pod::objects`](super::Pod::objects) are from. It is an earlier one while the last cannot
    /// be read.
    pub used: Arc<ObjectVersion>,
}

/// All policy objects of a source, whether or not they select a pod.
pub type PolicyObjects = BTreeMap<Arc<ObjectName>, PolicyFacts>;

/// A policy object, and how far it is in force on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyState {
    /// The object.
    pub name: Arc<ObjectName>,
    /// The generation that was read last; `None` for a manifest without one.
    pub generation: Option<i64>,
    /// The oldest generation that is in the kernel's maps for a pod.
    pub applied: Option<i64>,
    /// The pods that it selects and that are to be enforced or audited.
    pub selected: u32,
    /// Those of them for which the generation that was read last is in force.
    pub enforced: u32,
    /// The problem with the object.
    pub problem: Option<String>,
}

impl PolicyState {
    /// Whether the generation that was read last is in force for every pod.
    pub fn is_applied(&self) -> bool {
        self.selected == self.enforced && self.applied == self.generation
    }
}

/// The pods of this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodCounts {
    /// Pods that are to be enforced or audited.
    pub selected: u32,
    /// Those of them whose packets are judged, all of them.
    pub enforced: u32,
    /// Those of `enforced` in mode audit.
    pub audited: u32,
}

/// An `EgressSet`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) name: String,
    /// The destinations, or why they cannot be read.
    pub(super) destinations: Result<Vec<String>, String>,
}

impl Set {
    pub(super) fn read(name: &str, spec: &Value) -> Self {
        Self {
            name: name.to_owned(),
            destinations: read_set(spec),
        }
    }
}

/// A kind of policy object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PolicyKind {
    /// Objects that select pods.
    Policy(ObjectKind),
    /// `EgressSet`.
    Set,
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which kinds of policy objects of a cluster are known. A kind in none of these sets does not exist there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyKinds {
    /// Those whose objects have been listed.
    pub listed: BTreeSet<PolicyKind>,
    /// Those that the API server has not listed and that it may have: it refuses them, for example.
    pub unlisted: BTreeSet<PolicyKind>,
    /// Those of `unlisted` of which an earlier agent knew objects.
    pub withheld: BTreeSet<PolicyKind>,
}

impl PolicyKind {
    /// All kinds.
    pub const ALL: [Self; 4] = [
        Self::Policy(ObjectKind::EgressPolicy),
        Self::Policy(ObjectKind::ClusterEgressPolicy),
        Self::Policy(ObjectKind::ClusterNetworkPolicy),
        Self::Set,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Policy(kind) => kind.as_str(),
            Self::Set => "EgressSet",
        }
    }

    /// The API group.
    pub(super) fn group(self) -> &'static str {
        match self {
            Self::Policy(ObjectKind::ClusterNetworkPolicy) => "policy.networking.k8s.io",
            Self::Policy(ObjectKind::EgressPolicy | ObjectKind::ClusterEgressPolicy)
            | Self::Set => "egress-agent.dev",
        }
    }

    /// The version that is read.
    pub(super) fn version(self) -> &'static str {
        match self {
            Self::Policy(ObjectKind::ClusterNetworkPolicy) => "v1alpha2",
            Self::Policy(ObjectKind::EgressPolicy | ObjectKind::ClusterEgressPolicy)
            | Self::Set => "v1alpha1",
        }
    }

    pub(super) fn is_namespaced(self) -> bool {
        self == Self::Policy(ObjectKind::EgressPolicy)
    }
}

/// The policy in the form for [`egress_api::Selection`], and its present problem.
pub(super) fn applied(
    policy: &Policy,
    peers: &dyn Peers,
) -> (Arc<ObjectName>, Applied, Vec<String>) {
    let (rules, problems) = match &policy.body {
        Body::Namespace(rules) => (Rules::Namespace(Arc::clone(rules)), Vec::new()),
        Body::Tier(rules) => (Rules::Tier(Arc::clone(rules)), Vec::new()),
        Body::Network(network) => {
            let (rules, problems) = network.resolve(peers);
            (Rules::Tier(Arc::new(rules)), problems)
        }
    };
    let applied = Applied {
        subject: Arc::clone(&policy.subject),
        rules,
    };
    (Arc::clone(&policy.name), applied, problems)
}
