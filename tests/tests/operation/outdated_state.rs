//! The state that an agent has saved in `stateDir` may be older than the enforced policies. An agent that
//! starts while the API server is unreachable uses no saved state that an edit has replaced.

use std::{net::IpAddr, path::Path};

use egress_tests::{
    Agent, ApiServer, Cluster, ClusterPod, Lab, SHORT, TcpEcho,
    addresses::{RESOLVER, server},
    cluster::allow,
    dns::{RecordType, ResponseCode},
    eventually, holds,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

/// A file system for `stateDir` that can be made read-only.
struct StateDir(tempfile::TempDir);

impl StateDir {
    #[track_caller]
    fn new() -> Self {
        let state = Self(tempfile::tempdir().expect("a directory"));
        let none = None::<&str>;
        mount(
            Some("tmpfs"),
            state.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            none,
        )
        .expect("mount(2) of a file system in memory");
        state
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    #[track_caller]
    fn make_read_only(&self) {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        let none = None::<&str>;
        // The kernel refuses while a file is open for writing.
        eventually("mount(2) makes it read-only", || {
            mount(none, self.path(), none, flags, none).ok()
        });
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        let _ = umount2(self.path(), MntFlags::MNT_DETACH);
    }
}

/// Two pods in a cluster: the tests remove `later.test` from the policy of `cart`; `till` keeps its policy.
struct Scene {
    agent: Agent,
    cart: ClusterPod,
    till: ClusterPod,
    _web: TcpEcho,
    cluster: Cluster,
    state: StateDir,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let state = StateDir::new();
        let path = state.path().to_str().expect("a path in UTF-8");
        let cluster = Cluster::on(ApiServer::shared(), Lab::builder().config("stateDir", path));
        let web = cluster.lab.serve_tcp(443);
        cluster.lab.dns().addresses("shop.test", &[server(10)]);
        cluster.lab.dns().addresses("later.test", &[server(11)]);
        let shop = cluster.namespace("shop", &Value::Null);
        let both = allow("shop.test:443 later.test:443");
        let cart = cluster.run(&shop, "cart", &both);
        let till = cluster.run(&shop, "till", &both);
        let agent = cluster.start_agent_with(&["--keep-enforcing"]);
        agent.wait_enforcing(cart.net());
        agent.wait_enforcing(till.net());
        assert_eq!(cart.net().lookup("later.test"), [server(11)]);
        Self {
            agent,
            cart,
            till,
            _web: web,
            cluster,
            state,
        }
    }

    /// Removes `later.test` from the policy of `cart`.
    #[track_caller]
    fn tighten(&mut self) {
        self.cluster
            .annotate(&mut self.cart, &allow("shop.test:443"));
        // A new version of the policy may also come of other facts, which the log lines do not tell apart.
        eventually("the edit is applied", || {
            let (_, explanation) = self.cluster.lab.explain(self.cart.net(), "later.test:443");
            holds(explanation["decision"] == "denied")
        });
    }

    /// Kills the agent and starts another one without the API server.
    #[track_caller]
    fn restart_alone(&mut self) {
        self.agent.logs_after(
            "that the API server is away",
            || self.cluster.proxy.refuse(),
            |line| line.contains("API server"),
        );
        self.agent.kill();
        self.agent = self.cluster.spawn_agent(&["--keep-enforcing"]);
        self.agent.wait_log("that it waits", |line| {
            line.contains("waiting for the API server")
        });
    }

    /// Asserts that the edit is enforced, and that only the edited pod lacks DNS until the API server is
    /// back.
    #[track_caller]
    fn assert_only_the_edited_pod_lacks_dns(&self) {
        let (cart, till) = (self.cart.net(), self.till.net());
        let asked = cart.try_resolve(RESOLVER, "later.test", RecordType::A, SHORT);
        assert!(asked.is_none(), "the old policy was used: {asked:?}");
        assert!(
            !cart.reaches(server(11)),
            "the removed name is allowed again"
        );
        assert_eq!(till.lookup("later.test"), [server(11)]);
        till.talks_tcp((server(11), 443));
        let title = format!("{}/{}", cart.namespace(), cart.name());
        let text = self
            .agent
            .wait_log("that the saved policy is not used", |line| {
                line.contains("saved annotations") && line.contains(&title)
            });
        assert!(!text.contains("/till"), "{text}");

        self.cluster.proxy.allow();
        eventually("the pod resolves names again", || {
            let shop = cart.try_resolve(RESOLVER, "shop.test", RecordType::A, SHORT)?;
            holds(shop.code == ResponseCode::NoError)
        });
        cart.talks_tcp((server(10), 443));
        let later = cart.resolve("later.test", RecordType::A);
        assert_eq!(later.code, ResponseCode::NXDomain);
    }
}

#[test]
fn an_unsaved_edit_stays_enforced_after_the_agent_was_killed() {
    let mut scene = Scene::new();
    scene.state.make_read_only();
    scene.tighten();
    scene.restart_alone();
    scene.assert_only_the_edited_pod_lacks_dns();
}

#[test]
fn an_edit_applied_by_an_agent_with_another_state_dir_stays_enforced() {
    let mut scene = Scene::new();
    assert!(scene.agent.stop().success());
    let lab = &scene.cluster.lab;
    let elsewhere = lab.directory().join("elsewhere");
    lab.edit_config("stateDir", elsewhere.to_str().expect("a path in UTF-8"));
    scene.agent = scene.cluster.start_agent_with(&["--keep-enforcing"]);
    scene.agent.wait_enforcing(scene.cart.net());
    scene.tighten();
    let state = scene.state.path().to_str().expect("a path in UTF-8");
    scene.cluster.lab.edit_config("stateDir", state);
    scene.restart_alone();
    scene.assert_only_the_edited_pod_lacks_dns();
}

#[test]
fn an_unsaved_removal_of_a_cluster_prefix_stays_in_effect() {
    let mut scene = Scene::new();
    let elsewhere: IpAddr = [10, 78, 0, 5].into();
    let (outside, node) = (scene.cluster.lab.outside(), scene.cluster.lab.node());
    outside.ip_batch("addr add 10.78.0.5/32 dev eth0\n");
    node.ip_batch("route add 10.78.0.0/16 via 10.98.0.2\n");
    let other = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": format!("{}-other", scene.cluster.node()) },
        "spec": { "podCIDR": "10.78.0.0/24", "podCIDRs": ["10.78.0.0/24"] },
    });
    scene.cluster.server.apply(&other);
    let till = scene.till.net();
    eventually("the address is internal", || holds(till.reaches(elsewhere)));
    scene.state.make_read_only();
    scene.cluster.server.delete(&other);
    eventually("the address is not internal any more", || {
        holds(!till.reaches(elsewhere))
    });

    scene.restart_alone();
    let till = scene.till.net();
    assert_eq!(till.lookup("later.test"), [server(11)]);
    till.talks_tcp((server(11), 443));
    assert!(!till.reaches(elsewhere), "the address is internal again");
}
