//! `EgressSet`: a named list of destinations.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{read::Reader, schema};

/// A named list of destinations, which an entry of any policy uses as `@name`, `@name:443` or `@name:443/tcp`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, CustomResource, JsonSchema)]
#[kube(
    group = "egress-agent.dev",
    version = "v1alpha1",
    kind = "EgressSet",
    plural = "egresssets",
    shortname = "egs",
    category = "egress",
    doc = "A named list of destinations.",
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct EgressSetSpec {
    /// Names, wildcards, addresses and prefixes, without ports and protocols.
    #[schemars(schema_with = "schema::destinations")]
    pub destinations: Vec<String>,
}

/// The destinations of an `EgressSet`, or why they cannot be read.
///
/// # Errors
///
/// The mistake.
pub fn read_set(spec: &Value) -> Result<Vec<String>, String> {
    let mut reader = Reader::new(spec, "spec");
    let is_known = reader.expect_only(&["destinations"]).is_ok();
    let destinations = reader.required("destinations");
    destinations
        .filter(|_| is_known)
        .ok_or_else(|| reader.problems.join("; "))
}
