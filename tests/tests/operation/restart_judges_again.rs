//! An agent that starts with another configuration judges again the flows that an earlier agent let pass.

use std::{
    net::{Ipv6Addr, TcpStream},
    process::ExitStatus,
};

use egress_tests::{
    Agent, Cluster, DEADLINE, Lab, SHORT, Shop, addresses::server, cluster::allow, eventually,
    exchange, holds,
};
use serde_json::{Value, json};

/// A pod with one connection to its allowed name, and one to its allowed address.
struct Scene {
    by_name: TcpStream,
    by_address: TcpStream,
    shop: Shop,
}

impl Scene {
    #[track_caller]
    fn of(lab: Lab) -> Self {
        let allow = format!("shop.test:443 {}:443", server(12));
        let shop = Shop::start(lab, &allow, &["--keep-enforcing"]);
        assert_eq!(shop.pod.lookup("shop.test"), [server(10)]);
        Self {
            by_name: shop.pod.talks_tcp((server(10), 443)),
            by_address: shop.pod.talks_tcp((server(12), 443)),
            shop,
        }
    }

    /// Ends the agent with `end`, and starts another one with this key of the configuration changed.
    #[track_caller]
    fn restart_with(
        &mut self,
        end: impl FnOnce(&mut Agent) -> ExitStatus,
        key: &str,
        prefixes: &[&str],
    ) {
        end(&mut self.shop.agent);
        self.shop.lab.edit_config(key, prefixes.to_vec());
        self.shop.agent = self
            .shop
            .lab
            .start_agent_with(&["--keep-enforcing"], &[&self.shop.pod]);
    }

    #[track_caller]
    fn assert_only_by_name_is_cut(&mut self) {
        assert!(
            !exchange(&mut self.by_name, b"after", SHORT),
            "the connection goes on"
        );
        assert!(
            exchange(&mut self.by_address, b"after", DEADLINE),
            "a connection was cut that is still allowed"
        );
    }
}

#[test]
fn a_restart_with_a_new_protected_address_ends_connections_to_it() {
    let mut scene = Scene::of(Lab::new());
    scene.restart_with(Agent::stop, "ranges.protected", &["203.0.113.10/32"]);
    scene.assert_only_by_name_is_cut();
    scene
        .shop
        .agent
        .denies_tcp(&scene.shop.pod, (server(10), 443), "protected");
}

#[test]
fn after_a_kill_a_restart_with_a_new_protected_address_ends_connections_to_it() {
    let mut scene = Scene::of(Lab::new());
    scene.restart_with(Agent::kill, "ranges.protected", &["203.0.113.10/32"]);
    scene.assert_only_by_name_is_cut();
}

#[test]
fn a_takeover_with_a_new_protected_address_ends_connections_to_it() {
    let mut scene = Scene::of(Lab::new());
    let lab = &scene.shop.lab;
    let socket = lab.directory().join("standby.sock");
    lab.edit_config("socket", socket.to_str().expect("a path in UTF-8"));
    lab.edit_config("ranges.protected", vec!["203.0.113.10/32"]);
    let standby = lab.spawn_agent(&["--take-over", "--keep-enforcing"]);
    standby.wait_log("that it stands by", |line| line.contains("standing by"));
    assert!(exchange(&mut scene.by_name, b"before", DEADLINE));
    assert!(scene.shop.agent.stop().success());
    standby.wait_enforcing(&scene.shop.pod);
    scene.assert_only_by_name_is_cut();
}

#[test]
fn a_restart_that_makes_an_internal_address_external_ends_connections_to_it() {
    let lab = Lab::builder()
        .config("ranges.internal", vec!["203.0.113.99/32"])
        .build();
    let mut scene = Scene::of(lab);
    let mut internal = scene.shop.pod.talks_tcp((server(99), 443));
    scene.restart_with(Agent::stop, "ranges.internal", &[]);
    assert!(
        !exchange(&mut internal, b"after", SHORT),
        "the connection goes on"
    );
    for open in [&mut scene.by_name, &mut scene.by_address] {
        assert!(
            exchange(open, b"after", DEADLINE),
            "a connection was cut that is still allowed"
        );
    }
}

#[test]
fn connections_from_under_the_ranges_of_a_short_lived_agent_end() {
    let lab = Lab::builder()
        .config("ranges.protected", vec!["203.0.113.10/32"])
        .config("quarantine.enabled", false)
        .build();
    let (_web, pod) = lab.shop_and_cart("*");
    let mut agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    let mut allowed = pod.talks_tcp((server(12), 443));
    assert!(pod.connect_tcp((server(10), 443), SHORT).is_err());
    assert!(agent.stop().success());

    // These agents put their ranges in force, and end before they know which pods there are: nothing listens on
    // this port.
    let kubeconfig = lab.directory().join("nobody.kubeconfig");
    let nobody = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "c", "cluster": { "server": "http://127.0.0.1:9" } }],
        "users": [{ "name": "u", "user": {} }],
        "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
        "current-context": "x",
    });
    std::fs::write(&kubeconfig, nobody.to_string()).expect("write a kubeconfig");
    let live_briefly = |prefixes: &[&str]| {
        lab.edit_config("ranges.protected", prefixes.to_vec());
        let mut agent = lab.spawn_cluster_agent(&kubeconfig, &["--keep-enforcing"]);
        agent.wait_log("that it waits", |line| {
            line.contains("waiting for the API server")
        });
        agent.kill();
    };
    live_briefly(&[]);
    let mut protected = pod.talks_tcp((server(10), 443));
    live_briefly(&["203.0.113.10/32"]);

    let _agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    assert!(
        !exchange(&mut protected, b"after", SHORT),
        "the connection goes on"
    );
    assert!(
        exchange(&mut allowed, b"after", DEADLINE),
        "a connection was cut that is still allowed"
    );
}

#[test]
fn connections_from_under_the_resolvers_of_a_short_lived_agent_end() {
    // The translation of a resolver's address is open to nobody.
    let resolvers = ["10.99.0.53", "203.0.113.10"];
    let lab = Lab::builder()
        .config("dns.resolvers", resolvers.to_vec())
        .build();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "203.0.113.0/24:443")]);
    let mut agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    let translated = |last: u16| Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0xcb00, 0x7100 + last);
    let mut allowed = pod.talks_tcp((translated(12), 443));
    assert!(pod.connect_tcp((translated(10), 443), SHORT).is_err());
    assert!(agent.stop().success());
    // This agent puts its resolvers in force, and ends before it knows the pod.
    lab.write_file(&lab.pod_file(&pod), b"{{{ not YAML");
    lab.edit_config("dns.resolvers", resolvers[..1].to_vec());
    let mut agent = lab.start_agent_with(&["--keep-enforcing"], &[]);
    agent.wait_log("that the pod stays enforced", |line| {
        line.contains("shop/cart") && line.contains("as an earlier agent left it")
    });
    let mut to_resolver = pod.talks_tcp((translated(10), 443));
    agent.kill();

    lab.write_pod(&pod, &[("allow", "203.0.113.0/24:443")]);
    lab.edit_config("dns.resolvers", resolvers.to_vec());
    let _agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    assert!(
        !exchange(&mut to_resolver, b"after", SHORT),
        "the connection goes on"
    );
    assert!(
        exchange(&mut allowed, b"after", DEADLINE),
        "a connection was cut that is still allowed"
    );
}

#[test]
fn with_an_unreadable_manifest_connections_to_a_new_protected_address_end() {
    let mut scene = Scene::of(Lab::new());
    assert!(scene.shop.agent.stop().success());
    scene
        .shop
        .lab
        .edit_config("ranges.protected", vec!["203.0.113.10/32"]);
    let file = scene.shop.lab.pod_file(&scene.shop.pod);
    scene.shop.lab.write_file(&file, b"{{{ not YAML");
    scene.shop.agent = scene.shop.lab.start_agent_with(&["--keep-enforcing"], &[]);
    scene
        .shop
        .agent
        .wait_log("that the pod stays enforced", |line| {
            line.contains("shop/cart") && line.contains("as an earlier agent left it")
        });
    scene.assert_only_by_name_is_cut();

    let entries = "shop.test:443 203.0.113.12:443";
    scene
        .shop
        .lab
        .write_pod(&scene.shop.pod, &[("allow", entries)]);
    scene.shop.agent.wait_enforcing(&scene.shop.pod);
    assert!(exchange(&mut scene.by_address, b"read", DEADLINE));
    scene.shop.pod.talks_tcp((server(12), 443));
}

#[test]
fn without_the_api_server_connections_to_a_new_protected_address_end() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    cluster.lab.dns().addresses("shop.test", &[server(10)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let known = cluster.run(&shop, "known", &allow("shop.test:443 203.0.113.12:443"));
    let mut outdated = cluster.run(&shop, "outdated", &allow("203.0.113.12:443 shop.test:443"));
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    let mut cut = Vec::new();
    let mut open = Vec::new();
    for pod in [known.net(), outdated.net()] {
        agent.wait_enforcing(pod);
        assert_eq!(pod.lookup("shop.test"), [server(10)]);
        cut.push(pod.talks_tcp((server(10), 443)));
        open.push(pod.talks_tcp((server(12), 443)));
    }
    let state = cluster.lab.directory().join("state/cluster.json");
    let saved = eventually("the agent has saved the policies", || {
        let saved = std::fs::read_to_string(&state).ok()?;
        saved
            .contains("203.0.113.12:443 shop.test:443")
            .then_some(saved)
    });
    cluster.annotate(&mut outdated, &allow("shop.test:443 203.0.113.12:443"));
    // A new version of the policy may also come of other facts, which the log lines do not tell apart.
    eventually("the edit is applied", || {
        let (_, explanation) = cluster.lab.explain(outdated.net(), "203.0.113.12:443");
        holds(explanation["entries"][0]["column"] == 15)
    });
    // A flow gets the pod's new policy only with its next packet.
    for connection in cut.iter_mut().chain(&mut open) {
        assert!(
            exchange(connection, b"edited", DEADLINE),
            "the connection was cut"
        );
    }
    agent.logs_after(
        "that the API server is away",
        || cluster.proxy.refuse(),
        |line| line.contains("API server"),
    );
    assert!(agent.stop().success());
    std::fs::write(&state, saved).expect("write what was saved before");
    cluster
        .lab
        .edit_config("ranges.protected", vec!["203.0.113.10/32"]);
    agent = cluster.spawn_agent(&["--keep-enforcing"]);
    agent.wait_log("that one pod's saved policy is not used", |line| {
        line.contains("saved annotations") && line.contains("/outdated")
    });
    agent.wait_log("that it waits", |line| {
        line.contains("waiting for the API server")
    });
    for connection in &mut cut {
        assert!(
            !exchange(connection, b"after", SHORT),
            "the connection goes on"
        );
    }
    for connection in &mut open {
        assert!(
            exchange(connection, b"after", DEADLINE),
            "the connection was cut"
        );
    }
}
