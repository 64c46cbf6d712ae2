//! Pods of the cluster come and go that rules name as peers.

use std::sync::Arc;

use egress_tests::{
    Cluster, DEADLINE, Lab, addresses::server as address, cluster::allow, eventually, exchange,
    holds,
};
use serde_json::{Value, json};

use crate::policies::{install, install_upstream, network_policy, put, server};

/// A pod of another node, which runs and has this address.
fn peer(cluster: &Cluster, namespace: &str, name: &str, host: u8) -> Value {
    let object = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "namespace": namespace, "name": name, "labels": { "app": "db" } },
        "spec": { "nodeName": "elsewhere", "containers": [{ "name": "main", "image": "none" }] },
    });
    cluster.server.apply(&object);
    let ip = address(host);
    let status = json!({ "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }] });
    cluster.server.set_status(&object, &status);
    object
}

#[test]
fn peers_come_and_go_and_the_addresses_that_a_pod_has_learned_stay_where_they_are() {
    let server = server();
    install(&server);
    install_upstream(&server);
    let cluster = Cluster::on(Arc::clone(&server), Lab::builder());
    let _web = cluster.lab.serve_tcp(443);
    cluster.lab.dns().addresses("shop.test", &[address(10)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("shop.test:443"));
    let cart = cart.net();
    let to_db = json!([{
        "action": "Accept",
        "to": [{"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "db"}}}}],
        "protocols": [{"tcp": {"destinationPort": {"number": 443}}}],
    }]);
    put(&server, &network_policy("db", &to_db));
    peer(&cluster, &shop, "first", 20);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart);
    assert_eq!(cart.lookup("shop.test"), [address(10)]);
    let mut open = cart.talks_tcp((address(10), 443));
    let allow_map = || cluster.lab.allow_map(cart);
    let before = allow_map();
    cart.talks_tcp((address(20), 443));
    assert!(!cart.reaches(address(30)), "there is no such peer yet");

    let second = peer(&cluster, &shop, "second", 30);
    eventually("the new peer is reached", || {
        holds(cart.reaches(address(30)))
    });
    assert_eq!(allow_map(), before, "the addresses were copied");
    server.delete(&second);
    eventually("the peer that is gone is not", || {
        holds(!cart.reaches(address(30)))
    });
    assert_eq!(allow_map(), before, "the addresses were copied");

    assert!(exchange(&mut open, b"still here", DEADLINE), "it was cut");
    cart.talks_tcp((address(10), 443));
    cart.talks_tcp((address(20), 443));
}
