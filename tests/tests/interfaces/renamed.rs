//! Host ends that somebody on the node renames.

use egress_tests::{Lab, Shop, addresses::server, eventually, holds};

/// A pod that is enforced.
#[track_caller]
fn scene(arguments: &[&str]) -> Shop {
    let shop = Shop::start(Lab::new(), "shop.test:443", arguments);
    shop.pod.reaches_only_shop();
    shop
}

/// Renames an interface of the node.
#[track_caller]
fn rename(scene: &Shop, from: &str, to: &str) {
    let line = format!("link set {from} name {to}\n");
    scene.lab.node().ip_batch(&line);
}

/// Renames the pod's interface, and waits until the agent logs that it stays enforced.
#[track_caller]
fn rename_pods(scene: &Shop, to: &str) {
    scene.agent.logs_after(
        "that the pod stays enforced",
        || rename(scene, scene.pod.interface(), to),
        |line| line.contains("shop/cart") && line.contains("stays enforced") && line.contains(to),
    );
}

/// Writes a manifest of the pod that names this interface.
#[track_caller]
fn name_interface(scene: &Shop, interface: &str) {
    let allow = &[("allow", "shop.test:443")];
    scene.lab.write_pod_on(&scene.pod, Some(interface), allow);
}

#[test]
fn a_pod_stays_enforced_when_its_interface_is_renamed() {
    let scene = scene(&[]);
    rename_pods(&scene, "moved0");
    scene.pod.reaches_only_shop();
    eventually("status has the new name", || {
        holds(scene.lab.status_of(&scene.pod)["interfaces"][0]["name"] == "moved0")
    });

    scene.agent.logs_after(
        "that the manifest is right again",
        || name_interface(&scene, "moved0"),
        |line| line.contains("shop/cart") && line.contains("the problem is gone"),
    );
    scene.pod.reaches_only_shop();
    scene.lab.node().ip_batch("link del moved0\n");
    scene.agent.wait_log("that the interface is gone", |line| {
        line.contains("shop/cart") && line.contains("there is no interface moved0")
    });
}

#[test]
fn an_interface_that_was_renamed_while_no_agent_ran_stays_enforced() {
    let mut scene = scene(&["--keep-enforcing"]);
    assert!(scene.agent.stop().success());
    rename(&scene, scene.pod.interface(), "moved0");
    scene.agent = scene.lab.start_agent(&[&scene.pod]);
    scene.pod.reaches_only_shop();
    let status = scene.lab.status_of(&scene.pod);
    let problem = status["problem"].as_str().unwrap_or_default();
    assert!(problem.contains("moved0"), "{status}");
}

#[test]
fn an_interface_that_takes_a_renamed_ones_name_does_not_release_it() {
    let scene = scene(&[]);
    let other = scene.lab.pod("shop", "other");
    // Nobody enforces it.
    other.talks_tcp((server(99), 443));
    rename_pods(&scene, "moved0");
    scene.agent.logs_after(
        "that both are enforced",
        || rename(&scene, other.interface(), scene.pod.interface()),
        |line| line.contains("enforcing on other interfaces") && line.contains("shop/cart"),
    );
    scene.pod.reaches_only_shop();
    assert!(
        !other.reaches(server(99)),
        "the manifest names this interface"
    );
}

#[test]
fn enforcement_moves_when_the_manifest_names_another_existing_interface() {
    let scene = scene(&[]);
    let other = scene.lab.pod("shop", "other");
    // A manifest with a missing interface changes nothing yet.
    scene.agent.logs_after(
        "that there is no such interface",
        || name_interface(&scene, "nowhere0"),
        |line| line.contains("shop/cart") && line.contains("nowhere0"),
    );
    scene.pod.reaches_only_shop();
    scene.agent.logs_after(
        "that it is enforced there",
        || name_interface(&scene, other.interface()),
        |line| line.contains("enforcing on other interfaces") && line.contains("shop/cart"),
    );
    assert!(
        !other.reaches(server(99)),
        "the manifest names this interface"
    );
    eventually("the earlier interface is not enforced any more", || {
        holds(scene.pod.reaches(server(99)))
    });
}
