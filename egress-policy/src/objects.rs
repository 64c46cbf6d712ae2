//! Policy objects of a cluster, as far as they concern one pod: what selects it, in the order of evaluation.
//!
//! The source of pods evaluates selectors, and turns each object into the types below. Entries are still text, in the
//! grammar of annotations.

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::{Deserialize, Serialize};

use super::Mode;

/// The kinds of policy objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ObjectKind {
    /// `egress-agent.dev` `EgressPolicy`.
    EgressPolicy,
    /// `egress-agent.dev` `ClusterEgressPolicy`.
    ClusterEgressPolicy,
    /// `policy.networking.k8s.io` `ClusterNetworkPolicy`.
    ClusterNetworkPolicy,
}

impl ObjectKind {
    /// The kind as manifests write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::EgressPolicy => "EgressPolicy",
            Self::ClusterEgressPolicy => "ClusterEgressPolicy",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
        }
    }
}

/// The name of a policy object. Displayed as `EgressPolicy shop/web` or `ClusterEgressPolicy guardrails`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectName {
    /// The kind.
    pub kind: ObjectKind,
    /// The namespace, if the kind has one.
    pub namespace: Option<String>,
    /// `metadata.name`.
    pub name: String,
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind.as_str())?;
        if let Some(namespace) = &self.namespace {
            write!(f, "{namespace}/")?;
        }
        f.write_str(&self.name)
    }
}

/// An `EgressPolicy` that selects the pod. Its lists mean what annotations of the namespace mean.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespacePolicy {
    /// The object.
    pub name: Arc<ObjectName>,
    /// `spec.mode`.
    pub mode: Option<Mode>,
    /// `spec.allow`.
    pub allow: Option<Vec<String>>,
    /// `spec.deny`.
    pub deny: Option<Vec<String>>,
    /// `spec.resolve`.
    pub resolve: Option<Vec<String>>,
}

/// When ordered rules are evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Tier {
    /// Before annotations and [`NamespacePolicy`].
    Admin,
    /// After them.
    Baseline,
}

impl Tier {
    /// The tier as manifests write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Admin => "Admin",
            Self::Baseline => "Baseline",
        }
    }
}

/// What happens to packets that match a rule of a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum TierAction {
    /// They pass.
    Allow,
    /// They are denied.
    Deny,
    /// The next tier decides.
    Pass,
}

/// One rule of a tier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierRule {
    /// Its name, if it has one.
    pub name: Option<String>,
    /// Its place in the object's list of rules, from 0.
    pub index: usize,
    /// What happens to packets that match.
    pub action: TierAction,
    /// The entries. A rule of a `ClusterNetworkPolicy` is written as entries, too. No entry: it matches nothing.
    pub entries: Vec<String>,
}

/// An object with ordered rules that selects the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierPolicy {
    /// The object.
    pub name: Arc<ObjectName>,
    /// The tier.
    pub tier: Tier,
    /// The order within the tier: the lowest first.
    pub priority: u32,
    /// The rules, in order.
    pub rules: Vec<TierRule>,
}

/// All policy objects that concern one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Objects {
    /// The `EgressPolicy` objects that select it, by name.
    pub namespace: Vec<Arc<NamespacePolicy>>,
    /// The objects with ordered rules that select it, in any order.
    pub tiers: Vec<Arc<TierPolicy>>,
    /// The destinations of every `EgressSet`, by its name.
    pub sets: Arc<BTreeMap<String, Vec<String>>>,
}
