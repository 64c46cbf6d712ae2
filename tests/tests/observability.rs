//! What the agent tells about itself.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, TcpStream},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    thread,
};

use egress_tests::{
    Lab, Pod, SHORT,
    addresses::{RESOLVER, server},
    bpf::bpftool,
    dns::{RecordType, address, question},
    eventually, holds,
    observed::{HTTP, Metrics},
};
use serde_json::Value;

#[track_caller]
fn served() -> Lab {
    Lab::builder().config("http", HTTP).build()
}

/// Waits until the metrics are as they should be.
#[track_caller]
fn metrics_when(lab: &Lab, what: &str, is: impl Fn(&Metrics) -> bool) -> Metrics {
    eventually(what, || Some(lab.metrics()).filter(|metrics| is(metrics)))
}

#[test]
fn metrics_count_what_has_happened() {
    let lab = served();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let audited = lab.pod("other", "cart");
    lab.write_pod(&audited, &[("allow", "shop.test:443"), ("mode", "audit")]);
    let off = lab.pod("other", "off");
    lab.write_pod(&off, &[]);
    let mut agent = lab.start_agent(&[&pod, &audited]);
    pod.lookup("shop.test");
    pod.talks_tcp((server(10), 443));
    agent.denies_name(&pod, "evil.test");
    agent.denies_tcp(&pod, (server(10), 80), "port_not_allowed");
    agent.denies_tcp(&pod, (server(9), 80), "no_rule");
    assert!(audited.connect_tcp((server(9), 443), SHORT).is_ok());
    agent.wait_denial("the audited connection", |denial| denial.of(&audited));

    const WOULD_DENY: &str = "egress_agent_denials_total\
        {event=\"would_deny\",namespace=\"other\",reason=\"address_not_learned\"}";
    let dns = |direction: &str, outcome: &str| {
        format!(
            "egress_agent_dns_messages_total\
             {{direction=\"{direction}\",outcome=\"{outcome}\",transport=\"udp\"}}"
        )
    };
    let mode = |mode: &str| format!("egress_agent_pods{{mode=\"{mode}\"}}");
    let metrics = metrics_when(&lab, "everything is counted", |metrics| {
        metrics.find("egress_agent_allow_map_entries") == 1.0
            && metrics.find("egress_agent_flows") > 0.0
            && metrics.find(&mode("enforce")) == 1.0
            && metrics.find(WOULD_DENY) >= 1.0
            && metrics.find(WOULD_DENY) == metrics.get("egress_agent_audited_packets_total")
    });
    for (series, value) in [
        (mode("enforce"), 1.0),
        (mode("audit"), 1.0),
        (mode("off"), 1.0),
        (mode("missing"), 0.0),
        (dns("question", "delivered"), 1.0),
        (dns("question", "refused"), 1.0),
        (dns("answer", "delivered"), 1.0),
        (dns("question", "undeliverable"), 0.0),
        (dns("answer", "undeliverable"), 0.0),
        (
            "egress_agent_allow_map_fill_ratios".to_owned(),
            1.0 / 4096.0,
        ),
        ("egress_agent_pods_unreadable".to_owned(), 0.0),
        ("egress_agent_frames_unsent_total".to_owned(), 0.0),
        ("egress_agent_flows_lost_total".to_owned(), 0.0),
    ] {
        assert_eq!(metrics.get(&series), value, "{series}");
    }
    // Each message that was put back or answered was held for a time that is counted.
    assert_eq!(metrics.get("egress_agent_dns_hold_seconds_count"), 3.0);
    assert!(metrics.get("egress_agent_dns_hold_seconds_sum") > 0.0);
    assert!(metrics.get("egress_agent_reconcile_seconds_count") >= 1.0);
    assert!(metrics.get("egress_agent_last_reconcile_timestamp_seconds") > 1e9);
    assert!(metrics.get("egress_agent_passed_packets_total") >= 3.0);
    assert!(metrics.get("process_resident_memory_bytes") > 1e6);
    assert!(metrics.get("process_cpu_seconds_total") > 0.0);
    assert!(metrics.get("process_open_fds") > 3.0);
    let build = metrics
        .series()
        .any(|series| series.starts_with("egress_agent_build_info{"));
    assert!(build);
    assert!(
        !metrics.series().any(|series| series.contains("cart")),
        "no pod is named in a label"
    );
    // What lines say in the end is what was counted all the while. Nothing comes between: whatever
    // was denied has been waited for, but for a SYN that is sent again.
    let counted = lab.metrics();
    assert!(agent.stop().success());
    for (reason, at_least) in [
        ("dns_name", 1.0),
        ("port_not_allowed", 1.0),
        ("no_rule", 1.0),
    ] {
        let series = format!(
            "egress_agent_denials_total\
             {{event=\"denied\",namespace=\"shop\",reason=\"{reason}\"}}"
        );
        let of = agent
            .denials()
            .into_iter()
            .filter(|denial| denial.reason == reason);
        let told: u64 = of.map(|denial| denial.count).sum();
        let counted = counted.get(&series);
        assert!(
            counted >= at_least && counted <= told as f64,
            "{series}: {counted}, {told} told"
        );
    }
}

#[test]
fn dns_over_tcp_is_counted_apart() {
    let lab = served();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let _agent = lab.start_agent(&[&pod]);
    let message = question(7, "shop.test", RecordType::A);
    let length = u16::try_from(message.len()).expect("a short question");
    let mut stream = pod.reach_tcp((RESOLVER, 53));
    stream
        .write_all(&[&length.to_be_bytes(), message.as_slice()].concat())
        .expect("send a question");
    stream.read_exact(&mut [0; 14]).expect("an answer");
    let of = |direction: &str| {
        format!(
            "egress_agent_dns_messages_total\
             {{direction=\"{direction}\",outcome=\"delivered\",transport=\"tcp\"}}"
        )
    };
    let metrics = lab.metrics();
    assert_eq!(metrics.get(&of("question")), 1.0);
    assert_eq!(metrics.get(&of("answer")), 1.0);
}

#[test]
fn every_metric_is_documented() {
    let lab = served();
    let _agent = lab.start_agent(&[]);
    let documented = include_str!("../../docs/metrics.md");
    for (family, kind) in &lab.metrics().types {
        let ending = match kind.as_str() {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        let name = format!("`{family}{ending}`");
        assert!(documented.contains(&name), "docs/metrics.md has no {name}");
    }
}

#[test]
fn the_agent_is_ready_when_every_pod_is_attached() {
    let lab = served();
    let pod = lab.pod_without_interface("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[]);
    let (status, missing) = eventually("the pod has been looked at", || {
        let (status, missing) = lab.http("/readyz");
        missing.contains("shop/cart").then_some((status, missing))
    });
    assert_eq!(status, 503);
    assert!(missing.contains("there is no interface"), "{missing}");
    let metrics = lab.metrics();
    assert_eq!(metrics.get("egress_agent_pods{mode=\"missing\"}"), 1.0);
    let (code, explanation) = lab.explain(&pod, "shop.test:443");
    assert_eq!((code, &explanation["decision"]), (2, &"unknown".into()));
    assert_eq!(lab.http("/healthz"), (200, "ok\n".to_owned()));

    lab.add_interface(&pod);
    agent.wait_enforcing(&pod);
    eventually("the agent is ready", || {
        holds(lab.http("/readyz") == (200, "ok\n".to_owned()))
    });
    assert_eq!(lab.http("/elsewhere").0, 404);
}

#[test]
fn status_tells_what_a_pod_has_resolved_and_what_it_was_denied() {
    let lab = Lab::new();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let agent = lab.start_agent(&[&pod]);
    pod.lookup("shop.test");
    agent.denies_tcp(&pod, (server(9), 80), "no_rule");
    let status = eventually("the denial's line", || {
        Some(lab.status_of(&pod)).filter(|status| status["last_denial"].is_object())
    });
    assert_eq!(status["mode"], "enforce");
    assert_eq!(status["enforced"], true);
    assert_eq!(
        status["interfaces"][0]["index"].as_u64(),
        interface_of(&lab, &pod)
    );
    assert_eq!(status["policy_version"], 1);
    assert_eq!(
        (&status["names"], &status["addresses"]),
        (&1.into(), &1.into())
    );
    assert!(status["denied"]["no_rule"].as_u64() >= Some(1), "{status}");
    assert_eq!(status["last_denial"]["reason"], "no_rule");
    assert_eq!(status["problem"], Value::Null);
    let resolved = &status["resolved"][0];
    assert_eq!(resolved["name"], "shop.test");
    assert_eq!(resolved["listed"], true);
    let known = &resolved["addresses"][0];
    assert_eq!(known["address"], server(10).to_string());
    assert!((1..=24 * 3600 + 30).contains(&known["remaining_seconds"].as_u64().unwrap_or(0)));

    let output = lab.ask(&["status"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    for expected in [
        "node n1",
        "configuration (dns.resolvers)",
        "shop/cart",
        "enforce",
        "losses:",
    ] {
        assert!(text.contains(expected), "no {expected:?} in\n{text}");
    }
    let output = lab.ask(&["status", "shop/cart"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("shop.test") && text.contains("203.0.113.10"),
        "{text}"
    );

    let output = lab.ask(&["status", "shop/none"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("no pod shop/none"), "{said}");
}

/// The index of the interface that the pod's packets come from, on the node.
fn interface_of(lab: &Lab, pod: &Pod) -> Option<u64> {
    let mut command = std::process::Command::new("ip");
    command.args(["-o", "link", "show", "dev", pod.interface()]);
    let output = lab.node().run(|| command.output()).expect("ip runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let index = text
        .split(':')
        .next()
        .and_then(|index| index.trim().parse().ok());
    assert!(index.is_some(), "{text}");
    index
}

#[test]
fn status_follows_an_edit_and_points_at_what_cannot_be_read() {
    let lab = served();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let agent = lab.start_agent(&[&pod]);
    agent.applies(&pod, || {
        lab.write_pod(&pod, &[("allow", "shop.test:443 203.0.113.7")]);
    });
    eventually("the second version", || {
        holds(lab.status_of(&pod)["policy_version"] == 2)
    });
    let before = lab.status_of(&pod)["applied"].clone();
    lab.write_pod(&pod, &[("allow", "shop.test:443, http://x.test")]);
    let status = eventually("the problem", || {
        Some(lab.status_of(&pod)).filter(|status| status["problem"].is_string())
    });
    let problem = status["problem"].as_str().unwrap_or_default();
    assert!(problem.contains("line 1, column 16"), "{problem}");
    assert!(problem.contains("the last good policy stays"), "{problem}");
    assert_eq!(
        (&status["policy_version"], &status["applied"]),
        (&2.into(), &before)
    );
    assert_eq!(lab.metrics().get("egress_agent_pods_unreadable"), 1.0);
    let (code, explanation) = lab.explain(&pod, "203.0.113.7:80");
    assert_eq!(code, 0, "{explanation}");
    assert_eq!(explanation["entries"][0]["entry"], "203.0.113.7");
}

/// What becomes of a packet, as `explain` says and as it is.
struct Case {
    target: &'static str,
    to: (IpAddr, u16),
    /// `None` when it passes.
    reason: Option<&'static str>,
    /// The entry that decides, where one does.
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

/// Explains, then tries, and compares.
#[track_caller]
fn agrees(lab: &Lab, pod: &Pod, cases: &[Case], passes_anyway: bool) {
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
        let reached = if target.ends_with("/udp") {
            pod.echo_udp(*to, b"hello", SHORT)
        } else {
            pod.connect_tcp(*to, SHORT).is_ok()
        };
        let passes = reason.is_none() || passes_anyway;
        assert_eq!(reached, passes, "what really happens to {target}");
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
fn explain_agrees_with_what_happens() {
    let (lab, pod) = explained();
    let _tcp = [80, 81, 443].map(|port| lab.serve_tcp(port));
    let _udp = [91, 92].map(|port| lab.serve_udp(port));
    lab.write_namespace("shop", &[("deny", DENY)]);
    lab.write_pod(&pod, &[("allow", POLICY)]);
    let agent = lab.start_agent(&[&pod]);
    agrees(
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
    agrees(&lab, &pod, &table(), false);

    // Names that may not be asked for.
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
    // Of two addresses, one is denied by itself.
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
    // Without a port, what is open is listed.
    let (code, open) = lab.explain(&pod, "203.0.113.20");
    assert_eq!(code, 0);
    assert_eq!(
        open["ports"],
        serde_json::json!([{"protocol": "tcp", "first": 80, "last": 80}])
    );
    // Questions to a resolver are judged by their names.
    let (code, resolver) = lab.explain(&pod, &format!("{RESOLVER}:53/udp"));
    assert_eq!(code, 0, "{resolver:#}");
    // What cannot be answered.
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
    let lab = served();
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
    let flows = || {
        let pin = lab.pins().join("pods/shop_cart/flows");
        bpftool(&[
            "map",
            "dump",
            "pinned",
            pin.to_str().expect("a path in UTF-8"),
        ])
    };
    let before = (numbers(), flows());
    for target in [
        "203.0.113.20:443",
        "203.0.113.9:80",
        "shop.test:443",
        "evil.test",
    ] {
        lab.explain(&pod, target);
    }
    // The pod's own kernel may say something of itself meanwhile; that passes and makes no flow.
    let after = (numbers(), flows());
    assert_eq!(after.1, before.1);
    assert_eq!(after.0[1..], before.0[1..]);
    assert!(agent.denials().is_empty(), "{:?}", agent.denials());
    assert_eq!(
        lab.dns().asked("shop.test") + lab.dns().asked("evil.test"),
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
    eventually("the copy of the answer is read", || {
        holds(lab.status_of(&pod)["addresses"] == 1)
    });
    agrees(
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
fn explain_agrees_about_what_has_expired() {
    let lab = Lab::builder()
        .config("dns.minTtl", "1s")
        .config("dns.grace", "0s")
        .build();
    let _web = lab.serve_tcp(443);
    lab.dns().answer("shop.test", [address(server(10)).ttl(1)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    pod.lookup("shop.test");
    eventually("its lifetime has ended", || {
        holds(lab.explain(&pod, "203.0.113.10:443").1["reason"] == "expired")
    });
    agrees(
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
    // Whoever asks for the name again reaches it.
    let (code, explanation) = lab.explain(&pod, "shop.test:443");
    assert_eq!(code, 0, "{explanation:#}");
    pod.lookup("shop.test");
    pod.talks_tcp((server(10), 443));
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
        agrees(&lab, pod, &cases, false);
    }
}

#[test]
fn the_socket_is_roots_alone_and_goes_with_the_agent() {
    let lab = Lab::new();
    let mut agent = lab.start_agent(&[]);
    let mode = |path: &std::path::Path| {
        let metadata = fs::metadata(path).expect("it is there");
        metadata.permissions().mode() & 0o777
    };
    eventually("the socket", || holds(lab.socket().exists()));
    assert_eq!(mode(&lab.socket()), 0o600);
    assert!(agent.stop().success());
    assert!(!lab.socket().exists());
    let output = lab.ask(&["status"]);
    assert_eq!(output.status.code(), Some(1));

    // One that a killed agent left is replaced.
    let mut agent = lab.start_agent(&[]);
    eventually("it answers", || {
        holds(lab.ask(&["status"]).status.success())
    });
    agent.kill();
    assert!(lab.socket().exists());
    let _agent = lab.start_agent(&[]);
    eventually("the next agent answers", || {
        holds(lab.ask(&["status"]).status.success())
    });
}

#[test]
fn a_second_agent_on_the_same_socket_says_so_and_goes_on() {
    let first = Lab::new();
    let _first_agent = first.start_agent(&[]);
    eventually("the first answers", || {
        holds(first.ask(&["status"]).status.success())
    });
    let socket = first.socket();
    let second = Lab::builder()
        .config("socket", socket.to_str().expect("a path in UTF-8"))
        .build();
    let (_web, pod) = second.shop_and_cart("shop.test:443");
    let mut agent = second.start_agent(&[&pod]);
    agent.wait_said("that the socket is another's", |line| {
        line.contains("ERROR") && line.contains("another agent answers there")
    });
    pod.lookup("shop.test");
    pod.talks_tcp((server(10), 443));
    assert!(agent.stop().success());
    assert!(
        first.ask(&["status"]).status.success(),
        "the first still answers"
    );
}

#[test]
fn an_http_port_that_is_taken_is_said_and_the_agent_goes_on() {
    let lab = served();
    let taken = lab
        .node()
        .run(|| std::net::TcpListener::bind(HTTP))
        .expect("the port is free");
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let agent = lab.start_agent(&[&pod]);
    agent.wait_said("that the port is taken", |line| {
        line.contains("ERROR") && line.contains("cannot serve /healthz")
    });
    pod.lookup("shop.test");
    pod.talks_tcp((server(10), 443));
    drop(taken);
    agent.wait_said("that it serves", |line| line.contains("serving /healthz"));
    assert_eq!(lab.http("/healthz").0, 200);
}

#[test]
fn slow_and_hostile_clients_hinder_nobody() {
    let lab = served();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let mut agent = lab.start_agent(&[&pod]);
    eventually("the socket", || holds(lab.socket().exists()));
    // A pod that holds more connections than there may be, each with half a request.
    let stranger = lab.pod("evil", "pod");
    let gateway = IpAddr::V4(Ipv4Addr::new(10, 1, stranger.ipv4().octets()[2], 1));
    let half: Vec<TcpStream> = (0..200)
        .map(|_| {
            let mut stream = stranger.reach_tcp((gateway, 9465));
            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: ");
            stream
        })
        .collect();
    let silent: Vec<UnixStream> = (0..40)
        .map(|_| UnixStream::connect(lab.socket()).expect("a connection"))
        .collect();
    assert_eq!(lab.http("/healthz"), (200, "ok\n".to_owned()));
    assert!(lab.ask(&["status"]).status.success());

    // What is too long, and what is no request.
    for bytes in [
        [b"GET / HTTP/1.1\r\nA: ".as_slice(), &[b'a'; 100_000]].concat(),
        vec![0; 100_000],
        b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nx".to_vec(),
    ] {
        let mut stream = lab.http_connection();
        // It may be closed before all is written.
        let _ = stream.write_all(&bytes);
        let mut response = Vec::new();
        let _ = stream.read_to_end(&mut response);
        assert!(!response.starts_with(b"HTTP/1.1 200"), "{}", response.len());
    }
    for bytes in [
        vec![b'x'; 100_000],
        b"{\"status\":7}\n".to_vec(),
        vec![b'['; 8000],
    ] {
        let mut stream = UnixStream::connect(lab.socket()).expect("a connection");
        let _ = stream.write_all(&bytes);
        let mut response = Vec::new();
        let _ = stream.read_to_end(&mut response);
        assert!(response.is_empty() || response.starts_with(b"{\"error\""));
    }
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    lab.metrics();
                }
            });
        }
        for _ in 0..20 {
            pod.lookup("shop.test");
            pod.talks_tcp((server(10), 443));
        }
    });
    drop((half, silent));
    assert!(
        agent.stop().success(),
        "it ends though clients are connected"
    );
}
