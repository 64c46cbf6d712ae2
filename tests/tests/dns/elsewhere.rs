//! A pod cannot bypass the entries for names by querying a server that is not its resolver.

use std::net::IpAddr;

use egress_tests::{
    Agent, Lab, Pod, SHORT,
    addresses::{RESOLVER, STRANGER, numbered, server},
    dns::{RecordType, ResponseCode},
};

const REASON: &str = "dns_elsewhere";

/// A laboratory in which every server knows `evil.test`, and every server accepts DNS over TLS and over QUIC.
struct Scene {
    _tls: egress_tests::TcpEcho,
    _quic: egress_tests::UdpEcho,
    lab: Lab,
}

impl Scene {
    fn new() -> Self {
        Self::on(Lab::new())
    }

    fn on(lab: Lab) -> Self {
        lab.dns().addresses("evil.test", &[server(66)]);
        Self {
            _tls: lab.serve_tcp(853),
            _quic: lab.serve_udp(853),
            lab,
        }
    }
}

/// Asserts that the pod gets no DNS response from this server over UDP, TCP, TLS or QUIC, and that each
/// denial has its reason.
#[track_caller]
fn assert_cannot_query(agent: &Agent, pod: &Pod, server: IpAddr) {
    let answer = pod.try_resolve(server, "evil.test", RecordType::A, SHORT);
    assert!(answer.is_none(), "{server} answered: {answer:?}");
    agent.wait_denial("the query", |d| d.is(pod, REASON, server, 53));
    agent.denies_each_tcp(pod, &[((server, 53), REASON), ((server, 853), REASON)]);
    agent.denies_udp(pod, (server, 853), REASON);
}

#[test]
fn a_denied_name_cannot_be_queried_at_another_server() {
    let scene = Scene::new();
    let lab = &scene.lab;
    let _web = lab.serve_tcp(443);
    let pods = [
        ("open", &[("deny", "evil.test")][..]),
        ("wildcard", &[("deny", "*.evil.test evil.test")]),
        ("anywhere", &[("allow", "*"), ("deny", "evil.test")]),
        (
            "ports",
            &[("allow", "*:53 *:853 *:443"), ("deny", "evil.test")],
        ),
    ];
    let pods = pods.map(|(name, annotations)| {
        let pod = lab.pod("shop", name);
        lab.write_pod(&pod, annotations);
        pod
    });
    let agent = lab.start_agent(&pods.each_ref());
    for pod in &pods {
        assert_eq!(
            pod.resolve("evil.test", RecordType::A).code,
            ResponseCode::NXDomain
        );
        assert_cannot_query(&agent, pod, STRANGER);
        pod.talks_tcp((STRANGER, 443));
    }
    assert_eq!(lab.dns().queries_for("evil.test"), 0);
}

#[test]
fn an_address_entry_allows_a_dns_server_that_is_not_a_resolver() {
    let scene = Scene::new();
    let lab = &scene.lab;
    let pod = lab.pod("shop", "cart");
    let entries = format!("* {STRANGER}:53 {STRANGER}:853");
    lab.write_pod(&pod, &[("allow", &entries), ("deny", "evil.test")]);
    let agent = lab.start_agent(&[&pod]);
    let answer = pod.resolve_at(STRANGER, "evil.test", RecordType::A);
    assert_eq!(answer.addresses, [server(66)]);
    pod.talks_tcp((STRANGER, 853));
    pod.talks_udp((STRANGER, 853));
    assert_cannot_query(&agent, &pod, server(53 + 1));
}

#[test]
fn an_entry_for_a_name_does_not_allow_dns_to_its_address() {
    let scene = Scene::new();
    let lab = &scene.lab;
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("ns.shop.test", &[STRANGER]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "ns.shop.test")]);
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup("ns.shop.test"), [STRANGER]);
    pod.talks_tcp((STRANGER, 443));
    assert_cannot_query(&agent, &pod, STRANGER);
}

#[test]
fn an_internal_server_takes_dns_over_tls_only_with_an_entry() {
    let scene = Scene::on(
        Lab::builder()
            .config("ranges.internal", vec!["198.18.0.0/15"])
            .build(),
    );
    let lab = &scene.lab;
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    pod.talks_tcp((numbered(1), 443));
    assert_cannot_query(&agent, &pod, numbered(1));
}

#[test]
fn a_policy_without_guarded_names_leaves_dns_to_other_servers_alone() {
    let scene = Scene::on(Lab::builder().config("dns.guard", false).build());
    let lab = &scene.lab;
    let pods = [
        ("open", &[("deny", "203.0.113.99")][..]),
        ("anywhere", &[("allow", "*")]),
        ("unguarded", &[("allow", "ns.shop.test")]),
    ];
    lab.dns().addresses("ns.shop.test", &[STRANGER]);
    let pods = pods.map(|(name, annotations)| {
        let pod = lab.pod("shop", name);
        lab.write_pod(&pod, annotations);
        pod
    });
    let _agent = lab.start_agent(&pods.each_ref());
    for pod in &pods {
        assert_eq!(pod.lookup("ns.shop.test"), [STRANGER]);
        let answer = pod.resolve_at(STRANGER, "evil.test", RecordType::A);
        assert_eq!(answer.addresses, [server(66)]);
        pod.talks_tcp((STRANGER, 853));
        pod.talks_udp((STRANGER, 853));
    }
}

#[test]
fn a_name_that_is_denied_later_ends_connections_with_dns_servers() {
    let scene = Scene::new();
    let lab = &scene.lab;
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*")]);
    let agent = lab.start_agent(&[&pod]);
    let mut open = pod.talks_tcp((STRANGER, 853));
    let _to_resolver = pod.reach_tcp((RESOLVER, 853));
    agent.applies_policy_after(&pod, || {
        lab.write_pod(&pod, &[("allow", "*"), ("deny", "evil.test")]);
    });
    assert!(!egress_tests::exchange(&mut open, b"after", SHORT));
    assert_cannot_query(&agent, &pod, STRANGER);
    // Only its port 53 makes a server a resolver.
    agent.denies_tcp(&pod, (RESOLVER, 853), REASON);
}
