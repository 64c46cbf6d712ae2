//! The manifests mean the same to the API server, to the agent and to each other.

mod agent;
mod alerts;
mod examples;
mod objects;
mod rights;

use egress_agent::config::Config;
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{ConfigMap, Container, PodSpec},
};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Every directory for `kubectl apply -k`.
const KUSTOMIZATIONS: [&str; 5] = [
    ".",
    "base",
    "overlays/audit",
    "overlays/locked-down",
    "cleanup",
];

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn the<T: DeserializeOwned>(objects: &[Value], kind: &str) -> T {
    let [object] = objects
        .iter()
        .filter(|object| object["kind"] == kind)
        .collect::<Vec<_>>()[..]
    else {
        panic!("not one {kind}");
    };
    serde_json::from_value(object.clone()).expect(kind)
}

fn configuration(objects: &[Value]) -> Config {
    let map: ConfigMap = the(objects, "ConfigMap");
    let data = map.data.expect("data");
    let text = data.get("config.yaml").expect("config.yaml");
    Config::from_yaml(text).unwrap_or_else(|error| panic!("{error}"))
}

fn pod_spec(objects: &[Value]) -> PodSpec {
    let daemon_set: DaemonSet = the(objects, "DaemonSet");
    daemon_set
        .spec
        .and_then(|spec| spec.template.spec)
        .expect("a pod spec")
}

fn agent(spec: &PodSpec) -> &Container {
    let [agent] = spec.containers.as_slice() else {
        panic!("not one container");
    };
    agent
}
