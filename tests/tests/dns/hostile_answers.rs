//! Forged and malformed responses, and malformed queries.

use std::net::{IpAddr, SocketAddr};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod,
    addresses::{RESOLVER, STRANGER, server, server6},
    dns::{DnsSocket, Question, RecordType, Send, address, cname, question, text},
    exchange,
    frames::{self, Tap},
};
use etherparse::ip_number;

const LIE: u8 = 66;
const TRUTH: u8 = 10;

/// A second configured resolver.
const OTHER_RESOLVER: &str = "10.99.0.54";

/// A pod that may reach `shop.test` and `next.test`, and the socket from which it sends queries.
struct Scene {
    agent: Agent,
    socket: DnsSocket,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new(handler: impl Fn(&Question) -> Vec<Send> + std::marker::Send + Sync + 'static) -> Self {
        let lab = Lab::builder()
            .config(
                "dns.resolvers",
                vec![RESOLVER.to_string(), OTHER_RESOLVER.to_owned()],
            )
            .build();
        lab.dns().on("shop.test", handler);
        lab.dns().addresses("next.test", &[server(20)]);
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", "shop.test:443 next.test:443")]);
        let agent = lab.start_agent(&[&pod]);
        let socket = pod.dns_socket();
        Self {
            agent,
            socket,
            pod,
            lab,
        }
    }

    fn ask(&self) {
        self.socket.ask(RESOLVER, 1, "shop.test", RecordType::A);
    }

    /// Queries `next.test` and asserts that its response is the next message that the pod receives: no
    /// earlier message was delivered late.
    #[track_caller]
    fn assert_nothing_was_delivered(&self) {
        self.socket.ask(RESOLVER, 2, "next.test", RecordType::A);
        let answer = self.socket.expect("the response for next.test");
        assert_eq!(
            answer.message.metadata.id, 2,
            "something else was delivered: {answer:?}"
        );
        assert_eq!(answer.addresses, [server(20)]);
    }

    #[track_caller]
    fn learned(&self) -> Vec<IpAddr> {
        self.lab.allowed(&self.pod).into_keys().collect()
    }

    #[track_caller]
    fn wait_reported(&self, reason: &str) {
        self.agent
            .wait_denial(reason, |d| d.of(&self.pod) && d.reason == reason);
    }

    /// Asserts that the response is not delivered, and that nothing is learned from it.
    #[track_caller]
    fn assert_withheld(&self, reason: &str) {
        self.ask();
        self.wait_reported(reason);
        self.assert_nothing_was_delivered();
        assert_eq!(self.learned(), [server(20)]);
    }

    /// Asserts that the pod receives only the real response, and that only its address is learned.
    #[track_caller]
    fn delivers_only_the_real_response(&self) {
        self.ask();
        let answer = self.socket.expect("the true response");
        assert_eq!(answer.message.metadata.id, 1);
        assert_eq!(answer.addresses, [server(TRUTH)]);
        assert_eq!(self.learned(), [server(TRUTH)]);
        self.assert_nothing_was_delivered();
        assert_eq!(self.learned(), [server(TRUTH), server(20)]);
    }
}

fn truth(asked: &Question) -> Send {
    Send::answer(asked, &[address(server(TRUTH))])
}

fn lie(asked: &Question) -> Send {
    Send::answer(asked, &[address(server(LIE))])
}

#[test]
fn a_response_nobody_asked_for_is_not_delivered() {
    let scene = Scene::new(|asked| vec![truth(asked)]);
    let mut forged = question(7, "shop.test", RecordType::A);
    forged[2] |= 0x80; // QR: this is a response
    scene
        .lab
        .dns()
        .send(RESOLVER, scene.socket.address(), &forged);
    scene.wait_reported("dns_unsolicited");
    scene.delivers_only_the_real_response();
}

#[test]
fn a_response_with_another_id_is_not_delivered() {
    let scene = Scene::new(|asked| vec![lie(asked).with_id(asked.id ^ 0x100), truth(asked)]);
    scene.delivers_only_the_real_response();
    scene.wait_reported("dns_unsolicited");
}

#[test]
fn a_response_from_a_resolver_that_was_not_asked_is_not_delivered() {
    let other: IpAddr = OTHER_RESOLVER.parse().expect("an address");
    let scene =
        Scene::new(move |asked| vec![lie(asked).from(SocketAddr::new(other, 53)), truth(asked)]);
    scene.delivers_only_the_real_response();
    scene.wait_reported("dns_unsolicited");
}

#[test]
fn nothing_is_learned_from_a_strangers_response() {
    let scene =
        Scene::new(|asked| vec![lie(asked).from(SocketAddr::new(STRANGER, 53)), truth(asked)]);
    scene.ask();
    // A stranger's datagram is ordinary traffic to the pod. Nothing is learned from it.
    let answer = std::iter::from_fn(|| scene.socket.receive(DEADLINE))
        .find(|(_, from)| from.ip() == RESOLVER);
    assert!(answer.is_some(), "the resolver's answer arrives");
    assert_eq!(scene.learned(), [server(TRUTH)]);
}

#[test]
fn a_response_to_another_query_is_not_delivered() {
    let scene = Scene::new(|asked| {
        let mut other_name = asked.clone();
        other_name.name = "next.test".to_owned();
        let mut other_type = asked.clone();
        other_type.qtype = RecordType::AAAA;
        vec![lie(&other_name), lie(&other_type), truth(asked)]
    });
    scene.delivers_only_the_real_response();
    scene.wait_reported("dns_unsolicited");
}

#[test]
fn a_second_response_to_one_query_is_not_delivered() {
    let scene = Scene::new(|asked| vec![truth(asked), lie(asked)]);
    scene.delivers_only_the_real_response();
    scene.wait_reported("dns_unsolicited");
}

#[test]
fn records_of_other_names_are_not_learned() {
    let scene = Scene::new(|asked| {
        vec![Send::answer(
            asked,
            &[
                address(server(TRUTH)),
                address(server(LIE)).of("bank.test"),
                address(server6(LIE.into())).of("next.test"),
                text("unrelated").of("shop.test"),
            ],
        )]
    });
    scene.ask();
    assert_eq!(
        scene.socket.expect("the response").message.answers.len(),
        4,
        "the response was changed"
    );
    assert_eq!(scene.learned(), [server(TRUTH)]);
    scene
        .agent
        .denies_tcp(&scene.pod, (server(TRUTH), 9), "port_not_allowed");
    scene
        .agent
        .denies_tcp(&scene.pod, (server(LIE), 443), "address_not_learned");
}

#[test]
fn nothing_is_learned_from_a_broken_chain() {
    let scene = Scene::new(|asked| {
        vec![Send::answer(
            asked,
            &[
                cname("a.example"),
                address(server(LIE)).of("b.example"),
                cname("b.example").of("c.example"),
            ],
        )]
    });
    scene.ask();
    scene.socket.expect("the response");
    assert_eq!(scene.learned(), [] as [IpAddr; 0]);
}

#[test]
fn a_circular_chain_neither_blocks_nor_is_learned() {
    let scene = Scene::new(|asked| {
        vec![Send::answer(
            asked,
            &[
                cname("a.example"),
                cname("b.example"),
                cname("shop.test"),
                address(server(LIE)).of("d.example"),
            ],
        )]
    });
    scene.ask();
    // Delivered or not, nothing is learned from it, and it does not delay the next response.
    scene.socket.ask(RESOLVER, 2, "next.test", RecordType::A);
    let next = std::iter::from_fn(|| scene.socket.receive(DEADLINE))
        .find(|(bytes, _)| bytes.starts_with(&[0, 2]));
    assert!(next.is_some(), "the next answer arrives");
    assert_eq!(scene.learned(), [server(20)]);
}

/// The offset at which the question section for `shop.test` ends: header, name, type, class.
const QUESTION_END: usize = 12 + "\u{4}shop\u{4}test\0".len() + 4;

#[test]
fn a_compression_loop_is_not_delivered() {
    let scene = Scene::new(|asked| {
        vec![truth(asked).edited(|bytes| {
            // The owner of the first record points at itself.
            let here = u16::try_from(QUESTION_END).expect("a small offset") | 0xc000;
            bytes[QUESTION_END..QUESTION_END + 2].copy_from_slice(&here.to_be_bytes());
        })]
    });
    scene.assert_withheld("dns_malformed");
}

#[test]
fn a_response_cut_short_is_not_delivered() {
    let scene = Scene::new(|asked| vec![truth(asked).edited(|b| b.truncate(QUESTION_END + 9))]);
    scene.assert_withheld("dns_malformed");
}

#[test]
fn a_response_with_none_or_two_question_entries_is_not_delivered() {
    for count in [0, 2] {
        let scene = Scene::new(move |asked| vec![truth(asked).edited(|bytes| bytes[5] = count)]);
        scene.ask();
        scene
            .agent
            .wait_denial("a response with a wrong QDCOUNT", |d| {
                d.of(&scene.pod)
                    && ["dns_malformed", "dns_unsolicited"].contains(&d.reason.as_str())
            });
        scene.assert_nothing_was_delivered();
        assert_eq!(scene.learned(), [server(20)], "QDCOUNT {count}");
    }
}

#[test]
fn a_response_with_too_high_a_record_count_is_not_delivered() {
    let scene = Scene::new(|asked| {
        vec![truth(asked).edited(|bytes| bytes[6..8].copy_from_slice(&[0xff, 0xff]))]
    });
    scene.assert_withheld("dns_malformed");
}

#[test]
fn a_malformed_query_stays_on_the_node() {
    let mut scene = Scene::new(|asked| vec![truth(asked)]);
    let whole = question(9, "shop.test", RecordType::A);
    let with = |edit: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        edit(&mut bytes);
        bytes
    };
    let unreadable = [
        ("two questions", with(&|b| b[5] = 2)),
        ("no question", with(&|b| b[5] = 0)),
        ("a header cut short", whole[..7].to_vec()),
        ("a name cut short", whole[..16].to_vec()),
        ("no DNS at all", b"tunnel: 4a5f-data-data-data".to_vec()),
        ("nothing", Vec::new()),
    ];
    for (what, bytes) in &unreadable {
        let uplink = Tap::open(scene.lab.outside(), "eth0");
        scene.socket.send(RESOLVER, bytes);
        // The gate keeps the order of queries: the first on the uplink was released first.
        scene.assert_nothing_was_delivered();
        let pod = scene.pod.ipv4().into();
        let first = uplink
            .receive(DEADLINE, |frame| {
                frames::is(frame, pod, RESOLVER, ip_number::UDP)
            })
            .expect("the readable query passes");
        assert!(
            first.windows(4).any(|w| w == b"next"),
            "{what} left the node: {first:?}"
        );
    }
    // The programs may pass the readable query before the agent has read the last of these. A refusal comes after that.
    scene.agent.denies_name(&scene.pod, "evil.test");
    assert!(scene.agent.stop().success());
    let denials = scene.agent.denials();
    let reported = denials
        .iter()
        .filter(|d| d.reason == "dns_malformed")
        .map(|d| d.count);
    assert_eq!(
        reported.sum::<u64>(),
        unreadable.len() as u64,
        "{denials:?}"
    );
}

#[test]
fn port_53_of_other_servers_is_ordinary_traffic_and_nothing_is_learned_there() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("shop.test", &[server(LIE)]);
    let (may, may_not) = (lab.pod("shop", "may"), lab.pod("shop", "may-not"));
    lab.write_pod(&may, &[("allow", "shop.test:443 203.0.113.53:53")]);
    lab.write_pod(&may_not, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&may, &may_not]);

    let answer = may.resolve_at(STRANGER, "shop.test", RecordType::A);
    assert_eq!(answer.addresses, [server(LIE)]);
    // Names are not judged at this server, and DNS over TCP is an ordinary connection.
    may.resolve_at(STRANGER, "evil.test", RecordType::A);
    drop(may.reach_tcp((STRANGER, 53)));
    assert!(
        lab.allowed(&may).is_empty(),
        "another server's answer was learned from"
    );
    agent.denies_tcp(&may, (server(LIE), 443), "address_not_learned");
    agent.denies_udp(&may_not, (STRANGER, 53), "no_rule");
}

#[test]
fn protected_addresses_are_never_learned() {
    let lab = Lab::builder()
        .config("ranges.protected", vec!["203.0.113.200/32"])
        .build();
    let _web = lab.serve_tcp(80);
    let forbidden = ["169.254.169.254", "127.0.0.1", "224.0.0.1", "203.0.113.200"]
        .map(|a| a.parse::<IpAddr>().expect("an address"));
    lab.dns()
        .addresses("rebind.test", &[&forbidden[..], &[server(TRUTH)]].concat());
    let forbidden6 = ["::1", "fe80::1", "ff02::1", "::ffff:169.254.169.254"]
        .map(|a| a.parse::<IpAddr>().expect("an address"));
    lab.dns().addresses(
        "rebind6.test",
        &[&forbidden6[..], &[server6(TRUTH.into())]].concat(),
    );
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "rebind.test:80 rebind6.test:80")]);
    let agent = lab.start_agent(&[&pod]);

    pod.lookup("rebind.test");
    pod.resolve("rebind6.test", RecordType::AAAA);
    let learned: Vec<_> = lab.allowed(&pod).into_keys().collect();
    assert_eq!(learned, [server(TRUTH), server6(TRUTH.into())]);
    let mut stream = pod.talks_tcp((server(TRUTH), 80));
    assert!(exchange(&mut stream, b"hello", DEADLINE));
    agent.denies_tcp(&pod, (forbidden[0], 80), "protected");
    agent.denies_tcp(&pod, (server(200), 80), "protected");
    agent.wait_denial("the name that the address was the response for", |denial| {
        denial.is(&pod, "protected", server(200), 80) && denial.dst_names == ["rebind.test"]
    });
}
