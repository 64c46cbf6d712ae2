//! Reads the output as the API server will, so that no object that cannot be applied is written unnoticed.

use egress_api::{ClusterEgressPolicySpec, EgressPolicySpec, EgressSetSpec};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

#[derive(Deserialize)]
struct Written {
    kind: String,
    spec: Value,
}

/// Problems of the written objects. A text here is an error of this crate.
pub(crate) fn errors(yaml: &str) -> Vec<String> {
    let written: Vec<Written> = match serde_saphyr::from_multiple(yaml) {
        Ok(written) => written,
        Err(error) => return vec![format!("the output is not YAML: {error}")],
    };
    written
        .into_iter()
        .filter_map(|object| {
            let read = match object.kind.as_str() {
                "EgressPolicy" => read::<EgressPolicySpec>(object.spec),
                "ClusterEgressPolicy" => read::<ClusterEgressPolicySpec>(object.spec),
                "EgressSet" => read::<EgressSetSpec>(object.spec),
                other => Err(format!("kind {other}")),
            };
            read.err()
                .map(|error| format!("an {} in the output cannot be read: {error}", object.kind))
        })
        .collect()
}

fn read<T: DeserializeOwned>(spec: Value) -> Result<(), String> {
    serde_json::from_value::<T>(spec)
        .map(drop)
        .map_err(|error| error.to_string())
}
