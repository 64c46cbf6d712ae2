//! Resolvers on other ports than 53, as behind a socket-level load balancer.

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr, TcpStream},
    sync::Arc,
};

use egress_tests::{
    ApiServer, Cluster, DEADLINE, DnsServer, Lab, Pod, SHORT,
    addresses::{RESOLVER, numbered, server, server6},
    cluster::allow,
    dns::{Answer, RecordType, ResponseCode, Send, address, framed_query, read_message},
};
use serde_json::{Value, json};

const PORT: u16 = 5353;

/// The addresses of a server on [`PORT`].
fn other() -> [SocketAddr; 2] {
    ["10.99.0.54:5353", "[fd99::54]:5353"].map(|text| text.parse().expect("an address and a port"))
}

/// A laboratory with a second resolver, on [`PORT`].
fn lab() -> (Lab, DnsServer) {
    let [v4, v6] = other().map(|at| at.to_string());
    let lab = Lab::builder()
        .config("dns.resolvers", vec![RESOLVER.to_string(), v4, v6])
        .build();
    let dns = lab.serve_dns_at(&other());
    (lab, dns)
}

#[track_caller]
fn query(pod: &Pod, server: SocketAddr, name: &str, qtype: RecordType) -> Answer {
    pod.try_resolve_at(server, name, qtype, DEADLINE)
        .unwrap_or_else(|| panic!("no response from {server} for {name}"))
}

/// Sends a query on a connection; `None` when the connection ends without a response.
fn query_on(mut stream: &TcpStream, name: &str) -> Option<Answer> {
    stream.write_all(&framed_query(9, name)).ok()?;
    let message = read_message(&mut stream).ok()?;
    Some(Answer::read(&message))
}

#[test]
fn a_resolver_on_another_port_is_treated_like_one_on_port_53() {
    let (lab, dns) = lab();
    let _web = lab.serve_tcp(443);
    dns.addresses("shop.test", &[server(10), server6(10)]);
    dns.addresses("evil.test", &[server(66)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    let [v4, v6] = other();
    for (at, qtype, answers) in [
        (v4, RecordType::A, server(10)),
        (v6, RecordType::AAAA, server6(10)),
    ] {
        assert_eq!(query(&pod, at, "shop.test", qtype).addresses, [answers]);
        pod.talks_tcp((answers, 443));
        let refused = query(&pod, at, "evil.test", qtype);
        assert_eq!(refused.code, ResponseCode::NXDomain);
        agent.wait_denial("the query", |d| {
            d.is_question(&pod, "evil.test") && d.reason == "dns_name" && d.dst_ip == Some(at.ip())
        });
    }
    assert_eq!(dns.queries_for("evil.test"), 0);
    assert_eq!(pod.syn_retransmissions(), 0);
    // A datagram from the resolver to a port that has sent no query is malformed DNS.
    let socket = pod.udp_socket(v4);
    let own = socket.local_addr().expect("a bound socket");
    dns.send(v4.ip(), own, b"hello");
    agent.wait_denial("the datagram", |d| {
        d.of(&pod) && d.reason == "dns_malformed"
    });
}

#[test]
fn a_resolver_on_another_port_can_be_queried_over_tcp() {
    let (lab, dns) = lab();
    let _web = lab.serve_tcp(443);
    dns.addresses("shop.test", &[server(10)]);
    dns.addresses("evil.test", &[server(66)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    let stream = pod
        .connect_tcp(other()[0], DEADLINE)
        .expect("the resolver accepts");
    let answer = query_on(&stream, "shop.test").expect("a response");
    assert_eq!(answer.addresses, [server(10)]);
    pod.talks_tcp((server(10), 443));
    let refused = query_on(&stream, "evil.test").expect("a refusal");
    assert_eq!(refused.code, ResponseCode::NXDomain);
    assert_eq!(dns.queries_for("evil.test"), 0);
}

#[test]
fn addresses_in_fragmented_responses_from_another_port_are_learned() {
    let (lab, dns) = lab();
    let _web = lab.serve_tcp(443);
    let many: Vec<IpAddr> = (0..190).map(numbered).collect();
    let records: Vec<_> = many.iter().copied().map(address).collect();
    dns.on("shop.test", move |asked| {
        vec![Send::answer(asked, &records)]
    });
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    for at in other() {
        let answer = query(&pod, at, "shop.test", RecordType::A);
        assert!(answer.bytes > 3000, "{} bytes", answer.bytes);
        assert_eq!(answer.addresses, many);
    }
    pod.talks_tcp((many[189], 443));
    assert!(agent.denials().is_empty(), "{:?}", agent.denials());
}

#[test]
fn a_resolver_counts_as_one_only_on_its_own_port() {
    let (lab, _dns) = lab();
    let _echo = lab.serve_udp(5454);
    let pod = lab.pod("shop", "cart");
    let entries = format!("shop.test:443 {RESOLVER}:5454");
    lab.write_pod(&pod, &[("allow", &entries)]);
    let agent = lab.start_agent(&[&pod]);
    agent.denies_udp(&pod, (other()[0].ip(), 53), "no_rule");
    agent.denies_udp(&pod, (RESOLVER, PORT), "port_not_allowed");
    pod.talks_udp((RESOLVER, 5454));
}

#[test]
fn queries_to_a_port_that_is_configured_later_are_held_at_once() {
    let lab = Lab::new();
    let at = other()[0];
    let dns = lab.serve_dns_at(&[at]);
    dns.addresses("evil.test", &[server(66)]);
    let pod = lab.pod("shop", "cart");
    let entries = format!("shop.test:443 {at}");
    lab.write_pod(&pod, &[("allow", &entries)]);
    let agent = lab.start_agent(&[&pod]);
    let stream = pod.connect_tcp(at, DEADLINE).expect("an ordinary server");
    assert!(query_on(&stream, "evil.test").is_some());
    assert_eq!(
        query(&pod, at, "evil.test", RecordType::A).addresses,
        [server(66)]
    );

    lab.edit_config("dns.resolvers", vec![RESOLVER.to_string(), at.to_string()]);
    agent.applies_policy_after(&pod, || agent.reload());
    let refused = query(&pod, at, "evil.test", RecordType::A);
    assert_eq!(refused.code, ResponseCode::NXDomain);
    assert!(
        query_on(&stream, "evil.test").is_none(),
        "the open connection goes on"
    );
    assert_eq!(dns.queries_for("evil.test"), 2);
}

/// Makes the cluster's DNS pod have the laboratory's resolver's address, and listen on a port as in
/// `OpenShift`.
fn announce_dns_service(cluster: &Cluster) {
    cluster.server.apply(&json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "namespace": "kube-system", "name": "kube-dns" },
        "spec": {
            "clusterIP": "None",
            "ports": [
                { "name": "dns", "port": 53, "protocol": "UDP", "targetPort": PORT },
                { "name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": PORT },
                { "name": "metrics", "port": 9154, "protocol": "TCP" },
            ],
        },
    }));
    cluster.server.apply(&json!({
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": { "namespace": "kube-system", "name": "kube-dns" },
        "subsets": [{
            "addresses": [{ "ip": other()[0].ip() }],
            "ports": [
                { "name": "dns", "port": PORT, "protocol": "UDP" },
                { "name": "dns-tcp", "port": PORT, "protocol": "TCP" },
                { "name": "metrics", "port": 9154, "protocol": "TCP" },
            ],
        }],
    }));
}

#[test]
fn the_ports_of_the_clusters_dns_pods_are_read_from_their_endpoints() {
    let builder = Lab::builder()
        .config("dns", json!({}))
        .config("ranges.internal", vec!["10.99.0.0/24"]);
    let cluster = Cluster::on(Arc::new(ApiServer::start()), builder);
    let at = other()[0];
    let dns = cluster.lab.serve_dns_at(&[at]);
    let _web = cluster.lab.serve_tcp(443);
    let _metrics = cluster.lab.serve_tcp(9154);
    dns.addresses("shop.test", &[server(10)]);
    dns.addresses("evil.test", &[server(66)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let listed = allow("shop.test:443");
    let cart = cluster.run(&shop, "cart", &listed);
    announce_dns_service(&cluster);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    cluster.wait_resolver(at.ip());

    let answer = query(cart.net(), at, "shop.test", RecordType::A);
    assert_eq!(answer.addresses, [server(10)]);
    cart.net().talks_tcp((server(10), 443));
    let refused = query(cart.net(), at, "evil.test", RecordType::A);
    assert_eq!(refused.code, ResponseCode::NXDomain);
    assert_eq!(dns.queries_for("evil.test"), 0);
    // The DNS pod's other ports are ordinary internal ports.
    cart.net().talks_tcp((at.ip(), 9154));
    let unanswered = cart
        .net()
        .try_resolve(at.ip(), "shop.test", RecordType::A, SHORT);
    assert!(unanswered.is_none(), "it listens on another port");
}
