//! Interfaces that appear, disappear, are replaced, or cannot be attached to; both ways of attaching.

use std::{fs, process::Command};

use egress_common::ids::IfIndex;
use egress_tests::{Lab, Pod, SHORT, TcpEcho, addresses::server, eventually, holds};

struct Scene {
    _web: TcpEcho,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::new();
        let (web, pod) = lab.shop_and_cart("shop.test:443");
        Self {
            _web: web,
            pod,
            lab,
        }
    }

    /// The output of `tc filter show` for the pod's interface, both directions.
    #[track_caller]
    fn filters(&self) -> String {
        let show = |way| {
            let mut command = Command::new("tc");
            command.args(["filter", "show", "dev", self.pod.interface(), way]);
            let output = self.lab.node().run(|| command.output()).expect("tc runs");
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        show("ingress") + &show("egress")
    }

    /// Deletes the pod's interface.
    #[track_caller]
    fn delete_interface(&self) {
        self.delete_interface_of(&self.pod);
    }

    #[track_caller]
    fn delete_interface_of(&self, pod: &Pod) {
        let mut command = Command::new("ip");
        command.args(["link", "del", pod.interface()]);
        let status = self.lab.node().run(|| command.status()).expect("ip runs");
        assert!(status.success());
    }
}

#[test]
fn clsact_filters_enforce_and_are_removed_at_the_end() {
    let scene = Scene::new();
    let attach = ["--attach", "clsact"];
    let mut agent = scene.lab.start_agent_with(&attach, &[&scene.pod]);
    assert_eq!(scene.filters().matches("direct-action").count(), 2);
    scene.pod.reaches_only_shop();
    assert!(agent.stop().success());
    assert_eq!(scene.filters(), "");
    scene.pod.talks_tcp((server(99), 443));
    assert!(!scene.lab.pins().exists());
}

#[test]
fn clsact_filters_outlive_a_killed_agent_and_are_replaced_or_cleaned_up() {
    let scene = Scene::new();
    let attach = ["--attach", "clsact"];
    let mut agent = scene.lab.start_agent_with(&attach, &[&scene.pod]);
    scene.pod.reaches_only_shop();
    agent.kill();
    assert!(!scene.pod.reaches(server(99)));
    scene.pod.talks_tcp((server(10), 443));

    let mut agent = scene.lab.start_agent_with(&attach, &[&scene.pod]);
    assert_eq!(scene.filters().matches("direct-action").count(), 2);
    scene.pod.reaches_only_shop();
    agent.kill();
    scene.lab.cleanup();
    assert_eq!(scene.filters(), "");
    scene.pod.talks_tcp((server(99), 443));
}

#[test]
fn a_deleted_pod_leaves_nothing_behind_and_uninstalling_works() {
    for attach in ["tcx", "clsact"] {
        let scene = Scene::new();
        let other = scene.lab.pod("shop", "other");
        scene.lab.write_pod(&other, &[("allow", "shop.test:443")]);
        let arguments = ["--attach", attach];
        let mut agent = scene
            .lab
            .start_agent_with(&arguments, &[&scene.pod, &other]);
        let removed = |line: &str| line.contains("removed") && line.contains("pod=shop/cart");
        agent.logs_after(
            "that the deleted pod is removed",
            || {
                scene.delete_interface();
                scene.lab.remove_pod(&scene.pod);
            },
            removed,
        );
        let left = |ifindex: IfIndex| {
            let prefix = format!("{ifindex}_");
            let pins = fs::read_dir(scene.lab.pins().join("links")).expect("the links");
            pins.flatten()
                .any(|pin| pin.file_name().to_string_lossy().starts_with(&prefix))
        };
        let ifindex = scene.lab.ifindex(other.interface());
        assert!(left(ifindex), "the other pod is attached to");
        assert!(!agent.stderr().contains("cannot"), "{}", agent.stderr());

        // The other pod's interface disappears before the uninstallation.
        agent.kill();
        scene.delete_interface_of(&other);
        scene.lab.cleanup();
        assert!(!scene.lab.pins().exists());
    }
}

#[test]
fn a_foreign_filter_stays() {
    let scene = Scene::new();
    let interface = scene.pod.interface();
    // A classic BPF program: "return -1", so the packet goes on.
    for arguments in [
        format!("qdisc add dev {interface} clsact"),
        format!("filter add dev {interface} ingress prio 1 handle 1 bpf bytecode"),
    ] {
        let mut command = Command::new("tc");
        command.args(arguments.split(' '));
        if arguments.ends_with("bytecode") {
            command.arg("1,6 0 0 4294967295");
        }
        let status = scene.lab.node().run(|| command.status()).expect("tc runs");
        assert!(status.success(), "tc {arguments}");
    }
    let attach = ["--attach", "clsact"];
    let mut agent = scene.lab.start_agent_with(&attach, &[&scene.pod]);
    let during = scene.filters();
    assert!(agent.stop().success());
    for filters in [during, scene.filters()] {
        assert!(filters.contains("bytecode"), "{filters}");
    }
}

#[test]
fn a_new_interface_with_the_same_name_is_enforced() {
    for attach in ["tcx", "clsact"] {
        let scene = Scene::new();
        let agent = scene
            .lab
            .start_agent_with(&["--attach", attach], &[&scene.pod]);
        scene.pod.reaches_only_shop();
        let before = scene.lab.ifindex(scene.pod.interface());
        scene.delete_interface();
        scene.lab.add_interface(&scene.pod);
        assert_ne!(scene.lab.ifindex(scene.pod.interface()), before);
        // A connection may also fail because the interface has only just come up.
        let after = scene.lab.ifindex(scene.pod.interface());
        eventually("the new interface is enforced", || {
            holds(scene.lab.status_of(&scene.pod)["interfaces"][0]["index"] == after.get())
        });
        scene.pod.reaches_only_shop();
        drop(agent);
    }
}

#[test]
fn a_pod_without_its_interface_is_removed_and_reported_until_it_is_back() {
    let scene = Scene::new();
    let agent = scene.lab.start_agent(&[&scene.pod]);
    scene.pod.reaches_only_shop();
    let pin = scene.lab.allow_pin(&scene.pod);
    agent.logs_after(
        "that the interface is missing",
        || scene.delete_interface(),
        |line| line.contains("shop/cart") && line.contains("there is no interface"),
    );
    assert!(!pin.exists());
    eventually("its policy is gone", || {
        holds(scene.lab.shared_entries("policies").is_empty())
    });
    agent.logs_after(
        "that the pod is enforced again",
        || scene.lab.add_interface(&scene.pod),
        |line| line.contains("enforcing") && line.contains("pod=shop/cart"),
    );
    scene.pod.reaches_only_shop();
}

#[test]
fn a_failed_attachment_is_retried_and_leaves_nothing_behind() {
    let scene = Scene::new();
    let other = scene.lab.pod("shop", "other");
    let agent = scene
        .lab
        .start_agent_with(&["--attach", "tcx"], &[&scene.pod]);
    // An obstacle at the path of the link's pin.
    let interface = other.interface();
    let ifindex = scene.lab.ifindex(interface);
    let obstacle = scene.lab.pins().join(format!("links/{ifindex}_from_pod"));
    fs::create_dir(&obstacle).expect("a directory in bpffs");
    agent.logs_after(
        "which interface cannot be attached to",
        || scene.lab.write_pod(&other, &[("allow", "shop.test:443")]),
        |line| line.contains("shop/other") && line.contains("cannot attach"),
    );
    let policies = || scene.lab.shared_entries("policies").len();
    let before = policies();
    // Each reconciliation is an attempt.
    for n in 0..20 {
        scene
            .lab
            .write_file(&format!("note{n}.yaml"), b"# nothing\n");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    // An attempt that has not ended has a policy of its own.
    eventually("attempts leave no policy behind", || {
        holds(policies() == before)
    });
    scene.pod.reaches_only_shop();

    fs::remove_dir(&obstacle).expect("the directory is still there");
    agent.wait_enforcing(&other);
    assert_eq!(other.lookup("shop.test"), [server(10)]);
    other.talks_tcp((server(10), 443));
    assert!(other.connect_tcp((server(99), 443), SHORT).is_err());
    eventually("each pod has one policy", || holds(policies() == 2));
    scene.lab.remove_pod(&other);
    eventually("the pod's policy is gone", || holds(policies() == 1));
}
