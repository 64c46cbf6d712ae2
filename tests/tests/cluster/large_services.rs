//! A Service that is very large costs the node no more than others.

use std::{net::IpAddr, sync::Arc};

use egress_tests::{ApiServer, Cluster, cluster::allow};
use serde_json::{Value, json};

use crate::services::{create, is_denied, lab};

/// The memory that the agent may take for one Service, in KiB. The products of ports, addresses and endpoints take ten times
/// as much.
const MEMORY: u64 = 96 << 10;

/// Writes a Service with so many ports and external addresses, and so many endpoints behind port 53, which closed pods may
/// not reach.
fn write(server: &ApiServer, namespace: &str, [ports, external, endpoints]: [u32; 3]) -> IpAddr {
    let address = |from: [u8; 4], number: u32| {
        IpAddr::from((u32::from_be_bytes(from) + number).to_be_bytes())
    };
    let at = |port: fn(u32) -> u32| -> Value {
        let one = |number| json!({ "name": format!("p{number}"), "port": port(number), "protocol": "TCP" });
        (1..=ports).map(one).collect()
    };
    let external: Value = (0..external)
        .map(|number| json!(address([198, 18, 0, 0], number)))
        .collect();
    let mut spec = json!({ "ports": at(|number| number) });
    if external != json!([]) {
        spec["externalIPs"] = external;
    }
    let (_, ip, _) = create(server, namespace, "web", &spec);
    let addresses: Value = (0..endpoints)
        .map(|number| json!({ "ip": address([10, 1, 64, 0], number) }))
        .collect();
    server.apply(&json!({
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": { "namespace": namespace, "name": "web" },
        "subsets": [{ "addresses": addresses, "ports": at(|_| 53) }],
    }));
    ip.expect("a cluster IP")
}

#[test]
fn large_services_keep_no_agent_from_its_work() {
    // Many ports at many addresses; many endpoints behind many ports.
    for (sizes, closed) in [
        ([1000, 1000, 1], true),
        ([2000, 0, 4000], true),
        ([1, 2000, 1], false),
        ([20, 0, 400], false),
    ] {
        let cluster = Cluster::on(Arc::new(ApiServer::start()), lab());
        let [shop, other] = ["shop", "other"].map(|name| cluster.namespace(name, &Value::Null));
        let cart = cluster.run(&shop, "cart", &allow("b.test:443"));
        let agent = cluster.start_agent();
        agent.wait_enforcing(cart.net());
        agent.wait_ready();
        let before = agent.memory_kib("VmHWM");
        let ip = write(&cluster.server, &other, sizes);
        is_denied(&cluster, &agent, cart.net(), (ip, 1));
        agent.applies_policy_after(cart.net(), || {
            cluster.server.namespace(&shop, &allow("a.test:443"));
        });
        let name = format!("{other}/web");
        let log = agent.stderr();
        let mut lines = log.lines();
        let is_named = lines.any(|line| line.contains(&name) && line.contains("agent reads"));
        assert_eq!(is_named, closed, "{sizes:?}: {log}");
        let more = agent.memory_kib("VmHWM") - before;
        assert!(more < MEMORY, "{sizes:?}: {more} KiB");
    }
}
