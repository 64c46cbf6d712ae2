//! A pod whose network makes each delivered frame expensive for its sender, and the pod next to it.
#![expect(
    clippy::float_cmp,
    clippy::cast_precision_loss,
    reason = "metrics are floating-point numbers, and counts among them are exact"
)]

use std::time::Duration;

use egress_tests::{
    Lab, Pod,
    addresses::{RESOLVER, server},
    dns::{Answer, DnsSocket, RecordType, ResponseCode},
    observed::HTTP,
    rewritten::nft,
};

/// The number of responses for the slow pod that are queued at the same time.
const QUESTIONS: u16 = 24;

/// From now on each response costs the thread that delivers it a hundred million rules, more than half a
/// second: chains that jump to chains that jump.
#[track_caller]
fn slow_down_responses(pod: &Pod) {
    const FAN: usize = 10;
    const DEPTH: usize = 7;
    let mut commands = String::from("table ip slow {\n");
    for depth in (0..=DEPTH).rev() {
        let rule = if depth == DEPTH {
            "ip ttl 0 counter\n".to_owned()
        } else {
            format!("jump c{}\n", depth + 1)
        };
        commands.extend(["chain c", &depth.to_string(), " {\n"]);
        commands.push_str(&rule.repeat(FAN));
        commands.push_str("}\n");
    }
    commands += "chain in { type filter hook input priority 0;\n udp sport 53 ip ttl 1-255 jump c0\n }\n}\n";
    nft(pod.netns(), &commands);
}

#[track_caller]
fn restore_speed(pod: &Pod) {
    nft(pod.netns(), "delete table ip slow\n");
}

/// Appends the ids of the responses that have arrived.
fn arrived(socket: &DnsSocket, within: Duration, ids: &mut Vec<u16>) {
    while let Some((bytes, _)) = socket.receive(within) {
        ids.push(Answer::read(&bytes).message.metadata.id);
    }
}

#[test]
fn a_pod_that_takes_frames_slowly_delays_only_itself() {
    let lab = Lab::builder().config("http", HTTP).build();
    let _servers = [lab.serve_tcp(443), lab.serve_tcp(444)];
    let [slow, neighbour] = lab.pods_of_shop(["slow", "neighbour"]);
    let agent = lab.start_agent(&[&slow, &neighbour]);
    assert_eq!(neighbour.lookup("shop.test"), [server(10)]);
    slow_down_responses(&slow);
    let socket = slow.dns_socket();
    for id in 0..QUESTIONS {
        // These queries are refused, so the agent itself responds.
        socket.ask(RESOLVER, id, "evil.test", RecordType::A);
    }
    let mut ids = Vec::new();
    let (first, _) = socket.receive(egress_tests::DEADLINE).expect("a response");
    ids.push(Answer::read(&first).message.metadata.id);

    // While the other responses are queued, the neighbour sends more queries than the slow pod has, is
    // refused, and gets another policy...
    let mut beside = |what: &str| {
        arrived(&socket, Duration::from_millis(1), &mut ids);
        let came = ids.len();
        assert!(
            came < usize::from(QUESTIONS / 2),
            "{what} waited for {came} frames of the slow pod"
        );
    };
    for _ in 0..QUESTIONS {
        assert_eq!(neighbour.lookup("shop.test"), [server(10)]);
    }
    beside("questions");
    let refused = neighbour.resolve("evil.test", RecordType::A);
    assert_eq!(refused.code, ResponseCode::NXDomain);
    beside("a refusal");
    agent.applies_policy_after(&neighbour, || {
        lab.write_pod(&neighbour, &[("allow", "shop.test:443-444")]);
    });
    neighbour.talks_tcp((server(10), 444));
    beside("an edit");
    // ... and the agent responds to requests for its status.
    assert_eq!(lab.status_of(&neighbour)["mode"], "enforce");
    beside("status");
    assert_eq!(lab.metrics().get("egress_agent_slow_pods"), 1.0);
    agent.wait_log("which pod is slow", |line| {
        line.contains("takes frames slowly") && line.contains("pod=shop/slow")
    });

    // The slow pod gets its responses in order, and resolves as before when it takes frames quickly again.
    restore_speed(&slow);
    assert_eq!(slow.lookup("shop.test"), [server(10)]);
    slow.talks_tcp((server(10), 443));
    arrived(&socket, Duration::from_millis(1), &mut ids);
    assert!(ids.is_sorted(), "{ids:?}");
    assert!(!agent.stderr().contains("pod=shop/neighbour ifindex"));
}

#[test]
fn frames_beyond_a_slow_pods_queue_are_lost_for_that_pod_only() {
    // More than a queue holds according to docs/limits.md.
    const FLOOD: u16 = 2000;
    let lab = Lab::builder().config("http", HTTP).build();
    let _web = lab.serve_tcp(443);
    let [slow, neighbour] = lab.pods_of_shop(["slow", "neighbour"]);
    let agent = lab.start_agent(&[&slow, &neighbour]);
    slow_down_responses(&slow);
    let socket = slow.dns_socket();
    for id in 0..FLOOD {
        socket.ask(RESOLVER, id, "evil.test", RecordType::A);
    }
    agent.wait_log("whose frames are lost", |line| {
        line.contains("could not be put back") && line.contains("pod=shop/slow")
    });
    assert_eq!(neighbour.lookup("shop.test"), [server(10)]);
    neighbour.talks_tcp((server(10), 443));
    assert!(lab.metrics().get("egress_agent_frames_unsent_total") > 0.0);
    assert!(!agent.stderr().contains("lost pod=shop/neighbour"));
    restore_speed(&slow);
}

#[test]
fn several_slow_pods_do_not_occupy_all_sender_threads() {
    // More than there are sender threads.
    const SLOW: usize = 6;
    let lab = Lab::builder()
        .config("http", HTTP)
        .config("dns.learn", "agent")
        .build();
    let _web = lab.serve_tcp(443);
    let [once_slow, neighbour] = lab.pods_of_shop(["slow", "neighbour"]);
    let slow: Vec<Pod> = (0..SLOW)
        .map(|number| {
            let pod = lab.pod("shop", &format!("slow-{number}"));
            lab.write_pod(&pod, &[("allow", "shop.test:443")]);
            pod
        })
        .collect();
    let all: Vec<&Pod> = slow.iter().chain([&once_slow, &neighbour]).collect();
    let _agent = lab.start_agent(&all);
    // This pod has been slow, so a sender thread serves it from now on.
    slow_down_responses(&once_slow);
    assert_eq!(once_slow.lookup("shop.test"), [server(10)]);
    restore_speed(&once_slow);
    for pod in &slow {
        slow_down_responses(pod);
        assert_eq!(pod.lookup("shop.test"), [server(10)]);
    }
    let sockets: Vec<DnsSocket> = slow.iter().map(Pod::dns_socket).collect();
    for socket in &sockets {
        for id in 0..QUESTIONS {
            socket.ask(RESOLVER, id, "evil.test", RecordType::A);
        }
    }
    for _ in 0..QUESTIONS {
        for pod in [&once_slow, &neighbour] {
            assert_eq!(pod.lookup("shop.test"), [server(10)]);
        }
    }
    let mut ids = Vec::new();
    for socket in &sockets {
        arrived(socket, Duration::from_millis(1), &mut ids);
    }
    let came = ids.len();
    assert!(came < usize::from(QUESTIONS), "{came} frames came first");
    let metrics = lab.metrics();
    assert_eq!(metrics.get("egress_agent_slow_pods"), (SLOW + 1) as f64);
}
