//! Ordered rules of policy objects.

use std::sync::Arc;

use egress_common::{
    classes::ClassSet,
    records::{POLICY_ALLOW_INTERNAL, POLICY_SELECTED, POLICY_UNIDENTIFIED},
};

use super::*;
use crate::objects::{ObjectKind, ObjectName, Objects, Tier, TierAction, TierPolicy, TierRule};
use crate::unidentified;

fn policy(kind: ObjectKind, name: &str, rules: &[(TierAction, &str)]) -> Arc<TierPolicy> {
    let rules = rules.iter().enumerate();
    Arc::new(TierPolicy {
        name: Arc::new(ObjectName {
            kind,
            namespace: None,
            name: name.to_owned(),
        }),
        tier: Tier::Admin,
        priority: 7,
        rules: rules
            .map(|(index, (action, entry))| TierRule {
                name: None,
                index,
                action: *action,
                entries: vec![(*entry).to_owned()],
            })
            .collect(),
    })
}

fn compiled(tiers: Vec<Arc<TierPolicy>>) -> Compiled {
    let none = Annotations::default();
    let objects = Objects {
        tiers,
        ..Objects::default()
    };
    let inputs = Inputs {
        pod: &none,
        namespace: &none,
        objects: &objects,
    };
    compile(inputs, &crate::reference::settings()).unwrap()
}

const OURS: ObjectKind = ObjectKind::ClusterEgressPolicy;
const UPSTREAM: ObjectKind = ObjectKind::ClusterNetworkPolicy;

#[test]
fn of_two_policies_with_one_priority_the_first_denials_come_first() {
    let compiled = compiled(vec![
        policy(UPSTREAM, "b", &[(TierAction::Deny, "10.0.0.1:2")]),
        policy(
            OURS,
            "a",
            &[
                (TierAction::Allow, "10.0.0.1:3"),
                (TierAction::Deny, "10.0.0.1:4"),
            ],
        ),
        policy(OURS, "c", &[(TierAction::Deny, "10.0.0.1:1")]),
    ]);
    let classes = compiled.record.classes.iter();
    let ports: Vec<u16> = classes.map(|class| class.port_min).take(4).collect();
    assert_eq!(ports, [1, 2, 3, 4]);
    let warning = &compiled.warnings[0];
    assert!(
        warning.contains("ClusterEgressPolicy a and ClusterEgressPolicy c")
            && warning.contains("the same tier and priority (7)"),
        "{warning}"
    );
}

#[test]
fn a_cluster_network_policy_denies_connections_that_the_pod_opens_and_no_replies() {
    let compiled = compiled(vec![
        policy(OURS, "a", &[(TierAction::Deny, "10.0.0.1")]),
        policy(
            UPSTREAM,
            "b",
            &[
                (TierAction::Deny, "10.0.0.2"),
                (TierAction::Pass, "10.0.0.3"),
            ],
        ),
    ]);
    let [ours, upstreams] = [0, 1].map(ClassSet::one);
    assert_eq!(compiled.record.deny, ours.or(upstreams));
    assert_eq!(compiled.record.spares_answers, upstreams);
}

#[test]
fn another_peer_changes_nothing_about_names() {
    let of = |peers: &str| {
        let peers: Vec<(TierAction, &str)> = peers
            .split(' ')
            .map(|peer| (TierAction::Allow, peer))
            .chain([(TierAction::Deny, "*.evil.test"), (TierAction::Deny, "*")])
            .collect();
        compiled(vec![policy(UPSTREAM, "peers", &peers)])
    };
    let before = of("10.0.0.1:443 shop.test:443");
    for peers in [
        "10.0.0.2:443 shop.test:443",
        "10.0.0.1:443 10.0.0.2:443 shop.test:443",
    ] {
        let after = of(peers);
        assert_ne!(after.cidrs, before.cidrs);
        assert!(after.record.names_alike(&before.record));
        assert!(after.names.grants_alike(&before.names));
    }
    for names in [
        "10.0.0.1:443 shop.test:443 a.test:443",
        "10.0.0.1:443 shop.test:443 x.evil.test:443",
        "10.0.0.1:443 *.test:443",
        "10.0.0.1:443 sh*.test:443",
    ] {
        assert!(!of(names).names.grants_alike(&before.names), "{names}");
    }
}

#[test]
fn rules_about_names_do_not_count_for_a_pod_that_is_not_known() {
    let settings = crate::reference::settings();
    let of = |rules: &[(TierAction, &str)]| {
        let objects = Objects {
            tiers: vec![policy(OURS, "rules", rules)],
            ..Objects::default()
        };
        unidentified(&objects, &settings)
    };
    let plain = unidentified(&Objects::default(), &settings);
    assert_eq!(of(&[(TierAction::Deny, "*.evil.test")]), plain);
    let denying = of(&[
        (TierAction::Deny, "*.evil.test"),
        (TierAction::Deny, "10.0.0.1"),
    ]);
    assert_eq!(denying.names, plain.names);
    assert_eq!(
        denying.record.flags & !POLICY_SELECTED,
        plain.record.flags & !POLICY_SELECTED
    );
    assert_eq!(denying.cidrs.len(), 1);
    // What cannot be read may deny anything.
    let unreadable = of(&[(TierAction::Deny, "@missing")]);
    assert_eq!(unreadable.record.flags & POLICY_ALLOW_INTERNAL, 0);
    assert_ne!(unreadable.record.flags & POLICY_UNIDENTIFIED, 0);
}
