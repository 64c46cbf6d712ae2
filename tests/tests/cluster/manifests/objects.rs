//! Every object is valid for the API server, and every file is used.

use std::collections::BTreeSet;

use egress_api::{ClusterEgressPolicy, ClusterNetworkPolicy, EgressPolicy, EgressSet};
use egress_tests::yaml::{self, identity};
use k8s_openapi::{
    api::{
        admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding},
        apps::v1::{DaemonSet, Deployment},
        core::v1::{ConfigMap, Namespace, Pod, ResourceQuota, ServiceAccount},
        rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::list;

/// Parses the object as its type and serialises it again: a field that the type does not have is lost.
fn check<T: DeserializeOwned + Serialize>(object: &Value) -> Result<(), String> {
    let typed: T = serde_json::from_value(object.clone()).map_err(|error| error.to_string())?;
    let back = serde_json::to_value(typed).map_err(|error| error.to_string())?;
    if back == *object {
        Ok(())
    } else {
        Err(format!(
            "is not the same when read and written:\n{object:#}\n{back:#}"
        ))
    }
}

/// Checks an object by its type.
pub(super) fn check_typed(object: &Value) -> Result<(), String> {
    let text = |key: &str| object[key].as_str().unwrap_or_default().to_owned();
    match (text("apiVersion").as_str(), text("kind").as_str()) {
        ("v1", "Namespace") => check::<Namespace>(object),
        ("v1", "ResourceQuota") => check::<ResourceQuota>(object),
        ("v1", "ServiceAccount") => check::<ServiceAccount>(object),
        ("v1", "ConfigMap") => check::<ConfigMap>(object),
        ("v1", "Pod") => check::<Pod>(object),
        ("apps/v1", "DaemonSet") => check::<DaemonSet>(object),
        ("apps/v1", "Deployment") => check::<Deployment>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => check::<ClusterRole>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => {
            check::<ClusterRoleBinding>(object)
        }
        ("rbac.authorization.k8s.io/v1", "Role") => check::<Role>(object),
        ("rbac.authorization.k8s.io/v1", "RoleBinding") => check::<RoleBinding>(object),
        ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy") => {
            check::<ValidatingAdmissionPolicy>(object)
        }
        ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding") => {
            check::<ValidatingAdmissionPolicyBinding>(object)
        }
        ("apiextensions.k8s.io/v1", "CustomResourceDefinition") => {
            check::<CustomResourceDefinition>(object)
        }
        ("egress-agent.dev/v1alpha1", "EgressPolicy") => check::<EgressPolicy>(object),
        ("egress-agent.dev/v1alpha1", "ClusterEgressPolicy") => {
            check::<ClusterEgressPolicy>(object)
        }
        ("egress-agent.dev/v1alpha1", "EgressSet") => check::<EgressSet>(object),
        ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy") => {
            check::<ClusterNetworkPolicy>(object)
        }
        ("monitoring.coreos.com/v1", "PodMonitor") => {
            check_keys(&object["spec"], &["selector", "podMetricsEndpoints"])
        }
        ("monitoring.coreos.com/v1", "PrometheusRule") => {
            for group in list(&object["spec"]["groups"]) {
                check_keys(group, &["name", "rules"])?;
                for rule in list(&group["rules"]) {
                    check_keys(rule, &["alert", "expr", "for", "labels", "annotations"])?;
                }
            }
            check_keys(&object["spec"], &["groups"])
        }
        (version, kind) => Err(format!("{version} {kind} is not known here")),
    }
}

fn check_keys(object: &Value, keys: &[&str]) -> Result<(), String> {
    let found: BTreeSet<&str> = object
        .as_object()
        .ok_or("not a mapping")?
        .keys()
        .map(String::as_str)
        .collect();
    if found == keys.iter().copied().collect() {
        Ok(())
    } else {
        Err(format!("has {found:?}: expected {keys:?}"))
    }
}

#[test]
fn every_field_of_every_object_is_known_to_the_api_server() {
    for file in yaml::files() {
        // kubectl reads the kustomizations; the agent reads examples/pods and its own configuration.
        if file.ends_with("kustomization.yaml") || file == "examples/egress-agent.yaml" {
            continue;
        }
        for object in yaml::objects(&file) {
            check_typed(&object)
                .unwrap_or_else(|error| panic!("{file}: {:?} {error}", identity(&object)));
        }
    }
}

#[test]
fn every_version_of_a_definition_is_served_and_converted_without_a_webhook() {
    for definition in yaml::objects("base/crds.yaml") {
        let spec = &definition["spec"];
        let versions = list(&spec["versions"]);
        assert!(versions.iter().all(|version| version["served"] == true));
        let stored = versions.iter().filter(|version| version["storage"] == true);
        assert_eq!(stored.count(), 1, "{definition}");
        assert!(matches!(
            spec["conversion"]["strategy"].as_str(),
            None | Some("None")
        ));
    }
}

#[test]
fn a_misspelled_field_is_detected() {
    let mut objects = yaml::objects("base/daemonset.yaml");
    objects[0]["spec"]["template"]["spec"]["hostPid"] = true.into();
    assert!(check_typed(&objects[0]).is_err());
}

#[test]
fn every_file_is_in_a_kustomization_or_an_example() {
    for file in yaml::files() {
        let Some((directory, name)) = file.rsplit_once('/') else {
            continue;
        };
        if directory.starts_with("examples") || name == "kustomization.yaml" {
            continue;
        }
        let [kustomization] = &yaml::objects(&format!("{directory}/kustomization.yaml"))[..] else {
            panic!("{directory}: not one kustomization");
        };
        let named = list(&kustomization["resources"])
            .iter()
            .any(|entry| entry == name)
            || list(&kustomization["patches"])
                .iter()
                .any(|patch| patch["path"] == name);
        assert!(named, "{file}");
    }
}

#[test]
fn the_flat_file_is_the_base() {
    assert_eq!(yaml::objects("egress-agent.yaml"), yaml::kustomized("base"));
    assert_eq!(yaml::kustomized("."), yaml::kustomized("base"));
}
