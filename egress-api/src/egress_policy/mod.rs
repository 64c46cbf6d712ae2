//! `EgressPolicy`: what pods of one namespace may reach.

pub(crate) mod read;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema;

/// What the selected pods of the namespace may reach. It adds to what the namespace's annotations say.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, CustomResource, JsonSchema)]
#[kube(
    group = "egress-agent.dev",
    version = "v1alpha1",
    kind = "EgressPolicy",
    plural = "egresspolicies",
    namespaced,
    shortname = "egp",
    category = "egress",
    doc = "What pods of a namespace may reach.",
    printcolumn = r#"{"name": "Mode", "type": "string", "jsonPath": ".spec.mode"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct EgressPolicySpec {
    /// The pods that the policy is about. An empty selector selects all pods of the namespace.
    #[serde(default)]
    #[schemars(schema_with = "schema::selector")]
    pub pod_selector: LabelSelector,
    /// What happens to packets that are not allowed. Without it, as with annotations, they are dropped unless
    /// the agent's configuration says `defaultMode: audit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Destinations that the pods may reach: `destination[:port[-port]][/protocol]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::allow")]
    pub allow: Option<Vec<String>>,
    /// Destinations that the pods may not reach, whoever allows them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::deny")]
    pub deny: Option<Vec<String>>,
    /// Names that the pods may look up although no entry allows them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schema::resolve")]
    pub resolve: Option<Vec<String>>,
}

/// What happens to packets that are not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// They are dropped and reported.
    Enforce,
    /// They are reported.
    Audit,
    /// Nothing is judged.
    Off,
}
