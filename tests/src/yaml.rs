//! The manifests, as the tests read them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::workspace;

/// The repository's `manifests` directory.
pub fn directory() -> PathBuf {
    workspace::root().join("manifests")
}

/// The objects of a file in [`directory`], in their order.
pub fn objects(file: &str) -> Vec<Value> {
    let path = directory().join(file);
    let text = fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    serde_saphyr::from_multiple(&text).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// The paths, relative to [`directory`], of every YAML file in and below it.
pub fn files() -> Vec<String> {
    let mut found = Vec::new();
    collect(&directory(), "", &mut found);
    found.sort();
    assert!(found.len() > 10, "{found:?}");
    found
}

fn collect(directory: &Path, prefix: &str, found: &mut Vec<String>) {
    for entry in fs::read_dir(directory).expect("list manifests") {
        let entry = entry.expect("list manifests");
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            collect(&entry.path(), &format!("{name}/"), found);
        } else if is_yaml(&name) {
            found.push(name);
        }
    }
}

fn is_yaml(path: &str) -> bool {
    Path::new(path)
        .extension()
        .is_some_and(|extension| extension == "yaml")
}

/// The objects that `kubectl apply -k` applies for a directory in [`directory`]: those of its kustomization's
/// resources and components, with its patches applied.
///
/// Patches may only replace values of mappings: in this, strategic merging and this function agree. Any other
/// feature of a kustomization panics.
pub fn kustomized(base: &str) -> Vec<Value> {
    let file = format!("{base}/kustomization.yaml");
    let [kustomization] = objects(&file)
        .try_into()
        .unwrap_or_else(|_| panic!("{file}: not one document"));
    let mut result = Vec::new();
    let mapping = kustomization.as_object().expect("a mapping");
    for (key, value) in mapping {
        match key.as_str() {
            "apiVersion" | "kind" | "patches" => {}
            "resources" | "components" => {
                for entry in value.as_array().expect("a list") {
                    let entry = within(base, entry.as_str().expect("a path"));
                    result.extend(if is_yaml(&entry) {
                        objects(&entry)
                    } else {
                        kustomized(&entry)
                    });
                }
            }
            _ => panic!("{file}: `{key}` is not understood"),
        }
    }
    for patch in mapping
        .get("patches")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        let patch = within(base, patch["path"].as_str().expect("the patch's path"));
        for patch in objects(&patch) {
            let target = result
                .iter_mut()
                .find(|object| identity(object) == identity(&patch))
                .unwrap_or_else(|| panic!("{file}: nothing to patch: {:?}", identity(&patch)));
            merge(target, &patch);
        }
    }
    result
}

/// Kind, namespace and name.
pub fn identity(object: &Value) -> (String, String, String) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let metadata = &object["metadata"];
    (
        text(&object["kind"]),
        text(&metadata["namespace"]),
        text(&metadata["name"]),
    )
}

/// `entry` relative to the directory `path`.
fn within(path: &str, entry: &str) -> String {
    let mut parts: Vec<&str> = path.split('/').filter(|part| *part != ".").collect();
    for part in entry.split('/') {
        match part {
            "." => {}
            ".." => {
                parts.pop().expect("a path within manifests");
            }
            _ => parts.push(part),
        }
    }
    parts.join("/")
}

fn merge(target: &mut Value, patch: &Value) {
    match (target, patch) {
        (Value::Object(target), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(target.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (_, Value::Array(_) | Value::Null) => panic!("a patch may replace values of mappings only"),
        (target, patch) => *target = patch.clone(),
    }
}
