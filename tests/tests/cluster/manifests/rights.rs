//! The agent's rights in a cluster.

use std::collections::BTreeSet;

use egress_agent::pods::cluster::{ACCESS, Within};
use egress_tests::yaml::{self, identity};

use super::list;

/// One right of the agent, from a `ClusterRole` or a `Role`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    /// The namespace; empty for the whole cluster.
    within: String,
    group: String,
    resource: String,
    names: Vec<String>,
    verbs: Vec<String>,
}

#[test]
fn the_agents_rights_are_exactly_those_it_uses() {
    let mut granted = BTreeSet::new();
    let objects = yaml::kustomized("base");
    for object in objects.iter().filter(|object| !object["rules"].is_null()) {
        for rule in list(&object["rules"]) {
            let strings = |key: &str| -> Vec<String> {
                list(&rule[key])
                    .iter()
                    .map(|text| text.as_str().expect("a text").to_owned())
                    .collect()
            };
            for group in strings("apiGroups") {
                for resource in strings("resources") {
                    granted.insert(Right {
                        within: identity(object).1,
                        group: group.clone(),
                        resource,
                        names: strings("resourceNames"),
                        verbs: strings("verbs"),
                    });
                }
            }
        }
    }
    assert_eq!(granted, used());

    // Each role is bound to the agent alone.
    for role in objects.iter().filter(|object| !object["rules"].is_null()) {
        let kind = role["kind"].as_str().expect("a kind");
        let binding = objects
            .iter()
            .find(|object| {
                object["kind"] == format!("{kind}Binding")
                    && object["roleRef"]["name"] == role["metadata"]["name"]
                    && object["metadata"]["namespace"] == role["metadata"]["namespace"]
            })
            .unwrap_or_else(|| panic!("{:?} is not bound", identity(role)));
        assert_eq!(binding["roleRef"]["kind"], kind);
        let [subject] = list(&binding["subjects"]) else {
            panic!("not one subject");
        };
        assert_eq!(identity(&objects[0]).2, "egress-agent");
        assert_eq!(
            (&subject["kind"], &subject["name"], &subject["namespace"]),
            (
                &"ServiceAccount".into(),
                &"egress-agent".into(),
                &"egress-agent".into()
            )
        );
    }
}

/// The rights that the agent's requests need.
fn used() -> BTreeSet<Right> {
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    ACCESS
        .iter()
        .map(|access| Right {
            within: match access.within {
                Within::Cluster => String::new(),
                Within::DnsNamespace => "kube-system".to_owned(),
                Within::Default => "default".to_owned(),
            },
            group: access.group.to_owned(),
            resource: access.resource.to_owned(),
            names: owned(access.names),
            verbs: owned(access.verbs),
        })
        .collect()
}
