//! Selectors of endpoints: labels with the source they come from.

use crate::{
    fields::Fields,
    object::{NAMESPACE_NAME, Subject},
    products::Reach,
    selector,
};

/// The label with a pod's namespace.
const NAMESPACE: &str = "io.kubernetes.pod.namespace";

/// The prefix of labels that a pod's namespace has.
const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels.";

/// Reads a selector. That of a policy in a namespace may repeat the namespace.
pub(super) fn read(fields: &Fields<'_>, reach: &Reach) -> Result<Subject, String> {
    let pods = selector::read_renamed(fields, |key| Ok(pod_key(key)?.map(str::to_owned)))?;
    let namespaces = selector::read_renamed(fields, |key| Ok(namespace_key(without_source(key))))?;
    if let Reach::Namespace(own) = reach {
        let names = namespaces.match_labels.iter().flatten();
        let repeats = names
            .clone()
            .all(|(key, value)| key == NAMESPACE_NAME && Some(value) == own.as_ref());
        if !repeats || namespaces.match_expressions.is_some() {
            return Err(format!(
                "{} is about namespaces, in a policy of one namespace",
                fields.place()
            ));
        }
        return Ok(Subject {
            pods,
            ..Subject::default()
        });
    }
    Ok(Subject { namespaces, pods })
}

/// The label without `k8s:` or `any:`.
fn without_source(key: &str) -> &str {
    key.strip_prefix("k8s:")
        .or_else(|| key.strip_prefix("any:"))
        .unwrap_or(key)
}

fn pod_key(key: &str) -> Result<Option<&str>, String> {
    let bare = without_source(key);
    if namespace_key(bare).is_some() {
        return Ok(None);
    }
    if bare.contains(':') || bare.starts_with("io.cilium.") || bare.starts_with("io.kubernetes.") {
        return Err(format!(
            "the selector has `{key}`, which is no label of pods or namespaces"
        ));
    }
    Ok(Some(bare))
}

/// The label of the namespace for a label of the endpoint.
fn namespace_key(bare: &str) -> Option<String> {
    if bare == NAMESPACE {
        return Some(NAMESPACE_NAME.to_owned());
    }
    bare.strip_prefix(NAMESPACE_LABELS).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn subject(selector: &serde_json::Value, reach: &Reach) -> Result<Subject, String> {
        read(&Fields::new(selector, "endpointSelector").unwrap(), reach)
    }

    #[test]
    fn labels_of_namespaces_select_namespaces() {
        let selector = json!({
            "matchLabels": {
                "k8s:app": "web",
                "io.kubernetes.pod.namespace": "shop",
                "k8s:io.cilium.k8s.namespace.labels.team": "a",
            },
            "matchExpressions": [{"key": "any:tier", "operator": "Exists"}],
        });
        let Subject { namespaces, pods } = subject(&selector, &Reach::Cluster).unwrap();
        assert_eq!(
            selector::words(&namespaces),
            "kubernetes.io/metadata.name=shop, team=a"
        );
        assert_eq!(selector::words(&pods), "app=web, tier Exists ()");
    }

    #[test]
    fn a_policy_of_a_namespace_selects_pods_of_that_namespace() {
        let other = json!({"matchLabels": {"io.kubernetes.pod.namespace": "other"}});
        assert!(subject(&other, &Reach::Namespace(Some("shop".to_owned()))).is_err());
        assert!(subject(&other, &Reach::Namespace(Some("other".to_owned()))).is_ok());
    }

    #[test]
    fn reserved_labels_and_service_accounts_are_refused() {
        for key in [
            "reserved:host",
            "io.cilium.k8s.policy.serviceaccount",
            "io.kubernetes.pod.name",
        ] {
            assert!(
                subject(&json!({"matchLabels": {key: "x"}}), &Reach::Cluster).is_err(),
                "{key}"
            );
        }
    }
}
