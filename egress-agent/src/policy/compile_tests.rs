use std::collections::BTreeMap;

use egress_common::protocol::bits;

use super::*;
use crate::{
    dns::Name,
    policy::{PodAnnotations, prefix::to_mapped, reference::settings},
};

fn annotations(pairs: &[(&str, &str)]) -> Annotations {
    let map: BTreeMap<String, String> = pairs
        .iter()
        .map(|(key, value)| (format!("egress-agent.dev/{key}"), (*value).to_owned()))
        .collect();
    Annotations::from_map(&map)
}

fn compiled(pod: &[(&str, &str)], namespace: &[(&str, &str)], settings: &Settings) -> Compiled {
    compile(&annotations(pod), &annotations(namespace), settings).unwrap()
}

fn message(pod: &[(&str, &str)], namespace: &[(&str, &str)]) -> String {
    compile(&annotations(pod), &annotations(namespace), &settings())
        .unwrap_err()
        .to_string()
}

fn name(text: &str) -> Name {
    Name::from_labels(text.split('.').map(str::as_bytes)).unwrap()
}

fn question(compiled: &Compiled, text: &str) -> QuestionRule {
    compiled.names.question(&name(text))
}

fn is_open(compiled: &Compiled) -> bool {
    compiled.record.flags & POLICY_OPEN != 0
}

fn restricted(pod_annotations: PodAnnotations) -> Settings {
    Settings {
        pod_annotations,
        ..settings()
    }
}

#[test]
fn five_hundred_names_on_one_port_are_one_class() {
    let list: Vec<String> = (0..500)
        .map(|n| format!("host{n}.example.com:443"))
        .collect();
    let policy = compiled(&[("allow", &list.join(" "))], &[], &settings());
    assert_eq!(
        policy.record.classes[0],
        PortClass {
            port_min: 443,
            port_max: 443,
            protocols: bits::TCP | bits::UDP,
            pad: [0; 3],
        }
    );
    assert_eq!(policy.record.classes[1], PortClass::NONE);
    assert_eq!(policy.record.named, 1);
    assert_eq!(policy.names.classes(&name("host499.example.com")), 1);
    assert_eq!(policy.names.classes(&name("host500.example.com")), 0);
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
fn a_pod_without_annotations_is_in_the_configured_mode() {
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
fn a_restricted_pods_mode_can_only_tighten() {
    let narrow = restricted(PodAnnotations::Narrow);
    let policy = compiled(&[("mode", "off")], &[("allow", "a.com")], &narrow);
    assert_eq!(policy.mode, Mode::Enforce);
    assert_eq!(
        policy.warnings,
        [
            "the pod's mode off does not count: it is enforce without it, and a pod can only tighten \
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
fn under_narrow_a_pod_reaches_what_both_lists_have() {
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
        policy.names.classes(&name("api.example.com")).count_ones(),
        2
    );
    assert_eq!(
        policy.names.classes(&name("www.example.com")).count_ones(),
        1
    );
    assert_eq!(policy.cidrs.len(), 1);
    assert_eq!(policy.cidrs[0].prefix_len, 112);
    assert_eq!(
        policy.warnings,
        [
            "the pod's allow entry `other.net` does not count: its namespace's list does not cover it \
         (podAnnotations: narrow)",
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
        (Mode::Enforce, false, 0)
    );
}

#[test]
fn a_denied_name_is_refused_whoever_allows_it() {
    let policy = compiled(
        &[
            ("allow", "*.example.com db.cluster.local"),
            ("resolve", "x.example.com"),
        ],
        &[("deny", "x.example.com *.bad.example.com db.cluster.local")],
        &settings(),
    );
    for denied in ["x.example.com", "a.b.bad.example.com", "db.cluster.local"] {
        assert_eq!(question(&policy, denied), QuestionRule::Denied, "{denied}");
        assert_eq!(policy.names.classes(&name(denied)), 0, "{denied}");
    }
    assert_eq!(
        policy.names.explain_denied(&name("a.bad.example.com")),
        Some("*.bad.example.com")
    );
    assert_eq!(policy.names.explain_denied(&name("bad.example.com")), None);
    assert_ne!(policy.names.classes(&name("bad.example.com")), 0);
    assert_eq!(policy.record.deny, 0);
}

#[test]
fn questions_pass_for_names_an_entry_could_allow_and_for_the_cluster() {
    let policy = compiled(
        &[("allow", "github.com:443"), ("resolve", "db.net")],
        &[],
        &settings(),
    );
    assert_eq!(question(&policy, "GitHub.com"), QuestionRule::Allowed);
    assert_eq!(question(&policy, "db.net"), QuestionRule::Allowed);
    assert_eq!(policy.names.classes(&name("db.net")), 0);
    assert_eq!(
        question(&policy, "kubernetes.default.svc.cluster.local"),
        QuestionRule::Allowed
    );
    assert_eq!(question(&policy, "api.github.com"), QuestionRule::NotListed);
    assert_eq!(
        question(&policy, "github.com.cluster.localx"),
        QuestionRule::NotListed
    );
}

#[test]
fn questions_for_any_name_pass_for_open_pods_and_those_that_may_go_anywhere() {
    for pod in [("allow", "*:443"), ("deny", "192.0.2.1"), ("resolve", "*")] {
        let policy = compiled(&[pod, ("mode", "enforce")], &[], &settings());
        assert_eq!(
            question(&policy, "any.example"),
            QuestionRule::Allowed,
            "{pod:?}"
        );
    }
    let unguarded = Settings {
        guard: false,
        ..settings()
    };
    let policy = compiled(&[("allow", "a.com"), ("deny", "b.com")], &[], &unguarded);
    assert_eq!(question(&policy, "any.example"), QuestionRule::Allowed);
    assert_eq!(question(&policy, "b.com"), QuestionRule::Denied);
}

#[test]
fn a_pod_that_is_denied_everything_cannot_carry_data_out_in_questions() {
    let policy = compiled(&[("deny", "*")], &[("allow", "*")], &settings());
    assert_eq!(
        question(&policy, "secret.evil.example"),
        QuestionRule::NotListed
    );
    assert_eq!(
        policy.record.classes[policy.record.deny.trailing_zeros() as usize].protocols,
        bits::ALL
    );
    let ports = compiled(&[("deny", "*:25")], &[], &settings());
    assert_eq!(question(&ports, "mail.example"), QuestionRule::Allowed);
}

#[test]
fn protocols_follow_the_list_an_entry_stands_in() {
    let protocols = |list: &str, entry: &str| {
        let policy = compiled(&[(list, entry)], &[], &settings());
        assert_eq!(policy.record.classes[1], PortClass::NONE);
        policy.record.classes[0].protocols
    };
    assert_eq!(
        protocols("allow", "192.0.2.1"),
        bits::TCP | bits::UDP | bits::ICMP_ECHO
    );
    assert_eq!(protocols("allow", "192.0.2.1:80"), bits::TCP | bits::UDP);
    assert_eq!(
        protocols("allow", "192.0.2.1/icmp"),
        bits::ICMP_ECHO | bits::ICMP_OTHER
    );
    assert_eq!(protocols("allow", "192.0.2.1/sctp"), bits::SCTP);
    assert_eq!(protocols("deny", "192.0.2.1"), bits::ALL);
    assert_eq!(protocols("deny", "192.0.2.1:80"), bits::TCP | bits::UDP);
}

#[test]
fn a_denial_is_explained_by_its_most_specific_entry() {
    let policy = compiled(
        &[("deny", "* 192.0.2.0/24 192.0.2.7 198.51.100.0/24:25")],
        &[],
        &settings(),
    );
    let explain = |address: [u8; 4], class| policy.explain_deny(&to_mapped(address.into()), class);
    let everything = policy.record.any.trailing_zeros() as u8;
    assert_eq!(
        explain([192, 0, 2, 7], everything).as_deref(),
        Some("192.0.2.7")
    );
    assert_eq!(
        explain([192, 0, 2, 8], everything).as_deref(),
        Some("192.0.2.0/24")
    );
    assert_eq!(explain([203, 0, 113, 1], everything).as_deref(), Some("*"));
    let mail = (policy.record.deny & !policy.record.any).trailing_zeros() as u8;
    assert_eq!(
        explain([198, 51, 100, 1], mail).as_deref(),
        Some("198.51.100.0/24:25")
    );
    assert_eq!(explain([203, 0, 113, 1], mail), None);
}

#[test]
fn all_of_a_family_opens_protected_addresses_and_says_so() {
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
fn an_error_names_annotation_line_and_column() {
    assert_eq!(
        message(
            &[("allow", "a.com # :0 in a comment\n  b.com, ü.com:70000\n")],
            &[]
        ),
        "pod annotation egress-agent.dev/allow, line 2, column 16: `70000` is not a port: expected \
         a number from 1 to 65535, or a range such as 8000-8100"
    );
    assert_eq!(
        message(&[], &[("deny", "a.com:443")]),
        "namespace annotation egress-agent.dev/deny, line 1, column 1: `a.com:443` is a denied \
         name with a port or protocol: a denied name is refused as a question, so for every port; \
         deny the address instead, or leave the port out"
    );
    assert_eq!(
        message(&[("resolve", "a.com 10.0.0.1")], &[]),
        "pod annotation egress-agent.dev/resolve, line 1, column 7: `10.0.0.1` is an address: \
         expected a name or wildcard that may be asked for"
    );
    assert_eq!(
        message(&[("resolve", "a.com:53")], &[]),
        "pod annotation egress-agent.dev/resolve, line 1, column 1: `a.com:53` has a port or \
         protocol: expected the name alone, since resolve opens nothing"
    );
    assert_eq!(
        message(&[("mode", "enforced")], &[]),
        "pod annotation egress-agent.dev/mode, line 1, column 1: `enforced` is not a mode: \
         expected enforce, audit or off"
    );
}

#[test]
fn a_mistyped_key_does_not_leave_a_pod_open() {
    assert_eq!(
        message(&[("alow", "a.com")], &[]),
        "pod annotation `egress-agent.dev/alow` is not known: expected one of allow, deny, \
         resolve, mode, interface under egress-agent.dev/"
    );
    assert_eq!(
        message(&[], &[("interface", "veth0")]),
        "namespace annotation `egress-agent.dev/interface` names the interface of one pod: it \
         belongs on a pod"
    );
    let other = BTreeMap::from([("example.com/allow".to_owned(), "]".to_owned())]);
    assert_eq!(Annotations::from_map(&other), Annotations::default());
}

#[test]
fn all_errors_are_collected_and_the_line_stays_short() {
    let list = vec!["x:0"; 50].join("\n");
    let error = compile(
        &annotations(&[("allow", &list), ("mode", "off")]),
        &annotations(&[]),
        &settings(),
    )
    .unwrap_err();
    assert_eq!(error.problems().len(), 50);
    let line = error.to_string();
    assert!(line.ends_with("; and 42 more"), "{line}");
    assert!(!line.contains('\n'));
}

#[test]
fn limits_are_errors_that_name_the_count() {
    let ports: Vec<String> = (1..=65).map(|port| format!("a.com:{port}")).collect();
    assert_eq!(
        message(&[("allow", &ports.join(" "))], &[]),
        "the policy has 65 classes (distinct action, protocol and port range); the limit is 64"
    );
    assert!(
        compile(
            &annotations(&[("allow", &ports[..64].join(" "))]),
            &annotations(&[]),
            &settings()
        )
        .is_ok()
    );
    let addresses: Vec<String> = (0..4097)
        .map(|n| format!("10.0.{}.{}", n / 256, n % 256))
        .collect();
    assert_eq!(
        message(&[("allow", &addresses.join(" "))], &[]),
        "the policy has 4097 address prefixes; the limit is 4096"
    );
    let names: Vec<String> = (0..=NAMES).map(|n| format!("n{n}")).collect();
    assert_eq!(
        message(&[("allow", &names.join(" "))], &[]),
        "the policy has 10001 names; the limit is 10000"
    );
}

#[test]
fn an_unreadable_policy_denies_everything_external_and_says_why() {
    let policy = unreadable(&settings());
    assert_eq!(policy.mode, Mode::Enforce);
    assert_eq!(
        policy.record.flags,
        POLICY_UNREADABLE | POLICY_ALLOW_INTERNAL
    );
    assert_eq!(question(&policy, "a.com"), QuestionRule::NotListed);
    assert_eq!(
        question(&policy, "a.svc.cluster.local"),
        QuestionRule::Allowed
    );
}

#[test]
fn a_label_with_a_dot_inside_never_passes_for_two_labels() {
    let policy = compiled(
        &[("allow", "github.com *.example.com api-*.test.com")],
        &[],
        &settings(),
    );
    for labels in [
        [b"github.com".as_slice()].as_slice(),
        &[b"a.example", b"com"],
        &[b"api-x.test", b"com"],
    ] {
        let name = Name::from_labels(labels.iter().copied()).unwrap();
        assert_eq!(
            policy.names.question(&name),
            QuestionRule::NotListed,
            "{name}"
        );
    }
}
