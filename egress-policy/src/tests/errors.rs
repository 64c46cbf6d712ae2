use crate::Inputs;
use std::{collections::BTreeMap, sync::Arc};

use super::annotations;
use crate::{
    Annotations, NAMES, PodAnnotations, Settings, compile,
    objects::{NamespacePolicy, ObjectKind, ObjectName, Objects},
    reference::settings,
};

fn message(pod: &[(&str, &str)], namespace: &[(&str, &str)]) -> String {
    compile(
        Inputs::annotations(&annotations(pod), &annotations(namespace)),
        &settings(),
    )
    .unwrap_err()
    .to_string()
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
         name with a port or protocol: queries for a denied name are refused, which affects every port; \
         deny the address instead, or omit the port"
    );
    assert_eq!(
        message(&[("resolve", "a.com 10.0.0.1")], &[]),
        "pod annotation egress-agent.dev/resolve, line 1, column 7: `10.0.0.1` is an address: \
         expected a name or wildcard that may be queried"
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
        "namespace annotation `egress-agent.dev/interface` names the interface of one pod: put \
         it on the pod"
    );
    let other = BTreeMap::from([("example.com/allow".to_owned(), "]".to_owned())]);
    assert_eq!(Annotations::from_map(&other), Annotations::default());
}

#[test]
fn all_errors_are_collected_and_the_message_stays_short() {
    let list = vec!["x:0"; 50].join("\n");
    let error = compile(
        Inputs::annotations(
            &annotations(&[("allow", &list), ("mode", "off")]),
            &annotations(&[]),
        ),
        &settings(),
    )
    .unwrap_err();
    assert_eq!(error.problems().len(), 50);
    let line = error.to_string();
    assert!(line.ends_with("; and 42 more"), "{line}");
    assert!(!line.contains('\n'));
}

#[test]
fn exceeded_limits_are_errors_that_name_the_count() {
    let ports: Vec<String> = (1..=129).map(|port| format!("a.com:{port}")).collect();
    assert_eq!(
        message(&[("allow", &ports.join(" "))], &[]),
        "the policy has 129 classes (distinct rule, action, protocol and port range); the limit is 128"
    );
    assert!(
        compile(
            Inputs::annotations(
                &annotations(&[("allow", &ports[..128].join(" "))]),
                &annotations(&[])
            ),
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
    let globs: Vec<String> = (0..101).map(|n| format!("a*{n}.example.com")).collect();
    assert_eq!(
        message(&[("allow", &globs.join(" "))], &[]),
        "the policy has 101 names with * inside a label, or as a label after the first; the limit is 100"
    );
}

#[test]
fn short_texts_that_stand_for_many_entries_are_not_read_to_their_end() {
    let holes: Vec<String> = (1..=10_000)
        .map(|port| format!("[::/0!::1]:{port}"))
        .collect();
    let limit = "the policy has more than 30000 entries, with all that sets and CIDRs with exceptions stand for; \
                 that is the limit";
    assert_eq!(message(&[("allow", &holes.join(" "))], &[]), limit);
    // In every mode, because a policy that is off is read, too.
    let off = [("deny", &*holes.join(" ")), ("mode", "off")];
    assert_eq!(message(&off, &[]), limit);
}

#[test]
fn narrowing_is_bounded() {
    let settings = Settings {
        pod_annotations: PodAnnotations::Narrow,
        ..settings()
    };
    let message = |pod: &[String], namespace: &[String]| {
        let (pod, namespace) = (pod.join(" "), namespace.join(" "));
        let (pod, namespace) = (
            annotations(&[("allow", &pod)]),
            annotations(&[("allow", &namespace)]),
        );
        let compiled = compile(Inputs::annotations(&pod, &namespace), &settings);
        compiled.map_err(|error| error.to_string())
    };
    let names =
        |count: usize| -> Vec<String> { (0..count).map(|n| format!("n{n}.test")).collect() };
    let ports = |count: usize| -> Vec<String> { (1..=count).map(|n| format!("*:{n}")).collect() };
    assert!(message(&names(400), &names(400)).is_ok());
    let error = message(&names(2001), &names(2000)).unwrap_err();
    assert!(
        error.starts_with("the policy has 4002000 pairs of a destination"),
        "{error}"
    );
    let error = message(&ports(100), &names(500)).unwrap_err();
    assert!(
        error.starts_with("the policy has more than 30000 entries of the pod"),
        "{error}"
    );
}

#[test]
fn characters_that_change_the_direction_of_text_are_escaped() {
    let error = message(&[("allow", "a\u{202e}moc.example:x")], &[]);
    assert!(error.contains(r"a\u{202e}moc"), "{error}");
    assert!(!error.contains('\u{202e}'), "{error}");
    // Also where the message quotes a set.
    let sets = Arc::new(BTreeMap::from([(
        "s".to_owned(),
        vec!["a\nb:x".to_owned()],
    )]));
    let objects = Objects {
        sets,
        ..Objects::default()
    };
    let inputs = Inputs {
        pod: &annotations(&[("allow", "@s")]),
        namespace: &Annotations::default(),
        objects: &objects,
    };
    let error = compile(inputs, &settings()).unwrap_err().to_string();
    assert!(
        !error.contains('\n') && error.contains(r"`a\nb`"),
        "{error}"
    );
}

#[test]
fn an_exceeded_limit_names_the_largest_objects() {
    let name = |name: &str| {
        Arc::new(ObjectName {
            kind: ObjectKind::EgressPolicy,
            namespace: Some("shop".to_owned()),
            name: name.to_owned(),
        })
    };
    let policy = |of: &str, entries: Vec<String>| {
        Arc::new(NamespacePolicy {
            name: name(of),
            mode: None,
            allow: Some(entries),
            deny: None,
            resolve: None,
        })
    };
    let ports =
        |from: usize, count: usize| (from..from + count).map(|port| format!("a.com:{port}"));
    let addresses = (0..90).map(|n| format!("10.0.0.{n}")).collect();
    let objects = Objects {
        namespace: vec![
            policy("one", vec!["b.com".to_owned()]),
            policy("ports", ports(1, 70).collect()),
            policy("set", vec!["@wide".to_owned()]),
            policy("more", ports(100, 60).collect()),
        ],
        sets: Arc::new(BTreeMap::from([("wide".to_owned(), addresses)])),
        ..Objects::default()
    };
    let none = annotations(&[]);
    let inputs = Inputs {
        pod: &none,
        namespace: &none,
        objects: &objects,
    };
    let error = compile(inputs, &settings()).unwrap_err().to_string();
    let expected = "the limit is 128, with most entries from EgressPolicy shop/set (90), \
                    EgressPolicy shop/ports (70), EgressPolicy shop/more (60)";
    assert!(error.ends_with(expected), "{error}");
}
