//! Ordered rules of the cluster, and pods that are not known yet.

use std::{net::IpAddr, sync::Arc};

use egress_tests::{
    Agent, Cluster, Denial, Lab, Pod, SHORT,
    addresses::{PODS, PODS6, server as address},
    cluster::allow,
    eventually, holds,
};
use serde_json::{Value, json};

use crate::policies::{install, install_upstream, network_policy, put, server};

/// Of the internal addresses, some of which rules are about.
const INTERNAL: &str = "203.0.113.0/26";

fn cluster_policy(name: &str, priority: u32, selector: &Value, rules: &Value) -> Value {
    json!({
        "apiVersion": "egress-agent.dev/v1alpha1",
        "kind": "ClusterEgressPolicy",
        "metadata": {"name": name},
        "spec": {
            "tier": "Admin",
            "priority": priority,
            "podSelector": selector,
            "rules": rules,
        },
    })
}

/// True if this is about a packet of the interface to this address.
fn is_of(denial: &Denial, net: &Pod, to: IpAddr, reason: &str) -> bool {
    denial.reason == reason && denial.pod == net.interface() && denial.dst_ip == Some(to)
}

#[track_caller]
fn assert_denied(agent: &Agent, net: &Pod, to: IpAddr, reason: &str) {
    let from = agent.mark();
    assert!(net.connect_tcp((to, 443), SHORT).is_err(), "{to} is open");
    agent.wait_denial_from(from, reason, |denial| is_of(denial, net, to, reason));
}

#[test]
fn ordered_rules_hold_before_a_pod_is_known() {
    let server = server();
    install(&server);
    install_upstream(&server);
    let ranges = json!({"internal": [PODS, PODS6, INTERNAL]});
    let lab = Lab::builder().config("ranges", ranges);
    let cluster = Cluster::on(Arc::clone(&server), lab);
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let to = |host: u8| format!("{}:443", address(host));
    let every = json!({});
    let other = json!({"matchLabels": {"app": "other"}});
    put(
        &server,
        &cluster_policy(
            "every",
            10,
            &every,
            &json!([
                {"action": "Allow", "entries": [to(21), to(99)]},
                {"action": "Deny", "entries": [format!("{}/31", address(20)), "*.evil.test"]},
            ]),
        ),
    );
    put(
        &server,
        &cluster_policy(
            "some",
            20,
            &other,
            &json!([
                {"action": "Allow", "entries": [to(98)]},
                {"action": "Pass", "entries": [to(30)]},
                {"action": "Deny", "entries": [to(31)]},
            ]),
        ),
    );
    let agent = cluster.start_agent();
    let net = cluster.quarantined(&agent, &shop, "cart");
    // Internal addresses without a rule are open, and external ones are closed.
    eventually("the pod sends from its address", || {
        holds(net.connect_tcp((address(10), 443), SHORT).is_ok())
    });
    assert_denied(&agent, &net, address(97), "pod_unknown");
    // Of rules about every pod, all count.
    assert_denied(&agent, &net, address(20), "deny_rule");
    net.talks_tcp((address(21), 443));
    net.talks_tcp((address(99), 443));
    // Of rules about some, what takes away.
    assert_denied(&agent, &net, address(30), "deny_rule");
    assert_denied(&agent, &net, address(31), "deny_rule");
    assert_denied(&agent, &net, address(98), "pod_unknown");

    // A policy that comes meanwhile counts, too.
    let rule = json!([{"action": "Deny", "to": [{"networks": [format!("{}/32", address(10))]}]}]);
    put(&server, &network_policy("later", &rule));
    eventually("the later policy denies", || {
        // A connection may also fail because the machine is busy.
        let failed = net.connect_tcp((address(10), 443), SHORT).is_err();
        let denials = agent.denials();
        holds(
            failed
                && denials
                    .iter()
                    .any(|d| is_of(d, &net, address(10), "deny_rule")),
        )
    });
    server.delete(&network_policy("later", &rule));
    eventually("the address is open again", || {
        holds(net.connect_tcp((address(10), 443), SHORT).is_ok())
    });

    // The pod is not one of those that the second policy is about.
    let (object, uid) = cluster.create(&shop, "cart", &allow(&to(40)));
    let mut cart = cluster.pod_without_processes(object, &uid, net);
    cart.running().start_container();
    agent.wait_enforcing(cart.net());
    cart.net().talks_tcp((address(30), 443));
    cart.net().talks_tcp((address(31), 443));
    let denied = cart.net().connect_tcp((address(20), 443), SHORT);
    assert!(denied.is_err(), "a denied address is reached");
}

#[test]
fn a_rule_that_cannot_be_read_closes_pods_that_are_not_known_to_internal_addresses() {
    let server = server();
    install(&server);
    install_upstream(&server);
    let ranges = json!({"internal": [PODS, PODS6, INTERNAL]});
    let lab = Lab::builder().config("ranges", ranges);
    let cluster = Cluster::on(Arc::clone(&server), lab);
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let deny = json!([{"action": "Deny", "entries": ["@missing"]}]);
    put(
        &server,
        &cluster_policy("some", 20, &json!({"matchLabels": {"app": "other"}}), &deny),
    );
    let agent = cluster.start_agent();
    let net = cluster.quarantined(&agent, &shop, "cart");
    eventually("a connection is denied", || {
        assert!(net.connect_tcp((address(10), 443), SHORT).is_err());
        let denied = agent.denials().into_iter().any(|denial| {
            denial.pod == net.interface()
                && denial.reason == "pod_unknown"
                && denial.src_ip == Some(net.ipv4().into())
                && denial.dst_ip == Some(address(10))
        });
        holds(denied)
    });
    server.delete(&cluster_policy("some", 20, &Value::Null, &deny));
    eventually("the address is open", || {
        holds(net.connect_tcp((address(10), 443), SHORT).is_ok())
    });
}
