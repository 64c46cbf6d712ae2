//! Ordered rules of the cluster hold whatever teams write, and whatever the owners of zones answer.

use std::{net::UdpSocket, time::Duration};

use egress_tests::{
    DEADLINE, Lab, Pod, SHORT,
    addresses::{numbered, server},
    eventually, holds,
};
use serde_json::{Value, json};

fn admin(name: &str, rules: &Value) -> Value {
    json!({
        "apiVersion": "egress-agent.dev/v1alpha1",
        "kind": "ClusterEgressPolicy",
        "metadata": { "name": name },
        "spec": { "tier": "Admin", "priority": 10, "rules": rules },
    })
}

/// A laboratory in which `numbered(…)` are internal addresses.
fn lab(allow_internal: bool) -> Lab {
    Lab::builder()
        .config("ranges.internal", vec!["198.18.0.0/16"])
        .config("ranges.allowInternal", allow_internal)
        .build()
}

fn denying_internal() -> Value {
    let rules = json!([{ "action": "Deny", "entries": ["198.18.0.7"] }]);
    admin("guard", &rules)
}

#[test]
fn lists_that_cannot_be_read_keep_no_admin_rule_from_a_new_pod() {
    let lab = lab(true);
    let _web = lab.serve_tcp(443);
    lab.write_policy(&denying_internal());
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "!")]);
    let agent = lab.start_agent(&[&pod]);
    let denial = agent.denies_tcp(&pod, (numbered(7), 443), "deny_rule");
    assert_eq!(denial.line["policy"]["name"], "guard", "{}", denial.text);
    pod.talks_tcp((numbered(1), 443));
    agent.denies_tcp(&pod, (server(1), 443), "policy_unreadable");
}

#[test]
fn lists_that_cannot_be_read_keep_no_admin_rule_from_a_known_pod() {
    let lab = lab(true);
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "203.0.113.20:443")]);
    let agent = lab.start_agent(&[&pod]);
    pod.talks_tcp((numbered(7), 443));
    lab.write_pod(&pod, &[("allow", "203.0.113.20:443 !")]);
    agent.wait_log("that the lists stay", |line| {
        line.contains("the last good policy stays")
    });
    agent.applies_policy_after(&pod, || lab.write_policy(&denying_internal()));
    agent.denies_tcp(&pod, (numbered(7), 443), "deny_rule");
    pod.talks_tcp((server(20), 443));
    lab.remove_policy(&denying_internal());
    eventually("the rule is gone", || holds(pod.reaches(numbered(7))));
}

#[test]
fn ordered_rules_that_were_never_readable_close_a_new_pod() {
    let lab = lab(true);
    let _web = lab.serve_tcp(443);
    let rules = json!([{ "action": "Deny", "entries": ["@missing"] }]);
    lab.write_policy(&admin("guard", &rules));
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "203.0.113.20:443")]);
    let agent = lab.start_agent(&[&pod]);
    agent.denies_tcp(&pod, (server(20), 443), "policy_unreadable");
    agent.denies_tcp(&pod, (numbered(1), 443), "policy_unreadable");
}

/// A datagram from this internal address, port 7777, to the pod. Returns whether the pod's answer arrives in time.
#[track_caller]
fn is_answered(lab: &Lab, pod: &Pod, from: u32, timeout: Duration) -> bool {
    let inner = pod.netns().run(|| UdpSocket::bind((pod.ipv4(), 9000)));
    let inner = inner.expect("a UDP socket in the pod");
    let outer = lab
        .outside()
        .run(|| UdpSocket::bind((numbered(from), 7777)));
    let outer = outer.expect("a UDP socket outside");
    outer
        .send_to(b"hello", (pod.ipv4(), 9000))
        .expect("a datagram to the pod");
    let mut buffer = [0; 16];
    inner.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    let (_, asker) = inner
        .recv_from(&mut buffer)
        .expect("the pod gets the datagram");
    inner.send_to(b"answer", asker).expect("the pod answers");
    outer.set_read_timeout(Some(timeout)).expect("a time-out");
    outer.recv(&mut buffer).is_ok()
}

#[test]
fn an_exception_that_opens_nothing_lets_no_reply_pass() {
    let lab = lab(false);
    // The zone's owner names an address to which no name may lead.
    lab.dns().addresses("api.shop.test", &[numbered(7)]);
    lab.write_policy(&admin(
        "guard",
        &json!([
            { "action": "Allow", "entries": ["api.shop.test:7777/udp", "198.18.0.1:7777/udp"] },
            { "action": "Deny", "entries": ["198.18.0.0/16"] },
        ]),
    ));
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[]);
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup("api.shop.test"), [numbered(7)]);
    assert!(
        !is_answered(&lab, &pod, 7, SHORT),
        "a denied address got an answer"
    );
    agent.wait_denial("the answer", |d| d.is(&pod, "deny_rule", numbered(7), 7777));
    assert!(
        is_answered(&lab, &pod, 1, DEADLINE),
        "the exception by address is one"
    );
}

#[test]
fn resolve_carries_no_name_past_an_admin_rule_that_denies_everything() {
    let lab = Lab::new();
    lab.dns().addresses("evil.test", &[server(66)]);
    lab.dns().addresses("shop.test", &[server(10)]);
    let exception = json!({ "action": "Allow", "entries": ["shop.test:443"] });
    let rest = json!({ "action": "Deny", "entries": ["*"] });
    lab.write_policy(&admin("guard", &json!([exception, rest])));
    let pods = [("any", "*"), ("one", "evil.test")].map(|(name, resolve)| {
        let pod = lab.pod("shop", name);
        lab.write_pod(&pod, &[("resolve", resolve)]);
        pod
    });
    let agent = lab.start_agent(&[&pods[0], &pods[1]]);
    for pod in &pods {
        agent.denies_name(pod, "evil.test");
        assert_eq!(lab.dns().queries_for("evil.test"), 0);
        assert_eq!(pod.lookup("shop.test"), [server(10)]);
    }
    // Where the first tier leaves something to teams, they may permit the query.
    let leaving = json!([{ "action": "Deny", "entries": ["*:25/tcp"] }]);
    agent.applies_policy_after(&pods[1], || lab.write_policy(&admin("guard", &leaving)));
    assert_eq!(pods[1].lookup("evil.test"), [server(66)]);
}
