//! `defaultMode: audit`: every packet is judged and reported, and only pods with an explicit `mode: enforce`
//! are enforced.

use egress_tests::{
    Agent, Builder, DEADLINE, Denial, Lab, Pod, SHORT, addresses::server, echo_on, eventually,
    exchange, holds,
};
use serde_json::json;

const POWERS: [&str; 3] = ["grant", "narrow", "ignore"];
/// The entries of the lists in these tests.
const LISTED: &str = "203.0.113.10:443 203.0.113.12:443";

fn audit(pod_annotations: &str) -> Builder {
    Lab::builder()
        .config("defaultMode", "audit")
        .config("podAnnotations", pod_annotations)
}

/// Asserts that the pod connects to this server, and that the agent reports that it would deny it.
#[track_caller]
fn assert_audited(agent: &Agent, pod: &Pod, last: u8, reason: &str) {
    let to = server(last);
    pod.talks_tcp((to, 443));
    let line = agent.wait_denial(&format!("{reason} of {to}"), |denial| {
        denial.is(pod, reason, to, 443)
    });
    assert_eq!(
        (line.event.as_str(), line.verdict.as_str()),
        ("would_deny", "audited")
    );
}

/// Asserts that the pod connects to this server, and that the agent reports nothing.
#[track_caller]
fn assert_allowed(agent: &Agent, pod: &Pod, last: u8) {
    let to = server(last);
    pod.talks_tcp((to, 443));
    // When a later connection has its line, a line for this one would be there too.
    assert_audited(agent, pod, last + 1, "no_rule");
    let is_denied = |denial: &Denial| denial.of(pod) && denial.dst_ip == Some(to);
    assert!(!agent.denials().iter().any(is_denied), "{to} is allowed");
}

#[test]
fn with_default_mode_audit_a_list_stops_nothing() {
    for power in POWERS {
        let lab = audit(power).build();
        let _web = lab.serve_tcp(443);
        lab.dns().addresses("elsewhere.test", &[server(30)]);
        let own = lab.pod("shop", "own");
        lab.write_pod(&own, &[("allow", LISTED)]);
        let denies = lab.pod("shop", "denies");
        lab.write_pod(&denies, &[("deny", "203.0.113.99")]);
        lab.write_namespace("listed", &[("allow", LISTED)]);
        let of_namespace = lab.pod("listed", "plain");
        lab.write_pod(&of_namespace, &[]);
        let agent = lab.start_agent(&[&own, &denies, &of_namespace]);

        // Under `narrow` and `ignore` the pod is judged as one to which its namespace grants nothing.
        if power == "grant" {
            assert_allowed(&agent, &own, 10);
        } else {
            assert_audited(&agent, &own, 10, "no_rule");
        }
        assert_audited(&agent, &own, 20, "no_rule");
        assert_eq!(own.lookup("elsewhere.test"), [server(30)], "{power}");
        agent.wait_denial("the query's name", |denial| {
            denial.is_question(&own, "elsewhere.test") && denial.event == "would_deny"
        });
        assert_audited(&agent, &denies, 99, "deny_rule");
        assert_allowed(&agent, &of_namespace, 10);
        for pod in [&own, &denies, &of_namespace] {
            assert_eq!(lab.status_of(pod)["mode"], "audit", "{power}");
        }
    }
}

#[test]
fn a_pods_own_deny_does_not_hide_denials_of_a_locked_down_cluster() {
    for power in ["narrow", "ignore"] {
        let lab = audit(power).build();
        let _web = lab.serve_tcp(443);
        let pod = lab.pod("shop", "denies");
        lab.write_pod(&pod, &[("deny", "203.0.113.99")]);
        let agent = lab.start_agent(&[&pod]);
        assert_audited(&agent, &pod, 20, "no_rule");
    }
}

#[test]
fn with_default_mode_audit_only_an_explicit_mode_enforces() {
    for power in POWERS {
        let lab = audit(power).build();
        let _web = lab.serve_tcp(443);
        lab.write_namespace("closed", &[("allow", LISTED), ("mode", "enforce")]);
        let by_namespace = lab.pod("closed", "plain");
        lab.write_pod(&by_namespace, &[]);
        lab.write_namespace("listed", &[("allow", LISTED)]);
        let by_itself = lab.pod("listed", "own");
        lab.write_pod(&by_itself, &[("mode", "enforce")]);
        let agent = lab.start_agent(&[&by_namespace, &by_itself]);
        for pod in [&by_namespace, &by_itself] {
            pod.talks_tcp((server(10), 443));
            agent.denies_tcp(pod, (server(20), 443), "no_rule");
        }
    }
}

#[test]
fn with_default_mode_audit_unreadable_annotations_stop_nothing() {
    let lab = audit("narrow").build();
    let _web = lab.serve_tcp(443);
    let typo = lab.pod("shop", "typo");
    lab.write_pod(&typo, &[("allow", "shop.test:https")]);
    let unknown = lab.pod("shop", "unknown");
    lab.write_pod(&unknown, &[("alow", LISTED), ("mode", "enforced")]);
    let enforced = lab.pod("shop", "enforced");
    lab.write_pod(
        &enforced,
        &[("allow", "shop.test:https"), ("mode", "enforce")],
    );
    lab.write_namespace("closed", &[("mode", "enforce")]);
    let by_namespace = lab.pod("closed", "typo");
    lab.write_pod(&by_namespace, &[("allow", "shop.test:https")]);
    let agent = lab.start_agent(&[&typo, &unknown, &enforced, &by_namespace]);

    for pod in [&typo, &unknown] {
        assert_audited(&agent, pod, 10, "policy_unreadable");
        let text = format!("{}/{}", pod.namespace(), pod.name());
        agent.wait_log("the problem and its consequence", |line| {
            line.contains(&text) && line.contains("nothing is stopped (defaultMode: audit)")
        });
    }
    for pod in [&enforced, &by_namespace] {
        agent.denies_tcp(pod, (server(10), 443), "policy_unreadable");
    }
}

#[test]
fn an_unreadable_edit_keeps_the_last_policy_and_follows_a_change_of_the_default_mode() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", LISTED)]);
    let agent = lab.start_agent(&[&pod]);
    agent.logs_after(
        "that the edit cannot be read",
        || lab.write_pod(&pod, &[("allow", "shop.test:https")]),
        |line| line.contains("the last good policy stays"),
    );
    agent.denies_tcp(&pod, (server(20), 443), "no_rule");

    lab.edit_config("defaultMode", "audit");
    agent.applies_policy_after(&pod, || agent.reload());
    assert_audited(&agent, &pod, 21, "no_rule");
    assert_allowed(&agent, &pod, 10);
}

#[test]
fn a_cluster_moves_from_the_base_through_audit_to_lockdown() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    let listed = lab.pod("shop", "listed");
    lab.write_pod(&listed, &[("allow", LISTED)]);
    let kept = lab.pod("shop", "kept");
    lab.write_pod(&kept, &[("allow", LISTED), ("mode", "enforce")]);
    let plain = lab.pod("shop", "plain");
    lab.write_pod(&plain, &[]);
    let agent = lab.start_agent(&[&listed, &kept]);
    let mut open = listed.talks_tcp((server(10), 443));
    agent.denies_tcp(&listed, (server(20), 443), "no_rule");
    plain.talks_tcp((server(20), 443));

    // The audit overlay: a pod's entries count as far as its namespace's list covers them.
    lab.edit_config("defaultMode", "audit");
    lab.edit_config("podAnnotations", "narrow");
    agent.applies_policy_after(&listed, || agent.reload());
    agent.wait_enforcing(&plain);
    for pod in [&listed, &plain] {
        assert_audited(&agent, pod, 10, "no_rule");
        assert_audited(&agent, pod, 30, "no_rule");
    }
    assert!(
        exchange(&mut open, b"audited", DEADLINE),
        "the open connection was cut"
    );
    agent.denies_tcp(&kept, (server(30), 443), "no_rule");

    // Add the reported destinations to the namespace's list.
    agent.applies_policy_after(&listed, || {
        lab.write_namespace("shop", &[("allow", LISTED)]);
    });
    assert_allowed(&agent, &listed, 12);
    assert_eq!(lab.status_of(&plain)["mode"], "audit");

    lab.edit_config("defaultMode", "enforce");
    agent.applies_policy_after(&listed, || agent.reload());
    assert!(
        exchange(&mut open, b"locked down", DEADLINE),
        "the open connection was cut"
    );
    eventually("all pods are enforced", || {
        let mode = |pod: &&Pod| lab.status_of(pod)["mode"] == "enforce";
        holds([&listed, &kept, &plain].iter().all(mode))
    });
    for pod in [&listed, &kept, &plain] {
        pod.talks_tcp((server(10), 443));
        assert!(pod.connect_tcp((server(40), 443), SHORT).is_err());
    }
}

#[test]
fn a_pod_with_too_many_addresses_is_audited_in_audit_mode() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    let own = [pod.ipv4().to_string(), pod.ipv6().to_string()];
    let others = (1..=7).map(|last| format!("10.9.9.{last}"));
    let addresses: Vec<_> = own
        .into_iter()
        .chain(others)
        .map(|ip| json!({ "ip": ip }))
        .collect();
    let manifest = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod.name(),
            "namespace": pod.namespace(),
            "uid": pod.uid(),
            "annotations": {
                "egress-agent.dev/allow": LISTED,
                "egress-agent.dev/mode": "audit",
                "egress-agent.dev/interface": pod.interface(),
            },
        },
        "spec": { "containers": [{ "name": "main", "image": "example.com/main" }] },
        "status": { "podIP": pod.ipv4(), "podIPs": addresses },
    });
    lab.write_file(&lab.pod_file(&pod), manifest.to_string().as_bytes());
    let agent = lab.start_agent(&[&pod]);
    assert_audited(&agent, &pod, 20, "policy_unreadable");
}

#[test]
fn a_denial_line_counts_connections() {
    let lab = audit("grant").build();
    let _servers = [lab.serve_tcp(443)];
    let _echo = lab.serve_udp(5000);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "")]);
    let mut agent = lab.start_agent(&[&pod]);
    for _ in 0..3 {
        let mut stream = pod.talks_tcp((server(20), 443));
        for _ in 0..5 {
            assert!(exchange(&mut stream, b"again", DEADLINE));
        }
    }
    for _ in 0..2 {
        let socket = pod.udp_socket((server(20), 5000));
        for _ in 0..4 {
            assert!(echo_on(&socket, b"again", DEADLINE));
        }
    }
    for _ in 0..2 {
        assert!(pod.ping(server(20), DEADLINE));
    }
    // Pending denials get their lines when the agent stops.
    assert!(agent.stop().success());
    let counted = |protocol: &str| {
        let denials = agent.denials();
        let lines = denials.iter().filter(|denial| {
            denial.dst_ip == Some(server(20)) && denial.protocol.as_deref() == Some(protocol)
        });
        lines.fold((0, 0), |(packets, connections), line| {
            (packets + line.count, connections + line.connections)
        })
    };
    let (segments, connections) = counted("tcp");
    assert!(segments > 3 * 5, "{segments}");
    assert_eq!(connections, 3);
    assert_eq!(counted("udp"), (8, 2));
    assert_eq!(counted("icmp"), (2, 1));
}

#[test]
fn a_retransmitted_syn_counts_as_the_same_connection() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "")]);
    let mut agent = lab.start_agent(&[&pod]);
    // The kernel retransmits the first SYN after a second.
    let patience = std::time::Duration::from_millis(1500);
    assert!(pod.connect_tcp((server(20), 443), patience).is_err());
    assert!(agent.stop().success());
    let lines = agent.denials();
    let packets: u64 = lines.iter().map(|line| line.count).sum();
    let connections: u64 = lines.iter().map(|line| line.connections).sum();
    assert!(packets >= 2, "{lines:?}");
    assert_eq!(connections, 1, "{lines:?}");
}
