//! DNS over TCP: the agent allows and refuses the same as over UDP.

use std::{net::IpAddr, process::Command};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod,
    addresses::{RESOLVER, RESOLVER6, numbered, server, server6},
    dns::{
        DnsStream, RecordType, ResponseCode, Send, address, framed, framed_query, question, text,
    },
    eventually,
    frames::{self, Tap},
};
use etherparse::ip_number;

/// A pod that may reach `shop.test`, and a server there.
struct Scene {
    _web: egress_tests::TcpEcho,
    agent: Agent,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        Self::with(&[])
    }

    /// A scene with further annotations.
    #[track_caller]
    fn with(annotations: &[(&str, &str)]) -> Self {
        let lab = Lab::new();
        let web = lab.serve_tcp(443);
        lab.dns().addresses("shop.test", &[server(10), server6(10)]);
        lab.dns().addresses("evil.test", &[server(66)]);
        let pod = lab.pod("shop", "cart");
        let allow = ("allow", "shop.test:443 *.many.test:443");
        lab.write_pod(&pod, &[&[allow], annotations].concat());
        let agent = lab.start_agent(&[&pod]);
        Self {
            _web: web,
            agent,
            pod,
            lab,
        }
    }

    /// Runs a program in the pod, which must succeed; returns its output.
    #[track_caller]
    fn output_of(&self, command: &mut Command) -> String {
        let output = self.pod.netns().run(|| command.output());
        let output = output.unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{command:?}: {}\n{printed}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        printed
    }

    #[track_caller]
    fn dig(&self, arguments: &[&str]) -> String {
        self.output_of(
            Command::new("dig")
                .arg(format!("@{RESOLVER}"))
                .args(arguments),
        )
    }

    fn asked_over_tcp(&self, name: &str) -> usize {
        let questions = self.lab.dns().questions();
        questions
            .iter()
            .filter(|q| q.tcp && q.name.eq_ignore_ascii_case(name))
            .count()
    }

    #[track_caller]
    fn learned(&self) -> Vec<IpAddr> {
        self.lab.allowed(&self.pod).into_keys().collect()
    }
}

#[test]
fn dig_over_tcp_allows_exactly_the_addresses_it_prints() {
    let scene = Scene::new();
    let printed = scene.dig(&["+tcp", "+short", "shop.test"]);
    assert_eq!(printed.trim(), server(10).to_string());
    assert_eq!(scene.learned(), [server(10)]);
    scene.pod.talks_tcp((server(10), 443));
    let printed = scene.output_of(Command::new("dig").arg(format!("@{RESOLVER6}")).args([
        "+tcp",
        "+short",
        "shop.test",
        "AAAA",
    ]));
    assert_eq!(printed.trim(), server6(10).to_string());
    scene.pod.talks_tcp((server6(10), 443));
    assert_eq!(scene.pod.syn_retransmissions(), 0);
    scene
        .agent
        .denies_tcp(&scene.pod, (server(66), 443), "address_not_learned");
    assert_eq!(scene.asked_over_tcp("shop.test"), 2);
}

#[test]
fn a_query_may_be_split_anywhere() {
    let scene = Scene::new();
    let bytes = framed_query(7, "shop.test");
    for no_delay in [true, false] {
        for at in 1..bytes.len() {
            let mut stream = DnsStream::open(&scene.pod, RESOLVER);
            stream.tcp.set_nodelay(no_delay).expect("TCP_NODELAY");
            let (first, second) = bytes.split_at(at);
            stream.write(first);
            stream.write(second);
            assert_eq!(stream.expect(7).addresses, [server(10)], "split at {at}");
        }
    }
    let mut stream = DnsStream::open(&scene.pod, RESOLVER);
    for byte in bytes {
        stream.write(&[byte]);
    }
    assert_eq!(stream.expect(7).addresses, [server(10)], "byte by byte");
    assert!(scene.agent.denials().is_empty());
}

#[test]
fn a_response_may_be_split_anywhere() {
    let scene = Scene::new();
    scene.lab.dns().on("*.many.test", |asked| {
        let bytes = asked.name[1..]
            .split('.')
            .next()
            .and_then(|n| n.parse().ok());
        let pieces = bytes.expect("a number in the name");
        vec![Send::answer(asked, &[address(server(10)), text("and more")]).in_pieces(pieces)]
    });
    let mut stream = DnsStream::open(&scene.pod, RESOLVER);
    for pieces in 1..40 {
        stream.ask(pieces, &format!("p{pieces}.many.test"));
        assert_eq!(stream.expect(pieces).addresses, [server(10)]);
    }
    assert_eq!(scene.learned(), [server(10)]);
}

#[test]
fn queries_may_be_sent_together() {
    let scene = Scene::new();
    scene.lab.dns().numbered("many.test");
    let mut stream = DnsStream::open(&scene.pod, RESOLVER);
    let names: Vec<String> = (0..100).map(|n| format!("n{n}.many.test")).collect();
    let mut bytes = Vec::new();
    for (id, name) in (0..).zip(&names) {
        bytes.extend(framed_query(id, name));
    }
    stream.write(&bytes);
    for id in 0..100 {
        let answer = stream.expect(id);
        assert_eq!(answer.addresses, [numbered(id.into())]);
        assert!(scene.learned().contains(&numbered(id.into())));
    }
    assert_eq!(scene.learned().len(), 100);
}

#[test]
fn a_response_of_64_kib_arrives_and_its_addresses_are_learned() {
    const ADDRESSES: u32 = 2660;
    let scene = Scene::new();
    scene.lab.dns().on("shop.test", |asked| {
        if !asked.tcp {
            return vec![Send::truncated(asked)];
        }
        let all: Vec<_> = (0..ADDRESSES).map(|n| address(numbered(n))).collect();
        vec![Send::answer(asked, &all)]
    });
    for _ in 0..3 {
        let mut stream = DnsStream::open(&scene.pod, RESOLVER);
        stream.ask(1, "shop.test");
        let answer = stream.expect(1);
        assert_eq!(answer.addresses.len(), ADDRESSES as usize);
        assert!(answer.bytes > 64_000, "{} bytes", answer.bytes);
    }
    assert_eq!(scene.learned().len(), ADDRESSES as usize);
}

#[test]
fn a_long_response_arrives_after_its_addresses_while_the_policy_changes() {
    const ADDRESSES: u32 = 2000;
    let scene = Scene::new();
    scene.lab.dns().on("shop.test", |asked| {
        let many = (1..ADDRESSES).map(|n| address(numbered(n)));
        let all: Vec<_> = many.chain([address(server(10))]).collect();
        vec![Send::answer(asked, &all)]
    });
    for edit in 0..10 {
        let mut stream = DnsStream::open(&scene.pod, RESOLVER);
        stream.ask(1, "shop.test");
        let allow = format!("shop.test:443 e{edit}.test:443");
        scene.lab.write_pod(&scene.pod, &[("allow", &allow)]);
        let answer = stream.expect(1);
        assert_eq!(answer.addresses.len(), ADDRESSES as usize);
        assert!(scene.pod.reaches(server(10)), "the last address is closed");
        assert_eq!(scene.learned().len(), ADDRESSES as usize);
    }
    assert!(scene.agent.denials().is_empty());
}

#[test]
fn a_refused_query_over_tcp_is_answered_on_the_node() {
    let scene = Scene::new();
    let printed = scene.dig(&["+tcp", "evil.test"]);
    assert!(
        printed.contains("status: NXDOMAIN") && printed.contains("EDE: 18"),
        "{printed}"
    );
    let printed = scene.dig(&["+tcp", "+keepopen", "evil.test", "shop.test", "other.test"]);
    assert_eq!(printed.matches("status: NXDOMAIN").count(), 2, "{printed}");
    assert!(printed.contains("203.0.113.10"), "{printed}");
    scene
        .agent
        .wait_denial("the query", |d| d.is_question(&scene.pod, "evil.test"));
    assert_eq!(scene.lab.dns().queries_for("evil.test"), 0);
    assert_eq!(scene.lab.dns().queries_for("other.test"), 0);
}

#[test]
fn refusals_are_interleaved_with_the_resolvers_responses() {
    let scene = Scene::new();
    scene.lab.dns().on("shop.test", |asked| {
        std::thread::sleep(std::time::Duration::from_millis(300));
        vec![Send::answer(asked, &[address(server(10))])]
    });
    let mut stream = DnsStream::open(&scene.pod, RESOLVER);
    let mut bytes = Vec::new();
    for (id, name) in [(1, "shop.test"), (2, "evil.test"), (3, "worse.test")] {
        bytes.extend(framed_query(id, name));
    }
    stream.write(&bytes);
    assert_eq!(stream.expect(2).code, ResponseCode::NXDomain);
    assert_eq!(stream.expect(3).code, ResponseCode::NXDomain);
    assert_eq!(stream.expect(1).addresses, [server(10)]);
    stream.ask(4, "evil.test");
    assert_eq!(stream.expect(4).code, ResponseCode::NXDomain);
    stream.ask(5, "shop.test");
    assert_eq!(stream.expect(5).addresses, [server(10)]);
    assert_eq!(scene.lab.dns().queries_for("shop.test"), 2);
    assert_eq!(scene.lab.dns().queries_for("evil.test"), 0);
}

#[test]
fn a_response_that_is_withheld_over_udp_is_withheld_over_tcp() {
    for (what, reason) in [
        ("another id", "dns_unsolicited"),
        ("another name", "dns_unsolicited"),
        ("a second answer", "dns_unsolicited"),
        ("a long one, in pieces", "dns_unsolicited"),
        ("cut short", "dns_malformed"),
        ("a question", "dns_malformed"),
    ] {
        let scene = Scene::new();
        scene.lab.dns().on("shop.test", move |asked| {
            let lie = Send::answer(asked, &[address(server(66))]);
            match what {
                "another id" => vec![lie.with_id(asked.id ^ 1)],
                "another name" => {
                    let mut other = asked.clone();
                    other.name = "other.test".to_owned();
                    vec![Send::answer(&other, &[address(server(66))])]
                }
                "a long one, in pieces" => vec![lie.with_id(asked.id ^ 1).in_pieces(32)],
                "a second answer" => vec![Send::answer(asked, &[]), lie],
                "cut short" => vec![lie.edited(|bytes| bytes.truncate(40))],
                _ => vec![lie.edited(|bytes| bytes[2] &= 0x7f)],
            }
        });
        let mut stream = DnsStream::open(&scene.pod, RESOLVER);
        stream.ask(1, "shop.test");
        if what == "a second answer" {
            stream.expect(1);
        }
        stream.assert_ends();
        scene
            .agent
            .wait_denial(what, |d| d.of(&scene.pod) && d.reason == reason);
        assert!(scene.learned().is_empty(), "{what}");
    }
}

#[test]
fn a_response_that_does_not_fit_the_allow_map_is_not_delivered() {
    let lab = Lab::builder().config("limits.addressesPerPod", 8).build();
    lab.dns().on("shop.test", |asked| {
        let all: Vec<_> = (0..9).map(|n| address(numbered(n))).collect();
        vec![Send::answer(asked, &all)]
    });
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    let mut stream = DnsStream::open(&pod, RESOLVER);
    stream.ask(1, "shop.test");
    stream.assert_ends();
    agent.wait_denial("the response", |d| {
        d.of(&pod) && d.reason == "allow_map_full"
    });
}

#[test]
fn a_response_over_tcp_to_a_query_over_udp_is_not_delivered() {
    let scene = Scene::new();
    scene.lab.dns().on("shop.test", |asked| {
        if !asked.tcp {
            return Vec::new();
        }
        let mut other = asked.clone();
        other.id = 77;
        vec![Send::answer(&other, &[address(server(66))])]
    });
    scene
        .pod
        .dns_socket()
        .ask(RESOLVER, 77, "shop.test", RecordType::A);
    let mut stream = DnsStream::open(&scene.pod, RESOLVER);
    stream.ask(1, "shop.test");
    stream.assert_ends();
    assert!(scene.learned().is_empty());
}

#[test]
fn bytes_that_are_not_a_query_stay_on_the_node() {
    let mut scene = Scene::new();
    let whole = question(9, "shop.test", RecordType::A);
    let mut two = whole.clone();
    two[5] = 2;
    for (what, bytes) in [
        ("two questions", framed(&two)),
        ("no DNS", framed(b"tunnel: 4a5f-data-data-data")),
        ("an empty message", vec![0, 0]),
        ("a long message", [&[0x20, 0], &[0x5a; 64][..]].concat()),
    ] {
        let uplink = Tap::open(scene.lab.outside(), "eth0");
        let mut stream = DnsStream::open(&scene.pod, RESOLVER);
        stream.write(&bytes);
        stream.assert_ends();
        let pod = scene.pod.ipv4().into();
        let last = uplink.receive(DEADLINE, |frame| {
            let message = &bytes[2..];
            assert!(
                message.is_empty() || !frame.windows(message.len()).any(|w| w == message),
                "{what} left the node"
            );
            frames::is(frame, pod, RESOLVER, ip_number::TCP) && frame[14 + 20 + 13] & 4 != 0
        });
        assert!(last.is_some(), "the resolver gets no RST");
    }
    assert!(scene.lab.dns().questions().is_empty());
    assert!(scene.agent.stop().success());
    let denials = scene.agent.denials();
    let reported = |reason| {
        let denials = denials.iter().filter(|d| d.reason == reason);
        denials.map(|d| d.count).sum::<u64>()
    };
    assert_eq!(reported("dns_malformed"), 3, "{denials:?}");
    assert_eq!(reported("dns_over_tcp"), 1, "{denials:?}");
}

#[test]
fn after_a_restart_clients_reconnect_at_once() {
    let mut scene = Scene::new();
    let mut stream = DnsStream::open(&scene.pod, RESOLVER);
    stream.ask(1, "shop.test");
    stream.expect(1);
    assert!(scene.agent.stop().success());
    scene.agent = scene.lab.start_agent(&[&scene.pod]);
    stream.ask(2, "shop.test");
    stream.assert_ends();
    let mut stream = DnsStream::open(&scene.pod, RESOLVER);
    stream.ask(3, "shop.test");
    assert_eq!(stream.expect(3).addresses, [server(10)]);
    assert_eq!(scene.asked_over_tcp("shop.test"), 2);
}

#[test]
fn in_audit_mode_tcp_connections_pass_and_denied_names_are_reported() {
    let scene = Scene::with(&[("mode", "audit")]);
    let mut stream = DnsStream::open(&scene.pod, RESOLVER);
    stream.ask(1, "shop.test");
    assert_eq!(stream.expect(1).addresses, [server(10)]);
    stream.ask(2, "evil.test");
    assert_eq!(stream.expect(2).addresses, [server(66)]);
    let denial = scene
        .agent
        .wait_denial("the query", |d| d.is_question(&scene.pod, "evil.test"));
    assert_eq!(denial.verdict, "audited");
    eventually("the audited response is learned", || {
        scene.learned().contains(&server(10)).then_some(())
    });
}
