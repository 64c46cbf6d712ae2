//! Evaluates the admission policy's expressions and compares them with the agent's own parser: the policy
//! never rejects a list that the agent reads, and it rejects common mistakes.
//!
//! The expressions in the definitions of policy objects are compared in the same way.
//!
//! `ADMISSION_PLUGIN` names Kubernetes' own plugin (plugin.go). If it is set, the plugin must agree.

mod definitions;
mod policy;
mod reports;
mod served;
mod written_reports;

use std::{collections::BTreeMap, rc::Rc};

use egress_agent::config::Config;
use egress_policy::{Annotations, Inputs, describe};
use proptest::prelude::*;
use serde_json::{Value, json};

use policy::Policy;

/// Creates an object of a kind with these annotations in the place where they apply.
type Make = fn(&str, &BTreeMap<String, String>) -> Value;

fn object(kind: &str, annotations: &BTreeMap<String, String>) -> Value {
    json!({"apiVersion": version(kind), "kind": kind,
        "metadata": {"name": "x", "annotations": annotations}, "spec": {}})
}

fn version(kind: &str) -> &'static str {
    match kind {
        "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" => "apps/v1",
        "Job" | "CronJob" => "batch/v1",
        _ => "v1",
    }
}

pub(crate) fn annotations(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| (format!("egress-agent.dev/{key}"), (*value).to_owned()))
        .collect()
}

/// The reason why a pod with these annotations is rejected, if it is.
fn rejected(policy: &Policy, annotations: &BTreeMap<String, String>) -> Option<String> {
    policy.judge(&object("Pod", annotations), &Value::Null)
}

/// `Ok` if the agent can read these annotations of a pod.
pub(crate) fn readable(annotations: &BTreeMap<String, String>) -> Result<(), String> {
    let settings = Config::default_config()
        .expect("defaults")
        .policy_settings();
    describe(
        Inputs::annotations(&Annotations::from_map(annotations), &Annotations::default()),
        &settings,
    )
    .map(drop)
    .map_err(|error| error.to_string())
}

/// Lists that the agent reads.
pub(crate) const READABLE: &[&str] = &[
    "",
    " \t\n,,\r\n",
    "# a comment alone",
    "github.com # https://example.com/ 10.1.2.3/8 :90-80\nexample.com#another",
    "github.com",
    "10.0.0.0/8!10.1.0.0/16!10.2.0.0/16:443/tcp [2001:db8::/32!2001:db8:1::/48]:443 192.0.2.0/24!192.0.2.7",
    "github.com:443",
    "github.com:22/tcp",
    "github.com/UDP",
    "github.com/icmp",
    "GitHub.COM.",
    "github.com.:443",
    "localhost:8080",
    "a.b:1,c.d:65535 e.f:8000-8100/Tcp",
    "a.b:00443 c.d:0000000000001-0000000000002",
    "*",
    "*:443",
    "*/icmp",
    "203.0.113.7/esp [2001:db8::7]/GRE vpn.example/ip-50 *.example/any 10.0.0.0/8/ip-089 2001:db8::/32/ah",
    "*:1-65535/sctp",
    "*.example.com",
    "*.example.com:443/tcp",
    "api-*.example.com",
    "*.S3-*.*x*.com:443",
    "s3.*.amazonaws.com:443",
    "*.*.example.com",
    "*a.b**c.d*e.example",
    "_dmarc.my_host.example -a-.b--c.example",
    "xn--bcher-kva.example bücher.example *.BÜCHER.example:80 bücher。example/tcp",
    "1.2.3.a 0x7g.com 10.example 1-2.3-4.com:90-95",
    "203.0.113.7 203.0.113.7:22/tcp 203.0.113.7/tcp",
    "0.0.0.0/0 10.0.0.0/8 10.20.0.0/16:5432 10.20.0.0/16/sctp 10.0.0.0/8:1-9/udp",
    "192.0.2.128/25 192.0.2.64/26 10.128.0.0/9 172.16.0.0/12 192.0.2.6/31 192.0.2.7/32",
    "10.0.0.0/0008",
    "::/0 ::1 :: 2001:db8::7 2001:db8::/32 2001:DB8::/32/tcp 1:2:3:4:5:6:7:8 1:2:3:4:5:6:7::",
    "::1.2.3.4 64:ff9b::192.0.2.1 1:2:3:4:5:6:1.2.3.4 2001:db8::7/128 2001:db8::8/125",
    "[2001:db8::7] [2001:db8::7]:443 [2001:db8::7]:8000-8100/udp [2001:db8::7]/tcp [::1]/icmp",
    "[2001:db8::/32]:443 [2001:db8::]/32:443 [2001:db8::]/32 [2001:db8::/32]/tcp 2001:db8::10:0/112",
    "2001:db8:0:0:0:0:0:0/032 2001:db8:0:0::0/64 ::ffff:0:0:0/112",
    "a.example\u{a0}b.example\u{3000}c.example\u{2028}d.example\u{85}e.example\u{b}f.example",
];

/// Entries that the agent does not read, with common mistakes.
pub(crate) const UNREADABLE: &[&str] = &[
    "https://github.com",
    "https://github.com:443/x",
    "github.com/path",
    "github.com:https",
    "github.com:0",
    "github.com:70000",
    "github.com:65536",
    "github.com:+80",
    "github.com:",
    "github.com:90-80",
    "github.com:80-",
    "github.com:-80",
    "github.com:80:81",
    "github.com:443/https",
    "github.com/tcp:443",
    "github.com/tcp/443",
    "github.com:80/icmp",
    "github.com:80/esp",
    "github.com:80/any",
    "github.com/ip-256",
    "github.com/ip-",
    "github.com/ip50",
    "github.com;443",
    "github.com|example.com",
    "443",
    ":443",
    "10.1.2.3/16",
    "10.128.0.0/8",
    "192.0.2.129/25",
    "192.0.2.1/31",
    "0.0.0.1/0",
    "10.0.0.0/33",
    "10.0.0.0/64",
    "10.0.0.0/",
    "10.0.0/8",
    "10.0.0.0:443/8",
    "example.com/24",
    "256.1.1.1",
    "1.2.3",
    "1.2.3.4.",
    "1.2.3.4.5",
    "0127.0.0.1",
    "0x7f.1",
    "192.168.1.*",
    "192.168.1.*:80",
    "*.1.2.3",
    "api.**.example.com",
    "**",
    "**.example.com",
    "example.*",
    "*.",
    ".example.com",
    "a..example.com",
    ".",
    "user@example.com",
    "exa mple.com:x",
    "\"github.com\"",
    "'github.com'",
    "[github.com]",
    "(github.com)",
    "github.com=443",
    "bü*.example.com",
    "2001:db8::/32:443",
    "2001:db8::7/64",
    "[2001:db8::7/64]:443",
    "[2001:db8::7]/64:443",
    "2001:db8::/129",
    "2001:db8:::7",
    "2001::db8::7",
    "1:2:3:4:5:6:7:8:9",
    "1:2:3:4::5:6:7:8",
    "2001:db8",
    "2001:db8:7",
    "2001:db8::g",
    "2001:db8::12345",
    "fe80::1%eth0",
    "[fe80::1%eth0]:80",
    "[::ffff:10.0.0.1]:80",
    "::ffff:10.0.0.1",
    "::ffff:a00:1",
    "[2001:db8::7",
    "2001:db8::7]:443",
    "[2001:db8::7]443",
    "[2001:db8::7]:",
    "[10.0.0.1]:80",
    "[]:80",
    "[2001:db8::7]:443/icmp",
];

#[test]
fn lists_that_the_agent_reads_are_admitted() {
    let policy = Policy::read();
    for list in READABLE {
        for key in ["allow", "deny", "resolve"] {
            let annotations = annotations(&[(key, list)]);
            match (readable(&annotations), rejected(&policy, &annotations)) {
                (Ok(()), rejected) => assert_eq!(rejected, None, "{key}: {list}"),
                (Err(error), None) => panic!("{key}: {list} is admitted: {error}"),
                (Err(error), Some(_)) => assert_ne!(key, "allow", "{list}: {error}"),
            }
        }
    }
}

#[test]
fn mistyped_entries_are_rejected_and_named() {
    let policy = Policy::read();
    for entry in UNREADABLE {
        for list in [
            (*entry).to_owned(),
            format!("github.com:443 # fine\n  {entry}, b.c"),
        ] {
            let annotations = annotations(&[("allow", &list)]);
            assert!(readable(&annotations).is_err(), "{entry} is readable");
            let message =
                rejected(&policy, &annotations).unwrap_or_else(|| panic!("{entry} is admitted"));
            let shown = entry
                .split([' '])
                .find(|part| message.contains(&format!("`{part}`")));
            assert!(shown.is_some(), "{entry}: {message}");
        }
    }
}

#[test]
fn names_in_deny_and_resolve_have_no_port() {
    let policy = Policy::read();
    for (key, list) in [
        ("deny", "github.com:443"),
        ("deny", "github.com/tcp"),
        ("deny", "*.github.com:443"),
        ("deny", "bücher.example:443"),
        ("resolve", "github.com:443"),
        ("resolve", "203.0.113.7"),
        ("resolve", "10.0.0.0/8"),
        ("resolve", "::1"),
        ("resolve", "*:53"),
    ] {
        let annotations = annotations(&[(key, list)]);
        assert!(readable(&annotations).is_err(), "{key}: {list}");
        let message = rejected(&policy, &annotations).expect("rejected");
        assert!(message.contains(key), "{key}: {list}: {message}");
    }
    for (key, list) in [
        (
            "deny",
            "github.com 203.0.113.7:22/tcp [2001:db8::7]:443 2001:db8::/32/tcp *:25 */udp *",
        ),
        (
            "resolve",
            "github.com *.example.com api-*.example.com * bücher.example",
        ),
    ] {
        let annotations = annotations(&[(key, list)]);
        assert_eq!(readable(&annotations), Ok(()), "{key}: {list}");
        assert_eq!(rejected(&policy, &annotations), None, "{key}: {list}");
    }
}

#[test]
fn unknown_modes_and_keys_are_rejected() {
    let policy = Policy::read();
    for (key, value, good) in [
        ("mode", "enforce", true),
        ("mode", " audit\n", true),
        ("mode", "off", true),
        ("mode", "Enforce", false),
        ("mode", "on", false),
        ("mode", "", false),
        ("interface", "veth0", true),
        ("alow", "github.com", false),
        ("allow.", "github.com", false),
        ("", "", false),
    ] {
        let annotations = annotations(&[(key, value)]);
        assert_eq!(readable(&annotations).is_ok(), good, "{key}: {value}");
        let rejected = rejected(&policy, &annotations);
        assert_eq!(rejected.is_none(), good, "{key}: {value}: {rejected:?}");
    }
    let others = BTreeMap::from([("example.com/allow".to_owned(), "https://x".to_owned())]);
    assert_eq!(rejected(&policy, &others), None);
}

#[test]
fn namespaces_and_every_kind_of_template_are_judged() {
    let policy = Policy::read();
    let good = annotations(&[("allow", "github.com:443")]);
    let bad = annotations(&[("allow", "https://github.com")]);
    let pod_only = annotations(&[("interface", "veth0")]);
    let make: [(&str, Make); 9] = [
        ("Pod", object),
        ("Namespace", object),
        ("Deployment", with_template),
        ("StatefulSet", with_template),
        ("DaemonSet", with_template),
        ("ReplicaSet", with_template),
        ("ReplicationController", with_template),
        ("Job", with_template),
        ("CronJob", with_job_template),
    ];
    for (kind, make) in make {
        assert_eq!(
            policy.judge(&make(kind, &good), &Value::Null),
            None,
            "{kind}"
        );
        let rejected = policy.judge(&make(kind, &bad), &Value::Null);
        assert!(rejected.is_some(), "{kind}");
        let rejected = policy.judge(&make(kind, &pod_only), &Value::Null);
        assert_eq!(rejected.is_some(), kind == "Namespace", "{kind}");
    }
    let bare = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"},
        "spec": {"template": {"spec": {}}}});
    assert_eq!(policy.judge(&bare, &Value::Null), None);
    assert_eq!(
        policy.judge(
            &json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}),
            &Value::Null
        ),
        None
    );
}

fn with_template(kind: &str, annotations: &BTreeMap<String, String>) -> Value {
    json!({"apiVersion": version(kind), "kind": kind, "metadata": {"name": "x"},
        "spec": {"template": {"metadata": {"annotations": annotations}, "spec": {}}}})
}

fn with_job_template(kind: &str, annotations: &BTreeMap<String, String>) -> Value {
    let job = with_template("Job", annotations);
    json!({"apiVersion": version(kind), "kind": kind, "metadata": {"name": "x"},
        "spec": {"jobTemplate": {"spec": job["spec"]}}})
}

/// Scaling a Deployment or removing a pod's finalizer must not fail because of annotations that are older
/// than the policy.
#[test]
fn old_mistakes_do_not_reject_an_edit() {
    let policy = Policy::read();
    let bad = annotations(&[("allow", "https://github.com"), ("mode", "enforce")]);
    let make: [(&str, Make); 2] = [("Pod", object), ("Deployment", with_template)];
    for (kind, make) in make {
        let old = make(kind, &bad);
        assert_eq!(policy.judge(&old, &old), None);
        let mut edited = bad.clone();
        edited.insert(
            "egress-agent.dev/deny".to_owned(),
            "gist.github.com".to_owned(),
        );
        assert_eq!(policy.judge(&make(kind, &edited), &old), None);
        edited.insert("egress-agent.dev/mode".to_owned(), "on".to_owned());
        assert!(policy.judge(&make(kind, &edited), &old).is_some());
        let fewer = annotations(&[("allow", "https://github.com")]);
        assert_eq!(policy.judge(&make(kind, &fewer), &old), None);
    }
}

#[test]
fn annotations_too_large_to_evaluate_are_left_to_the_agent() {
    let policy = Policy::read();
    let spaces = " ".repeat(40_000);
    let list = format!("https://a{spaces}");
    let long = annotations(&[("allow", &list), ("deny", &spaces)]);
    assert_eq!(rejected(&policy, &long), None);
    let shorter = annotations(&[("allow", &list)]);
    assert!(rejected(&policy, &shorter).is_some());
    let many = annotations(&[("allow", &"/ ".repeat(1001))]);
    assert_eq!(rejected(&policy, &many), None);
    let fewer = annotations(&[("allow", &"/ ".repeat(1000))]);
    assert!(rejected(&policy, &fewer).is_some());
}

/// Only Kubernetes knows the cost of the expressions, so this checks the budget only with its plugin.
#[test]
fn the_largest_evaluated_annotations_are_within_the_api_servers_budget() {
    let policy = Policy::read();
    let entries = |make: fn(usize) -> String| (0..333).map(make).collect::<Vec<_>>().join(" ");
    let addresses =
        entries(|n| format!("[2001:0db8:0000:0000:0000:ffff:{n:x}:0/112]:8000-08100/udp"));
    // A policy has at most 100 names with `*` in a later label.
    let names = entries(|n| {
        let first = if n < 100 { "bucket.*" } else { "*.bucket" };
        format!("{first}.service-{n}.{}.example.com", "abcdefgh-".repeat(3))
    });
    let protocols = entries(|n| {
        format!(
            "[2001:0db8:0000:0000:0000:ffff:{n:x}:0/112]/ip-{:03}",
            100 + n % 50
        )
    });
    let annotations = annotations(&[
        ("allow", &protocols),
        ("deny", &addresses),
        ("resolve", &names),
    ]);
    let size: usize = annotations.values().map(String::len).sum();
    assert!((54_000..=65_536).contains(&size), "{size}");
    assert_eq!(readable(&annotations), Ok(()));
    assert_eq!(rejected(&policy, &annotations), None);
}

/// Texts made of parts of entries, in any order, many of them almost valid.
pub(crate) fn almost_entries() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => prop::sample::select(vec![
            "example", "com", "a", "x-1", "_b", "*", "*.", "api-*", "bü", "。", "0x1f", "xn--a", "10", "0", "255",
            "32", "443", "65535", "65536", "ffff", "db8", "2001",
        ]),
        5 => prop::sample::select(vec![".", ":", "::", "/", "-", "[", "]", "@", "%"]),
        2 => prop::sample::select(vec![":443", ":80-90", "/tcp", "/icmp", "/esp", "/ip-50", "/any", "/8", "/64", "10.0.0.0", "2001:db8::"]),
        1 => prop::sample::select(vec![" ", ",", "\n", "#", "\u{a0}"]),
    ];
    prop::collection::vec(part, 0..9).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_list_that_the_agent_reads_is_rejected(list in almost_entries(), key in 0..3_usize) {
        let policy = POLICY.with(Rc::clone);
        let annotations = annotations(&[(["allow", "deny", "resolve"][key], &list)]);
        if readable(&annotations).is_ok() {
            prop_assert_eq!(rejected(&policy, &annotations), None);
        }
    }
}

thread_local! {
    /// Compilation takes longer than matching.
    static POLICY: Rc<Policy> = Rc::new(Policy::read());
}
