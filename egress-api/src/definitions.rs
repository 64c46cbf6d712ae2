//! The definitions of this project's kinds for the API server, generated from the types.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;

use crate::{ClusterEgressPolicy, EgressNodeReport, EgressPolicy, EgressSet};

/// The definitions, in the order of their names.
pub fn definitions() -> Vec<CustomResourceDefinition> {
    let mut all = vec![
        ClusterEgressPolicy::crd(),
        EgressNodeReport::crd(),
        EgressPolicy::crd(),
        EgressSet::crd(),
    ];
    for definition in &mut all {
        let labels = definition.metadata.labels.get_or_insert_default();
        labels.insert(
            "app.kubernetes.io/name".to_owned(),
            "egress-agent".to_owned(),
        );
    }
    all
}
