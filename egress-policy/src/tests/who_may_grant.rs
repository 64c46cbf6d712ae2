use std::sync::Arc;

use egress_common::{
    classes::ClassSet,
    protocol::bits,
    records::RANGE_INTERNAL,
    verdict::{Destination, Verdict, judge, judge_answer},
};

use super::{annotations, compiled, is_open, name, question};
use crate::{
    Compiled, Inputs, Mode, Objects, PodAnnotations, QuestionRule, Settings, compile,
    objects::{NamespacePolicy, ObjectKind, ObjectName},
    prefix::to_mapped,
    reference::settings,
    unreadable,
};

fn restricted(pod_annotations: PodAnnotations) -> Settings {
    Settings {
        pod_annotations,
        ..settings()
    }
}

/// An `EgressPolicy` that says nothing.
fn egress_policy(name: &str) -> NamespacePolicy {
    NamespacePolicy {
        name: Arc::new(ObjectName {
            kind: ObjectKind::EgressPolicy,
            namespace: Some("shop".to_owned()),
            name: name.to_owned(),
        }),
        mode: None,
        allow: None,
        deny: None,
        resolve: None,
    }
}

fn with_policies(policies: impl IntoIterator<Item = NamespacePolicy>) -> Objects {
    Objects {
        namespace: policies.into_iter().map(Arc::new).collect(),
        ..Objects::default()
    }
}

/// The policy of a pod that these objects select.
fn compiled_with(
    pod: &[(&str, &str)],
    namespace: &[(&str, &str)],
    objects: &Objects,
    settings: &Settings,
) -> Compiled {
    let inputs = Inputs {
        pod: &annotations(pod),
        namespace: &annotations(namespace),
        objects,
    };
    compile(inputs, settings).unwrap()
}

#[test]
fn a_pod_with_allow_is_closed_and_one_with_only_deny_is_open() {
    let empty = compiled(&[("allow", "")], &[], &settings());
    assert_eq!((empty.mode, is_open(&empty)), (Mode::Enforce, false));
    let deny = compiled(&[("deny", "192.0.2.1")], &[], &settings());
    assert_eq!((deny.mode, is_open(&deny)), (Mode::Enforce, true));
    let both = compiled(&[("deny", "192.0.2.1")], &[("allow", "a.com")], &settings());
    assert!(!is_open(&both));
    let enforced = compiled(&[("mode", "enforce")], &[], &settings());
    assert_eq!((enforced.mode, is_open(&enforced)), (Mode::Enforce, false));
}

#[test]
fn a_pod_without_annotations_has_the_default_mode() {
    assert_eq!(compiled(&[], &[], &settings()).mode, Mode::Off);
    let locked = Settings {
        default_mode: Mode::Enforce,
        ..settings()
    };
    let policy = compiled(&[], &[], &locked);
    assert_eq!((policy.mode, is_open(&policy)), (Mode::Enforce, false));
    let resolving = compiled(&[("resolve", "a.com")], &[], &settings());
    assert_eq!(resolving.mode, Mode::Off);
}

#[test]
fn the_pods_mode_wins_over_its_namespaces() {
    let policy = compiled(&[("mode", "audit")], &[("mode", "enforce")], &settings());
    assert_eq!(policy.mode, Mode::Audit);
    let policy = compiled(&[("allow", "a.com")], &[("mode", "audit")], &settings());
    assert_eq!(policy.mode, Mode::Audit);
    let policy = compiled(&[("allow", "a.com"), ("mode", " off\n")], &[], &settings());
    assert_eq!(policy.mode, Mode::Off);
}

#[test]
fn a_restricted_pods_mode_can_only_be_tighter() {
    let narrow = restricted(PodAnnotations::Narrow);
    let policy = compiled(&[("mode", "off")], &[("allow", "a.com")], &narrow);
    assert_eq!(policy.mode, Mode::Enforce);
    assert_eq!(
        policy.warnings,
        [
            "the pod's mode off does not count: without it the mode is enforce, and a pod can only tighten \
         that"
        ]
    );
    assert_eq!(
        compiled(&[("mode", "enforce")], &[("mode", "audit")], &narrow).mode,
        Mode::Enforce
    );
    assert_eq!(
        compiled(&[("mode", "audit")], &[], &narrow).mode,
        Mode::Audit
    );
}

#[test]
fn a_restricted_pods_deny_does_not_open_a_closed_cluster() {
    let locked = Settings {
        default_mode: Mode::Enforce,
        ..restricted(PodAnnotations::Narrow)
    };
    assert!(!is_open(&compiled(&[("deny", "a.com")], &[], &locked)));
    assert!(is_open(&compiled(
        &[("deny", "a.com")],
        &[("deny", "b.com")],
        &locked
    )));
    assert!(is_open(&compiled(
        &[("deny", "a.com")],
        &[],
        &restricted(PodAnnotations::Narrow)
    )));
}

#[test]
fn if_audit_is_the_default_only_an_explicit_mode_enforces() {
    let audited = |pod_annotations| Settings {
        default_mode: Mode::Audit,
        ..restricted(pod_annotations)
    };
    for power in [
        PodAnnotations::Grant,
        PodAnnotations::Narrow,
        PodAnnotations::Ignore,
    ] {
        let settings = audited(power);
        let mode = |pod: &[_], namespace: &[_]| compiled(pod, namespace, &settings).mode;
        let list = ("allow", "a.com");
        assert_eq!(mode(&[], &[]), Mode::Audit);
        assert_eq!(mode(&[list], &[]), Mode::Audit);
        assert_eq!(mode(&[("deny", "a.com")], &[list]), Mode::Audit);
        assert_eq!(mode(&[list, ("mode", "enforce")], &[]), Mode::Enforce);
        assert_eq!(mode(&[list], &[("mode", "enforce")]), Mode::Enforce);
    }
    let settings = audited(PodAnnotations::Narrow);
    assert!(!is_open(&compiled(&[("deny", "a.com")], &[], &settings)));
}

#[test]
fn an_unreadable_policy_is_in_the_mode_of_its_namespaces_policy_objects_or_tighter() {
    let settings = Settings {
        default_mode: Mode::Audit,
        ..restricted(PodAnnotations::Narrow)
    };
    for (written, mode) in [(Mode::Enforce, Mode::Enforce), (Mode::Off, Mode::Audit)] {
        let objects = with_policies([NamespacePolicy {
            mode: Some(written),
            ..egress_policy("team")
        }]);
        let none = annotations(&[]);
        let closed = unreadable(
            &annotations(&[("mode", "audit")]),
            &none,
            &objects,
            &settings,
        );
        assert_eq!(closed.mode, mode);
    }
}

#[test]
fn if_audit_is_the_default_an_unreadable_policy_is_audited_unless_enforce_is_explicit() {
    let mode = |power, pod: &[_], namespace: &[_]| {
        let settings = Settings {
            default_mode: Mode::Audit,
            ..restricted(power)
        };
        unreadable(
            &annotations(pod),
            &annotations(namespace),
            &Objects::default(),
            &settings,
        )
        .mode
    };
    let [grant, narrow] = [PodAnnotations::Grant, PodAnnotations::Narrow];
    let (enforce, audit) = ([("mode", "enforce")], [("mode", "audit")]);
    for power in [grant, narrow] {
        assert_eq!(mode(power, &[], &[]), Mode::Audit);
        assert_eq!(mode(power, &[("mode", "off")], &[]), Mode::Audit);
        assert_eq!(mode(power, &[("mode", "enforced")], &[]), Mode::Audit);
        assert_eq!(mode(power, &enforce, &audit), Mode::Enforce);
        assert_eq!(mode(power, &[], &enforce), Mode::Enforce);
    }
    assert_eq!(mode(grant, &audit, &enforce), Mode::Audit);
    assert_eq!(mode(narrow, &audit, &enforce), Mode::Enforce);
}

#[test]
fn of_the_modes_of_a_namespace_and_its_policies_the_tightest_counts() {
    let mode = |pod: &[_], namespace: &[_], policies: &[Mode], power| {
        let policies = policies.iter().map(|&mode| NamespacePolicy {
            mode: Some(mode),
            ..egress_policy("team")
        });
        let objects = with_policies(policies);
        compiled_with(pod, namespace, &objects, &restricted(power)).mode
    };
    let [grant, narrow] = [PodAnnotations::Grant, PodAnnotations::Narrow];
    let (off, audit, enforce) = (Mode::Off, Mode::Audit, Mode::Enforce);
    for power in [grant, narrow] {
        assert_eq!(mode(&[], &[], &[off, enforce, audit], power), enforce);
        assert_eq!(mode(&[], &[("mode", "off")], &[audit, off], power), audit);
        assert_eq!(mode(&[], &[("mode", "enforce")], &[audit], power), enforce);
        assert_eq!(mode(&[], &[], &[off], power), off);
    }
    let own = [("mode", "off")];
    assert_eq!(mode(&own, &[], &[enforce], grant), off);
    assert_eq!(mode(&own, &[], &[enforce], narrow), enforce);
}

#[test]
fn under_narrow_egress_policies_cover_entries_as_the_namespaces_list_does() {
    let objects = with_policies([
        NamespacePolicy {
            allow: Some(vec!["*.example.com:443".to_owned()]),
            ..egress_policy("web")
        },
        NamespacePolicy {
            allow: Some(vec!["10.20.0.0/16".to_owned()]),
            resolve: Some(vec!["*.example.net".to_owned()]),
            ..egress_policy("db")
        },
    ]);
    let pod = [
        (
            "allow",
            "a.example.com 10.20.1.0/24 b.example.org:22 other.test 10.30.0.1",
        ),
        ("resolve", "a.example.net other.example"),
    ];
    let namespace = [("allow", "b.example.org")];
    let narrow = restricted(PodAnnotations::Narrow);
    let policy = compiled_with(&pod, &namespace, &objects, &narrow);
    for allowed in ["a.example.com", "b.example.org", "a.example.net"] {
        assert_eq!(
            question(&policy, allowed),
            QuestionRule::Allowed,
            "{allowed}"
        );
    }
    for unlisted in ["other.test", "other.example"] {
        assert_eq!(question(&policy, unlisted), QuestionRule::NotListed);
    }
    let prefixes: Vec<u32> = policy.cidrs.iter().map(|cidr| cidr.prefix_len).collect();
    assert_eq!(prefixes, [96 + 24]);
    assert_eq!(
        policy.warnings.len(),
        4,
        "one for each entry that counts less than it says: {:?}",
        policy.warnings
    );
    // A pod without a list has those of its namespace and of the policies.
    let plain = compiled_with(&[], &namespace, &objects, &narrow);
    for allowed in ["z.example.com", "b.example.org", "z.example.net"] {
        assert_eq!(
            question(&plain, allowed),
            QuestionRule::Allowed,
            "{allowed}"
        );
    }
}

#[test]
fn under_narrow_a_pod_reaches_the_intersection_of_both_lists() {
    let policy = compiled(
        &[(
            "allow",
            "api.example.com:443 other.net 10.0.0.0/8 *.example.com:1-100/tcp",
        )],
        &[("allow", "*.example.com 10.20.0.0/16:5432")],
        &restricted(PodAnnotations::Narrow),
    );
    assert_eq!(question(&policy, "other.net"), QuestionRule::NotListed);
    assert_eq!(
        policy
            .names
            .classes(&name("api.example.com"))
            .iter()
            .count(),
        2
    );
    assert_eq!(
        policy
            .names
            .classes(&name("www.example.com"))
            .iter()
            .count(),
        1
    );
    assert_eq!(policy.cidrs.len(), 1);
    assert_eq!(policy.cidrs[0].prefix_len, 112);
    assert_eq!(
        policy.warnings,
        [
            "the pod's allow entry `other.net` does not count: its namespace's list does not cover it \
         (podAnnotations: narrow): add it there, too, or remove it here",
            "the pod's allow entry `10.0.0.0/8` counts only where its namespace's list covers it: \
         10.20.0.0/16 (tcp and udp port 5432)",
        ]
    );
    let without = compiled(
        &[],
        &[("allow", "*.example.com")],
        &restricted(PodAnnotations::Narrow),
    );
    assert_eq!(question(&without, "a.example.com"), QuestionRule::Allowed);
}

#[test]
fn under_narrow_no_name_may_be_queried_if_the_namespace_denies_everything() {
    let narrow = restricted(PodAnnotations::Narrow);
    let policy = compiled(
        &[("allow", "a.com")],
        &[("allow", "*"), ("deny", "*")],
        &narrow,
    );
    assert_eq!(
        policy.names.question(&name("a.com"), false),
        QuestionRule::NotListed
    );
}

#[test]
fn under_narrow_anywhere_does_not_cover_a_protected_address() {
    let policy = compiled(
        &[("allow", "169.254.169.254 203.0.113.7")],
        &[("allow", "*")],
        &restricted(PodAnnotations::Narrow),
    );
    assert_eq!(policy.cidrs.len(), 1);
    assert_eq!(policy.cidrs[0].network, to_mapped([203, 0, 113, 7].into()));
}

#[test]
fn under_narrow_an_address_within_anywhere_opens_no_more_than_anywhere() {
    let narrow = restricted(PodAnnotations::Narrow);
    let policy = |namespace| {
        let pod = [("allow", "203.0.113.7")];
        let namespace = [("allow", namespace), ("deny", "evil.com")];
        compiled(&pod, &namespace, &narrow)
    };
    let packets = [(bits::UDP, 53), (bits::TCP, 853), (bits::UDP, 4789)];
    for (protocol, port) in packets {
        let verdict = |namespace| {
            let policy = policy(namespace);
            let destination = Destination {
                cidr: policy.cidrs[0].classes,
                ranges: RANGE_INTERNAL,
                tunnel: u64::from(port == 4789),
                ..Destination::default()
            };
            judge(&policy.record, &destination, protocol, port)
        };
        assert_ne!(verdict("*"), Verdict::Pass, "{port}");
        assert_eq!(verdict("* 203.0.113.0/24"), Verdict::Pass, "{port}");
    }
    // Nor does it let the pod answer through a tunnel.
    let answer = |namespace| {
        let policy = policy(namespace);
        let destination = Destination {
            cidr: policy.cidrs[0].classes,
            ranges: RANGE_INTERNAL,
            tunnel: 1,
            ..Destination::default()
        };
        judge_answer(&policy.record, &destination, bits::UDP, 4789)
    };
    assert_ne!(answer("*"), Verdict::Pass);
    assert_eq!(answer("* 203.0.113.0/24"), Verdict::Pass);
}

#[test]
fn under_narrow_a_tunnel_within_anywhere_is_said_to_lead_to_no_internal_address() {
    let narrow = restricted(PodAnnotations::Narrow);
    let warnings = |namespace| {
        let policy = compiled(
            &[("allow", "203.0.113.7/gre")],
            &[("allow", namespace)],
            &narrow,
        );
        assert_eq!(policy.warnings.len(), 1, "{:?}", policy.warnings);
        policy.warnings[0].clone()
    };
    for (namespace, leads_inside) in [("*/any", false), ("203.0.113.0/24/any", true)] {
        let printed = warnings(namespace);
        assert!(
            printed.contains("`203.0.113.7/gre` opens a tunnel (gre)"),
            "{printed}"
        );
        let denies = printed.contains("To internal addresses and the node it opens none");
        assert_eq!(denies, !leads_inside, "{printed}");
    }
}

#[test]
fn under_ignore_only_the_pods_denials_count() {
    let policy = compiled(
        &[
            ("allow", "a.com"),
            ("resolve", "b.com"),
            ("deny", "evil.c.com"),
        ],
        &[("allow", "*.c.com")],
        &restricted(PodAnnotations::Ignore),
    );
    assert_eq!(question(&policy, "a.com"), QuestionRule::NotListed);
    assert_eq!(question(&policy, "b.com"), QuestionRule::NotListed);
    assert_eq!(question(&policy, "x.c.com"), QuestionRule::Allowed);
    assert_eq!(question(&policy, "evil.c.com"), QuestionRule::Denied);
    assert_eq!(
        policy.warnings,
        [
            "the pod's allow grants nothing: the agent's configuration says podAnnotations: ignore",
            "the pod's resolve grants nothing: the agent's configuration says podAnnotations: ignore",
        ]
    );
    let alone = compiled(&[("allow", "*")], &[], &restricted(PodAnnotations::Ignore));
    assert_eq!(
        (alone.mode, is_open(&alone), alone.record.any),
        (Mode::Enforce, false, ClassSet::EMPTY)
    );
}

#[test]
fn a_whole_family_opens_protected_addresses_and_causes_a_warning() {
    let policy = compiled(&[("allow", "0.0.0.0/0:443")], &[], &settings());
    assert_eq!(
        policy.warnings,
        [
            "the pod's allow entry `0.0.0.0/0:443` opens protected addresses too, such as the metadata \
         service; `*` does not"
        ]
    );
}

#[test]
fn under_narrow_a_pod_cannot_open_a_protected_address_behind_a_translator() {
    let narrow = restricted(PodAnnotations::Narrow);
    for entry in ["64:ff9b::a9fe:a9fe", "64:ff9b::/96", "2002:a9fe:a9fe::/48"] {
        let policy = compiled(&[("allow", entry)], &[("allow", "*")], &narrow);
        assert!(policy.cidrs.is_empty(), "{entry}");
        assert_eq!(policy.warnings.len(), 1, "{entry}");
    }
    let policy = compiled(
        &[("allow", "64:ff9b::cb00:7109")],
        &[("allow", "*")],
        &narrow,
    );
    assert_eq!(policy.cidrs.len(), 1);
}
