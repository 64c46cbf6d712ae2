//! An agent that starts in a cluster does not know the cluster's policy objects yet. Pods stay under those that an
//! earlier agent enforced.

use std::{path::PathBuf, sync::Arc};

use egress_tests::{
    Agent, ApiServer, Cluster, ClusterPod, DEADLINE, Identity, Lab, TcpEcho, addresses::server,
    cluster::rights, eventually, exchange, holds, yaml,
};
use serde_json::{Value, json};

const GROUP: &str = "egress-agent.dev/v1alpha1";
const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

/// A pod without annotations. A policy of its namespace allows it a set with `shop.test` (`server(10)`), and
/// `server(20)` and its neighbour, which a policy of the cluster denies it.
struct Scene {
    agent: Agent,
    cart: ClusterPod,
    web: Value,
    _servers: TcpEcho,
    cluster: Cluster,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let cluster = Cluster::on(Arc::new(ApiServer::start()), Lab::builder());
        install(&cluster.server);
        let servers = cluster.lab.serve_tcp(443);
        cluster.lab.dns().addresses("shop.test", &[server(10)]);
        let shop = cluster.namespace("shop", &Value::Null);
        let web = json!({
            "apiVersion": GROUP,
            "kind": "EgressPolicy",
            "metadata": { "namespace": shop, "name": "web" },
            "spec": { "allow": ["@shop:443", "203.0.113.20/31:443"] },
        });
        let set = json!({
            "apiVersion": GROUP,
            "kind": "EgressSet",
            "metadata": { "name": "shop" },
            "spec": { "destinations": ["shop.test"] },
        });
        let guard = json!({
            "apiVersion": GROUP,
            "kind": "ClusterEgressPolicy",
            "metadata": { "name": "guard" },
            "spec": {
                "tier": "Admin",
                "priority": 1,
                "rules": [{ "action": "Deny", "entries": ["203.0.113.21"] }],
            },
        });
        for object in [&set, &web, &guard] {
            cluster.server.apply(object);
        }
        let cart = cluster.run(&shop, "cart", &Value::Null);
        let agent = cluster.start_agent_with(&["--keep-enforcing"]);
        agent.wait_enforcing(cart.net());
        assert_eq!(cart.net().lookup("shop.test"), [server(10)]);
        let scene = Self {
            agent,
            cart,
            web,
            _servers: servers,
            cluster,
        };
        scene.assert_as_before("at first");
        scene
    }

    fn state(&self) -> PathBuf {
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

    /// Asserts that the pod is under all three objects.
    #[track_caller]
    fn assert_as_before(&self, when: &str) {
        let cart = self.cart.net();
        cart.talks_tcp((server(10), 443));
        cart.talks_tcp((server(20), 443));
        assert!(!cart.reaches(server(21)), "the guardrail is gone {when}");
        assert!(!cart.reaches(server(99)), "the pod is open {when}");
    }

    /// Asserts that the pod is under what the API server has, when that can be reached again.
    #[track_caller]
    fn assert_the_cluster_decides_again(&self) {
        let web = &self.web;
        self.cluster.server.delete(web);
        self.cluster.proxy.allow();
        let cart = self.cart.net();
        eventually("the pod is free but for the guardrail", || {
            holds(cart.reaches(server(99)))
        });
        assert!(!cart.reaches(server(21)));
    }
}

/// Installs the definitions of policy objects.
fn install(api: &ApiServer) {
    for definition in yaml::objects("base/crds.yaml") {
        // A server of this version applies no definition with validations that it does not know.
        let status = api.asked_by(Identity::Admin, "POST", DEFINITIONS, &definition);
        assert_eq!(status, 200, "a definition is not accepted");
        let plural = definition["spec"]["names"]["plural"].as_str();
        let path = format!("/apis/{GROUP}/{}", plural.expect("a plural"));
        eventually(&format!("{path} is served"), || {
            holds(api.asked_by(Identity::Admin, "GET", &path, &Value::Null) == 200)
        });
    }
}

#[test]
fn without_the_api_server_pods_are_under_the_objects_that_were_reported_last() {
    let mut scene = Scene::new();
    let mut open = scene.cart.net().talks_tcp((server(20), 443));
    scene.agent.kill();
    scene.start_alone();
    scene.assert_as_before("without the API server");
    assert!(exchange(&mut open, b"on", DEADLINE), "a connection ended");
    let cart = scene.cart.net();
    assert_eq!(cart.lookup("shop.test"), [server(10)]);
    let denial = scene.agent.denies_tcp(cart, (server(21), 443), "deny_rule");
    assert_eq!(denial.line["policy"]["name"], "guard", "{}", denial.text);
    scene.assert_the_cluster_decides_again();
}

#[test]
fn without_the_saved_state_and_the_api_server_objects_stay_in_force() {
    let mut scene = Scene::new();
    let mut open = scene.cart.net().talks_tcp((server(20), 443));
    scene.agent.kill();
    std::fs::remove_file(scene.state()).expect("remove what the agent has saved");
    scene.start_alone();
    scene.assert_as_before("without the API server");
    assert!(exchange(&mut open, b"on", DEADLINE), "a connection ended");
    scene.assert_the_cluster_decides_again();
}

#[test]
fn objects_stay_in_force_when_the_next_agent_may_not_list_them() {
    let mut scene = Scene::new();
    scene.agent.kill();
    let api = Arc::clone(&scene.cluster.server);
    api.allow_agent("agent", &rights(|resource| !resource.contains("polic")));
    scene.agent = scene.cluster.start_agent_with(&["--keep-enforcing"]);
    scene.assert_as_before("because the agent may not list policies");
    // And once more, from what that agent has saved.
    scene.agent.kill();
    scene.agent = scene.cluster.start_agent_with(&["--keep-enforcing"]);
    scene.assert_as_before("after another restart");
    let cart = scene.cart.net();
    assert_eq!(cart.lookup("shop.test"), [server(10)]);
    api.allow_agent("agent", &rights(|_| true));
    scene.assert_the_cluster_decides_again();
}
