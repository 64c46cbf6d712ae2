//! The names that may lead to internal addresses where these need an entry (`ranges.allowInternal: false`).

use std::net::IpAddr;

use egress_tests::{
    Agent, Builder, Lab, Pod,
    addresses::{RESOLVER6, numbered, server},
    dns::{RecordType, address, cname, hints},
};
use serde_json::json;

const REASON: &str = "internal_answer";
/// An address of a node or a pod.
const INTERNAL: IpAddr = numbered(1);

/// A laboratory in which internal addresses need an entry.
fn locked() -> Builder {
    Lab::builder()
        .config("ranges.internal", vec!["198.18.0.0/15", "fd99::/64"])
        .config("ranges.allowInternal", false)
}

/// Asserts that the name resolves to this address, and that the pod may not connect to it.
#[track_caller]
fn assert_internal_answer_is_denied(agent: &Agent, pod: &Pod, name: &str, to: IpAddr) {
    assert_eq!(pod.lookup(name), [to], "the answer is delivered");
    let denial = agent.denies_tcp(pod, (to, 443), REASON);
    assert_eq!(denial.dst_names, [name]);
}

#[test]
fn a_foreign_zone_cannot_open_internal_addresses() {
    let lab = locked().build();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("a.foreign.test", &[INTERNAL]);
    lab.dns()
        .addresses("b.foreign.test", &[server(10), INTERNAL]);
    lab.dns()
        .answer("c.foreign.test", [cname("d.other.test"), address(INTERNAL)]);
    lab.dns().answer("e.foreign.test", [hints(&[numbered(2)])]);
    lab.dns().addresses("exact.test", &[numbered(3)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*.foreign.test:443 exact.test:443")]);
    let agent = lab.start_agent(&[&pod]);

    assert_internal_answer_is_denied(&agent, &pod, "a.foreign.test", INTERNAL);
    assert_eq!(pod.lookup("b.foreign.test"), [server(10), INTERNAL]);
    pod.talks_tcp((server(10), 443));
    pod.lookup("c.foreign.test");
    pod.resolve("e.foreign.test", RecordType::HTTPS);
    agent.denies_each_tcp(
        &pod,
        &[((INTERNAL, 443), REASON), ((numbered(2), 443), REASON)],
    );
    assert_internal_answer_is_denied(&agent, &pod, "exact.test", numbered(3));
    // The entries do not cover this port.
    agent.denies_tcp(&pod, (INTERNAL, 444), "no_rule");
    for target in ["198.18.0.1:443", "a.foreign.test:443"] {
        let (_, explained) = lab.explain(&pod, target);
        assert_eq!(explained["reason"], REASON, "{explained}");
    }
}

#[test]
fn an_address_entry_allows_an_internal_address_that_a_name_may_not_open() {
    let lab = locked().build();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("a.foreign.test", &[INTERNAL]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*.foreign.test:443 198.18.0.0/24:443")]);
    let _agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup("a.foreign.test"), [INTERNAL]);
    pod.talks_tcp((INTERNAL, 443));
}

#[test]
fn a_cluster_name_opens_its_service_unless_its_chain_leaves_the_cluster() {
    let lab = locked().config("dns.clusterDomain", "cluster.test").build();
    let _web = lab.serve_tcp(443);
    let dns = lab.dns();
    dns.addresses("db.shop.svc.cluster.test", &[INTERNAL]);
    let inner = [cname("db.shop.svc.cluster.test"), address(numbered(2))];
    dns.answer("alias.shop.svc.cluster.test", inner);
    // As `CoreDNS` responds for a Service of type `ExternalName`.
    let outer = [cname("db.foreign.test"), address(numbered(3))];
    dns.answer("external.shop.svc.cluster.test", outer);
    let back = [
        cname("db.foreign.test"),
        cname("api.other.svc.cluster.test"),
        address(numbered(4)),
    ];
    dns.answer("and-back.shop.svc.cluster.test", back);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*.svc.cluster.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    for (name, to) in [("db", INTERNAL), ("alias", numbered(2))] {
        assert_eq!(pod.lookup(&format!("{name}.shop.svc.cluster.test")), [to]);
        pod.talks_tcp((to, 443));
    }
    assert_internal_answer_is_denied(&agent, &pod, "external.shop.svc.cluster.test", numbered(3));
    assert_internal_answer_is_denied(&agent, &pod, "and-back.shop.svc.cluster.test", numbered(4));
}

#[test]
fn names_in_dns_internal_answers_may_lead_to_internal_addresses() {
    let names = json!(["app.corp.test", "*.lan.corp.test"]);
    let listed = locked().config("dns.internalAnswers", names).build();
    let _web = listed.serve_tcp(443);
    let dns = listed.dns();
    dns.addresses("app.corp.test", &[numbered(1)]);
    dns.answer(
        "x.lan.corp.test",
        [cname("lb.foreign.test"), address(numbered(2))],
    );
    dns.addresses("other.corp.test", &[numbered(3)]);
    let pod = listed.pod("shop", "cart");
    listed.write_pod(&pod, &[("allow", "*.corp.test:443")]);
    let agent = listed.start_agent(&[&pod]);
    for (name, to) in [
        ("app.corp.test", numbered(1)),
        ("x.lan.corp.test", numbered(2)),
    ] {
        assert_eq!(pod.lookup(name), [to]);
        pod.talks_tcp((to, 443));
    }
    assert_internal_answer_is_denied(&agent, &pod, "other.corp.test", numbered(3));

    // An edit applies at once to names that were resolved before.
    listed.edit_config("dns.internalAnswers", "all");
    agent.applies_policy_after(&pod, || agent.reload());
    let mut open = pod.talks_tcp((numbered(3), 443));
    listed.edit_config("dns.internalAnswers", json!([]));
    agent.applies_policy_after(&pod, || agent.reload());
    assert!(!egress_tests::exchange(
        &mut open,
        b"after",
        egress_tests::SHORT
    ));
    for to in [1, 2, 3] {
        agent.denies_tcp(&pod, (numbered(to), 443), REASON);
    }
}

#[test]
fn an_address_that_becomes_internal_is_closed_for_names() {
    let lab = Lab::builder()
        .config("ranges.internal", vec!["198.18.0.0/16"])
        .config("ranges.allowInternal", false)
        .build();
    let _web = lab.serve_tcp(443);
    let to = numbered(1 << 16);
    lab.dns().addresses("a.foreign.test", &[to]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*.foreign.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup("a.foreign.test"), [to]);
    let mut open = pod.talks_tcp((to, 443));
    lab.edit_config("ranges.internal", vec!["198.18.0.0/15"]);
    agent.applies_policy_after(&pod, || agent.reload());
    assert!(!egress_tests::exchange(
        &mut open,
        b"after",
        egress_tests::SHORT
    ));
    agent.denies_tcp(&pod, (to, 443), REASON);
}

#[test]
fn with_internal_addresses_allowed_names_may_lead_to_them() {
    let lab = locked().config("ranges.allowInternal", true).build();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("a.foreign.test", &[INTERNAL]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*.foreign.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup("a.foreign.test"), [INTERNAL]);
    pod.talks_tcp((INTERNAL, 443));
    pod.talks_tcp((RESOLVER6, 443));
    assert!(agent.denials().is_empty(), "{:?}", agent.denials());
}

#[test]
fn the_next_agent_denies_the_same_internal_answers() {
    let lab = locked()
        .config("dns.internalAnswers", json!(["app.corp.test"]))
        .build();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("app.corp.test", &[numbered(1)]);
    lab.dns().addresses("other.corp.test", &[numbered(2)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*.corp.test:443")]);
    let mut agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    pod.lookup("app.corp.test");
    pod.lookup("other.corp.test");
    assert!(agent.stop().success());
    let agent = lab.start_agent(&[&pod]);
    pod.talks_tcp((numbered(1), 443));
    agent.denies_tcp(&pod, (numbered(2), 443), REASON);
}
