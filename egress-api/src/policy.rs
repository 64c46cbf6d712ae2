//! Policy objects in the form in which they are evaluated: the pods that they select, and their rules.
//!
//! A part that cannot be read makes the policy stricter, never looser, and only for the pods that it may select:
//!
//! | unreadable | then |
//! |---|---|
//! | a selector | it selects everything within the object's reach, and the object only takes away |
//! | a list of an `EgressPolicy` | `allow` allows nothing, `deny` denies everything |
//! | tier or priority | the rules come first, and only take away |
//! | a rule | it matches nothing if its action allows, else it denies everything |
//!
//! A source of objects uses such a policy only if it has no earlier, readable form of the object.

use std::sync::Arc;

use ::egress_policy::objects::{NamespacePolicy, ObjectKind, ObjectName, TierPolicy};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::Value;

use crate::{
    cluster_egress_policy,
    cluster_network_policy::read::NetworkPolicy,
    egress_policy,
    read::Reader,
    selector::{Labels, Selector},
};

/// What follows when it is not known which pods a policy is about, or when its rules come.
pub(crate) const ONLY_TAKES_AWAY: &str =
    "so its permissions do not count, and its denials count for every pod that it may select";

/// A policy object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its name.
    pub name: Arc<ObjectName>,
    /// The pods that it selects.
    pub subject: Arc<PolicySubject>,
    /// Its rules for them.
    pub body: Body,
    /// What could not be read, or does not count.
    pub problems: Vec<String>,
    /// Whether all of it could be read.
    pub is_complete: bool,
}

/// The rules of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Lists that count as the namespace's word.
    Namespace(Arc<NamespacePolicy>),
    /// Ordered rules.
    Tier(Arc<TierPolicy>),
    /// Ordered rules whose entries depend on the cluster's nodes and pods.
    Network(Arc<NetworkPolicy>),
}

/// The pods that a policy is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySubject {
    /// Only pods of this namespace.
    pub(crate) namespace: Option<String>,
    pub(crate) namespaces: Selector,
    pub(crate) pods: Selector,
    /// Whether pods in the host's network do not count.
    pub(crate) without_host_network: bool,
}

/// What selectors look at in a pod.
#[derive(Clone, Copy, Debug)]
pub struct SelectedPod<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its labels.
    pub labels: &'a Labels,
    /// The labels of its namespace.
    pub namespace_labels: &'a Labels,
    /// `spec.hostNetwork`.
    pub host_network: bool,
}

impl PolicySubject {
    /// Whether the policy is about every pod that has a network of its own.
    pub fn selects_every_pod(&self) -> bool {
        self.namespace.is_none()
            && self.namespaces == Selector::default()
            && self.pods == Selector::default()
    }

    /// Whether the policy is about the pod.
    pub fn selects(&self, pod: SelectedPod<'_>) -> bool {
        let is_in_reach = match &self.namespace {
            Some(namespace) => namespace == pod.namespace,
            None => self.namespaces.selects(pod.namespace_labels),
        };
        is_in_reach
            && !(self.without_host_network && pod.host_network)
            && self.pods.selects(pod.labels)
    }
}

impl Policy {
    /// What could not be read, or does not count, in one text.
    pub fn problem(&self) -> Option<String> {
        (!self.problems.is_empty()).then(|| self.problems.join("; "))
    }

    /// Reads an object of this kind. `spec` is its specification, or null.
    pub fn read(kind: ObjectKind, namespace: Option<&str>, name: &str, spec: &Value) -> Self {
        let name = Arc::new(ObjectName {
            kind,
            namespace: namespace.map(str::to_owned),
            name: name.to_owned(),
        });
        let mut reader = Reader::new(spec, "spec");
        match kind {
            ObjectKind::EgressPolicy => egress_policy::read::policy(name, &mut reader),
            ObjectKind::ClusterEgressPolicy => {
                cluster_egress_policy::read::policy(name, &mut reader)
            }
            ObjectKind::ClusterNetworkPolicy => {
                crate::cluster_network_policy::read::policy(name, &mut reader)
            }
        }
    }
}

/// Reads the selector in a field; one that is missing selects everything. If it cannot be read, it selects
/// everything, and `is_good` becomes false.
pub(crate) fn selector(reader: &mut Reader<'_>, field: &str, is_good: &mut bool) -> Selector {
    let Ok(read) = reader.try_optional::<LabelSelector>(field) else {
        *is_good = false;
        return Selector::default();
    };
    match Selector::read(&read.unwrap_or_default()) {
        Ok(selector) => selector,
        Err(error) => {
            reader.problem(field, &format!("cannot be read: {error}"));
            *is_good = false;
            Selector::default()
        }
    }
}

#[cfg(test)]
#[path = "policy_tests/mod.rs"]
mod tests;
