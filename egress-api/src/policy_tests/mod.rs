use std::net::IpAddr;

use ::egress_policy::objects::{Tier, TierAction, TierRule};
use serde_json::json;

use super::*;
use crate::{NamedPort, PeerPod, Peers};

mod network;

/// A cluster with two nodes, and with two pods of which one has a named port.
struct Cluster;

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

impl Peers for Cluster {
    fn nodes(&self, nodes: &Selector) -> Result<Vec<IpAddr>, String> {
        let labels = Labels::from([("zone".into(), "a".into())]);
        let all = ["192.168.7.6", "192.168.7.7", "fd01::1"].map(address);
        Ok(all.into_iter().filter(|_| nodes.selects(&labels)).collect())
    }

    fn pods(&self, namespaces: &Selector, pods: &Selector) -> Result<Vec<PeerPod>, String> {
        let team = Labels::from([("team".into(), "shop".into())]);
        let web = Labels::from([("app".into(), "web".into())]);
        let all = [
            PeerPod {
                addresses: vec![address("10.1.0.7"), address("fd00::7")],
                ports: vec![NamedPort {
                    name: "http".into(),
                    protocol: "tcp",
                    port: 8080,
                }],
            },
            PeerPod {
                addresses: vec![address("10.1.0.6")],
                ports: Vec::new(),
            },
        ];
        let is_selected = |_: &PeerPod| namespaces.selects(&team) && pods.selects(&web);
        Ok(all.into_iter().filter(is_selected).collect())
    }
}

/// A cluster of which nothing is known.
struct Unknown;

impl Peers for Unknown {
    fn nodes(&self, _: &Selector) -> Result<Vec<IpAddr>, String> {
        Err("the nodes are not known".into())
    }

    fn pods(&self, _: &Selector, _: &Selector) -> Result<Vec<PeerPod>, String> {
        Err("the pods are not known".into())
    }
}

fn egress_policy(spec: &Value) -> (Policy, NamespacePolicy) {
    let policy = Policy::read(ObjectKind::EgressPolicy, Some("shop"), "web", spec);
    let Body::Namespace(body) = policy.body.clone() else {
        panic!("not an EgressPolicy");
    };
    (policy, NamespacePolicy::clone(&body))
}

fn tier_policy(kind: ObjectKind, spec: &Value, peers: &dyn Peers) -> (Policy, TierPolicy) {
    let mut policy = Policy::read(kind, None, "guardrails", spec);
    let body = match &policy.body {
        Body::Namespace(_) => panic!("not a tier's"),
        Body::Tier(body) => TierPolicy::clone(body),
        Body::Network(network) => {
            let (body, problems) = network.resolve(peers);
            policy.problems.extend(problems);
            body
        }
    };
    (policy, body)
}

fn selects(policy: &Policy, namespace: &str, labels: &[(&str, &str)], host_network: bool) -> bool {
    let of = |labels: &[(&str, &str)]| -> Labels {
        let labels = labels.iter();
        labels
            .map(|&(key, value)| (key.into(), value.into()))
            .collect()
    };
    policy.subject.selects(SelectedPod {
        namespace,
        labels: &of(labels),
        namespace_labels: &of(&[("kubernetes.io/metadata.name", namespace)]),
        host_network,
    })
}

fn rule(index: usize, action: TierAction, entries: &[&str]) -> TierRule {
    TierRule {
        name: None,
        index,
        action,
        entries: entries.iter().map(|&entry| entry.to_owned()).collect(),
    }
}

#[test]
fn an_egress_policy_selects_pods_of_its_namespace() {
    let (policy, body) = egress_policy(&json!({
        "podSelector": {"matchLabels": {"app": "web"}},
        "mode": "audit",
        "allow": ["github.com:443"],
        "deny": ["gist.github.com"],
    }));
    assert!(policy.is_complete, "{:?}", policy.problems);
    assert_eq!(policy.name.to_string(), "EgressPolicy shop/web");
    assert_eq!(body.mode, Some(::egress_policy::Mode::Audit));
    assert_eq!(body.allow, Some(vec!["github.com:443".to_owned()]));
    assert_eq!(body.deny, Some(vec!["gist.github.com".to_owned()]));
    assert_eq!(body.resolve, None);
    assert!(selects(&policy, "shop", &[("app", "web")], false));
    assert!(!selects(&policy, "shop", &[("app", "db")], false));
    assert!(!selects(&policy, "other", &[("app", "web")], false));
    let (all, _) = egress_policy(&json!({}));
    assert!(all.is_complete && selects(&all, "shop", &[], false));
}

#[test]
fn an_egress_policy_that_cannot_be_read_allows_nothing() {
    let like = json!({"matchExpressions": [{"key": "app", "operator": "Like", "values": ["w"]}]});
    let (policy, body) = egress_policy(&json!({
        "podSelector": like, "mode": "off", "allow": ["*"], "deny": ["a.test"],
    }));
    assert!(!policy.is_complete);
    assert!(
        policy.problems[0].starts_with("spec.podSelector"),
        "{:?}",
        policy.problems
    );
    assert!(selects(&policy, "shop", &[("app", "db")], false));
    assert!(!selects(&policy, "other", &[], false));
    assert_eq!((body.mode, body.allow), (None, Some(Vec::new())));
    assert_eq!(body.deny, Some(vec!["a.test".to_owned()]));

    for spec in [
        json!({"allow": "github.com"}),
        json!({"allow": [1]}),
        json!({"alow": ["github.com"], "allow": ["github.com"]}),
        json!("nothing"),
    ] {
        let (policy, body) = egress_policy(&spec);
        assert!(!policy.is_complete, "{spec}");
        assert_eq!(body.allow, Some(Vec::new()), "{spec}");
    }
    let (_, body) = egress_policy(&json!({"deny": {}}));
    assert_eq!(body.deny, Some(vec!["*".to_owned()]));
}

#[test]
fn a_cluster_egress_policy_has_its_rules_in_order() {
    let spec = json!({
        "tier": "Baseline",
        "priority": 7,
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "shop"}},
        "rules": [
            {"action": "Deny", "entries": ["169.254.169.254"]},
            {"name": "git", "action": "Allow", "entries": ["github.com:443", "@web"]},
            {"action": "Pass", "entries": ["*"]},
        ],
    });
    let (policy, body) = tier_policy(ObjectKind::ClusterEgressPolicy, &spec, &Unknown);
    assert!(policy.is_complete, "{:?}", policy.problems);
    assert_eq!((body.tier, body.priority), (Tier::Baseline, 7));
    assert_eq!(
        body.rules[0],
        rule(0, TierAction::Deny, &["169.254.169.254"])
    );
    assert_eq!(body.rules[1].name.as_deref(), Some("git"));
    assert_eq!(body.rules[2], rule(2, TierAction::Pass, &["*"]));
    assert!(selects(&policy, "shop", &[], false));
    assert!(!selects(&policy, "other", &[], false));
}

#[test]
fn an_unreadable_part_of_a_cluster_egress_policy_only_takes_away() {
    let rules = json!([
        {"action": "Allow", "entries": ["a.test"]},
        {"action": "Deny", "entries": ["b.test"]},
        {"action": "Pass", "entries": ["c.test"]},
    ]);
    for (field, value) in [
        ("tier", json!("Middle")),
        ("priority", json!(1001)),
        ("priority", json!(-1)),
        ("podSelector", json!({"matchLabels": {"a b": "c"}})),
        ("podselector", json!({})),
    ] {
        let mut spec = json!({"tier": "Baseline", "priority": 3, "rules": rules});
        spec[field] = value;
        let (policy, body) = tier_policy(ObjectKind::ClusterEgressPolicy, &spec, &Unknown);
        assert!(!policy.is_complete, "{field}");
        assert!(policy.problems[0].contains(field), "{:?}", policy.problems);
        assert!(selects(&policy, "any", &[], false), "{field}");
        assert_eq!(
            body.rules,
            [
                rule(0, TierAction::Allow, &[]),
                rule(1, TierAction::Deny, &["b.test"]),
                rule(2, TierAction::Deny, &["c.test"]),
            ],
            "{field}"
        );
    }
}

#[test]
fn an_unreadable_rule_fails_closed_and_leaves_the_others() {
    let spec = json!({
        "tier": "Admin",
        "priority": 0,
        "rules": [
            {"action": "Allow", "entries": "a.test"},
            {"name": "odd", "action": "Log", "entries": ["b.test"]},
            {"action": "Deny", "entries": ["c.test"], "ports": [443]},
            {"action": "Allow", "entries": ["d.test"]},
        ],
    });
    let (policy, body) = tier_policy(ObjectKind::ClusterEgressPolicy, &spec, &Unknown);
    assert!(!policy.is_complete);
    assert_eq!(policy.problems.len(), 3, "{:?}", policy.problems);
    assert!(
        policy.problems[0].starts_with("spec.rules[0] cannot be read")
            && policy.problems[0].ends_with("the rule matches nothing"),
        "{:?}",
        policy.problems
    );
    assert!(
        policy.problems[1].starts_with("spec.rules[1] (odd)")
            && policy.problems[1].ends_with("the rule denies everything"),
        "{:?}",
        policy.problems
    );
    assert_eq!(body.rules[0], rule(0, TierAction::Allow, &[]));
    assert_eq!(body.rules[1].name.as_deref(), Some("odd"));
    assert_eq!(
        (body.rules[1].action, &*body.rules[1].entries),
        (TierAction::Deny, &["*".to_owned()][..])
    );
    assert_eq!(body.rules[2], rule(2, TierAction::Deny, &["*"]));
    assert_eq!(body.rules[3], rule(3, TierAction::Allow, &["d.test"]));
}
