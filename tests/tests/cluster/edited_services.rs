//! Who edits a Service does not harm others: every agent reads each version of it.

use std::sync::Arc;

use egress_tests::{ApiServer, Cluster, Lab, cluster::allow};
use serde_json::{Value, json};

use crate::services::create;

const EDITS: u16 = 80;
const PORTS: u16 = 200;
const ENDPOINTS: u16 = 50;
/// The memory that the agent may take for that, in KiB. All combinations of the versions take a hundred times as much.
const MEMORY: u64 = 64 << 10;

/// The endpoints of the Service, as its controller writes them after an edit of the target port.
fn write_endpoints(server: &ApiServer, namespace: &str, port: u16) {
    let addresses: Value = (1..=ENDPOINTS)
        .map(|number| json!({ "ip": format!("10.1.200.{number}") }))
        .collect();
    let ports: Value = (0..PORTS)
        .map(|number| json!({ "name": format!("p{number}"), "port": port, "protocol": "TCP" }))
        .collect();
    server.apply(&json!({
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": { "namespace": namespace, "name": "web" },
        "subsets": [{ "addresses": addresses, "ports": ports }],
    }));
}

/// The Service with ports that no earlier edit had.
fn write_ports(server: &ApiServer, namespace: &str, edit: u16) {
    let ports: Value = (0..PORTS)
        .map(|number| {
            let port = 1 + edit * PORTS + number;
            json!({ "name": format!("p{number}"), "port": port, "protocol": "TCP" })
        })
        .collect();
    create(server, namespace, "web", &json!({ "ports": ports }));
}

#[test]
fn edits_of_a_large_service_keep_no_agent_from_its_work() {
    let cluster = Cluster::on(Arc::new(ApiServer::start()), Lab::builder());
    let [shop, other] = ["shop", "other"].map(|name| cluster.namespace(name, &Value::Null));
    let cart = cluster.run(&shop, "cart", &allow("b.test:443"));
    write_ports(&cluster.server, &other, 0);
    write_endpoints(&cluster.server, &other, 8000);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    agent.wait_ready();
    let before = agent.memory_kib("VmHWM");
    for edit in 1..=EDITS {
        write_ports(&cluster.server, &other, edit);
        write_endpoints(&cluster.server, &other, 8000 + edit);
    }
    agent.wait_log("which Service is closed", |line| {
        line.contains(&format!("{other}/web")) && line.contains("are denied for a minute")
    });
    agent.applies_policy_after(cart.net(), || {
        cluster.server.namespace(&shop, &allow("a.test:443"));
    });
    let more = agent.memory_kib("VmHWM") - before;
    assert!(more < MEMORY, "{more} KiB");
}
