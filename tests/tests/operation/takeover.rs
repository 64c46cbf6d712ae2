//! State that a restarted agent takes over from the previous one, and state that it does not.

use std::fs;

use egress_tests::{
    Agent, Lab, SHORT, Shop, addresses::server, bpf::bpftool, dns::RecordType, eventually, holds,
};

/// A pod that has resolved its allowed name; its agent has ended and left it enforced.
#[track_caller]
fn without_agent(arguments: &[&str]) -> Shop {
    let lab = Lab::new();
    lab.dns().addresses("later.test", &[server(20)]);
    let arguments = [arguments, &["--keep-enforcing"]].concat();
    let mut shop = Shop::start(lab, "shop.test:443", &arguments);
    assert_eq!(shop.pod.lookup("shop.test"), [server(10)]);
    shop.pod.talks_tcp((server(10), 443));
    assert!(shop.agent.stop().success());
    shop
}

/// Replaces the pod's manifest by that of a pod with this name and UID on the same interface.
#[track_caller]
fn recreate(scene: &Shop, name: &str, uid: &str, allow: &str) {
    scene.lab.remove_pod(&scene.pod);
    let manifest = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": "shop",
            "name": name,
            "uid": uid,
            "annotations": {
                "egress-agent.dev/interface": scene.pod.interface(),
                "egress-agent.dev/allow": allow,
            },
        },
        "status": { "podIPs": [{ "ip": scene.pod.ipv4() }, { "ip": scene.pod.ipv6() }] },
    });
    scene
        .lab
        .write_file("recreated.json", manifest.to_string().as_bytes());
}

/// Asserts that only `later.test` is allowed, and that no earlier address is.
#[track_caller]
fn assert_starts_afresh(scene: &Shop, agent: &Agent) {
    agent.wait_ready();
    assert!(!scene.pod.reaches(server(99)), "the pod is open");
    assert!(
        !scene.pod.reaches(server(10)),
        "the pod inherited an address"
    );
    assert_eq!(scene.pod.lookup("later.test"), [server(20)]);
    scene.pod.talks_tcp((server(20), 443));
}

#[test]
fn a_pod_recreated_while_no_agent_ran_is_enforced_and_inherits_nothing() {
    let scene = without_agent(&[]);
    recreate(&scene, "cart", "another", "later.test:443");
    let agent = scene.lab.start_agent(&[]);
    assert_starts_afresh(&scene, &agent);
}

#[test]
fn another_pod_on_the_same_interface_is_enforced_and_inherits_nothing() {
    let scene = without_agent(&[]);
    recreate(&scene, "heir", "heir", "later.test:443");
    let agent = scene.lab.start_agent(&[]);
    assert_starts_afresh(&scene, &agent);
    let pin = scene.lab.allow_pin(&scene.pod);
    assert!(!pin.exists(), "left: {}", pin.display());
}

#[test]
fn a_name_removed_while_no_agent_ran_is_closed() {
    let scene = without_agent(&[]);
    // The ports and protocols are the same; only the name differs.
    scene
        .lab
        .write_pod(&scene.pod, &[("allow", "later.test:443")]);
    let agent = scene.lab.start_agent(&[&scene.pod]);
    assert_starts_afresh(&scene, &agent);
}

#[test]
fn a_pod_switched_off_while_no_agent_ran_is_not_enforced() {
    let scene = without_agent(&[]);
    scene
        .lab
        .write_pod(&scene.pod, &[("allow", "shop.test:443"), ("mode", "off")]);
    let _agent = scene.lab.start_agent(&[]);
    eventually("the pod is not enforced any more", || {
        holds(scene.pod.reaches(server(99)))
    });
    scene.pod.resolve("evil.test", RecordType::A);
    assert_eq!(scene.lab.dns().queries_for("evil.test"), 1);
}

#[test]
fn another_attach_mode_takes_over_from_the_previous_one() {
    for (before, after) in [("clsact", "tcx"), ("tcx", "clsact")] {
        let scene = without_agent(&["--attach", before]);
        let mut agent = scene
            .lab
            .start_agent_with(&["--attach", after], &[&scene.pod]);
        assert!(
            !scene.pod.reaches(server(99)),
            "{before}, then {after}: the pod is open"
        );
        scene.pod.talks_tcp((server(10), 443));
        assert_eq!(scene.pod.lookup("shop.test"), [server(10)]);
        assert_eq!(
            scene.lab.dns().queries_for("shop.test"),
            2,
            "{before}, then {after}: each query is forwarded once"
        );
        assert!(agent.stop().success());
        scene.pod.talks_tcp((server(99), 443));
    }
}

#[test]
fn a_pod_whose_manifest_is_unreadable_at_the_start_stays_enforced_as_before() {
    let scene = without_agent(&[]);
    let file = scene.lab.pod_file(&scene.pod);
    scene.lab.write_file(&file, b"{{{ not YAML");
    let agent = scene.lab.start_agent(&[]);
    agent.wait_log("that the pod stays enforced", |line| {
        line.contains("shop/cart") && line.contains("as an earlier agent left it")
    });
    assert!(!scene.pod.reaches(server(99)), "the pod is open");
    scene.pod.talks_tcp((server(10), 443));

    scene
        .lab
        .write_pod(&scene.pod, &[("allow", "shop.test:443")]);
    agent.wait_enforcing(&scene.pod);
    assert_eq!(scene.pod.lookup("shop.test"), [server(10)]);
    scene.lab.remove_pod(&scene.pod);
    eventually("the pod is not enforced any more", || {
        holds(scene.pod.reaches(server(99)))
    });
}

#[test]
fn an_interface_without_a_known_pod_is_detached() {
    let scene = without_agent(&[]);
    // The state that an agent leaves if it is killed while it starts or stops enforcing a pod.
    let interface = scene.pod.interface();
    let ifindex = scene.lab.ifindex(interface);
    let interfaces = scene.lab.pins().join("interfaces");
    let key = ifindex
        .get()
        .to_ne_bytes()
        .map(|byte| format!("{byte:#04x}"));
    let mut arguments = vec!["map", "delete", "pinned"];
    arguments.push(interfaces.to_str().expect("a path in UTF-8"));
    arguments.push("key");
    arguments.extend(key.iter().map(String::as_str));
    bpftool(&arguments);
    assert!(
        !scene.pod.reaches(server(99)),
        "an interface without an entry lets traffic out"
    );
    scene.lab.remove_pod(&scene.pod);
    let _agent = scene.lab.start_agent(&[]);
    eventually("the interface is not enforced any more", || {
        holds(scene.pod.reaches(server(99)))
    });
}

/// A map of another build has that build's type information, or none.
#[test]
fn maps_pinned_by_another_build_do_no_harm() {
    let lab = Lab::new();
    let (_web, cart) = lab.shop_and_cart("shop.test:443");
    let mut agent = lab.start_agent_with(&["--keep-enforcing"], &[]);
    let pin = lab.pins().join("interfaces");
    let path = pin.to_str().expect("a path in UTF-8");
    let made = bpftool(&["map", "show", "pinned", path]);
    let number = |key: &str| made[key].as_u64().expect("a number").to_string();
    assert!(agent.stop().success());
    lab.cleanup();
    fs::create_dir_all(lab.pins()).expect("the directory of pins");
    let (key, value, entries) = (
        number("bytes_key"),
        number("bytes_value"),
        number("max_entries"),
    );
    bpftool(&[
        "map",
        "create",
        path,
        "type",
        "hash",
        "key",
        &key,
        "value",
        &value,
        "entries",
        &entries,
        "name",
        "interfaces",
        "flags",
        &number("flags"),
    ]);

    let agent = lab.start_agent(&[&cart]);
    assert_eq!(cart.lookup("shop.test"), [server(10)]);
    cart.talks_tcp((server(10), 443));
    assert!(cart.connect_tcp((server(99), 443), SHORT).is_err());
    drop(agent);
}
