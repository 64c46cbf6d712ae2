//! The manifests that describe pods to the agent.

use std::fs;

use serde_json::{Map, Value, json};

use crate::{Lab, Pod};

/// Annotations: keys without the prefix `egress-agent.dev/`, and values.
pub type Annotations<'a> = &'a [(&'a str, &'a str)];

const ANNOTATION_PREFIX: &str = "egress-agent.dev/";

impl Lab {
    /// Writes or replaces the manifest of a pod.
    #[track_caller]
    pub fn write_pod(&self, pod: &Pod, annotations: Annotations<'_>) {
        self.write_object(
            &pod_file(pod),
            &pod_manifest(pod, Some(pod.interface()), annotations),
        );
    }

    /// Writes the manifest of a pod with this interface annotation, or without one.
    #[track_caller]
    pub fn write_pod_on(&self, pod: &Pod, interface: Option<&str>, annotations: Annotations<'_>) {
        self.write_object(&pod_file(pod), &pod_manifest(pod, interface, annotations));
    }

    /// Writes the manifest of a pod with labels.
    #[track_caller]
    pub fn write_labelled_pod(
        &self,
        pod: &Pod,
        labels: &[(&str, &str)],
        annotations: Annotations<'_>,
    ) {
        let mut manifest = pod_manifest(pod, Some(pod.interface()), annotations);
        let labels = labels.iter();
        let labels: Map<String, Value> = labels
            .map(|(key, value)| ((*key).to_owned(), json!(value)))
            .collect();
        manifest["metadata"]["labels"] = labels.into();
        self.write_object(&pod_file(pod), &manifest);
    }

    /// Writes or replaces the manifest of a policy object.
    #[track_caller]
    pub fn write_policy(&self, object: &Value) {
        self.write_object(&policy_file(object), object);
    }

    /// Removes the manifest of a policy object.
    #[track_caller]
    pub fn remove_policy(&self, object: &Value) {
        self.remove_file(&policy_file(object));
    }

    /// Removes the manifest of a pod.
    #[track_caller]
    pub fn remove_pod(&self, pod: &Pod) {
        self.remove_file(&pod_file(pod));
    }

    /// Writes or replaces the manifest of a namespace.
    #[track_caller]
    pub fn write_namespace(&self, name: &str, annotations: Annotations<'_>) {
        let manifest = json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": { "name": name, "annotations": annotated(annotations) },
        });
        self.write_object(&format!("namespace-{name}.yaml"), &manifest);
    }

    /// Removes the manifest of a namespace.
    #[track_caller]
    pub fn remove_namespace(&self, name: &str) {
        self.remove_file(&format!("namespace-{name}.yaml"));
    }

    /// Writes a file into the directory of manifests, atomically.
    #[track_caller]
    pub fn write_file(&self, name: &str, content: &[u8]) {
        let staged = self.directory().join(format!("staged-{name}"));
        fs::write(&staged, content).expect("write a manifest");
        fs::rename(&staged, self.pods_dir().join(name)).expect("put a manifest in its place");
    }

    /// Removes a file from the directory of manifests.
    #[track_caller]
    pub fn remove_file(&self, name: &str) {
        fs::remove_file(self.pods_dir().join(name)).expect("remove a manifest");
    }

    /// The name of the file with the pod's manifest.
    pub fn pod_file(&self, pod: &Pod) -> String {
        pod_file(pod)
    }

    #[track_caller]
    fn write_object(&self, file: &str, object: &Value) {
        let text = serde_saphyr::to_string(object).expect("plain data is YAML");
        self.write_file(file, text.as_bytes());
    }
}

fn pod_file(pod: &Pod) -> String {
    format!("pod-{}-{}.yaml", pod.namespace(), pod.name())
}

fn policy_file(object: &Value) -> String {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let (kind, name) = (text(&object["kind"]), text(&object["metadata"]["name"]));
    format!("{kind}-{name}.yaml")
}

fn pod_manifest(pod: &Pod, interface: Option<&str>, annotations: Annotations<'_>) -> Value {
    let mut all = annotated(annotations);
    if let Some(interface) = interface {
        all.insert(format!("{ANNOTATION_PREFIX}interface"), json!(interface));
    }
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod.name(),
            "namespace": pod.namespace(),
            "uid": pod.uid(),
            "annotations": all,
        },
        "spec": { "containers": [{ "name": "main", "image": "example.com/main" }] },
        "status": {
            "podIP": pod.ipv4(),
            "podIPs": [{ "ip": pod.ipv4() }, { "ip": pod.ipv6() }],
        },
    })
}

fn annotated(annotations: Annotations<'_>) -> Map<String, Value> {
    annotations
        .iter()
        .map(|(key, value)| (format!("{ANNOTATION_PREFIX}{key}"), json!(value)))
        .collect()
}
