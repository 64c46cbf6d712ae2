//! Services: a node translates their addresses behind a pod's interface, and a packet to one counts as one to each
//! endpoint. A rule of nftables on the node stands for kube-proxy.

use std::{
    io::Read as _,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use egress_tests::{
    Agent, ApiServer, Cluster, ClusterPod, Lab, Pod, SHORT, TcpEcho, UdpEcho,
    addresses::{PODS, PODS6, RESOLVER, RESOLVER6, server as outside, server6 as outside6},
    cluster::{allow, rights},
    dns::{DnsStream, RecordType},
    eventually, exchange, holds,
    rewritten::nft,
};
use serde_json::{Value, json};

use crate::{conformance, policies::put};

/// The cluster IPs of the tests' API server.
const SERVICES: &str = "10.96.0.0/16";
const SERVICES6: &str = "fd96::/112";
/// The node's address.
pub(super) const NODE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 98, 0, 1));
/// The reason of every denial here.
const DENIED: &str = "deny_rule";

pub(super) fn lab() -> egress_tests::Builder {
    let internal = json!([PODS, PODS6, SERVICES, SERVICES6, format!("{NODE}/32")]);
    Lab::builder().config("ranges", json!({ "internal": internal }))
}

pub(super) fn cluster() -> Cluster {
    Cluster::on(conformance::server(), lab())
}

/// Port 80 of a Service, over TCP and UDP.
fn ports(target: &Value) -> Value {
    json!([
        { "name": "tcp", "port": 80, "protocol": "TCP", "targetPort": target },
        { "name": "udp", "port": 80, "protocol": "UDP", "targetPort": target },
    ])
}

/// Creates a Service, and returns it, its cluster IP and its node ports.
pub(super) fn create(
    server: &ApiServer,
    namespace: &str,
    name: &str,
    spec: &Value,
) -> (Value, Option<IpAddr>, Vec<u16>) {
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "namespace": namespace, "name": name },
        "spec": spec,
    });
    let created = server.apply(&service).data;
    let ip = created["spec"]["clusterIP"].as_str();
    let ip = ip.and_then(|ip| ip.parse().ok());
    let node_ports = created["spec"]["ports"].as_array().into_iter().flatten();
    let node_ports = node_ports.filter_map(|port| port["nodePort"].as_u64());
    let node_ports = node_ports.filter_map(|port| u16::try_from(port).ok());
    (service, ip, node_ports.collect())
}

/// Creates a Service without a selector, and returns its cluster IP.
pub(super) fn service(server: &ApiServer, namespace: &str, name: &str) -> IpAddr {
    let spec = json!({ "ports": ports(&json!(80)) });
    let (_, ip, _) = create(server, namespace, name, &spec);
    ip.expect("a cluster IP")
}

/// Writes the endpoints of a Service by hand. All have this port.
pub(super) fn endpoints(
    server: &ApiServer,
    namespace: &str,
    name: &str,
    addresses: &[IpAddr],
    port: u16,
) {
    let addresses = addresses.iter().map(|address| json!({ "ip": address }));
    server.apply(&json!({
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": { "namespace": namespace, "name": name },
        "subsets": [{
            "addresses": addresses.collect::<Value>(),
            "ports": [
                { "name": "tcp", "port": port, "protocol": "TCP" },
                { "name": "udp", "port": port, "protocol": "UDP" },
            ],
        }],
    }));
}

/// Makes the node translate an address and port, over TCP and UDP, as kube-proxy does.
pub(super) fn translate(cluster: &Cluster, from: (IpAddr, u16), to: (IpAddr, u16)) {
    let family = if from.0.is_ipv4() { "ip" } else { "ip6" };
    let to = SocketAddr::from(to);
    let (address, port) = from;
    let rules: Vec<String> = ["tcp", "udp"]
        .iter()
        .map(|protocol| {
            format!(
                "add rule {family} services prerouting {family} daddr {address} {protocol} dport {port} dnat to {to}\n"
            )
        })
        .collect();
    nft(
        cluster.lab.node(),
        &format!(
            "add table {family} services\n\
             add chain {family} services prerouting {{ type nat hook prerouting priority dstnat; }}\n{}",
            rules.concat()
        ),
    );
}

pub(super) fn serve(netns: &egress_tests::Namespace, port: u16) -> (TcpEcho, UdpEcho) {
    (TcpEcho::start(netns, port), UdpEcho::start(netns, port))
}

#[track_caller]
pub(super) fn reaches(pod: &Pod, to: (IpAddr, u16)) {
    drop(pod.talks_tcp(to));
    pod.talks_udp(to);
}

/// Asserts that the pod does not reach this address and port, once its policy denies them: a new version of the policy may
/// also come of objects of other tests, which the log lines do not tell apart.
#[track_caller]
pub(super) fn is_denied(cluster: &Cluster, agent: &Agent, pod: &Pod, to: (IpAddr, u16)) {
    eventually(&format!("the policy denies {to:?}"), || {
        let target = SocketAddr::from(to).to_string();
        let (_, explained) = cluster.lab.explain(pod, &target);
        holds(explained["decision"] == "denied")
    });
    drop(agent.denies_tcp(pod, to, DENIED));
    drop(agent.denies_udp(pod, to, DENIED));
}

/// A rule for every pod of these namespaces.
pub(super) fn rule(action: &str, namespace: &str) -> Value {
    let labels = json!({ "kubernetes.io/metadata.name": namespace });
    json!({ "name": action, "action": action, "to": [{ "namespaces": { "matchLabels": labels } }] })
}

/// A policy of the platform for the pods of a namespace.
pub(super) fn policy(cluster: &Cluster, namespace: &str, egress: &Value) -> Value {
    let labels = json!({ "kubernetes.io/metadata.name": namespace });
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": { "name": format!("{}-services", cluster.node()) },
        "spec": {
            "tier": "Admin", "priority": 1,
            "subject": { "namespaces": { "matchLabels": labels } },
            "egress": egress,
        },
    })
}

/// The answer of `explain` about a target, in one text.
fn explained(cluster: &Cluster, pod: &ClusterPod, to: (IpAddr, u16)) -> String {
    let target = SocketAddr::from(to).to_string();
    let (_, explained) = cluster.lab.explain(pod.net(), &target);
    explained["because"].as_str().expect("a text").to_owned()
}

#[test]
fn a_closed_pod_reaches_no_outside_host_through_a_service_with_endpoints_of_its_own() {
    let cluster = cluster();
    let _echo = serve(cluster.lab.outside(), 8443);
    let shop = cluster.namespace("shop", &Value::Null);
    let ip = service(&cluster.server, &shop, "partner");
    endpoints(&cluster.server, &shop, "partner", &[outside(9)], 8443);
    translate(&cluster, (ip, 80), (outside(9), 8443));
    let cart = cluster.run(&shop, "cart", &allow(""));
    let blog = cluster.namespace("blog", &Value::Null);
    let open = cluster.run(&blog, "open", &Value::Null);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    reaches(open.net(), (ip, 80));
    is_denied(&cluster, &agent, cart.net(), (ip, 80));
    let why = explained(&cluster, &cart, (ip, 80));
    assert!(
        why.contains("203.0.113.9:8443/tcp") && why.contains(&format!("Service {shop}/partner")),
        "{why}"
    );

    // An entry for the endpoint opens the Service, and so does one for the Service's address.
    for entry in [format!("{}:8443", outside(9)), format!("{ip}:80")] {
        agent.applies_policy_after(cart.net(), || {
            cluster.server.namespace(&shop, &allow(&entry));
        });
        reaches(cart.net(), (ip, 80));
    }
    // A wider one was not written for this Service.
    agent.applies_policy_after(cart.net(), || {
        let wide = allow(&format!("{SERVICES} *:80"));
        cluster.server.namespace(&shop, &wide);
    });
    is_denied(&cluster, &agent, cart.net(), (ip, 80));
}

#[test]
fn a_service_with_an_address_of_ipv6_counts_as_its_endpoints() {
    let cluster = cluster();
    let _echo = serve(cluster.lab.outside(), 8443);
    let [shop, bank] = ["shop", "bank"].map(|name| cluster.namespace(name, &Value::Null));
    let service = |namespace: &str, name: &str| {
        let spec = json!({ "ipFamilies": ["IPv6"], "ports": ports(&json!(80)) });
        let (_, ip, _) = create(&cluster.server, namespace, name, &spec);
        let ip = ip.expect("a cluster IP");
        assert!(ip.is_ipv6(), "{ip}");
        (ip, 80)
    };
    let to_partner = service(&shop, "partner");
    endpoints(&cluster.server, &shop, "partner", &[outside6(9)], 8443);
    translate(&cluster, to_partner, (outside6(9), 8443));
    let web = cluster.run(&bank, "web", &Value::Null);
    let _web_echo = serve(web.net().netns(), 8080);
    let web_ip = IpAddr::V6(web.net().ipv6());
    let to_web = service(&bank, "web");
    endpoints(&cluster.server, &bank, "web", &[web_ip], 8080);
    translate(&cluster, to_web, (web_ip, 8080));

    // A closed pod reaches pods behind a Service, and no host outside.
    let cart = cluster.run(&shop, "cart", &allow(""));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    reaches(cart.net(), to_web);
    is_denied(&cluster, &agent, cart.net(), to_partner);
    let why = explained(&cluster, &cart, to_partner);
    let endpoint = format!("[{}]:8443/tcp", outside6(9));
    assert!(
        why.contains(&endpoint) && why.contains(&format!("Service {shop}/partner")),
        "{why}"
    );
    let (ip, _) = to_partner;
    for entry in [format!("[{}]:8443", outside6(9)), format!("[{ip}]:80")] {
        agent.applies_policy_after(cart.net(), || {
            cluster.server.namespace(&shop, &allow(&entry));
        });
        reaches(cart.net(), to_partner);
    }

    // A rule about pods counts at the address of the Service in front of them.
    agent.applies_policy_after(cart.net(), || {
        let egress = json!([rule("Deny", &bank)]);
        put(&cluster.server, &policy(&cluster, &shop, &egress));
    });
    is_denied(&cluster, &agent, cart.net(), to_web);
    reaches(cart.net(), to_partner);
}

#[test]
fn an_outside_endpoint_that_is_added_later_cuts_the_service_off() {
    let cluster = cluster();
    let shop = cluster.namespace("shop", &Value::Null);
    let web = cluster.run(&shop, "web", &Value::Null);
    let _echo = serve(web.net().netns(), 8080);
    let web_ip = IpAddr::V4(web.net().ipv4());
    let ip = service(&cluster.server, &shop, "web");
    endpoints(&cluster.server, &shop, "web", &[web_ip], 8080);
    translate(&cluster, (ip, 80), (web_ip, 8080));
    let cart = cluster.run(&shop, "cart", &allow(""));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    let mut open = cart.net().talks_tcp((ip, 80));
    cart.net().talks_udp((ip, 80));

    let both = [web_ip, outside(9)];
    agent.applies_policy_after(cart.net(), || {
        endpoints(&cluster.server, &shop, "web", &both, 8080);
    });
    is_denied(&cluster, &agent, cart.net(), (ip, 80));
    let mark = agent.mark();
    assert!(!exchange(&mut open, b"still?", egress_tests::SHORT));
    agent.wait_denial_from(mark, "the open connection", |denial| {
        denial.is(cart.net(), DENIED, ip, 80)
    });
}

#[test]
fn a_rule_about_namespaces_applies_to_the_services_in_front_of_their_pods() {
    let cluster = cluster();
    let [shop, bank, blog] =
        ["shop", "bank", "blog"].map(|name| cluster.namespace(name, &Value::Null));
    let cart = cluster.run(&shop, "cart", &Value::Null);
    let mut servers = Vec::new();
    let mut services = Vec::new();
    for namespace in [&bank, &blog] {
        let labels = json!({ "app": "web" });
        let pod = cluster.run_with(namespace, "web", &labels, &[("http", 8080, "TCP")]);
        servers.push(serve(pod.net().netns(), 8080));
        let spec = json!({ "selector": labels, "ports": ports(&json!("http")) });
        let (_, ip, _) = create(&cluster.server, namespace, "web", &spec);
        let ip = ip.expect("a cluster IP");
        // The controller of endpoints looks the named port up.
        let pod_ip = IpAddr::V4(pod.net().ipv4());
        endpoints(&cluster.server, namespace, "web", &[pod_ip], 8080);
        translate(&cluster, (ip, 80), (pod_ip, 8080));
        services.push((pod, (ip, 80)));
    }
    let [(bank_web, to_bank), (blog_web, to_blog)] = &services[..] else {
        panic!("two Services");
    };
    let egress = json!([rule("Deny", &bank)]);
    put(&cluster.server, &policy(&cluster, &shop, &egress));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    is_denied(
        &cluster,
        &agent,
        cart.net(),
        (bank_web.net().ipv4().into(), 8080),
    );
    is_denied(&cluster, &agent, cart.net(), *to_bank);
    reaches(cart.net(), *to_blog);
    let why = explained(&cluster, &cart, *to_bank);
    assert!(
        why.contains(&format!("Service {bank}/web")) && why.contains("ClusterNetworkPolicy"),
        "{why}"
    );

    // The Service allows what its pods allow, and nothing else.
    agent.applies_policy_after(cart.net(), || {
        let everything =
            json!({ "name": "rest", "action": "Deny", "to": [{ "networks": ["0.0.0.0/0"] }] });
        let egress = json!([rule("Accept", &blog), everything]);
        put(&cluster.server, &policy(&cluster, &shop, &egress));
    });
    reaches(cart.net(), (blog_web.net().ipv4().into(), 8080));
    reaches(cart.net(), *to_blog);
    is_denied(&cluster, &agent, cart.net(), *to_bank);
}

#[test]
fn a_rule_about_a_pod_applies_at_every_address_that_the_node_translates() {
    let cluster = cluster();
    let [shop, bank] = ["shop", "bank"].map(|name| cluster.namespace(name, &Value::Null));
    let node =
        json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": cluster.node() } });
    let addresses = json!([{ "type": "InternalIP", "address": NODE }]);
    cluster
        .server
        .set_status(&node, &json!({ "addresses": addresses }));
    let cart = cluster.run(&shop, "cart", &Value::Null);
    let web = cluster.run(&bank, "web", &Value::Null);
    let _echo = serve(web.net().netns(), 8080);
    let (v4, v6) = (IpAddr::V4(web.net().ipv4()), IpAddr::V6(web.net().ipv6()));
    let spec = json!({
        "type": "NodePort",
        "externalIPs": [outside(77), outside6(77)],
        "ports": [{ "name": "tcp", "port": 80, "protocol": "TCP" }, { "name": "udp", "port": 80, "protocol": "UDP" }],
    });
    let (object, ip, node_ports) = create(&cluster.server, &bank, "web", &spec);
    let balanced = json!({ "loadBalancer": { "ingress": [{ "ip": outside(78) }] } });
    cluster.server.set_status(&object, &balanced);
    endpoints(&cluster.server, &bank, "web", &[v4, v6], 8080);
    let [tcp_port, udp_port] = node_ports[..] else {
        panic!("two node ports");
    };
    let at_80 = [ip.expect("a cluster IP"), outside(77), outside(78)].map(|ip| (ip, 80));
    let v6_at_80 = (outside6(77), 80);
    let on_node = [(NODE, tcp_port), (NODE, udp_port)];
    for from in at_80.into_iter().chain(on_node) {
        translate(&cluster, from, (v4, 8080));
    }
    translate(&cluster, v6_at_80, (v6, 8080));
    let agent = cluster.start_agent();
    for to in at_80.into_iter().chain([v6_at_80]) {
        reaches(cart.net(), to);
    }
    drop(cart.net().talks_tcp((NODE, tcp_port)));

    let egress = json!([rule("Deny", &bank)]);
    put(&cluster.server, &policy(&cluster, &shop, &egress));
    agent.wait_enforcing(cart.net());
    for to in at_80.into_iter().chain([v6_at_80]) {
        is_denied(&cluster, &agent, cart.net(), to);
    }
    drop(agent.denies_tcp(cart.net(), (NODE, tcp_port), DENIED));
    drop(agent.denies_udp(cart.net(), (NODE, udp_port), DENIED));
    // The address itself is the real host's at other ports.
    let _other = serve(cluster.lab.outside(), 443);
    reaches(cart.net(), (outside(77), 443));
}

#[test]
fn a_headless_service_closes_nothing() {
    let cluster = cluster();
    let _echo = serve(cluster.lab.outside(), 443);
    let shop = cluster.namespace("shop", &Value::Null);
    let spec = json!({ "clusterIP": "None", "ports": ports(&json!(443)) });
    let (_, ip, _) = create(&cluster.server, &shop, "partner", &spec);
    assert_eq!(ip, None);
    endpoints(&cluster.server, &shop, "partner", &[outside(9)], 443);
    let cart = cluster.run(&shop, "cart", &allow(&format!("{}:443", outside(9))));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    reaches(cart.net(), (outside(9), 443));
    let elsewhere = cart
        .net()
        .connect_tcp((outside(10), 443), egress_tests::SHORT);
    assert!(elsewhere.is_err(), "the pod is open");
}

#[test]
fn without_the_right_to_list_services_their_addresses_are_internal_and_status_says_so() {
    let server = Arc::new(ApiServer::start());
    server.allow_agent(
        "agent",
        &rights(|resource| !["services", "endpoints", "endpointslices"].contains(&resource)),
    );
    let cluster = Cluster::without_rights(server, lab());
    let _echo = serve(cluster.lab.outside(), 8443);
    let shop = cluster.namespace("shop", &Value::Null);
    let ip = service(&cluster.server, &shop, "partner");
    endpoints(&cluster.server, &shop, "partner", &[outside(9)], 8443);
    translate(&cluster, (ip, 80), (outside(9), 8443));
    let cart = cluster.run(&shop, "cart", &allow(""));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    reaches(cart.net(), (ip, 80));
    eventually("the problem is in status", || {
        let (_, status) = cluster.lab.ask_json(&["status"]);
        let problems = status["problems"].to_string();
        holds(
            problems.contains("the cluster's Services cannot be watched")
                && problems.contains("outside hosts"),
        )
    });

    // The right may come later.
    cluster.server.allow_agent("agent", &rights(|_| true));
    eventually("the Service is denied", || {
        let target = SocketAddr::from((ip, 80)).to_string();
        let (_, explained) = cluster.lab.explain(cart.net(), &target);
        holds(explained["decision"] == "denied")
    });
    is_denied(&cluster, &agent, cart.net(), (ip, 80));
}

#[test]
fn an_agent_that_starts_without_the_api_server_knows_which_services_lead_outside() {
    let cluster = cluster();
    let _echo = serve(cluster.lab.outside(), 8443);
    let shop = cluster.namespace("shop", &Value::Null);
    let ip = service(&cluster.server, &shop, "partner");
    endpoints(&cluster.server, &shop, "partner", &[outside(9)], 8443);
    translate(&cluster, (ip, 80), (outside(9), 8443));
    let cart = cluster.run(&shop, "cart", &allow(""));
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    agent.wait_enforcing(cart.net());
    is_denied(&cluster, &agent, cart.net(), (ip, 80));
    let saved = cluster.lab.directory().join("state/cluster.json");
    eventually("the Service is saved", || {
        let text = std::fs::read_to_string(&saved).ok()?;
        holds(text.contains("partner"))
    });
    agent.logs_after(
        "that the API server is away",
        || cluster.proxy.refuse(),
        |line| line.contains("API server"),
    );
    assert!(agent.stop().success());

    let agent = cluster.spawn_agent(&[]);
    agent.wait_enforcing(cart.net());
    is_denied(&cluster, &agent, cart.net(), (ip, 80));
    cluster.proxy.allow();
    agent.wait_ready();
    is_denied(&cluster, &agent, cart.net(), (ip, 80));
}

#[test]
fn a_service_with_the_address_of_a_resolver_gets_no_dns() {
    for (protocol, port) in [("UDP", 53), ("TCP", 5353)] {
        claim_a_resolver(protocol, port);
    }
}

/// A Service claims a resolver on this port. Its own port is only over this protocol.
#[track_caller]
fn claim_a_resolver(protocol: &str, port: u16) {
    let claimed = outside(77);
    let at = SocketAddr::from((claimed, port));
    // A resolver that did not count would be an internal server without an entry.
    let internal = json!([PODS, PODS6, SERVICES, SERVICES6, format!("{claimed}/32")]);
    let lab = Lab::builder()
        .config("ranges", json!({ "internal": internal }))
        .config(
            "dns.resolvers",
            json!([RESOLVER, RESOLVER6, at.to_string()]),
        );
    let cluster = Cluster::on(conformance::server(), lab);
    let dns = cluster.lab.serve_dns_at(&[at]);
    for name in ["a.shop.test", "b.shop.test", "c.shop.test"] {
        dns.addresses(name, &[outside(10)]);
    }
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("*.shop.test:443"));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    let ask = |name: &str| {
        let answer = cart.net().try_resolve_at(at, name, RecordType::A, SHORT);
        answer.is_some()
    };
    assert!(ask("a.shop.test"));
    let mut stream = DnsStream {
        tcp: cart.net().reach_tcp(at),
    };
    stream.ask(1, "a.shop.test");
    stream.expect(1);

    let ports = json!([{ "name": "dns", "port": port, "protocol": protocol }]);
    let spec = json!({ "ports": ports, "externalIPs": [claimed] });
    let (service, _, _) = create(&cluster.server, &shop, "dns", &spec);
    cluster.server.apply(&json!({
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": { "namespace": shop, "name": "dns" },
        "subsets": [{
            "addresses": [{ "ip": outside(9) }],
            "ports": [{ "name": "dns", "port": 53, "protocol": protocol }],
        }],
    }));
    let about = format!(
        "resolver {}",
        if port == 53 {
            claimed.to_string()
        } else {
            at.to_string()
        }
    );
    let told = eventually("status tells of the Service", || {
        let (_, status) = cluster.lab.ask_json(&["status"]);
        let problems = status["problems"].as_array().expect("a list").clone();
        let mut problems = problems.into_iter();
        problems.find(|problem| problem["about"] == about)
    });
    let text = told["message"].as_str().expect("a text");
    assert!(
        text.contains(&format!("Service {shop}/dns has this address")),
        "{text}"
    );
    assert!(text.contains(&format!("{}:53", outside(9))), "{text}");
    assert!(!ask("b.shop.test"));
    assert!(!ask("evil.test"));
    agent.wait_denial("the query", |denial| {
        denial.reason == "dns_elsewhere"
            && denial.dst_ip == Some(claimed)
            && denial.dst_port == Some(port)
    });
    stream.ask(2, "b.shop.test");
    assert!(
        matches!(stream.tcp.read(&mut [0]), Ok(0) | Err(_)),
        "an old connection goes on"
    );

    // The node may translate for some time longer.
    cluster.server.delete(&service);
    std::thread::sleep(SHORT * 4);
    assert!(!ask("c.shop.test"));
    for name in ["b.shop.test", "c.shop.test", "evil.test"] {
        assert_eq!(dns.queries_for(name), 0, "{name}");
    }
}

#[test]
fn a_headless_service_claims_no_resolver() {
    let resolver = outside(78);
    let lab = lab().config("dns.resolvers", json!([RESOLVER, RESOLVER6, resolver]));
    let cluster = Cluster::on(conformance::server(), lab);
    let dns = cluster.lab.serve_dns(&[resolver]);
    dns.addresses("a.shop.test", &[outside(10)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("*.shop.test:443"));
    let ports = json!([{ "name": "udp", "port": 53, "protocol": "UDP" }]);
    let spec = json!({ "ports": ports, "externalIPs": [resolver], "clusterIP": "None" });
    create(&cluster.server, &shop, "dns", &spec);
    endpoints(&cluster.server, &shop, "dns", &[outside(9)], 53);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    agent.wait_ready();
    let answer = cart
        .net()
        .resolve_at(resolver, "a.shop.test", RecordType::A);
    assert_eq!(answer.addresses, [outside(10)]);
}
