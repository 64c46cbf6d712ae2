//! `egress-agent explain` agrees with the verdicts of the kernel.

use std::net::{IpAddr, Ipv4Addr};

use egress_tests::{
    DEADLINE, Lab, Pod, SHORT,
    addresses::{RESOLVER, server},
    dns::address,
    eventually, holds,
    observed::HTTP,
};
use serde_json::Value;

/// A packet, and its verdict according to `explain` and in reality.
struct Case {
    target: &'static str,
    to: (IpAddr, u16),
    /// `None` if the packet passes.
    reason: Option<&'static str>,
    /// The entry that decides, if any.
    entry: Option<&'static str>,
}

fn case(
    target: &'static str,
    to: (IpAddr, u16),
    reason: impl Into<Option<&'static str>>,
    entry: impl Into<Option<&'static str>>,
) -> Case {
    Case {
        target,
        to,
        reason: reason.into(),
        entry: entry.into(),
    }
}

/// Explains each target, connects to it, and compares.
#[track_caller]
fn assert_agrees(lab: &Lab, pod: &Pod, cases: &[Case], passes_anyway: bool) {
    for Case {
        target,
        to,
        reason,
        entry,
    } in cases
    {
        let (code, explanation) = lab.explain(pod, target);
        let decision = match (reason, passes_anyway) {
            (None, _) => "allowed",
            (Some(_), false) => "denied",
            (Some(_), true) => "would_deny",
        };
        assert_eq!(
            explanation["decision"], decision,
            "{target}: {explanation:#}"
        );
        assert_eq!(
            explanation["reason"].as_str(),
            *reason,
            "{target}: {explanation:#}"
        );
        assert_eq!(
            explanation["entries"][0]["entry"].as_str(),
            *entry,
            "{target}: {explanation:#}"
        );
        assert_eq!(
            explanation["hint"].is_string(),
            reason.is_some(),
            "{explanation:#}"
        );
        let passes = reason.is_none() || passes_anyway;
        let timeout = if passes { DEADLINE } else { SHORT };
        let reached = if target.ends_with("/udp") {
            pod.echo_udp(*to, b"hello", timeout)
        } else {
            pod.connect_tcp(*to, timeout).is_ok()
        };
        assert_eq!(reached, passes, "the real verdict on {target}");
        assert_eq!(code, i32::from(!passes), "{target}: {explanation:#}");
    }
}

const METADATA: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));
const INTERNAL: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 7));
const POLICY: &str = "shop.test:443, *.wild.test:443\n203.0.113.20:80/tcp 203.0.113.32/28:443 \
                      203.0.113.40:90-91/udp";
const DENY: &str = "gist.test 203.0.113.33 10.99.0.8";

#[track_caller]
fn explained() -> (Lab, Pod) {
    let lab = Lab::builder()
        .config("ranges.internal", vec!["10.99.0.0/24"])
        .build();
    let dns = lab.dns();
    dns.addresses("shop.test", &[server(10)]);
    dns.addresses("a.wild.test", &[server(11)]);
    dns.addresses("half.wild.test", &[server(12), server(33)]);
    dns.addresses("gist.test", &[server(13)]);
    let pod = lab.pod("shop", "cart");
    (lab, pod)
}

fn table() -> Vec<Case> {
    let internal_denied = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 8));
    vec![
        case("203.0.113.10:443", (server(10), 443), None, "shop.test:443"),
        case(
            "203.0.113.10:80",
            (server(10), 80),
            "port_not_allowed",
            "shop.test:443",
        ),
        case(
            "203.0.113.11:443",
            (server(11), 443),
            None,
            "*.wild.test:443",
        ),
        case(
            "203.0.113.12:443",
            (server(12), 443),
            None,
            "*.wild.test:443",
        ),
        case(
            "203.0.113.14:443",
            (server(14), 443),
            "address_not_learned",
            None,
        ),
        case("203.0.113.14:81", (server(14), 81), "no_rule", None),
        case(
            "203.0.113.20:80",
            (server(20), 80),
            None,
            "203.0.113.20:80/tcp",
        ),
        case(
            "203.0.113.20:443",
            (server(20), 443),
            "port_not_allowed",
            "203.0.113.20:80/tcp",
        ),
        case(
            "203.0.113.34:443",
            (server(34), 443),
            None,
            "203.0.113.32/28:443",
        ),
        case(
            "203.0.113.33:443",
            (server(33), 443),
            "deny_rule",
            "203.0.113.33",
        ),
        case(
            "203.0.113.40:91/udp",
            (server(40), 91),
            None,
            "203.0.113.40:90-91/udp",
        ),
        case(
            "203.0.113.40:92/udp",
            (server(40), 92),
            "port_not_allowed",
            "203.0.113.32/28:443",
        ),
        case("169.254.169.254:80", (METADATA, 80), "protected", None),
        case("10.99.0.7:80", (INTERNAL, 80), None, None),
        case(
            "10.99.0.8:80",
            (internal_denied, 80),
            "deny_rule",
            "10.99.0.8",
        ),
        case("shop.test:443", (server(10), 443), None, "shop.test:443"),
        case(
            "shop.test:80",
            (server(10), 80),
            "port_not_allowed",
            "shop.test:443",
        ),
        case(
            "half.wild.test:443",
            (server(12), 443),
            None,
            "*.wild.test:443",
        ),
    ]
}

#[test]
fn explain_agrees_with_the_real_verdict() {
    let (lab, pod) = explained();
    let _tcp = [80, 81, 443].map(|port| lab.serve_tcp(port));
    let _udp = [91, 92].map(|port| lab.serve_udp(port));
    lab.write_namespace("shop", &[("deny", DENY)]);
    lab.write_pod(&pod, &[("allow", POLICY)]);
    let agent = lab.start_agent(&[&pod]);
    assert_agrees(
        &lab,
        &pod,
        &[case(
            "203.0.113.10:443",
            (server(10), 443),
            "address_not_learned",
            None,
        )],
        false,
    );
    let (code, before) = lab.explain(&pod, "shop.test:443");
    assert_eq!(
        (code, &before["addresses"]),
        (0, &Value::Array(Vec::new())),
        "{before:#}"
    );
    for name in ["shop.test", "a.wild.test", "half.wild.test"] {
        pod.lookup(name);
    }
    assert_agrees(&lab, &pod, &table(), false);

    // Names that may not be queried.
    for (name, entry) in [("gist.test", Some("gist.test")), ("evil.test", None)] {
        let (code, explanation) = lab.explain(&pod, &format!("{name}:443"));
        assert_eq!(
            (code, &explanation["reason"]),
            (1, &"dns_name".into()),
            "{explanation:#}"
        );
        assert_eq!(explanation["question"]["allowed"], false);
        assert_eq!(explanation["entries"][0]["entry"].as_str(), entry);
        agent.denies_name(&pod, name);
    }
    let (_, gist) = lab.explain(&pod, "gist.test");
    let entry = &gist["entries"][0];
    assert_eq!(
        (
            &entry["of"],
            &entry["annotation"],
            &entry["line"],
            &entry["column"]
        ),
        (
            &"namespace".into(),
            &"egress-agent.dev/deny".into(),
            &1.into(),
            &1.into()
        )
    );
    let (_, cidr) = lab.explain(&pod, "203.0.113.34:443");
    let entry = &cidr["entries"][0];
    assert_eq!(
        (&entry["of"], &entry["line"], &entry["column"]),
        (&"pod".into(), &2.into(), &21.into())
    );
    // One of the two addresses is denied by another entry.
    let (_, half) = lab.explain(&pod, "half.wild.test:443");
    let allowed: Vec<_> = half["addresses"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|address| (address["address"].clone(), address["allowed"].clone()))
        .collect();
    assert_eq!(
        allowed,
        [
            (server(12).to_string().into(), true.into()),
            (server(33).to_string().into(), false.into())
        ]
    );
    // Without a port, the allowed ports are listed.
    let (code, open) = lab.explain(&pod, "203.0.113.20");
    assert_eq!(code, 0);
    assert_eq!(
        open["ports"],
        serde_json::json!([{"protocol": "tcp", "first": 80, "last": 80}])
    );
    // Queries to a resolver are judged by their names.
    let (code, resolver) = lab.explain(&pod, &format!("{RESOLVER}:53/udp"));
    assert_eq!(code, 0, "{resolver:#}");
    // Invalid requests.
    for (pod, target) in [
        ("shop/none", "a.test"),
        ("shop/cart", "*.test"),
        ("cart", "a.test"),
    ] {
        let output = lab.ask(&["explain", pod, target]);
        assert_eq!(output.status.code(), Some(2), "{pod} {target}");
        assert!(!output.stderr.is_empty());
    }
    let output = lab.ask(&["explain", "shop/cart", "203.0.113.33:443"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.starts_with("DENIED: shop/cart to 203.0.113.33:443\n"),
        "{text}"
    );
    assert!(
        text.contains("egress-agent.dev/deny of the namespace, line 1, column 11"),
        "{text}"
    );
}

#[test]
fn explaining_leaves_no_trace() {
    let lab = Lab::builder().config("http", HTTP).build();
    let (_web, pod) = lab.shop_and_cart("shop.test:443 203.0.113.20");
    let agent = lab.start_agent(&[&pod]);
    let numbers = || {
        let metrics = lab.metrics();
        ["passed_packets", "denied_packets", "dns_held"].map(|name| {
            let begin = format!("egress_agent_{name}_total");
            let of = metrics.series().filter(|series| series.starts_with(&begin));
            of.map(|series| metrics.get(series)).sum::<f64>()
        })
    };
    let flows = || lab.pod_entries(&pod, "flows");
    let before = (numbers(), flows());
    for target in [
        "203.0.113.20:443",
        "203.0.113.9:80",
        "shop.test:443",
        "evil.test",
    ] {
        lab.explain(&pod, target);
    }
    // The pod's kernel may send packets of its own meanwhile; they pass and create no flow.
    let after = (numbers(), flows());
    assert_eq!(after.1, before.1);
    assert_eq!(after.0[1..], before.0[1..]);
    assert!(agent.denials().is_empty(), "{:?}", agent.denials());
    assert_eq!(
        lab.dns().queries_for("shop.test") + lab.dns().queries_for("evil.test"),
        0
    );
}

#[test]
fn explain_agrees_in_audit_mode() {
    let (lab, pod) = explained();
    let _tcp = [80, 81, 443].map(|port| lab.serve_tcp(port));
    lab.write_pod(&pod, &[("allow", POLICY), ("mode", "audit")]);
    let _agent = lab.start_agent(&[&pod]);
    pod.lookup("shop.test");
    eventually("the agent has read the copy of the response", || {
        holds(lab.status_of(&pod)["addresses"] == 1)
    });
    assert_agrees(
        &lab,
        &pod,
        &[
            case("203.0.113.10:443", (server(10), 443), None, "shop.test:443"),
            case(
                "203.0.113.10:80",
                (server(10), 80),
                "port_not_allowed",
                "shop.test:443",
            ),
            case("203.0.113.14:81", (server(14), 81), "no_rule", None),
        ],
        true,
    );
}

#[test]
fn explain_agrees_about_expired_addresses() {
    let lab = Lab::builder().exact_lifetimes().build();
    let _web = lab.serve_tcp(443);
    lab.dns().answer("shop.test", [address(server(10)).ttl(1)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    pod.lookup("shop.test");
    eventually("the address has expired", || {
        holds(lab.explain(&pod, "203.0.113.10:443").1["reason"] == "expired")
    });
    assert_agrees(
        &lab,
        &pod,
        &[case(
            "203.0.113.10:443",
            (server(10), 443),
            "expired",
            "shop.test:443",
        )],
        false,
    );
    // A new query for the name makes it reachable.
    let (code, explanation) = lab.explain(&pod, "shop.test:443");
    assert_eq!(code, 0, "{explanation:#}");
    pod.talks_tcp_within_ttl("shop.test", (server(10), 443));
}

#[test]
fn explain_agrees_with_other_policies() {
    let lab = Lab::new();
    let _tcp = [80, 443].map(|port| lab.serve_tcp(port));
    let [anywhere, open, closed, off] =
        ["anywhere", "open", "closed", "off"].map(|name| lab.pod("shop", name));
    lab.write_pod(&anywhere, &[("allow", "*:443")]);
    lab.write_pod(&open, &[("deny", "203.0.113.9:80")]);
    lab.write_pod(&closed, &[("allow", "http://x.test")]);
    lab.write_pod(&off, &[("mode", "off"), ("allow", "shop.test")]);
    let _agent = lab.start_agent(&[&anywhere, &open, &closed]);
    eventually("the pod that is not judged is known", || {
        holds(lab.ask(&["status", "shop/off"]).status.success())
    });
    let to = |n, port| (server(n), port);
    for (pod, cases) in [
        (
            &anywhere,
            vec![
                case("203.0.113.9:443", to(9, 443), None, "*:443"),
                case("203.0.113.9:80", to(9, 80), "port_not_allowed", "*:443"),
                case("169.254.169.254:443", (METADATA, 443), "protected", None),
            ],
        ),
        (
            &open,
            vec![
                case("203.0.113.9:443", to(9, 443), None, None),
                case("203.0.113.9:80", to(9, 80), "deny_rule", "203.0.113.9:80"),
                case("169.254.169.254:443", (METADATA, 443), "protected", None),
            ],
        ),
        (
            &closed,
            vec![case(
                "203.0.113.9:443",
                to(9, 443),
                "policy_unreadable",
                None,
            )],
        ),
        (&off, vec![case("203.0.113.9:443", to(9, 443), None, None)]),
    ] {
        assert_agrees(&lab, pod, &cases, false);
    }
}

#[test]
fn explain_names_the_list_that_lacks_the_entry() {
    let lab = Lab::builder().config("podAnnotations", "narrow").build();
    let _web = lab.serve_tcp(443);
    let dns = lab.dns();
    dns.addresses("*.corp.test", &[server(1)]);
    dns.addresses("evil.test", &[server(2)]);
    let pod = lab.pod("shop", "cart");
    let heir = lab.pod("shop", "heir");
    let namespace = "*.corp.test:443 203.0.113.20:443";
    lab.write_namespace("shop", &[("allow", namespace)]);
    let own = "a.corp.test:443 a.corp.test:22 evil.test:443 203.0.113.9:443";
    lab.write_pod(&pod, &[("allow", own)]);
    lab.write_pod(&heir, &[("mode", "enforce")]);
    let agent = lab.start_agent(&[&pod, &heir]);
    pod.lookup("a.corp.test");
    let allow = "egress-agent.dev/allow";
    let of_namespace = |entry: &str| {
        format!(
            "add `{entry}` to {allow} of the namespace: the pod's own list has it, which counts only \
             where the namespace's list covers it (podAnnotations: narrow)"
        )
    };
    let of_pod = |entry: &str| {
        format!("add `{entry}` to {allow} of the pod: the namespace's list covers it")
    };
    let of_both = |entry: &str| {
        format!(
            "add `{entry}` to {allow} of the namespace and to that of the pod \
             (podAnnotations: narrow)"
        )
    };
    for (target, hint) in [
        ("evil.test:443", of_namespace("evil.test:443/tcp")),
        ("a.corp.test:22", of_namespace("a.corp.test:22/tcp")),
        ("203.0.113.9:443", of_namespace("203.0.113.9:443/tcp")),
        ("203.0.113.20:443", of_pod("203.0.113.20:443/tcp")),
        ("203.0.113.30:25", of_both("203.0.113.30:25/tcp")),
        ("other.test:443", of_both("other.test:443/tcp")),
    ] {
        let (code, explanation) = lab.explain(&pod, target);
        assert_eq!(code, 1, "{explanation:#}");
        let printed = explanation["hint"].as_str().unwrap_or_default();
        assert!(printed.ends_with(&hint), "{target}: {explanation:#}");
    }
    // A pod without a list uses its namespace's.
    let (_, explanation) = lab.explain(&heir, "evil.test:443");
    assert_eq!(
        explanation["hint"],
        format!("add `evil.test:443/tcp` to {allow} of the namespace")
    );

    // With the hint applied, the connection passes.
    agent.denies_name(&pod, "evil.test");
    agent.applies_policy_after(&pod, || {
        let entries = format!("{namespace} evil.test:443/tcp");
        lab.write_namespace("shop", &[("allow", &entries)]);
    });
    assert_eq!(pod.lookup("evil.test"), [server(2)]);
    pod.talks_tcp((server(2), 443));
}

#[test]
fn explain_names_the_namespace_when_pod_annotations_are_ignored() {
    let lab = Lab::builder().config("podAnnotations", "ignore").build();
    let pod = lab.pod("shop", "cart");
    lab.write_namespace("shop", &[("allow", "all.test:443")]);
    lab.write_pod(&pod, &[("allow", "evil.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    let (code, explanation) = lab.explain(&pod, "evil.test:443");
    assert_eq!(code, 1, "{explanation:#}");
    assert_eq!(
        explanation["hint"],
        "add `evil.test:443/tcp` to egress-agent.dev/allow of the namespace: the pod's own list \
         grants nothing (podAnnotations: ignore)"
    );
}
