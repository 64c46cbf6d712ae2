//! `ClusterNetworkPolicy`: what its comments in the upstream API say, beyond upstream's conformance tests (which are in
//! tests/cluster/conformance).

use egress_tests::{
    SHORT,
    addresses::{server, server6},
    dns::{RecordType, ResponseCode},
};
use serde_json::{Value, json};

use crate::objects::{Scene, cluster_policy};

fn policy(name: &str, priority: u32, egress: &Value) -> Value {
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": { "name": name },
        "spec": {
            "tier": "Admin",
            "priority": priority,
            "subject": { "namespaces": {} },
            "egress": egress,
        },
    })
}

fn everywhere() -> Value {
    json!([{ "networks": ["0.0.0.0/0", "::/0"] }])
}

#[test]
fn a_star_in_a_domain_name_is_one_or_more_labels() {
    let names = policy(
        "names",
        1,
        &json!([
            { "action": "Accept", "to": [{ "domainNames": ["*.shop.test"] }] },
            { "action": "Deny", "to": everywhere() },
        ]),
    );
    let scene = Scene::new(&[], &[names]);
    let (pod, dns) = (&scene.pod, scene.lab.dns());
    dns.addresses("a.shop.test", &[server(21)]);
    dns.addresses("b.a.shop.test", &[server(22)]);
    dns.addresses("ashop.test", &[server(23)]);
    for (name, address) in [("a.shop.test", server(21)), ("b.a.shop.test", server(22))] {
        assert_eq!(pod.lookup(name), [address]);
        pod.talks_tcp((address, 443));
    }
    for name in ["shop.test", "ashop.test"] {
        let answer = pod.resolve(name, RecordType::A);
        assert_eq!(answer.code, ResponseCode::NXDomain, "{name}");
    }
    scene.denied_by((server(23), 443), "ClusterNetworkPolicy", "names");
}

#[test]
fn icmp_is_matched_by_rules_about_networks_and_not_by_rules_about_ports() {
    let pings = policy(
        "pings",
        1,
        &json!([
            { "action": "Accept", "to": [{ "networks": ["203.0.113.10/32", "2001:db8::10/128"] }] },
            {
                "action": "Accept",
                "to": [{ "networks": ["203.0.113.20/32"] }],
                "protocols": [{ "tcp": { "destinationPort": { "number": 443 } } }],
            },
            { "action": "Deny", "to": everywhere() },
        ]),
    );
    let scene = Scene::new(&[], &[pings]);
    let pod = &scene.pod;
    for address in [server(10), server6(0x10)] {
        assert!(pod.ping(address, egress_tests::DEADLINE), "{address}");
    }
    pod.talks_tcp((server(20), 443));
    for (address, protocol) in [
        (server(20), "icmp"),
        (server(99), "icmp"),
        (server6(0x99), "icmpv6"),
    ] {
        assert!(!pod.ping(address, SHORT), "{address} answers");
        let denial = scene.agent.wait_denial("a ping", |denial| {
            denial.of(pod) && denial.dst_ip == Some(address)
        });
        assert_eq!(
            denial.protocol.as_deref(),
            Some(protocol),
            "{}",
            denial.text
        );
        assert_eq!(denial.reason, "deny_rule", "{}", denial.text);
    }
}

#[test]
fn a_peer_of_an_unknown_kind_fails_closed() {
    let unknown = json!([{ "networks": ["203.0.113.0/24"] }, { "services": {} }]);
    let accepting = policy(
        "accepting",
        1,
        &json!([{ "action": "Accept", "to": unknown }]),
    );
    let denying =
        |action: &str| policy("closing", 2, &json!([{ "action": action, "to": unknown }]));
    let open = Scene::new(&[], std::slice::from_ref(&accepting));
    // The rule leaves packets that it would accept to the other rules, and here none of these denies them.
    open.pod.talks_tcp((server(10), 443));
    let after = policy(
        "after",
        3,
        &json!([{ "action": "Deny", "to": everywhere() }]),
    );
    open.agent
        .applies_policy_after(&open.pod, || open.lab.write_policy(&after));
    open.denied_by((server(10), 443), "ClusterNetworkPolicy", "after");
    drop(open);

    for action in ["Deny", "Pass"] {
        // A team's list would allow it.
        let scene = Scene::new(&[("allow", "203.0.113.10")], &[denying(action)]);
        scene.denied_by((server(10), 443), "ClusterNetworkPolicy", "closing");
        let (_, status) = scene.lab.ask_json(&["status"]);
        assert!(
            status.to_string().contains("spec.egress[0]"),
            "the status does not name the rule: {status}"
        );
    }
}

#[test]
fn rules_about_ingress_are_reported_once_and_those_about_egress_count() {
    let mut both = policy(
        "both",
        1,
        &json!([{ "action": "Deny", "to": [{ "networks": ["203.0.113.10/32"] }] }]),
    );
    both["spec"]["ingress"] = json!([{ "action": "Deny", "from": [{ "namespaces": {} }] }]);
    let scene = Scene::new(&[], &[both]);
    scene.denied_by((server(10), 443), "ClusterNetworkPolicy", "both");
    let pod = &scene.pod;
    // Every reconcile sees the policy again.
    scene.agent.applies_policy_after(pod, || {
        let labels = [("app", "cart")];
        let deny = [("deny", "203.0.113.20")];
        scene.lab.write_labelled_pod(pod, &labels, &deny);
    });
    let text = "ClusterNetworkPolicy both: spec.ingress has 1 rules: egress-agent does not enforce rules about ingress";
    let (_, status) = scene.lab.ask_json(&["status"]);
    let told = status["problems"].to_string();
    assert_eq!(told.matches(text).count(), 1, "{told}");
    let log = scene.agent.stderr();
    assert_eq!(log.matches(text).count(), 1, "{log}");
}

#[test]
fn of_two_policies_with_one_priority_the_first_denials_decide_and_then_the_names() {
    let of = |name: &str, rules: &Value| cluster_policy(name, "Admin", 7, rules);
    let first = of(
        "a",
        &json!([
            { "action": "Allow", "entries": ["203.0.113.10", "203.0.113.20"] },
            { "action": "Deny", "entries": ["203.0.113.30"] },
        ]),
    );
    let second = of(
        "b",
        &json!([
            { "action": "Deny", "entries": ["203.0.113.10"] },
            { "action": "Allow", "entries": ["203.0.113.30"] },
            { "action": "Deny", "entries": ["203.0.113.20"] },
        ]),
    );
    // A `ClusterNetworkPolicy` shares the order, and comes after the others by its kind.
    let third = policy(
        "a",
        7,
        &json!([{ "action": "Deny", "to": [{ "networks": ["203.0.113.40/32"] }] }]),
    );
    let scene = Scene::new(&[("allow", "203.0.113.40")], &[second, third, first]);
    scene.denied_by((server(10), 443), "ClusterEgressPolicy", "b");
    scene.pod.talks_tcp((server(20), 443));
    scene.denied_by((server(30), 443), "ClusterEgressPolicy", "a");
    scene.denied_by((server(40), 443), "ClusterNetworkPolicy", "a");
    let (_, status) = scene.lab.ask_json(&["status"]);
    assert!(
        status
            .to_string()
            .contains("have the same tier and priority (7)"),
        "{status}"
    );
}
