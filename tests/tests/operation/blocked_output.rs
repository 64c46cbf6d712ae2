//! Standard output and standard error that nobody reads, and pods that try to fill them.

use std::net::UdpSocket;

use egress_tests::{
    Agent, Lab, Pod,
    addresses::{RESOLVER, server},
    dns::{RecordType, question},
    eventually, holds,
    observed::HTTP,
};
use nix::sys::socket::{setsockopt, sockopt};

/// More than the pipes and the agent's own queues hold.
const FLOOD: u32 = 200_000;

struct Scene {
    agent: Agent,
    greedy: Pod,
    neighbour: Pod,
    lab: Lab,
}

impl Scene {
    /// Both pods are enforced, and nobody reads the agent's output.
    #[track_caller]
    fn unread(environment: &[(&str, &str)]) -> Self {
        let (lab, [greedy, neighbour]) = Self::pods();
        let agent = lab.spawn_agent_unread(environment);
        eventually("both pods are enforced", || {
            let text = lab.ask(&["status"]).stdout;
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines = text.lines().filter(|line| line.contains("enforce"));
            holds(lines.filter(|line| line.contains("shop/")).count() == 2)
        });
        Self {
            agent,
            greedy,
            neighbour,
            lab,
        }
    }

    #[track_caller]
    fn pods() -> (Lab, [Pod; 2]) {
        let lab = Lab::builder().config("http", HTTP).build();
        lab.dns().addresses("new.test", &[server(11)]);
        let pods = lab.pods_of_shop(["greedy", "neighbour"]);
        (lab, pods)
    }

    /// Asserts that the neighbour's DNS and an edit of its policy work.
    #[track_caller]
    fn assert_neighbour_unaffected(&self) {
        let _web = self.lab.serve_tcp(443);
        assert_eq!(self.neighbour.lookup("shop.test"), [server(10)]);
        self.neighbour.talks_tcp((server(10), 443));
        self.lab
            .write_pod(&self.neighbour, &[("allow", "shop.test:443 new.test:443")]);
        eventually("the edit is in force", || {
            holds(self.neighbour.lookup("new.test") == [server(11)])
        });
        self.neighbour.talks_tcp((server(11), 443));
    }
}

#[test]
fn a_log_that_nobody_reads_stops_neither_dns_nor_policy_edits() {
    // At this level each malformed query is a log line.
    let mut scene = Scene::unread(&[("RUST_LOG", "debug")]);
    let socket = scene.greedy.udp_socket((RESOLVER, 53));
    let lost = "egress_agent_log_lines_lost_total";
    for number in 0..FLOOD {
        socket.send(b"no question").expect("send a datagram");
        if number % 20_000 == 0 {
            assert_eq!(scene.neighbour.lookup("shop.test"), [server(10)]);
        }
    }
    scene.assert_neighbour_unaffected();
    // The agent may still be reading the messages of the flood.
    eventually("log lines are lost", || {
        for _ in 0..1000 {
            socket.send(b"no question").expect("send a datagram");
        }
        holds(scene.lab.metrics().get(lost) > 0.0)
    });

    // When the log is read again, it reports the lost lines.
    scene.agent.read_output();
    let line = scene.agent.wait_log("that lines were lost", |line| {
        line.contains("log lines were lost")
    });
    assert!(line.contains("lines="), "{line}");
    assert!(scene.agent.stop().success());
}

#[test]
fn denial_lines_that_nobody_reads_stop_neither_dns_nor_policy_edits() {
    let mut scene = Scene::unread(&[]);
    let socket = scene
        .greedy
        .netns()
        .run(|| UdpSocket::bind((scene.greedy.ipv4(), 0)))
        .expect("a UDP socket in a pod");
    let denied =
        "egress_agent_denials_total{event=\"denied\",namespace=\"shop\",reason=\"no_rule\"}";
    // Each destination has a line of its own; together they exceed a pipe's capacity.
    eventually("a thousand denials are counted", || {
        for port in 1000..1250 {
            socket.send_to(b"denied", (server(99), port)).expect("send");
        }
        holds(scene.lab.metrics().find(denied) >= 1000.0)
    });
    scene.assert_neighbour_unaffected();
    scene.agent.read_output();
    scene.agent.wait_denial("the first", |denial| {
        denial.of(&scene.greedy) && denial.dst_ip == Some(server(99))
    });
    assert!(scene.agent.stop().success());
}

#[test]
fn the_agent_ends_when_nobody_reads_its_output() {
    let mut scene = Scene::unread(&[("RUST_LOG", "debug")]);
    let socket = scene.greedy.udp_socket((RESOLVER, 53));
    let lost = "egress_agent_log_lines_lost_total";
    eventually("its log is full", || {
        for _ in 0..1000 {
            socket.send(b"no question").expect("send a datagram");
        }
        holds(scene.lab.metrics().find(lost) > 0.0)
    });
    assert!(scene.agent.stop().success());
}

#[test]
fn datagrams_with_segmentation_offload_are_denied_before_they_are_held() {
    const LENGTH: usize = 3000;
    let (lab, [greedy, neighbour]) = Scene::pods();
    let agent = lab.start_agent(&[&greedy, &neighbour]);
    // An allowed query, with padding (RFC 7830) that makes it too long for the interface.
    let mut all = question(1, "shop.test", RecordType::A);
    let padding = LENGTH - all.len() - 4;
    let data = all.len() - 2;
    all[data..].copy_from_slice(&(padding as u16 + 4).to_be_bytes());
    all.extend([0, 12]);
    all.extend((padding as u16).to_be_bytes());
    all.resize(LENGTH, 0);
    let socket = greedy.udp_socket((RESOLVER, 53));
    setsockopt(&socket, sockopt::UdpGsoSegment, &1000).expect("UDP_SEGMENT, Linux 4.18");
    for _ in 0..1000 {
        socket.send(&all).expect("send three datagrams");
    }
    agent.wait_denial("the queries", |denial| {
        denial.is(&greedy, "dns_malformed", RESOLVER, 53)
    });
    assert_eq!(neighbour.lookup("shop.test"), [server(10)]);
    assert_eq!(lab.dns().queries_for("shop.test"), 1, "the neighbour's");
    assert!(lab.metrics().get("egress_agent_frames_unsent_total") < 1.0);
    assert!(!agent.stderr().contains("put back"), "{}", agent.stderr());
    // A single query passes.
    greedy.lookup("shop.test");
}
