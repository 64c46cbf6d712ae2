//! Host ends that somebody on the node renames.

use egress_tests::{Agent, Lab, Pod, SHORT, TcpEcho, addresses::server, eventually, holds};

struct Scene {
    agent: Agent,
    _web: TcpEcho,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new(arguments: &[&str]) -> Self {
        let lab = Lab::new();
        let (web, pod) = lab.shop_and_cart("shop.test:443");
        let agent = lab.start_agent_with(arguments, &[&pod]);
        let scene = Self {
            agent,
            _web: web,
            pod,
            lab,
        };
        scene.assert_enforced();
        scene
    }

    #[track_caller]
    fn assert_enforced(&self) {
        assert_eq!(self.pod.lookup("shop.test"), [server(10)]);
        self.pod.talks_tcp((server(10), 443));
        assert!(!is_open(&self.pod), "the pod is open");
    }

    /// Renames an interface of the node.
    #[track_caller]
    fn rename(&self, from: &str, to: &str) {
        let line = format!("link set {from} name {to}\n");
        self.lab.node().ip_batch(&line);
    }

    /// Renames the pod's interface, and waits until the agent logs that it stays enforced.
    #[track_caller]
    fn rename_pods(&self, to: &str) {
        self.agent.logs_after(
            "that the pod stays enforced",
            || self.rename(self.pod.interface(), to),
            |line| {
                line.contains("shop/cart") && line.contains("stays enforced") && line.contains(to)
            },
        );
    }

    /// Writes a manifest of the pod that names this interface.
    #[track_caller]
    fn name_interface(&self, interface: &str) {
        let allow = &[("allow", "shop.test:443")];
        self.lab.write_pod_on(&self.pod, Some(interface), allow);
    }
}

fn is_open(pod: &Pod) -> bool {
    pod.connect_tcp((server(99), 443), SHORT).is_ok()
}

#[test]
fn a_pod_stays_enforced_when_its_interface_is_renamed() {
    let scene = Scene::new(&[]);
    scene.rename_pods("moved0");
    scene.assert_enforced();
    let status = scene.lab.status_of(&scene.pod);
    assert_eq!(status["interfaces"][0]["name"], "moved0", "{status}");

    scene.agent.logs_after(
        "that the manifest is right again",
        || scene.name_interface("moved0"),
        |line| line.contains("shop/cart") && line.contains("the problem is gone"),
    );
    scene.assert_enforced();
    scene.lab.node().ip_batch("link del moved0\n");
    scene.agent.wait_log("that the interface is gone", |line| {
        line.contains("shop/cart") && line.contains("there is no interface moved0")
    });
}

#[test]
fn an_interface_that_was_renamed_while_no_agent_ran_stays_enforced() {
    let mut scene = Scene::new(&["--keep-enforcing"]);
    assert!(scene.agent.stop().success());
    scene.rename(scene.pod.interface(), "moved0");
    scene.agent = scene.lab.start_agent(&[&scene.pod]);
    scene.assert_enforced();
    let status = scene.lab.status_of(&scene.pod);
    let problem = status["problem"].as_str().unwrap_or_default();
    assert!(problem.contains("moved0"), "{status}");
}

#[test]
fn an_interface_that_takes_a_renamed_ones_name_does_not_release_it() {
    let scene = Scene::new(&[]);
    let other = scene.lab.pod("shop", "other");
    assert!(is_open(&other), "nobody enforces it");
    scene.rename_pods("moved0");
    scene.agent.logs_after(
        "that both are enforced",
        || scene.rename(other.interface(), scene.pod.interface()),
        |line| line.contains("enforcing on other interfaces") && line.contains("shop/cart"),
    );
    scene.assert_enforced();
    assert!(!is_open(&other), "the manifest names this interface");
}

#[test]
fn enforcement_moves_when_the_manifest_names_another_existing_interface() {
    let scene = Scene::new(&[]);
    let other = scene.lab.pod("shop", "other");
    // A manifest with a missing interface changes nothing yet.
    scene.agent.logs_after(
        "that there is no such interface",
        || scene.name_interface("nowhere0"),
        |line| line.contains("shop/cart") && line.contains("nowhere0"),
    );
    scene.assert_enforced();
    scene.agent.logs_after(
        "that it is enforced there",
        || scene.name_interface(other.interface()),
        |line| line.contains("enforcing on other interfaces") && line.contains("shop/cart"),
    );
    assert!(!is_open(&other), "the manifest names this interface");
    eventually("the earlier interface is not enforced any more", || {
        holds(is_open(&scene.pod))
    });
}
