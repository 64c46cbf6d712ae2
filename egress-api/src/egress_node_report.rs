//! `EgressNodeReport`: what one node has in force.
//!
//! Only the node's agent writes the object, and it writes observations alone. So there is no `spec`, and `status` is
//! an ordinary field instead of a subresource: one request writes all of it, with one right.

use std::borrow::Cow;

use k8s_openapi::{
    ClusterResourceScope,
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Resource,
    core::schema::{OptionalEnum, StructuralSchemaRewriter},
};
use schemars::{JsonSchema, generate::SchemaSettings, transform::AddNullable};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Most policies that a report lists.
pub const REPORTED_POLICIES_MAX: usize = 500;
/// Most problems that a report lists.
pub const REPORTED_PROBLEMS_MAX: usize = 20;
/// Longest text of a problem, in bytes.
pub const PROBLEM_TEXT_MAX: usize = 256;
/// Longest name of what a problem is about, in bytes.
pub const PROBLEM_ABOUT_MAX: usize = 330;

const GROUP: &str = "egress-agent.dev";
const VERSION: &str = "v1alpha1";
const KIND: &str = "EgressNodeReport";
const PLURAL: &str = "egressnodereports";

/// What a node's agent has in force. Its name is that of the node, and the agent writes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EgressNodeReport {
    #[schemars(skip)]
    api_version: String,
    #[schemars(skip)]
    kind: String,
    /// The name of the node, and the Node as owner.
    #[schemars(skip)]
    pub metadata: ObjectMeta,
    /// What is in force.
    pub status: EgressNodeReportStatus,
}

/// What is in force on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EgressNodeReportStatus {
    /// The version of the agent.
    #[schemars(length(max = 63))]
    pub agent_version: String,
    /// The pods of the node.
    pub pods: ReportedPods,
    /// The policy objects that select pods of the node: how many, and how many are applied.
    pub policy_counts: PolicyCounts,
    /// The policy objects that select pods of the node. Those that are not applied come first.
    #[schemars(extend("maxItems" = REPORTED_POLICIES_MAX, "x-kubernetes-list-type" = "atomic"))]
    pub policies: Vec<ReportedPolicy>,
    /// What is wrong on the node, besides the problems of the listed policies.
    #[schemars(extend("maxItems" = REPORTED_PROBLEMS_MAX, "x-kubernetes-list-type" = "atomic"))]
    pub problems: Vec<ReportedProblem>,
    /// All problems, listed or not.
    pub problem_count: u32,
}

/// Pods of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReportedPods {
    /// Pods that are to be enforced or audited.
    pub selected: u32,
    /// Those of them whose packets are judged.
    pub enforced: u32,
    /// Those of `enforced` in mode audit: nothing that they send is stopped.
    pub audited: u32,
}

/// Policy objects of a cluster, as one node sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyCounts {
    /// Policies that select pods of the node.
    pub selecting: u32,
    /// Those of them whose present generation is in force for every pod that they select.
    pub applied: u32,
    /// Policies that select no pod of the node.
    pub not_selecting: u32,
    /// Policies that select pods of the node and are not listed, because there are too many.
    pub left_out: u32,
}

/// A policy object on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReportedPolicy {
    /// The kind of the policy object.
    #[schemars(length(max = 63))]
    pub kind: String,
    /// The namespace, if the kind has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub namespace: Option<String>,
    /// The name of the policy object.
    #[schemars(length(max = 253))]
    pub name: String,
    /// `metadata.generation` of the object that the agent has read last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
    /// The oldest generation that is in force for a pod of the node. Equal to `generation` once the last edit is in
    /// the kernel for every enforced pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied_generation: Option<i64>,
    /// The pods of the node that the policy selects, other than those in mode off.
    pub selected: u32,
    /// Those of them for which `generation` is in force in the kernel.
    pub enforced: u32,
    /// What is wrong with the policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = PROBLEM_TEXT_MAX))]
    pub problem: Option<String>,
}

/// A problem on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReportedProblem {
    /// A pod, an object or a part of the node.
    #[schemars(length(max = PROBLEM_ABOUT_MAX))]
    pub about: String,
    /// What is wrong.
    #[schemars(length(max = PROBLEM_TEXT_MAX))]
    pub message: String,
}

impl ReportedPolicy {
    /// Whether the present generation is in force for every pod that the policy selects.
    pub fn is_applied(&self) -> bool {
        self.selected == self.enforced && self.applied_generation == self.generation
    }
}

impl Resource for EgressNodeReport {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        KIND.into()
    }

    fn group((): &()) -> Cow<'_, str> {
        GROUP.into()
    }

    fn version((): &()) -> Cow<'_, str> {
        VERSION.into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        PLURAL.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl EgressNodeReport {
    /// A report.
    pub fn new(metadata: ObjectMeta, status: EgressNodeReportStatus) -> Self {
        Self {
            api_version: format!("{GROUP}/{VERSION}"),
            kind: KIND.to_owned(),
            metadata,
            status,
        }
    }

    /// The definition for the API server. kube's derive is not used: it demands a `spec`.
    pub(crate) fn crd() -> CustomResourceDefinition {
        let settings = SchemaSettings::openapi3().with(|settings| {
            settings.inline_subschemas = true;
            settings.meta_schema = None;
        });
        let generator = settings
            .with_transform(AddNullable::default())
            .with_transform(StructuralSchemaRewriter)
            .with_transform(OptionalEnum)
            .into_generator();
        let mut schema = generator.into_root_schema_for::<Self>();
        schema.insert(
            "description".to_owned(),
            json!("What a node's agent has in force. The agent writes it."),
        );
        let column = |name: &str, kind: &str, path: &str| json!({"name": name, "type": kind, "jsonPath": path});
        let definition = json!({
            "metadata": {"name": format!("{PLURAL}.{GROUP}")},
            "spec": {
                "group": GROUP,
                "scope": "Cluster",
                "names": {
                    "kind": KIND,
                    "plural": PLURAL,
                    "singular": KIND.to_lowercase(),
                    "shortNames": ["enr"],
                    "categories": ["egress"],
                },
                "versions": [{
                    "name": VERSION,
                    "served": true,
                    "storage": true,
                    "additionalPrinterColumns": [
                        column("Policies", "integer", ".status.policyCounts.selecting"),
                        column("Applied", "integer", ".status.policyCounts.applied"),
                        column("Pods", "integer", ".status.pods.selected"),
                        column("Enforced", "integer", ".status.pods.enforced"),
                        column("Problems", "integer", ".status.problemCount"),
                        column("Age", "date", ".metadata.creationTimestamp"),
                    ],
                    "schema": {"openAPIV3Schema": schema},
                }],
            },
        });
        serde_json::from_value(definition).expect("a definition")
    }
}
