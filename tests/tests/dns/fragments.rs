//! Large responses, and fragments from a resolver's address.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, UdpSocket},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod, SHORT,
    addresses::{RESOLVER, RESOLVER6, numbered, server, server6},
    dns::{DnsSocket, Question, RecordType, ResponseCode, Send, address, raw_record},
    echo_on, eventually,
    frames::{self, Tap},
    holds, raw,
};

/// A response with this many addresses takes three packets of 1,500 bytes.
const MANY: u16 = 190;
const MANY6: u16 = 120;

fn many_addresses() -> Vec<IpAddr> {
    (0..MANY.into()).map(numbered).collect()
}

fn many_addresses6() -> Vec<IpAddr> {
    (1000..1000 + MANY6).map(server6).collect()
}

/// A response with that many addresses.
fn answer_with_many(asked: &Question) -> Send {
    let addresses = match asked.qtype {
        RecordType::AAAA => many_addresses6(),
        _ => many_addresses(),
    };
    let records: Vec<_> = addresses.into_iter().map(address).collect();
    Send::answer(asked, &records)
}

fn learned(lab: &Lab, pod: &Pod) -> BTreeSet<IpAddr> {
    lab.allowed(pod).into_keys().collect()
}

/// True if the frame is a fragment.
fn is_fragment(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([8, 0]) => frame[20] & 0x3f != 0 || frame[21] != 0,
        Some([0x86, 0xdd]) => frame[20] == raw::protocol::FRAGMENT,
        _ => false,
    }
}

#[test]
fn a_response_in_fragments_allows_its_addresses() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns()
        .on("shop.test", |asked| vec![answer_with_many(asked)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    let tap = Tap::open(pod.netns(), "eth0");
    for (resolver, qtype, addresses) in [
        (RESOLVER, RecordType::A, many_addresses()),
        (RESOLVER6, RecordType::AAAA, many_addresses6()),
    ] {
        let answer = pod.resolve_at(resolver, "shop.test", qtype);
        assert!(answer.bytes > 3000, "{} bytes", answer.bytes);
        assert_eq!(answer.addresses, addresses);
        assert!(learned(&lab, &pod).is_superset(&addresses.iter().copied().collect()));
        pod.talks_tcp((addresses[addresses.len() - 1], 443));
        assert!(tap.receive(DEADLINE, is_fragment).is_some());
    }
    assert!(agent.denials().is_empty(), "{:?}", agent.denials());
}

/// A response with the address of one host behind this many bytes of another record.
fn answer_after_padding(asked: &Question, bytes: usize, host: u8) -> Vec<Send> {
    let something = vec![0x5a; bytes];
    vec![Send::answer(
        asked,
        &[raw_record(65_280, &something), address(server(host))],
    )]
}

#[test]
fn a_response_of_the_maximum_datagram_length_arrives() {
    let lab = Lab::new();
    lab.dns()
        .on("shop.test", |asked| answer_after_padding(asked, 65_400, 10));
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    for resolver in [RESOLVER, RESOLVER6] {
        let answer = pod.resolve_at(resolver, "shop.test", RecordType::A);
        assert!(answer.bytes > 65_400, "{} bytes", answer.bytes);
        assert!(learned(&lab, &pod).contains(&server(10)));
    }
}

#[test]
fn a_response_of_a_jumbo_frame_arrives() {
    let lab = Lab::builder().mtu(9000).build();
    lab.dns()
        .on("shop.test", |asked| answer_after_padding(asked, 8000, 10));
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    let tap = Tap::open(pod.netns(), "eth0");
    for resolver in [RESOLVER, RESOLVER6] {
        let answer = pod.resolve_at(resolver, "shop.test", RecordType::A);
        assert!(answer.bytes > 8000, "{} bytes", answer.bytes);
        assert!(learned(&lab, &pod).contains(&server(10)));
        let is_whole = |frame: &[u8]| frame.len() > 8000 && !is_fragment(frame);
        assert!(tap.receive(DEADLINE, is_whole).is_some());
    }
}

#[test]
fn dig_gets_all_addresses_with_every_buffer_size() {
    let lab = Lab::new();
    lab.dns().on("shop.test", |asked| {
        let whole = answer_with_many(asked);
        if asked.tcp || whole.bytes().len() <= asked.payload.into() {
            vec![whole]
        } else {
            vec![Send::truncated(asked)]
        }
    });
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    for (resolver, qtype, addresses) in [
        (RESOLVER, "A", many_addresses()),
        (RESOLVER6, "AAAA", many_addresses6()),
    ] {
        // The first two sizes give a truncated response, so dig repeats the query over TCP.
        for size in ["512", "1232", "4096"] {
            let mut command = Command::new("dig");
            command.arg(format!("@{resolver}")).args([
                "+short",
                "+tries=1",
                &format!("+bufsize={size}"),
                "shop.test",
                qtype,
            ]);
            let output = pod.netns().run(|| command.output());
            let output = output.expect("dig, of the package bind9-dnsutils");
            let printed = String::from_utf8_lossy(&output.stdout);
            let printed: Vec<IpAddr> = printed.lines().map(|l| l.parse().expect(l)).collect();
            assert_eq!(printed, addresses, "{size}");
            assert!(learned(&lab, &pod).is_superset(&addresses.iter().copied().collect()));
        }
    }
    let over_tcp = lab.dns().questions().iter().filter(|q| q.tcp).count();
    assert_eq!(over_tcp, 4);
    assert!(agent.denials().is_empty(), "{:?}", agent.denials());
}

#[test]
fn fragmented_datagrams_that_are_not_dns_arrive() {
    let lab = Lab::new();
    let _echo = lab.serve_udp(9999);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(
        &pod,
        &[(
            "allow",
            &format!("{RESOLVER}:9999/udp [{RESOLVER6}]:9999/udp"),
        )],
    );
    let agent = lab.start_agent(&[&pod]);
    for resolver in [RESOLVER, RESOLVER6] {
        let socket = pod.udp_socket((resolver, 9999));
        for length in [100, 3000, 20_000] {
            assert!(
                echo_on(&socket, &vec![7; length], DEADLINE),
                "{length} bytes"
            );
        }
    }
    assert!(agent.denials().is_empty(), "{:?}", agent.denials());
}

#[test]
fn a_pod_may_reply_to_a_fragmented_datagram_from_the_resolvers_host() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    for (resolver, own) in [
        (RESOLVER, IpAddr::from(pod.ipv4())),
        (RESOLVER6, pod.ipv6().into()),
    ] {
        let service = pod.netns().run(|| UdpSocket::bind((own, 7000)).unwrap());
        let client = lab
            .outside()
            .run(|| UdpSocket::bind((resolver, 7001)).unwrap());
        client.send_to(&[7; 3000], (own, 7000)).unwrap();
        let mut buffer = vec![0; 65_535];
        service.set_read_timeout(Some(DEADLINE)).unwrap();
        let (length, from) = service.recv_from(&mut buffer).expect("a datagram");
        assert_eq!((length, from), (3000, SocketAddr::new(resolver, 7001)));
        service.send_to(&buffer[..length], from).unwrap();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        assert_eq!(client.recv(&mut buffer).expect("the pod's reply"), 3000);
    }
    assert!(agent.denials().is_empty(), "{:?}", agent.denials());
}

#[test]
fn in_audit_mode_fragments_pass_and_their_addresses_are_learned() {
    let lab = Lab::new();
    lab.dns()
        .on("shop.test", |asked| vec![answer_with_many(asked)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443"), ("mode", "audit")]);
    let agent = lab.start_agent(&[&pod]);
    for (resolver, qtype, addresses) in [
        (RESOLVER, RecordType::A, many_addresses()),
        (RESOLVER6, RecordType::AAAA, many_addresses6()),
    ] {
        let answer = pod.resolve_at(resolver, "shop.test", qtype);
        assert_eq!(answer.addresses, addresses);
        let addresses: BTreeSet<IpAddr> = addresses.into_iter().collect();
        eventually("the agent has learned from the copy", || {
            holds(learned(&lab, &pod).is_superset(&addresses))
        });
    }
    // An unsolicited response arrives, and is reported when it is complete.
    let socket = pod.dns_socket();
    let asked = Question {
        name: "shop.test".to_owned(),
        qtype: RecordType::A,
        id: 1,
        from: socket.address(),
        to: SocketAddr::new(RESOLVER, 53),
        tcp: false,
        payload: 4096,
    };
    let records: Vec<_> = many_addresses().into_iter().map(address).collect();
    let unasked = Send::answer(&asked, &records);
    lab.dns().send(RESOLVER, socket.address(), unasked.bytes());
    assert_eq!(socket.expect("the copy passed").code, ResponseCode::NoError);
    agent.wait_denial("the unsolicited response", |d| {
        d.of(&pod) && d.reason == "dns_unsolicited" && d.verdict == "audited"
    });
}

/// A pod that has queried `shop.test` and waits. The resolver has the query and sends nothing until the test
/// makes it. The forger has guessed ports and id.
struct Pending {
    agent: Agent,
    socket: DnsSocket,
    /// Sends frames to the pod, as a host on its link can.
    link: Tap,
    cart: Pod,
    lab: Lab,
    ipv6: bool,
}

const LIE: u8 = 66;
const TRUTH: u8 = 10;
const ID: u16 = 0x5a5a;
/// The length of a fragment's data.
const PIECE: usize = 1400;

impl Pending {
    #[track_caller]
    fn new(ipv6: bool) -> Self {
        let lab = Lab::new();
        lab.dns().on("shop.test", |_| Vec::new());
        lab.dns().addresses("other.test", &[server(20)]);
        let cart = lab.pod("shop", "cart");
        lab.write_pod(&cart, &[("allow", "shop.test:443 other.test:443")]);
        let agent = lab.start_agent(&[&cart]);
        let socket = if ipv6 {
            cart.dns_socket6()
        } else {
            cart.dns_socket()
        };
        let resolver = if ipv6 { RESOLVER6 } else { RESOLVER };
        socket.ask(resolver, ID, "shop.test", RecordType::A);
        eventually("the query is at the resolver", || {
            holds(lab.dns().queries_for("shop.test") == 1)
        });
        Self {
            agent,
            socket,
            link: Tap::open(lab.node(), cart.interface()),
            cart,
            lab,
            ipv6,
        }
    }

    fn resolver(&self) -> IpAddr {
        if self.ipv6 { RESOLVER6 } else { RESOLVER }
    }

    /// The response to the query with this address, behind 3,000 bytes of another record.
    fn message(&self, host: u8) -> Vec<u8> {
        let asked = Question {
            name: "shop.test".to_owned(),
            qtype: RecordType::A,
            id: ID,
            from: self.socket.address(),
            to: SocketAddr::new(self.resolver(), 53),
            tcp: false,
            payload: 4096,
        };
        let [answer] = &answer_after_padding(&asked, 3000, host)[..] else {
            panic!("one response");
        };
        answer.bytes().to_vec()
    }

    /// A frame with this message, from this port of the resolver's address.
    fn frame(&self, port: u16, message: &[u8]) -> Vec<u8> {
        let to = self.socket.address();
        let from = (self.resolver(), port);
        frames::udp_to(&self.cart, from, (to.ip(), to.port()), message)
    }

    /// The fragments of a datagram from this port.
    fn datagram(&self, id: u16, port: u16, host: u8) -> Vec<Vec<u8>> {
        let frame = self.frame(port, &self.message(host));
        let fragments = frames::fragments(&frame, id, PIECE);
        assert_eq!(fragments.len(), 3);
        fragments
    }

    /// The fragments of the response.
    fn answer(&self, id: u16, host: u8) -> Vec<Vec<u8>> {
        self.datagram(id, 53, host)
    }

    fn offer<'a>(&self, frames: impl IntoIterator<Item = &'a Vec<u8>>) {
        for frame in frames {
            self.link.offer(frame);
        }
    }

    /// Waits until at least `count` dropped fragments have been reported.
    #[track_caller]
    fn wait_dropped(&self, count: u64) {
        let mut seen = 0;
        self.agent.wait_denial("fragments that were dropped", |d| {
            if d.of(&self.cart) && d.reason == "dns_fragmented" {
                assert_eq!(d.src_ip, Some(self.resolver()));
                seen += d.count;
            }
            seen >= count
        });
    }

    /// The resolver sends its response at last, in fragments. Asserts that the pod receives only this
    /// response and learns only its address.
    #[track_caller]
    fn delivers_only_the_real_response(&self) {
        let to = self.socket.address();
        let dns = self.lab.dns();
        dns.send(self.resolver(), to, &self.message(TRUTH));
        self.assert_only_the_real_response_arrived();
    }

    #[track_caller]
    fn assert_only_the_real_response_arrived(&self) {
        let answer = self.socket.expect("the resolver's response");
        assert_eq!(answer.addresses, [server(TRUTH)]);
        let expected = BTreeSet::from([server(TRUTH)]);
        assert_eq!(learned(&self.lab, &self.cart), expected);
    }
}

#[test]
fn fragments_arrive_in_any_order_and_more_than_once() {
    for ipv6 in [false, true] {
        for (id, order) in [(1, [2, 1, 0]), (2, [1, 0, 2]), (3, [2, 0, 1])] {
            let scene = Pending::new(ipv6);
            let tap = Tap::open(scene.cart.netns(), "eth0");
            let fragments = scene.answer(id, TRUTH);
            for i in order {
                scene.offer([&fragments[i], &fragments[i]]);
            }
            scene.assert_only_the_real_response_arrived();
            // The pod received each fragment once, unchanged and in order.
            for fragment in &fragments {
                let next = tap.receive(DEADLINE, is_fragment);
                assert_eq!(next.as_ref(), Some(fragment));
            }
            assert!(tap.receive(SHORT, is_fragment).is_none());
            assert!(scene.agent.denials().is_empty());
            // The copy of the fragment that completed the datagram comes too late.
            scene.lab.wait_loss_counted("dns_fragments_late", 1);
        }
    }
}

#[test]
fn fragments_that_overlap_are_all_dropped() {
    for ipv6 in [false, true] {
        let scene = Pending::new(ipv6);
        let tap = Tap::open(scene.cart.netns(), "eth0");
        // Two last fragments differ. A pod could take either.
        let (truth, lie) = (scene.answer(1, TRUTH), scene.answer(1, LIE));
        scene.offer([&truth[0], &truth[2], &lie[2], &truth[1]]);
        // A middle fragment overlaps the last one.
        let truth = scene.answer(2, TRUTH);
        let frame = scene.frame(53, &scene.message(LIE));
        let longer = frames::fragment(&frame, 2, PIECE..2 * PIECE + 8);
        scene.offer([&truth[0], &longer, &truth[2], &truth[1]]);
        // Two first fragments differ.
        let (truth, lie) = (scene.answer(3, TRUTH), scene.answer(3, LIE));
        scene.offer([&lie[0], &truth[0], &truth[1], &truth[2]]);
        scene.wait_dropped(3);
        // No fragment reached the pod, and the query is still pending.
        assert!(tap.receive(SHORT, is_fragment).is_none());
        scene.delivers_only_the_real_response();
    }
}

#[test]
fn a_response_cannot_hide_behind_a_first_fragment_from_another_port() {
    for ipv6 in [false, true] {
        let scene = Pending::new(ipv6);
        let (lie, other) = (scene.answer(1, LIE), scene.datagram(1, 9999, LIE));
        scene.offer([&other[0], &lie[0], &lie[1], &lie[2]]);
        scene.wait_dropped(1);
        // The first fragment from port 53 comes after the datagram was completed with the other one.
        let (lie, other) = (scene.answer(2, LIE), scene.datagram(2, 9999, LIE));
        scene.offer([&lie[2], &lie[1], &other[0], &lie[0]]);
        let (_, from) = scene.socket.receive(DEADLINE).expect("a datagram");
        assert_eq!(
            from.port(),
            9999,
            "the datagram from the other port is no DNS response"
        );
        scene.delivers_only_the_real_response();
    }
}

#[test]
fn a_fragment_planted_for_a_later_response_does_not_reach_the_pod() {
    // The pod's kernel keeps the fragments of a datagram that it cannot reassemble. They would replace a
    // fragment of the next datagram with the same identification.
    let scene = Pending::new(false);
    let tap = Tap::open(scene.cart.netns(), "eth0");
    let truth = scene.answer(1, TRUTH);
    let mut planted = scene.datagram(1, 9999, LIE);
    // The pod's kernel would keep the last two, and drop the first for its wrong checksum.
    planted[0][raw::ETHERNET + 10] ^= 1;
    scene.offer(&planted);
    scene.wait_dropped(1);
    assert!(tap.receive(SHORT, is_fragment).is_none());
    // The datagram with this identification is lost; one with another identification is not.
    scene.offer(&truth);
    assert!(tap.receive(SHORT, is_fragment).is_none());
    scene.delivers_only_the_real_response();
}

#[test]
fn over_ipv6_a_fragment_that_names_another_protocol_is_held_too() {
    // The pod's kernel reassembles by identification, whatever protocol later fragments name.
    let scene = Pending::new(true);
    let tap = Tap::open(scene.cart.netns(), "eth0");
    let (truth, mut lie) = (scene.answer(1, TRUTH), scene.answer(1, LIE));
    for protocol in [raw::protocol::TCP, raw::protocol::DESTINATION, 253] {
        lie[2][raw::IPV6] = protocol;
        scene.link.offer(&lie[2]);
    }
    scene.offer(&truth);
    scene.wait_dropped(1);
    assert!(tap.receive(SHORT, is_fragment).is_none());
    scene.delivers_only_the_real_response();
}

#[test]
fn an_incomplete_datagram_is_dropped_and_reported() {
    for ipv6 in [false, true] {
        let scene = Pending::new(ipv6);
        let tap = Tap::open(scene.cart.netns(), "eth0");
        for (id, missing) in [(1, 2), (2, 1), (3, 0)] {
            let mut fragments = scene.answer(id, LIE);
            fragments.remove(missing);
            scene.offer(&fragments);
        }
        scene.wait_dropped(3);
        assert!(tap.receive(SHORT, is_fragment).is_none());
        scene.delivers_only_the_real_response();
    }
}

#[test]
fn a_response_in_fragments_is_judged_like_a_whole_one() {
    for ipv6 in [false, true] {
        let scene = Pending::new(ipv6);
        let tap = Tap::open(scene.cart.netns(), "eth0");
        // A response to a query that nobody sent.
        let mut message = scene.message(LIE);
        message[0] ^= 1;
        scene.offer(&frames::fragments(&scene.frame(53, &message), 1, PIECE));
        // A malformed response.
        let mut message = scene.message(LIE);
        message[7] = 9;
        scene.offer(&frames::fragments(&scene.frame(53, &message), 2, PIECE));
        for reason in ["dns_unsolicited", "dns_malformed"] {
            scene
                .agent
                .wait_denial(reason, |d| d.of(&scene.cart) && d.reason == reason);
        }
        // A fragment of another response replaces one of this, so the checksum is wrong.
        let (truth, lie) = (scene.answer(3, TRUTH), scene.answer(3, LIE));
        scene.offer([&truth[0], &truth[1], &lie[2]]);
        scene.wait_dropped(1);
        assert!(tap.receive(SHORT, is_fragment).is_none());
        scene.delivers_only_the_real_response();
    }
}

#[test]
fn responses_arrive_during_a_flood_of_first_fragments() {
    let scene = Pending::new(false);
    let frame = scene.frame(53, &scene.message(LIE));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for id in (0..u16::MAX).cycle() {
                scene.link.offer(&frames::fragment(&frame, id, 0..PIECE));
                if done.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        // A program repeats its query when the query or the response was lost.
        for _ in 0..20 {
            eventually("a response during the flood", || {
                let resolve = scene
                    .cart
                    .try_resolve(RESOLVER, "other.test", RecordType::A, SHORT);
                holds(resolve?.addresses == [server(20)])
            });
        }
        done.store(true, Ordering::Relaxed);
    });
    scene.wait_dropped(1);
    scene
        .lab
        .dns()
        .on("other.test", |asked| answer_after_padding(asked, 3000, 10));
    let answer = scene.cart.resolve("other.test", RecordType::A);
    assert_eq!(answer.addresses, [server(10)]);
}
