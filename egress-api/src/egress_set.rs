//! `EgressSet`: a named list of destinations.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A named list of destinations, which an entry of any policy uses as `@name`, `@name:443` or `@name:443/tcp`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, CustomResource, JsonSchema)]
#[kube(
    group = "egress-agent.dev",
    version = "v1alpha1",
    kind = "EgressSet",
    plural = "egresssets",
    shortname = "egs",
    category = "egress"
)]
#[serde(rename_all = "camelCase")]
pub struct EgressSetSpec {
    /// Names, wildcards, addresses and prefixes, without ports and protocols.
    pub destinations: Vec<String>,
}
