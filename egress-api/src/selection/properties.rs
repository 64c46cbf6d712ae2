//! The policies that the selection finds are those whose selectors hold, whatever was there before.

use egress_policy::objects::ObjectKind;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{Body, Policy};

type Policies = BTreeMap<Arc<ObjectName>, Applied>;

/// Few enough that selectors and labels often meet.
const KEYS: [&str; 3] = ["app", "tier", "team"];
const VALUES: [&str; 3] = ["a", "b", "c"];
const NAMESPACES: [&str; 2] = ["shop", "bank"];

fn any_labels() -> impl Strategy<Value = Labels> {
    prop::collection::btree_map(
        prop::sample::select(&KEYS[..]).prop_map(str::to_owned),
        prop::sample::select(&VALUES[..]).prop_map(str::to_owned),
        0..=3,
    )
}

fn any_selector() -> impl Strategy<Value = Value> {
    let expression = (
        prop::sample::select(&KEYS[..]),
        prop::sample::select(&["In", "NotIn", "Exists", "DoesNotExist"][..]),
        prop::sample::subsequence(&VALUES[..], 1..=3),
    )
        .prop_map(|(key, operator, values)| {
            let mut expression = json!({"key": key, "operator": operator});
            if operator.ends_with("In") {
                expression["values"] = json!(values);
            }
            expression
        });
    (any_labels(), prop::collection::vec(expression, 0..=2)).prop_map(|(labels, expressions)| {
        // Most selectors are short.
        let labels: Labels = labels.into_iter().take(1).collect();
        json!({"matchLabels": labels, "matchExpressions": expressions})
    })
}

/// An `EgressPolicy` of one of the namespaces, or a `ClusterEgressPolicy`, with a number as its name.
fn any_policy() -> impl Strategy<Value = (Arc<ObjectName>, Applied)> {
    let namespace = prop::option::of(prop::sample::select(&NAMESPACES[..]));
    (0..8_u8, namespace, any_selector(), any_selector()).prop_map(
        |(number, namespace, pods, namespaces)| {
            let (kind, spec) = if namespace.is_some() {
                (ObjectKind::EgressPolicy, json!({"podSelector": pods}))
            } else {
                let spec = json!({
                    "tier": "Admin", "priority": 1, "rules": [],
                    "podSelector": pods, "namespaceSelector": namespaces,
                });
                (ObjectKind::ClusterEgressPolicy, spec)
            };
            let policy = Policy::read(kind, namespace, &number.to_string(), &spec);
            assert!(policy.is_complete, "{spec}: {:?}", policy.problems);
            let rules = match policy.body {
                Body::Namespace(rules) => Rules::Namespace(rules),
                Body::Tier(rules) => Rules::Tier(rules),
                Body::Network(_) => panic!("no such policy is made"),
            };
            let subject = policy.subject;
            (policy.name, Applied { subject, rules })
        },
    )
}

/// The pods by their numbers, each with a namespace, its own labels and its namespace's.
type Pods = Vec<(&'static str, Labels, Labels)>;

fn any_pods() -> impl Strategy<Value = Pods> {
    let pod = (
        prop::sample::select(&NAMESPACES[..]),
        any_labels(),
        any_labels(),
    );
    prop::collection::vec(pod, 3)
}

proptest! {
    #[test]
    fn every_policy_whose_selectors_hold_is_found_and_no_other(
        steps in prop::collection::vec(
            (prop::collection::vec(any_policy(), 0..=10), any_pods()),
            1..=4,
        ),
    ) {
        let mut selection = Selection::<usize>::default();
        for (policies, pods) in steps {
            let policies: Policies = policies.into_iter().collect();
            selection.update(policies.clone(), &Arc::default());
            for (number, (namespace, labels, namespace_labels)) in pods.into_iter().enumerate() {
                let pod = SelectedPod {
                    namespace,
                    labels: &labels,
                    namespace_labels: &namespace_labels,
                    host_network: false,
                };
                let selected = policies.iter().filter(|(_, policy)| policy.subject.selects(pod));
                let expected: BTreeSet<&Arc<ObjectName>> = selected.map(|(name, _)| name).collect();
                let (own, of_namespace) = (Arc::new(labels.clone()), Arc::new(namespace_labels.clone()));
                let objects = selection.of(number, namespace, &own, &of_namespace, false);
                let found = objects.namespace.iter().map(|policy| &policy.name);
                let found: BTreeSet<_> = found
                    .chain(objects.tiers.iter().map(|policy| &policy.name))
                    .collect();
                prop_assert_eq!(found, expected);
            }
        }
        selection.update(Policies::new(), &Arc::default());
        prop_assert!(selection.index.is_empty());
    }
}
