//! An agent that starts in a cluster does not know the cluster's addresses yet. What an earlier agent left in force
//! stays until every list has been read.

use std::{net::IpAddr, sync::Arc};

use egress_tests::{
    Agent, ApiServer, Cluster, ClusterPod, Lab, SHORT, TcpEcho,
    addresses::{RESOLVER, RESOLVER6, server},
    cluster::{allow, rights},
    dns::{RecordType, Send, address},
    eventually, holds,
};
use serde_json::{Value, json};

/// An address in the prefix of another node's pods.
const ELSEWHERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 78, 0, 5));
const PREFIX: &str = "10.78.0.0/24";

/// A pod with two names: that of an external address, and one that leads to a pod of another node, where no name may
/// lead.
struct Scene {
    agent: Agent,
    cart: ClusterPod,
    _web: TcpEcho,
    other: Value,
    cluster: Cluster,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let server_of_its_own = Arc::new(ApiServer::start());
        let builder = Lab::builder().config("ranges.allowInternal", false);
        let cluster = Cluster::on(server_of_its_own, builder);
        let web = cluster.lab.serve_tcp(443);
        let (outside, node) = (cluster.lab.outside(), cluster.lab.node());
        outside.ip_batch("addr add 10.78.0.5/32 dev eth0\n");
        node.ip_batch("route add 10.78.0.0/16 via 10.98.0.2\n");
        let other = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": { "name": format!("{}-other", cluster.node()) },
            "spec": { "podCIDR": PREFIX, "podCIDRs": [PREFIX] },
        });
        cluster.server.apply(&other);
        cluster.lab.dns().addresses("shop.test", &[server(10)]);
        cluster.lab.dns().addresses("rebound.test", &[ELSEWHERE]);
        let shop = cluster.namespace("shop", &Value::Null);
        let entries = allow("shop.test:443 rebound.test:443");
        let cart = cluster.run(&shop, "cart", &entries);
        let agent = cluster.start_agent_with(&["--keep-enforcing"]);
        agent.wait_enforcing(cart.net());
        assert_eq!(cart.net().lookup("shop.test"), [server(10)]);
        assert_eq!(cart.net().lookup("rebound.test"), [ELSEWHERE]);
        let scene = Self {
            agent,
            cart,
            _web: web,
            other,
            cluster,
        };
        scene.assert_closed("at first");
        scene
    }

    fn state(&self) -> std::path::PathBuf {
        self.cluster.lab.directory().join("state/cluster.json")
    }

    /// Starts another agent after one that was killed, without the API server.
    #[track_caller]
    fn start_alone(&mut self) {
        self.cluster.proxy.refuse();
        self.agent = self.cluster.spawn_agent(&["--keep-enforcing"]);
        self.agent.wait_log("that it waits", |line| {
            line.contains("waiting for the API server")
        });
    }

    #[track_caller]
    fn assert_closed(&self, when: &str) {
        let cart = self.cart.net();
        assert!(!cart.reaches(ELSEWHERE), "the other pod is open {when}");
        cart.talks_tcp((server(10), 443));
    }

    /// Asserts that the prefix is forgotten when the API server no longer names it.
    #[track_caller]
    fn assert_the_cluster_may_remove_it(&self) {
        self.cluster.server.delete(&self.other);
        self.cluster.proxy.allow();
        eventually("the address is not internal any more", || {
            holds(self.cart.net().reaches(ELSEWHERE))
        });
    }
}

#[test]
fn a_list_that_fails_at_the_start_removes_no_range() {
    let mut scene = Scene::new();
    scene.agent.kill();
    let api = Arc::clone(&scene.cluster.server);
    api.allow_agent("agent", &rights(|resource| resource != "nodes"));
    scene.agent = scene.cluster.start_agent_with(&["--keep-enforcing"]);
    scene.assert_closed("because a list failed");

    let saved = std::fs::read_to_string(scene.state()).expect("read what the agent has saved");
    assert!(saved.contains(PREFIX), "{saved}");
    scene.agent.kill();
    scene.start_alone();
    scene.assert_closed("after another restart");
    api.allow_agent("agent", &rights(|_| true));
    scene.assert_the_cluster_may_remove_it();
}

#[test]
fn without_the_saved_state_a_list_that_fails_at_the_start_removes_no_range() {
    let mut scene = Scene::new();
    scene.agent.kill();
    std::fs::remove_file(scene.state()).expect("remove what the agent has saved");
    let api = Arc::clone(&scene.cluster.server);
    api.allow_agent("agent", &rights(|resource| resource != "nodes"));
    scene.agent = scene.cluster.start_agent_with(&["--keep-enforcing"]);
    scene.assert_closed("because a list failed");
    api.allow_agent("agent", &rights(|_| true));
    scene.assert_the_cluster_may_remove_it();
}

#[test]
fn without_the_saved_state_and_the_api_server_ranges_stay() {
    let mut scene = Scene::new();
    scene.agent.kill();
    std::fs::remove_file(scene.state()).expect("remove what the agent has saved");
    scene.start_alone();
    scene.assert_closed("without the API server");
    scene.assert_the_cluster_may_remove_it();
}

#[test]
fn without_the_saved_state_and_the_api_server_responses_are_still_held() {
    let server_of_its_own = Arc::new(ApiServer::start());
    let builder = Lab::builder().config("dns", json!({}));
    let cluster = Cluster::on(server_of_its_own, builder);
    cluster.announce_resolver();
    cluster.lab.dns().addresses("shop.test", &[server(10)]);
    // Queries for this name get no response.
    cluster.lab.dns().on("slow.test", |_| Vec::new());
    let shop = cluster.namespace("shop", &Value::Null);
    let entries = allow("shop.test:443 slow.test:443");
    let cart = cluster.run(&shop, "cart", &entries);
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    agent.wait_enforcing(cart.net());
    cluster.wait_resolver(RESOLVER);
    assert_eq!(cart.net().lookup("shop.test"), [server(10)]);
    let slow = cart.net().dns_socket();
    slow.ask(RESOLVER, 7, "slow.test", RecordType::A);
    eventually("the query is out", || {
        holds(cluster.lab.dns().queries_for("slow.test") == 1)
    });

    cluster.proxy.refuse();
    agent.kill();
    let state = cluster.lab.directory().join("state/cluster.json");
    std::fs::remove_file(state).expect("remove what the agent has saved");
    let agent = cluster.spawn_agent(&["--keep-enforcing"]);
    agent.wait_log("that it waits", |line| {
        line.contains("waiting for the API server")
    });
    let asked = cluster.lab.dns().questions();
    let asked = asked.iter().find(|question| question.name == "slow.test");
    let asked = asked.expect("a query for slow.test");
    let answer = Send::answer(asked, &[address(server(11))]);
    let dns = cluster.lab.dns();
    dns.send(RESOLVER, slow.address(), answer.bytes());
    assert!(
        slow.receive(SHORT).is_none(),
        "a response passed that nobody held"
    );
    cluster.proxy.allow();
    eventually("the pod resolves names again", || {
        let net = cart.net();
        net.try_resolve(RESOLVER, "shop.test", RecordType::A, SHORT)
    });
}

#[test]
fn without_the_saved_state_ranges_of_services_stay_while_the_api_server_does_not_name_them() {
    let mut scene = Scene::new();
    scene.agent.kill();
    // As an agent leaves it to which the API server has named the prefix as a range of Services.
    let mut marked = 0;
    scene.cluster.lab.rewrite_shared("ranges", |key, value| {
        if key.ends_with(&[10, 78, 0, 0]) {
            value[0] |= 16;
            marked += 1;
        }
    });
    assert_eq!(marked, 1, "the prefix is in force");
    let api = Arc::clone(&scene.cluster.server);
    api.delete(&scene.other);
    // First the API server does not have the ranges, then it refuses them.
    for rights in [
        rights(|_| true),
        rights(|resource| resource != "servicecidrs"),
    ] {
        api.allow_agent("agent", &rights);
        std::fs::remove_file(scene.state()).expect("remove what the agent has saved");
        scene.agent = scene.cluster.start_agent_with(&["--keep-enforcing"]);
        scene.agent.wait_log("which addresses it knows", |line| {
            line.contains("the cluster's addresses are known")
        });
        scene.assert_closed("because the API server does not name it");
        scene.agent.kill();
    }
}

#[test]
fn a_failed_list_keeps_no_resolvers_that_come_from_other_lists() {
    let server_of_its_own = Arc::new(ApiServer::start());
    let builder = Lab::builder().config("dns", json!({}));
    let cluster = Cluster::on(server_of_its_own, builder);
    cluster.announce_resolver();
    cluster.lab.dns().addresses("shop.test", &[server(10)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let entries = json!({ "egress-agent.dev/allow": "shop.test:443" });
    let cart = cluster.run(&shop, "cart", &entries);
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    agent.wait_enforcing(cart.net());
    cluster.wait_resolver(RESOLVER);
    assert_eq!(cart.net().lookup("shop.test"), [server(10)]);
    let api = Arc::clone(&cluster.server);
    api.allow_agent("agent", &rights(|resource| resource != "nodes"));
    let endpoints = |addresses: Value| {
        json!({
            "apiVersion": "v1",
            "kind": "Endpoints",
            "metadata": { "namespace": "kube-system", "name": "kube-dns" },
            "subsets": [{
                "addresses": addresses,
                "ports": [{ "name": "dns", "port": 53, "protocol": "UDP" }],
            }],
        })
    };
    let other = json!([{ "ip": "10.99.0.77" }]);
    let state = cluster.lab.directory().join("state/cluster.json");
    for (left, gone, is_saved) in [
        (json!([{ "ip": RESOLVER6 }]), RESOLVER, true),
        (other, RESOLVER6, false),
    ] {
        agent.kill();
        if !is_saved {
            std::fs::remove_file(&state).expect("remove what the agent has saved");
        }
        api.apply(&endpoints(left));
        agent = cluster.start_agent_with(&["--keep-enforcing"]);
        agent.wait_enforcing(cart.net());
        let net = cart.net();
        // If the agent's first request for the cluster's DNS service fails, it deals with the pods before.
        eventually(&format!("{gone} is no resolver any more"), || {
            let asked = net.try_resolve(gone, "shop.test", RecordType::A, SHORT);
            let mut denials = agent.denials().into_iter();
            holds(asked.is_none() && denials.any(|denial| denial.is(net, "no_rule", gone, 53)))
        });
    }
}
