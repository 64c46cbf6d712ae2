//! `ClusterEgressPolicy`: ordered rules before or after what teams say.

pub(crate) mod read;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema;

/// Ordered rules for the selected pods of any namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, CustomResource, JsonSchema)]
#[kube(
    group = "egress-agent.dev",
    version = "v1alpha1",
    kind = "ClusterEgressPolicy",
    plural = "clusteregresspolicies",
    shortname = "cegp",
    category = "egress",
    doc = "Ordered rules about what pods of any namespace may reach.",
    printcolumn = r#"{"name": "Tier", "type": "string", "jsonPath": ".spec.tier"}"#,
    printcolumn = r#"{"name": "Priority", "type": "integer", "jsonPath": ".spec.priority"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct ClusterEgressPolicySpec {
    /// When the rules are evaluated: before the teams' policies, or after them.
    pub tier: Tier,
    /// The order within the tier, from 0 to 1000: the lowest first.
    #[schemars(schema_with = "schema::priority")]
    pub priority: u32,
    /// The namespaces of the selected pods. An empty selector selects all namespaces.
    #[serde(default)]
    #[schemars(schema_with = "schema::selector")]
    pub namespace_selector: LabelSelector,
    /// The selected pods in these namespaces. An empty selector selects all pods.
    #[serde(default)]
    #[schemars(schema_with = "schema::selector")]
    pub pod_selector: LabelSelector,
    /// The rules. The first one that matches a packet decides.
    #[schemars(length(min = 1, max = schema::RULES_MAX))]
    pub rules: Vec<Rule>,
}

/// When rules are evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Tier {
    /// Before annotations and `EgressPolicy` objects.
    Admin,
    /// After them, for packets about which they say nothing.
    Baseline,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rule {
    /// A name for messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 100))]
    pub name: Option<String>,
    /// What happens to packets that match an entry.
    pub action: Action,
    /// The destinations: `destination[:port[-port]][/protocol]`.
    #[schemars(schema_with = "schema::rule_entries")]
    pub entries: Vec<String>,
}

/// What happens to packets that match a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Action {
    /// They pass.
    Allow,
    /// They are denied.
    Deny,
    /// The next tier decides.
    Pass,
}
