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
    let [web_name, api_name] =
        ["web", "api"].map(|name| format!("{name}.{shop}.svc.cluster.local"));
    let [web_at, api_at] = ["web", "api"].map(|name| {
        let ip = service(&cluster.server, &shop, name);
        endpoints(&cluster.server, &shop, name, &[web_ip], 8080);
        (ip, 80)
    });
    let mut lists = allow(&format!("{web_name}:80 {api_name}:80 *:443"));
    lists["egress-agent.dev/deny"] = outside(9).to_string().into();
    let cart = cluster.run(&shop, "cart", &lists);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    for (name, (ip, _)) in [(&web_name, web_at), (&api_name, api_at)] {
        cluster.lab.dns().addresses(name, &[ip]);
        assert_eq!(cart.net().lookup(name), [ip]);
    }
    translate(&cluster, web_at, (web_ip, 8080));
    let mut allowed = cart.net().talks_tcp(web_at);
    agent.applies_policy_after(cart.net(), || {
        let endpoint = IpAddr::V4(other_pod.net().ipv4());
        create_with_a_dns_server(&cluster, &other, endpoint);
    });

    translate(&cluster, api_at, (outside(9), 8443));
    let mut denied = cart.net().talks_tcp(api_at);
    // The node translates new connections to nothing that is denied.
    translate_only(&cluster, api_at, (web_ip, 8080));
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
