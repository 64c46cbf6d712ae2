//! Denial lines and other reports for people.

use std::{collections::BTreeSet, net::IpAddr};

use egress_tests::{
    DEADLINE, Lab, SHORT,
    addresses::{RESOLVER, numbered, server},
    eventually,
    frames::{self, Tap},
    holds,
};
use serde_json::Value;

/// The keys of a denial line, as documented.
const KEYS: [&str; 21] = [
    "time",
    "event",
    "verdict",
    "reason",
    "node",
    "namespace",
    "pod",
    "uid",
    "protocol",
    "src_ip",
    "src_port",
    "dst_ip",
    "dst_port",
    "dst_names",
    "rule",
    "policy",
    "closed_by",
    "count",
    "connections",
    "first",
    "last",
];

fn keys(line: &Value) -> BTreeSet<&str> {
    line.as_object()
        .expect("a line is an object")
        .keys()
        .map(String::as_str)
        .collect()
}

/// `2026-11-20T10:11:12.345Z`
fn is_time(text: &str) -> bool {
    let pattern = "dddd-dd-ddTdd:dd:dd.dddZ";
    text.len() == pattern.len()
        && text
            .bytes()
            .zip(pattern.bytes())
            .all(|(found, expected)| match expected {
                b'd' => found.is_ascii_digit(),
                other => found == other,
            })
}

#[test]
fn a_denial_line_has_pod_destination_and_reason() {
    let lab = Lab::new();
    lab.dns().addresses("shop.test", &[server(10)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    pod.lookup("shop.test");
    let denial = agent.denies_tcp(&pod, (server(10), 80), "port_not_allowed");

    assert_eq!(keys(&denial.line), KEYS.into_iter().collect());
    assert_eq!(
        (denial.event.as_str(), denial.verdict.as_str()),
        ("denied", "dropped")
    );
    assert_eq!((denial.node.as_str(), denial.uid), ("n1", pod.uid()));
    assert_eq!(denial.src_ip, Some(pod.ipv4().into()));
    assert!(denial.src_port.is_some_and(|port| port != 0));
    assert_eq!(denial.dst_names, ["shop.test"]);
    assert_eq!(denial.rule, None);
    assert_eq!(denial.count, 1);
    for time in [&denial.time, &denial.first, &denial.last] {
        assert!(is_time(time), "{time}");
    }
    assert!(denial.first <= denial.last);
}

#[test]
fn a_denied_query_has_its_name_and_type() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443"), ("deny", "gist.test")]);
    let agent = lab.start_agent(&[&pod]);
    let (_, unlisted) = agent.denies_name(&pod, "evil.test");
    let (_, listed) = agent.denies_name(&pod, "gist.test");

    let mut expected: BTreeSet<_> = KEYS.into_iter().filter(|k| *k != "dst_port").collect();
    expected.extend(["dns_name", "dns_type"]);
    assert_eq!(keys(&unlisted.line), expected);
    assert_eq!(unlisted.dns_type.as_deref(), Some("A"));
    assert_eq!(
        (unlisted.protocol.as_deref(), unlisted.dst_ip),
        (Some("udp"), Some(RESOLVER))
    );
    assert_eq!(unlisted.rule, None);
    assert_eq!(listed.rule.as_deref(), Some("gist.test"));
}

#[test]
fn repeated_denials_are_folded_into_a_count() {
    const REPEATS: u64 = 20;
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let mut agent = lab.start_agent(&[&pod]);
    let socket = pod.udp_socket((server(9), 80));
    for _ in 0..REPEATS {
        socket.send(b"hello").expect("send a datagram");
    }
    let line = agent.wait_denial("the datagrams", |d| d.is(&pod, "no_rule", server(9), 80));
    assert!(line.count > 1, "each packet has a line of its own");
    assert!(agent.stop().success());
    let total: u64 = agent.denials().iter().map(|d| d.count).sum();
    assert_eq!(total, REPEATS, "{:?}", agent.denials());
}

#[test]
fn a_flood_from_one_pod_does_not_hide_another_pods_denials() {
    const FLOOD: u32 = 20_000;
    let lab = Lab::new();
    let (loud, quiet) = (lab.pod("shop", "loud"), lab.pod("shop", "quiet"));
    for pod in [&loud, &quiet] {
        lab.write_pod(pod, &[("allow", "shop.test:443")]);
    }
    let mut agent = lab.start_agent(&[&loud, &quiet]);
    let tap = Tap::open(loud.netns(), "eth0");
    let own: IpAddr = loud.ipv4().into();
    let flood = |range: std::ops::Range<u32>| {
        for n in range {
            tap.send(&frames::udp(&loud, (own, 7), (numbered(n), 80), b"flood"));
        }
    };
    flood(0..FLOOD / 2);
    assert!(!quiet.echo_udp((server(9), 80), b"hello", SHORT));
    flood(FLOOD / 2..FLOOD);
    agent.wait_denial("the quiet pod's", |d| {
        d.is(&quiet, "no_rule", server(9), 80)
    });
    agent.wait_event("denials_lost", |line| line["pod"] == "loud");
    assert!(agent.stop().success());

    let reported: u64 = agent
        .denials()
        .iter()
        .filter(|d| d.of(&loud))
        .map(|d| d.count)
        .sum();
    let lost: u64 = agent
        .events("denials_lost")
        .iter()
        .filter(|line| line["pod"] == "loud")
        .map(|line| line["count"].as_u64().expect("a count"))
        .sum();
    assert_eq!(
        reported + lost,
        u64::from(FLOOD),
        "{reported} reported and {lost} lost"
    );
}

#[test]
fn a_denial_line_appears_while_the_program_still_tries() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    std::thread::scope(|scope| {
        let trying = scope.spawn(|| pod.connect_tcp((server(9), 80), DEADLINE / 2));
        agent.wait_denial("the first SYN", |d| d.is(&pod, "no_rule", server(9), 80));
        assert!(
            !trying.is_finished(),
            "the line came only after the program had given up"
        );
        // Retransmissions belong to the same line.
        eventually("a SYN is sent again", || {
            holds(pod.syn_retransmissions() > 0)
        });
        let lines = agent.denials();
        assert_eq!(
            lines
                .iter()
                .filter(|d| d.is(&pod, "no_rule", server(9), 80))
                .count(),
            1
        );
        assert!(trying.join().expect("the trying thread").is_err());
    });
}

#[test]
fn the_datapath_log_is_off_by_default() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    agent.denies_tcp(&pod, (server(9), 80), "no_rule");
    assert!(!agent.stderr().contains("from_pod:"));
    drop(agent);

    let agent = lab.start_agent_with(&["--datapath-log"], &[&pod]);
    agent.denies_tcp(&pod, (server(9), 80), "no_rule");
    agent.wait_log("the packet's way", |line| {
        line.contains("from_pod:") && line.contains("203.0.113.9 port 80")
    });
}
