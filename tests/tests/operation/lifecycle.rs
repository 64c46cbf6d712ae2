//! Start, end, kill and restart of an agent.

use std::process::ExitStatus;

use egress_tests::{
    DEADLINE, Lab, SHORT, Shop,
    addresses::{RESOLVER, server},
    bpf::bpftool,
    dns::RecordType,
    eventually, exchange, holds,
};

/// A pod that has resolved its allowed name.
#[track_caller]
fn scene(arguments: &[&str]) -> Shop {
    let lab = Lab::new();
    lab.dns().addresses("later.test", &[server(20)]);
    let shop = Shop::start(lab, "shop.test:443 later.test:443", arguments);
    assert_eq!(shop.pod.lookup("shop.test"), [server(10)]);
    shop
}

/// Asserts that the kernel enforces earlier verdicts without the agent.
#[track_caller]
fn assert_still_enforced(scene: &Shop) {
    scene.pod.talks_tcp((server(10), 443));
    assert!(
        scene.pod.connect_tcp((server(99), 443), SHORT).is_err(),
        "the pod is open"
    );
    assert!(
        scene.pod.connect_tcp((server(10), 22), SHORT).is_err(),
        "the pod is open"
    );
}

/// Asserts that no trace of the agent is left.
#[track_caller]
fn assert_no_trace(scene: &Shop) {
    scene.pod.talks_tcp((server(99), 443));
    scene.pod.resolve("evil.test", RecordType::A);
    assert_eq!(scene.lab.dns().queries_for("evil.test"), 1);
    let pins = scene.lab.all_pins();
    assert!(!pins.iter().any(|pin| pin.is_file()), "left: {pins:?}");
    assert!(!scene.lab.pins().exists(), "left: {pins:?}");
}

#[track_caller]
fn assert_success(status: ExitStatus) {
    assert!(status.success(), "the agent ended with {status}");
}

#[test]
fn a_terminated_agent_removes_everything() {
    let mut scene = scene(&[]);
    // The agent may close some while they are listed.
    let objects = eventually("the agent's objects are in the kernel", || {
        let objects = scene.agent.kernel_objects();
        (objects.existing() == objects).then_some(objects)
    });
    assert!(
        !objects.programs.is_empty() && !objects.maps.is_empty(),
        "{objects:?}"
    );
    assert_success(scene.agent.stop());
    assert_no_trace(&scene);
    // The kernel frees unreferenced objects a moment later.
    eventually("programs and maps are gone", || {
        holds(objects.existing().is_empty())
    });
}

#[test]
fn with_keep_enforcing_the_kernel_enforces_until_a_restart_adopts_the_state() {
    let mut scene = scene(&["--keep-enforcing"]);
    let mut open = scene.pod.talks_tcp((server(10), 443));
    assert_success(scene.agent.stop());
    assert_still_enforced(&scene);
    assert!(
        exchange(&mut open, b"meanwhile", DEADLINE),
        "an open connection was cut"
    );

    let agent = scene.lab.start_agent(&[&scene.pod]);
    assert!(
        exchange(&mut open, b"after", DEADLINE),
        "an open connection was cut"
    );
    assert_still_enforced(&scene);
    assert_eq!(
        scene.lab.dns().queries_for("shop.test"),
        1,
        "learned addresses were lost"
    );
    agent.denies_tcp(&scene.pod, (server(98), 443), "address_not_learned");
    assert_eq!(scene.pod.lookup("later.test"), [server(20)]);
    scene.pod.talks_tcp((server(20), 443));
}

#[test]
fn an_agent_with_another_attach_mode_takes_over_from_its_predecessor() {
    let Shop {
        mut agent,
        web: _web,
        pod,
        lab,
    } = scene(&["--keep-enforcing", "--attach", "tcx"]);
    for way in ["clsact", "tcx"] {
        assert_success(agent.stop());
        agent = lab.start_agent_with(&["--keep-enforcing", "--attach", way], &[&pod]);
        assert_eq!(pod.lookup("later.test"), [server(20)], "{way}");
        pod.talks_tcp((server(10), 443));
        assert!(pod.connect_tcp((server(99), 443), SHORT).is_err(), "{way}");
    }
    assert_success(agent.stop());
    lab.cleanup();
    assert!(lab.all_pins().is_empty(), "{:?}", lab.all_pins());
    pod.talks_tcp((server(99), 443));
}

#[test]
fn a_killed_agent_leaves_its_pods_enforced_until_cleanup() {
    let mut scene = scene(&[]);
    let mut open = scene.pod.talks_tcp((server(10), 443));
    let objects = scene.agent.kernel_objects();
    scene.agent.kill();

    assert_still_enforced(&scene);
    assert!(
        exchange(&mut open, b"after", DEADLINE),
        "an open connection was cut"
    );
    // Undecided queries stay undecided: no agent runs.
    let answer = scene
        .pod
        .try_resolve(RESOLVER, "later.test", RecordType::A, SHORT);
    assert!(
        answer.is_none(),
        "an undecided response was delivered: {answer:?}"
    );

    scene.lab.cleanup();
    assert_no_trace(&scene);
    eventually("programs and maps are gone", || {
        holds(objects.existing().is_empty())
    });
    // A cleanup without anything to clean succeeds.
    scene.lab.cleanup();
}

#[test]
fn a_restart_after_a_kill_adopts_the_state() {
    let mut scene = scene(&[]);
    scene.agent.kill();
    // While no agent runs, another pod is added.
    let other = scene.lab.pod("shop", "mail");
    scene.lab.write_pod(&other, &[("allow", "shop.test:443")]);
    let mut agent = scene.lab.start_agent(&[&scene.pod, &other]);
    assert_still_enforced(&scene);
    assert_eq!(
        scene.lab.dns().queries_for("shop.test"),
        1,
        "learned addresses were lost"
    );
    assert_eq!(scene.pod.lookup("later.test"), [server(20)]);
    agent.denies_tcp(&other, (server(10), 443), "address_not_learned");
    assert_success(agent.stop());
    assert_no_trace(&scene);
}

#[test]
fn a_pod_removed_while_no_agent_ran_is_cleaned_up() {
    let mut scene = scene(&["--keep-enforcing"]);
    let pin = scene.lab.allow_pin(&scene.pod);
    assert!(pin.exists());
    assert_success(scene.agent.stop());
    assert!(pin.exists());
    scene.lab.remove_pod(&scene.pod);
    let agent = scene.lab.start_agent(&[]);
    eventually("the pod's pins are gone", || holds(!pin.exists()));
    eventually("its interface is not enforced any more", || {
        holds(scene.pod.connect_tcp((server(99), 443), SHORT).is_ok())
    });
    drop(agent);
}

#[test]
fn pods_come_and_go_while_the_agent_runs() {
    let scene = scene(&[]);
    let late = scene.lab.pod("shop", "late");
    scene.lab.write_pod(&late, &[("allow", "shop.test:443")]);
    scene.agent.wait_enforcing(&late);
    scene
        .agent
        .denies_tcp(&late, (server(10), 443), "address_not_learned");
    late.lookup("shop.test");
    late.talks_tcp((server(10), 443));
    // The pod's interface disappears with its namespace, and its manifest a moment later.
    let pin = scene.lab.allow_pin(&late);
    assert!(pin.exists());
    scene.lab.remove_pod(&late);
    drop(late);
    eventually("the pod's pins are gone", || holds(!pin.exists()));
    assert_still_enforced(&scene);
}

#[test]
fn bpftool_shows_named_fields() {
    for (learn, map) in [("kernel", "learned"), ("agent", "allow")] {
        let lab = Lab::builder().config("dns.learn", learn).build();
        let scene = Shop::start(lab, "shop.test:443", &[]);
        assert_eq!(scene.pod.lookup("shop.test"), [server(10)]);
        let pin = scene.lab.bpffs();
        let pin = pin.join("egress-agent/v2/pods/shop_cart").join(map);
        let pin = pin.to_str().expect("a path in UTF-8");
        let dump = bpftool(&["map", "dump", "pinned", pin]);
        let entry = &dump[0]["formatted"];
        assert!(entry["key"]["addr"].is_array(), "{dump}");
        assert!(entry["value"]["classes"]["words"].is_array(), "{dump}");
        assert!(entry["value"]["expires_ns"].is_u64(), "{dump}");
        let shown = bpftool(&["map", "show", "pinned", pin]);
        assert_eq!(shown["type"], "hash", "{shown}");
        assert_eq!(shown["name"], map, "{shown}");
        assert!(scene.lab.allowed(&scene.pod).contains_key(&server(10)));
    }
}
