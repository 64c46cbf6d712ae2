//! Policy objects, as both sources of pods have them.

use std::{collections::BTreeMap, sync::Arc};

use egress_api::{Applied, Body, Peers, Policy, Rules, read_set};
use egress_policy::objects::{ObjectKind, ObjectName};
use serde_json::Value;

/// The destinations of every `EgressSet`, by its name.
pub(super) type Sets = BTreeMap<String, Vec<String>>;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PolicyKind {
    Policy(ObjectKind),
    Set,
}

impl PolicyKind {
    pub(super) const ALL: [Self; 4] = [
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

/// The policy in the form for [`egress_api::Selection`], and what is wrong with it now.
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
