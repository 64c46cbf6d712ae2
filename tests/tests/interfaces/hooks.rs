//! Other programs on the hooks of a pod's interface. None of them lets packets pass unjudged; where one does,
//! the agent reports it.
#![expect(
    clippy::float_cmp,
    reason = "metrics are floating-point numbers, and counts among them are exact"
)]

use std::{thread, time::Duration};

use egress_tests::{
    Lab, Pod, SHORT, Shop,
    addresses::{RESOLVER, server},
    dns::{RecordType, ResponseCode},
    eventually,
    frames::Tap,
    holds,
    observed::{HTTP, title},
    rival::{Place, Rival},
};

/// Runs `before` on the laboratory and the pod, and then starts the agent.
#[track_caller]
fn start(attach: &str, before: impl FnOnce(&Lab, &Pod)) -> Shop {
    let lab = Lab::builder().config("http", HTTP).build();
    let (web, pod) = lab.shop_and_cart("shop.test:443");
    before(&lab, &pod);
    let agent = lab.start_agent_with(&["--attach", attach], &[&pod]);
    eventually("status knows the pod", || {
        let (_, status) = lab.ask_json(&["status"]);
        holds(
            status["pods"]
                .as_array()
                .is_some_and(|pods| !pods.is_empty()),
        )
    });
    Shop {
        agent,
        web,
        pod,
        lab,
    }
}

/// Waits until nothing forbidden leaves, and then for everything that is allowed.
#[track_caller]
fn wait_enforced(scene: &Shop) {
    eventually("denied connections do not leave", || {
        holds(!scene.pod.reaches(server(99)))
    });
    // Responses pass `to_pod` first, too, so their addresses are learned.
    eventually("a name is looked up", || {
        scene
            .pod
            .try_resolve(RESOLVER, "shop.test", RecordType::A, SHORT)
            .filter(|answer| answer.addresses == [server(10)])
    });
    scene.pod.talks_tcp((server(10), 443));
    assert_eq!(
        scene.pod.resolve("evil.test", RecordType::A).code,
        ResponseCode::NXDomain
    );
    assert!(!scene.pod.reaches(server(99)), "the pod is open");
}

/// Waits until status, metrics and readiness agree on whether the pod is enforced.
#[track_caller]
fn wait_counted_as_enforced(scene: &Shop, enforced: bool) {
    eventually("status shows whether the pod is enforced", || {
        holds(scene.lab.status_of(&scene.pod)["enforced"] == enforced)
    });
    let metrics = scene.lab.metrics();
    let count = |series: &str| metrics.find(series) == 1.0;
    assert_eq!(count("egress_agent_pods{mode=\"enforce\"}"), enforced);
    assert_eq!(count("egress_agent_pods{mode=\"missing\"}"), !enforced);
    assert_eq!(count("egress_agent_pods_bypassed"), !enforced);
    let (ready, why) = scene.lab.http("/readyz");
    assert_eq!(ready, if enforced { 200 } else { 503 });
    assert_eq!(why.contains(&title(&scene.pod)), !enforced, "{why}");
}

#[track_caller]
fn wait_problem(scene: &Shop, text: &str) {
    eventually(text, || {
        let problem = scene.lab.status_of(&scene.pod)["problem"].clone();
        holds(
            problem
                .as_str()
                .is_some_and(|problem| problem.contains(text)),
        )
    });
}

#[test]
fn a_filter_added_in_front_of_ours_opens_nothing() {
    let scene = start("clsact", |_, _| ());
    for (handle, side) in [(7, "ingress"), (8, "egress"), (9, "ingress")] {
        scene.lab.add_rival_filter(&scene.pod, side, handle);
        wait_enforced(&scene);
        let interface = scene.pod.interface();
        let filters = scene.lab.tc(&format!("filter show dev {interface} {side}"));
        assert_eq!(filters.matches("direct-action").count(), 1, "{filters}");
        assert!(filters.contains("bytecode"), "the rival is gone: {filters}");
    }
    wait_counted_as_enforced(&scene, true);
    assert!(scene.lab.metrics().find("egress_agent_hooks_moved_total") >= 3.0);
}

#[test]
fn a_tcx_program_attached_in_front_of_ours_opens_nothing() {
    let scene = start("tcx", |_, _| ());
    let rival = |place| Rival::attach(scene.lab.node(), scene.pod.interface(), place, Rival::OK);
    let mut rivals = Vec::new();
    for place in [Place::TcxIngress, Place::TcxEgress, Place::TcxIngress] {
        rivals.push(rival(place));
        wait_enforced(&scene);
    }
    wait_counted_as_enforced(&scene, true);
}

#[test]
fn a_removed_qdisc_or_filter_is_restored() {
    let scene = start("clsact", |_, _| ());
    let interface = scene.pod.interface();
    for removed in [
        format!("qdisc del dev {interface} clsact"),
        format!("filter del dev {interface} ingress"),
        format!("filter del dev {interface} egress"),
    ] {
        scene.lab.tc(&removed);
        wait_enforced(&scene);
    }
    wait_counted_as_enforced(&scene, true);
}

#[test]
fn with_an_immovable_filter_in_front_the_pod_counts_as_not_enforced() {
    let scene = start("clsact", |lab, pod| {
        let interface = pod.interface();
        lab.tc(&format!("qdisc add dev {interface} clsact"));
        // The kernel allows only one kind of filter per priority.
        lab.tc(&format!(
            "filter add dev {interface} ingress prio 1 protocol ip u32 match u32 0 0 flowid 1:1"
        ));
    });
    wait_problem(&scene, "u32 filter of priority 1");
    wait_counted_as_enforced(&scene, false);
    let interface = scene.pod.interface();
    scene.agent.logs_after(
        "that the problem is gone",
        || {
            let rival = format!("filter del dev {interface} ingress prio 1");
            scene.lab.tc(&rival);
        },
        |line| line.contains("the problem is gone") && line.contains("shop/cart"),
    );
    wait_enforced(&scene);
    wait_counted_as_enforced(&scene, true);
}

#[test]
fn a_program_that_insists_on_being_first_is_reported_and_does_not_keep_the_agent_busy() {
    let scene = start("tcx", |_, _| ());
    let mut rivals = Vec::new();
    eventually("the agent gives up and says so", || {
        rivals.push(Rival::attach(
            scene.lab.node(),
            scene.pod.interface(),
            Place::TcxIngress,
            Rival::OK,
        ));
        thread::sleep(Duration::from_millis(500));
        let problem = scene.lab.status_of(&scene.pod)["problem"].clone();
        holds(
            problem
                .as_str()
                .is_some_and(|problem| problem.contains("insists")),
        )
    });
    let moved = scene.lab.metrics().find("egress_agent_hooks_moved_total");
    assert!((1.0..=5.0).contains(&moved), "moved {moved} times");
    wait_counted_as_enforced(&scene, false);
    drop(rivals);
    wait_counted_as_enforced(&scene, true);
    wait_enforced(&scene);
}

#[test]
fn programs_that_see_packets_before_the_verdict_are_reported_and_enforcement_goes_on() {
    let scene = start("auto", |_, _| ());
    let interface = scene.pod.interface();
    let quiet = || {
        eventually("nothing is wrong", || {
            holds(scene.lab.status_of(&scene.pod)["problem"].is_null())
        });
    };
    quiet();
    // A packet socket as tcpdump opens it.
    let capture = Tap::open(scene.lab.node(), interface);
    wait_problem(
        &scene,
        &format!("a packet socket reads on interface {interface}"),
    );
    wait_counted_as_enforced(&scene, true);
    wait_enforced(&scene);
    drop(capture);
    quiet();

    let program = Rival::attach(scene.lab.node(), interface, Place::Xdp, Rival::XDP_PASS);
    wait_problem(&scene, "an XDP program");
    wait_counted_as_enforced(&scene, true);
    wait_enforced(&scene);
    drop(program);
    quiet();

    // A packet socket on another interface is no problem of this pod.
    let other = Tap::open(scene.lab.node(), "uplink");
    scene.agent.logs_after(
        "what it says of a capture on all interfaces",
        || {
            let all = scene.lab.node().run(|| {
                socket2::Socket::new(
                    socket2::Domain::PACKET,
                    socket2::Type::RAW,
                    // `ETH_P_ALL`, in network byte order.
                    Some(socket2::Protocol::from(i32::from(3u16.to_be()))),
                )
            });
            let all = all.expect("a packet socket");
            eventually("status reports it for the node", || {
                let (_, status) = scene.lab.ask_json(&["status"]);
                let problems = status["problems"].as_array()?.clone();
                holds(
                    problems
                        .iter()
                        .any(|problem| problem["about"] == "packet sockets"),
                )
            });
            drop(all);
        },
        |line| line.contains("packet sockets") && line.contains("every interface"),
    );
    quiet();
    drop(other);
}

#[test]
fn packets_taken_before_any_hook_are_noticed_by_probes() {
    for attach in ["tcx", "clsact"] {
        let scene = start(attach, |_, _| ());
        wait_counted_as_enforced(&scene, true);
        let rival = Rival::attach(
            scene.lab.node(),
            scene.pod.interface(),
            Place::Xdp,
            Rival::XDP_DROP,
        );
        wait_problem(&scene, "probes");
        wait_counted_as_enforced(&scene, false);
        drop(rival);
        wait_counted_as_enforced(&scene, true);
        wait_enforced(&scene);
    }
}
