//! Connections that the node translates are judged by where they lead, beside changes of other Services.

use std::{
    net::{IpAddr, SocketAddr, TcpStream},
    thread,
    time::Instant,
};

use egress_tests::{
    Cluster, Lab, SHORT,
    addresses::{PODS, PODS6, server as outside},
    cluster::allow,
    eventually, exchange, holds,
};
use serde_json::{Value, json};

use crate::{
    conformance,
    lost_endpoints::{LONG, ask, decides, remember_udp, translate_only, with_two_resolvers},
    policies::put,
    services::{
        NODE, cluster, create, endpoints, is_denied, policy, rule, serve, service, translate,
    },
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

#[test]
fn a_connection_by_a_name_outside_the_cluster_domain_goes_on() {
    let cluster = cluster();
    let _outside = serve(cluster.lab.outside(), 8443);
    let shop = cluster.namespace("shop", &Value::Null);
    let web = cluster.run(&shop, "web", &Value::Null);
    let web_ip = IpAddr::V4(web.net().ipv4());
    let partner = (service(&cluster.server, &shop, "partner"), 80);
    endpoints(&cluster.server, &shop, "partner", &[outside(9)], 8443);
    let unnamed = (service(&cluster.server, &shop, "web"), 80);
    endpoints(&cluster.server, &shop, "web", &[web_ip], 8080);
    for at in [partner, unnamed] {
        translate(&cluster, at, (outside(9), 8443));
    }
    cluster
        .lab
        .dns()
        .addresses("partner.corp.test", &[partner.0]);
    let cart = cluster.run(&shop, "cart", &allow("partner.corp.test:80"));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    assert_eq!(cart.net().lookup("partner.corp.test"), [partner.0]);
    let mut named = cart.net().talks_tcp(partner);
    let mut unnamed = cart.net().talks_tcp(unnamed);
    translate_only(&cluster, partner, (web_ip, 8080));
    ends(&mut unnamed, "that no entry allows");
    assert!(
        exchange(&mut named, b"still", LONG),
        "the one by name has ended"
    );
}

#[test]
fn connections_to_a_denied_endpoint_end_at_every_address_of_the_node() {
    let cluster = cluster();
    let external = outside(79);
    let node =
        json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": cluster.node() } });
    let addresses = json!([
        { "type": "InternalIP", "address": NODE },
        { "type": "ExternalIP", "address": external },
    ]);
    cluster
        .server
        .set_status(&node, &json!({ "addresses": addresses }));
    let [shop, bank] = ["shop", "bank"].map(|name| cluster.namespace(name, &Value::Null));
    let cart = cluster.run(&shop, "cart", &Value::Null);
    let [web, denied] = [&shop, &bank].map(|namespace| cluster.run(namespace, "web", &Value::Null));
    let _echoes = [&web, &denied].map(|pod| serve(pod.net().netns(), 8080));
    let [web_ip, denied_ip] = [&web, &denied].map(|pod| IpAddr::V4(pod.net().ipv4()));
    let port = json!({ "name": "tcp", "port": 80, "protocol": "TCP" });
    let spec = json!({ "type": "NodePort", "ports": [port] });
    let (_, _, node_ports) = create(&cluster.server, &shop, "web", &spec);
    endpoints(&cluster.server, &shop, "web", &[web_ip], 8080);
    put(
        &cluster.server,
        &policy(&cluster, &shop, &json!([rule("Deny", &bank)])),
    );
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    is_denied(&cluster, &agent, cart.net(), (denied_ip, 8080));
    let at = [NODE, external].map(|ip| (ip, node_ports[0]));
    for at in at {
        translate(&cluster, at, (denied_ip, 8080));
    }
    let mut connections = at.map(|at| (at, cart.net().talks_tcp(at)));
    translate_only(&cluster, at[0], (web_ip, 8080));
    for (at, connection) in &mut connections {
        ends(connection, &format!("to {at:?}"));
    }
}

#[test]
fn a_pod_that_begins_to_be_enforced_gets_answers_of_the_resolver_only() {
    let resolver = outside(85);
    let at = SocketAddr::from((resolver, 53));
    let (cluster, _dns, _evil) = with_two_resolvers(resolver);
    let shop = cluster.namespace("shop", &Value::Null);
    let mut lists = allow("*.shop.test:443");
    lists["egress-agent.dev/mode"] = "audit".into();
    let mut audited = cluster.run(&shop, "audited", &lists);
    lists["egress-agent.dev/mode"] = "enforce".into();
    let early = cluster.run(&shop, "early", &lists);
    remember_udp(&cluster);
    service(&cluster.server, &shop, "web");
    // A Service has the resolver's address, and is gone before the agent reads it.
    translate(&cluster, (resolver, 53), (outside(9), 53));
    let sockets = [&early, &audited].map(|pod| pod.net().udp_socket(at));
    for socket in &sockets {
        let answer = ask(socket, 1, "a.shop.test", LONG);
        assert_eq!(answer, Some(vec![outside(11)]));
    }
    // Without any rule, the kernel would not translate connections that it knows either.
    translate_only(&cluster, (outside(76), 53), (outside(9), 53));
    let agent = cluster.start_agent();
    let [early_socket, audited_socket] = &sockets;
    let trusted = |socket, what: &str| {
        let began = Instant::now();
        while ask(socket, 2, "b.shop.test", SHORT) != Some(vec![outside(10)]) {
            assert!(began.elapsed() < LONG, "{what}: another server answers");
            thread::sleep(SHORT / 4);
        }
    };
    agent.wait_enforcing(early.net());
    trusted(early_socket, "a pod that ran before the agent");

    let answer = ask(audited_socket, 1, "a.shop.test", LONG);
    assert_eq!(answer, Some(vec![outside(11)]), "the audited one is left");
    cluster.annotate(&mut audited, &lists);
    trusted(audited_socket, "a pod that was audited");
}

#[test]
fn a_denial_ends_connections_through_an_address_that_a_service_has_lost_long_ago() {
    let cluster = cluster();
    let [lost, marked] = [86, 84].map(outside);
    let [shop, bank] = ["shop", "bank"].map(|name| cluster.namespace(name, &Value::Null));
    let cart = cluster.run(&shop, "cart", &Value::Null);
    let web = cluster.run(&bank, "web", &Value::Null);
    let _echo = serve(web.net().netns(), 8080);
    let web_ip = IpAddr::V4(web.net().ipv4());
    let create_at = |name: &str, external: &[IpAddr]| {
        let ports = json!([{ "name": "tcp", "port": 80, "protocol": "TCP" }]);
        let spec = json!({ "ports": ports, "externalIPs": external });
        create(&cluster.server, &bank, name, &spec);
    };
    create_at("web", &[lost]);
    endpoints(&cluster.server, &bank, "web", &[web_ip], 8080);
    create_at("marked", &[marked]);
    endpoints(&cluster.server, &bank, "marked", &[outside(8)], 8080);
    let deny = json!({
        "name": "other", "action": "Deny", "to": [{ "networks": [format!("{}/32", outside(8))] }],
    });
    put(&cluster.server, &policy(&cluster, &shop, &json!([deny])));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    eventually("the policy denies the other address", || {
        holds(decides(&cluster, cart.net(), (marked, 80)).0)
    });
    translate(&cluster, (lost, 80), (web_ip, 8080));
    let mut connection = cart.net().talks_tcp((lost, 80));
    // Without any rule, the kernel would not translate connections that it knows either.
    translate_only(&cluster, (outside(76), 53), (outside(9), 53));
    create_at("web", &[]);
    create_at("marked", &[]);
    let began = Instant::now();
    while decides(&cluster, cart.net(), (marked, 80)).0 {
        assert!(began.elapsed() < LONG, "what Services have lost counts on");
        thread::sleep(SHORT);
    }
    assert!(
        exchange(&mut connection, b"still", LONG),
        "nothing denies it"
    );

    put(
        &cluster.server,
        &policy(&cluster, &shop, &json!([rule("Deny", &bank)])),
    );
    ends(&mut connection, "through an address of before");
}
