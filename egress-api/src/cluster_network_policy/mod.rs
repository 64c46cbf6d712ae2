//! `ClusterNetworkPolicy` of the Kubernetes network-policy-api, `policy.networking.k8s.io/v1alpha2`.
//!
//! This project does not ship its definition. Only what egress needs is read. Fields that are not known here are
//! ignored, and a peer without a known field is [`EgressPeer::default`].

mod entries;
pub(crate) mod read;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::CustomResource;
use serde::{Deserialize, Serialize};

use crate::cluster_egress_policy::Tier;
pub use entries::{ENTRIES_MAX, NamedPort, PeerPod, Peers};
pub use read::NetworkPolicy;

/// The specification.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, CustomResource)]
#[kube(
    group = "policy.networking.k8s.io",
    version = "v1alpha2",
    kind = "ClusterNetworkPolicy",
    plural = "clusternetworkpolicies",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase")]
pub struct ClusterNetworkPolicySpec {
    /// The tier.
    pub tier: Tier,
    /// From 0 to 1000; the lowest is evaluated first.
    pub priority: u32,
    /// The pods that the policy is about.
    pub subject: Subject,
    /// Rules about ingress. They are counted, not read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<serde_json::Value>,
    /// Rules about egress, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<EgressRule>,
}

/// The pods that a policy is about. Exactly one field is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Subject {
    /// All pods of these namespaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<LabelSelector>,
    /// These pods of these namespaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods: Option<NamespacedPod>,
}

/// Pods by their labels and those of their namespaces.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NamespacedPod {
    /// The namespaces.
    #[serde(default)]
    pub namespace_selector: LabelSelector,
    /// The pods in them.
    #[serde(default)]
    pub pod_selector: LabelSelector,
}

/// A rule about egress.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressRule {
    /// A name for messages.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// What happens to packets that match.
    pub action: RuleAction,
    /// The destinations.
    pub to: Vec<EgressPeer>,
    /// Protocols and ports; all of them if there are none here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocols: Option<Vec<Protocol>>,
}

/// What happens to packets that match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RuleAction {
    /// They pass.
    Accept,
    /// They are denied.
    Deny,
    /// The next tier decides.
    Pass,
}

/// A destination. Exactly one field is set. If none is, the peer has a field that is not known here: an `Accept`
/// rule then matches nothing, any other rule denies everything (the API's comment on `ClusterNetworkPolicyEgressPeer`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EgressPeer {
    /// All pods of these namespaces, but for those in the host's network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<LabelSelector>,
    /// These pods, but for those in the host's network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods: Option<NamespacedPod>,
    /// The addresses of these nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<LabelSelector>,
    /// Prefixes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub networks: Option<Vec<String>>,
    /// Names; a leading `*` stands for one or more labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_names: Option<Vec<String>>,
}

/// A protocol with its ports, or the name of a port. Exactly one field is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Protocol {
    /// TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<Ports>,
    /// UDP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub udp: Option<Ports>,
    /// SCTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sctp: Option<Ports>,
    /// The name of a port of the destination's pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_named_port: Option<String>,
}

/// The ports of a protocol. If none is set, there is a field that is not known here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ports {
    /// The destination's port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_port: Option<Port>,
}

/// One port, or a range. Exactly one field is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    /// One port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub number: Option<u16>,
    /// A range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<PortRange>,
}

/// A range of ports, both inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRange {
    /// The lowest.
    pub start: u16,
    /// The highest.
    pub end: u16,
}
