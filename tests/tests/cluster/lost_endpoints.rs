//! Services that lose a denied endpoint, or all: the node translates connections that it knows as before.

use std::{
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use egress_tests::{
    Cluster, DnsServer, Lab, Pod, SHORT,
    addresses::{PODS, PODS6, RESOLVER, RESOLVER6, server as outside},
    cluster::allow,
    dns::{Answer, RecordType, question},
    echo_on, exchange,
    rewritten::nft,
};
use serde_json::{Value, json};

use crate::{
    conformance,
    policies::put,
    services::{
        cluster, create, endpoints, is_denied, policy, reaches, rule, serve, service, translate,
    },
};

/// The minute for which a lost endpoint counts, and time for a crowded machine.
pub(super) const LONG: Duration = Duration::from_secs(150);
/// A lost endpoint counts for longer than this.
const MEANWHILE: Duration = Duration::from_secs(40);

/// Makes the node translate connections that it does not know to this address only.
pub(super) fn translate_only(cluster: &Cluster, from: (IpAddr, u16), to: (IpAddr, u16)) {
    nft(cluster.lab.node(), "flush table ip services");
    translate(cluster, from, to);
}

/// Makes the node know conversations over UDP for longer than the test takes. A colluding endpoint does it by sending.
pub(super) fn remember_udp(cluster: &Cluster) {
    cluster.lab.node().run(|| {
        for setting in [
            "nf_conntrack_udp_timeout",
            "nf_conntrack_udp_timeout_stream",
        ] {
            let path = format!("/proc/sys/net/netfilter/{setting}");
            fs::write(&path, "600").unwrap_or_else(|error| panic!("{path}: {error}"));
        }
    });
}

/// Asks a question on a connected socket, and returns the addresses of the response.
pub(super) fn ask(
    socket: &UdpSocket,
    id: u16,
    name: &str,
    timeout: Duration,
) -> Option<Vec<IpAddr>> {
    let query = question(id, name, RecordType::A);
    socket.set_read_timeout(Some(timeout)).expect("a time-out");
    socket.send(&query).expect("send a query");
    let mut buffer = [0; 512];
    let length = socket.recv(&mut buffer).ok()?;
    Some(Answer::read(&buffer[..length]).addresses)
}

/// Whether the pod's policy denies packets to an address and port, and the whole answer.
pub(super) fn decides(cluster: &Cluster, pod: &Pod, to: (IpAddr, u16)) -> (bool, String) {
    let (_, explained) = cluster.lab.explain(pod, &SocketAddr::from(to).to_string());
    (explained["decision"] == "denied", explained.to_string())
}

#[test]
fn a_connection_to_a_denied_endpoint_ends_also_if_the_service_loses_the_endpoint() {
    let cluster = cluster();
    let (_denied_tcp, denied_udp) = serve(cluster.lab.outside(), 8080);
    let shop = cluster.namespace("shop", &Value::Null);
    let web = cluster.run(&shop, "web", &Value::Null);
    let _echo = serve(web.net().netns(), 8080);
    let web_ip = IpAddr::V4(web.net().ipv4());
    let to = (service(&cluster.server, &shop, "web"), 80);
    endpoints(&cluster.server, &shop, "web", &[web_ip], 8080);
    // The node knows an endpoint that the agent has not read yet.
    translate(&cluster, to, (outside(9), 8080));
    remember_udp(&cluster);
    let cart = cluster.run(&shop, "cart", &allow(""));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    let mut connection = cart.net().talks_tcp(to);
    // It sends nothing meanwhile.
    let mut silent = cart.net().talks_tcp(to);
    let socket = cart.net().udp_socket(to);
    assert!(echo_on(&socket, b"hello", LONG));

    let both = [web_ip, outside(9)];
    agent.applies_policy_after(cart.net(), || {
        endpoints(&cluster.server, &shop, "web", &both, 8080);
    });
    is_denied(&cluster, &agent, cart.net(), to);
    assert!(!exchange(&mut connection, b"cut", SHORT));
    assert!(!echo_on(&socket, b"cut", SHORT));

    translate_only(&cluster, to, (web_ip, 8080));
    endpoints(&cluster.server, &shop, "web", &[web_ip], 8080);
    let lost = Instant::now();
    while lost.elapsed() < MEANWHILE {
        let (is_denied, why) = decides(&cluster, cart.net(), to);
        assert!(is_denied, "after {:?}: {why}", lost.elapsed());
        thread::sleep(SHORT);
    }
    while decides(&cluster, cart.net(), to).0 {
        assert!(lost.elapsed() < LONG, "the Service stays closed");
        thread::sleep(SHORT);
    }
    // Everything goes to the endpoint that is left, which knows no connection of before.
    reaches(cart.net(), to);
    assert!(!exchange(&mut silent, b"back?", SHORT * 4));
    drop(denied_udp);
    assert!(echo_on(&socket, b"elsewhere", LONG));
    agent.wait_log("of connections that ended", |line| {
        line.contains("ended connections that the node led to endpoints")
    });
}

#[test]
fn connections_end_that_lead_to_a_denied_endpoint_of_which_the_agent_never_heard() {
    let cluster = cluster();
    let [shop, bank] = ["shop", "bank"].map(|name| cluster.namespace(name, &Value::Null));
    let cart = cluster.run(&shop, "cart", &Value::Null);
    let [web, denied] = [&shop, &bank].map(|namespace| cluster.run(namespace, "web", &Value::Null));
    let _echoes = [&web, &denied].map(|pod| serve(pod.net().netns(), 8080));
    let [web_ip, denied_ip] = [&web, &denied].map(|pod| IpAddr::V4(pod.net().ipv4()));
    let to = (service(&cluster.server, &shop, "web"), 80);
    endpoints(&cluster.server, &shop, "web", &[web_ip], 8080);
    put(
        &cluster.server,
        &policy(&cluster, &shop, &json!([rule("Deny", &bank)])),
    );
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    is_denied(&cluster, &agent, cart.net(), (denied_ip, 8080));
    translate(&cluster, to, (denied_ip, 8080));
    let mut astray = cart.net().talks_tcp(to);
    translate_only(&cluster, to, (web_ip, 8080));
    let mut other = cart.net().talks_tcp(to);

    let began = Instant::now();
    while exchange(&mut astray, b"still", SHORT * 4) {
        assert!(began.elapsed() < LONG, "the connection goes on");
        thread::sleep(SHORT);
    }
    agent.wait_log("of connections that ended", |line| {
        line.contains("ended connections that the node led to endpoints")
    });
    assert!(
        exchange(&mut other, b"still", LONG),
        "an allowed one has ended"
    );
}

#[test]
fn a_resolver_is_trusted_again_only_when_the_node_translates_nothing_there() {
    // No other test's: all see the Services of all.
    let claimed = outside(87);
    let at = SocketAddr::from((claimed, 53));
    let (cluster, _dns, evil) = with_two_resolvers(claimed);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("*.shop.test:443"));
    remember_udp(&cluster);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    let socket = cart.net().udp_socket(at);
    let ask = |id, name, timeout| ask(&socket, id, name, timeout);
    // The node knows the Service before the agent does.
    translate(&cluster, (claimed, 53), (outside(9), 53));
    assert_eq!(ask(1, "a.shop.test", LONG), Some(vec![outside(11)]));
    // Without any rule, the kernel would not translate connections that it knows either.
    translate_only(&cluster, (outside(76), 53), (outside(9), 53));

    let ports = json!([{ "name": "udp", "port": 53, "protocol": "UDP" }]);
    let spec = json!({ "ports": ports, "externalIPs": [claimed] });
    let (dns_service, _, _) = create(&cluster.server, &shop, "dns", &spec);
    endpoints(&cluster.server, &shop, "dns", &[outside(9)], 53);
    let began = Instant::now();
    while ask(2, "b.shop.test", SHORT).is_some() {
        assert!(began.elapsed() < LONG, "the resolver stays trusted");
    }
    cluster.server.delete(&dns_service);
    let ended = Instant::now();
    let answer = loop {
        let answer = ask(3, "c.shop.test", SHORT);
        if answer.is_some() {
            break answer;
        }
        assert!(ended.elapsed() < LONG, "the resolver is not trusted again");
    };
    assert!(ended.elapsed() > MEANWHILE, "after {:?}", ended.elapsed());
    assert_eq!(answer, Some(vec![outside(10)]));
    assert_eq!(evil.queries_for("c.shop.test"), 0);
}

/// A cluster with one more resolver, and a server that is none and gives other addresses.
pub(super) fn with_two_resolvers(second: IpAddr) -> (Cluster, DnsServer, DnsServer) {
    let internal = json!([PODS, PODS6, format!("{second}/32")]);
    let lab = Lab::builder()
        .config("ranges", json!({ "internal": internal }))
        .config("dns.resolvers", json!([RESOLVER, RESOLVER6, second]));
    let cluster = Cluster::on(conformance::server(), lab);
    let dns = cluster.lab.serve_dns_at(&[(second, 53).into()]);
    let evil = cluster.lab.serve_dns_at(&[(outside(9), 53).into()]);
    for name in ["a.shop.test", "b.shop.test", "c.shop.test"] {
        dns.addresses(name, &[outside(10)]);
        evil.addresses(name, &[outside(11)]);
    }
    (cluster, dns, evil)
}

#[test]
fn a_resolver_that_a_service_has_claimed_for_a_moment_is_not_trusted() {
    let claimed = outside(88);
    let at = SocketAddr::from((claimed, 53));
    let (cluster, _dns, evil) = with_two_resolvers(claimed);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("*.shop.test:443"));
    remember_udp(&cluster);
    service(&cluster.server, &shop, "noise");
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    let socket = cart.net().udp_socket(at);
    let ask = |id, name, timeout| ask(&socket, id, name, timeout);
    translate(&cluster, (claimed, 53), (outside(9), 53));
    assert_eq!(ask(1, "a.shop.test", LONG), Some(vec![outside(11)]));
    translate_only(&cluster, (outside(76), 53), (outside(9), 53));

    // The agent reads the first change at once, and the next ones together.
    endpoints(&cluster.server, &shop, "noise", &[outside(8)], 8080);
    thread::sleep(SHORT / 4);
    let ports = json!([{ "name": "udp", "port": 53, "protocol": "UDP" }]);
    let spec = json!({ "ports": ports, "externalIPs": [claimed] });
    let (dns_service, _, _) = create(&cluster.server, &shop, "dns", &spec);
    endpoints(&cluster.server, &shop, "dns", &[outside(9)], 53);
    cluster.server.delete(&dns_service);
    thread::sleep(SHORT * 8);
    for id in 2..12 {
        assert_eq!(ask(id, "b.shop.test", SHORT), None);
    }
    assert_eq!(evil.queries_for("b.shop.test"), 0);
}
