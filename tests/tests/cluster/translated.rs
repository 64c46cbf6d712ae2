//! Connections that the node translates are judged by where they lead, beside changes of other Services.

use std::{
    net::{IpAddr, TcpStream},
    thread,
    time::Instant,
};

use egress_tests::{
    Cluster, Lab, SHORT,
    addresses::{PODS, PODS6, server as outside},
    cluster::allow,
    exchange,
};
use serde_json::{Value, json};

use crate::{
    conformance,
    lost_endpoints::{LONG, translate_only},
    services::{NODE, cluster, create, endpoints, is_denied, serve, service, translate},
};

/// Asserts that a connection ends.
#[track_caller]
fn ends(stream: &mut TcpStream, what: &str) {
    let began = Instant::now();
    while exchange(stream, b"still", SHORT * 4) {
        assert!(began.elapsed() < LONG, "the connection {what} goes on");
        thread::sleep(SHORT);
    }
}

/// Creates a Service with an endpoint behind port 53, which closed pods may not reach: each of them gets a rule for it.
fn create_with_a_dns_server(cluster: &Cluster, namespace: &str, endpoint: IpAddr) -> IpAddr {
    let port = json!({ "name": "tcp", "port": 443, "protocol": "TCP", "targetPort": 53 });
    let spec = json!({ "ports": [port] });
    let (_, ip, _) = create(&cluster.server, namespace, "other", &spec);
    endpoints(&cluster.server, namespace, "other", &[endpoint], 53);
    ip.expect("a cluster IP")
}

#[test]
fn another_teams_service_ends_no_connection_that_a_name_allows() {
    let internal = json!([
        PODS,
        PODS6,
        "10.96.0.0/16",
        "fd96::/112",
        format!("{NODE}/32")
    ]);
    let ranges = json!({ "internal": internal, "allowInternal": false });
    let cluster = Cluster::on(
        conformance::server(),
        Lab::builder().config("ranges", ranges),
    );
    let _outside = serve(cluster.lab.outside(), 8443);
    let [shop, other] = ["shop", "other"].map(|name| cluster.namespace(name, &Value::Null));
    let web = cluster.run(&shop, "web", &Value::Null);
    let other_pod = cluster.run(&other, "other", &Value::Null);
    let _echo = serve(web.net().netns(), 8080);
    let web_ip = IpAddr::V4(web.net().ipv4());
    let name = format!("web.{shop}.svc.cluster.local");
    let at = (service(&cluster.server, &shop, "web"), 80);
    endpoints(&cluster.server, &shop, "web", &[web_ip], 8080);
    cluster.lab.dns().addresses(&name, &[at.0]);
    let list = allow(&format!("{name}:80 *:443"));
    let cart = cluster.run(&shop, "cart", &list);
    let mut lists = list.clone();
    lists["egress-agent.dev/deny"] = outside(9).to_string().into();
    let denied = cluster.run(&shop, "denied", &lists);
    let agent = cluster.start_agent();
    for pod in [&cart, &denied] {
        agent.wait_enforcing(pod.net());
        assert_eq!(pod.net().lookup(&name), [at.0]);
    }
    translate(&cluster, at, (web_ip, 8080));
    let mut allowed = cart.net().talks_tcp(at);
    agent.applies_policy_after(cart.net(), || {
        let endpoint = IpAddr::V4(other_pod.net().ipv4());
        create_with_a_dns_server(&cluster, &other, endpoint);
    });

    translate_only(&cluster, at, (outside(9), 8443));
    let mut denied = denied.net().talks_tcp(at);
    // The node leads new connections, and those that it has forgotten, to a third endpoint.
    translate_only(&cluster, at, (IpAddr::V4(other_pod.net().ipv4()), 8080));
    ends(&mut denied, "to a denied endpoint");
    assert!(
        exchange(&mut allowed, b"still", LONG),
        "the allowed one has ended"
    );
}

#[test]
fn a_denied_connection_ends_beside_another_teams_service() {
    let cluster = cluster();
    let _outside = serve(cluster.lab.outside(), 8443);
    let [shop, other] = ["shop", "other"].map(|name| cluster.namespace(name, &Value::Null));
    let web = cluster.run(&shop, "web", &Value::Null);
    let other_pod = cluster.run(&other, "other", &Value::Null);
    let web_ip = IpAddr::V4(web.net().ipv4());
    let at = (service(&cluster.server, &shop, "web"), 80);
    endpoints(&cluster.server, &shop, "web", &[web_ip], 8080);
    let of_other = create_with_a_dns_server(&cluster, &other, IpAddr::V4(other_pod.net().ipv4()));
    let name = format!("web.{shop}.svc.cluster.local");
    cluster.lab.dns().addresses(&name, &[at.0]);
    // The entry for the Service is about another port, and the one for the port about something else.
    let list = allow(&format!("{name}:25 other.test:80 *:443"));
    let cart = cluster.run(&shop, "cart", &list);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    is_denied(&cluster, &agent, cart.net(), (of_other, 443));
    assert_eq!(cart.net().lookup(&name), [at.0]);
    translate(&cluster, at, (outside(9), 8443));
    let mut denied = cart.net().talks_tcp(at);
    translate_only(&cluster, at, (web_ip, 8080));
    ends(&mut denied, "to a host outside");
}
