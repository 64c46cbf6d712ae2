//! Checksums that are computed after the verdict, and that the pod directs to fields that were judged.

use std::net::{IpAddr, Ipv6Addr};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod,
    addresses::{RESOLVER, server, server6},
    dns::{RecordType, question},
    frames::{self, Tap},
    raw::{IPV4, IPV6, Ip, arp, flag, protocol, tcp},
    rewritten::{
        SHIFTED_TCP_SUM, Sum, UDP_SUM, compute_checksums, finish, send_by_tun, send_by_tun_udp,
        send_by_udp,
    },
};

/// The port that the pod may reach at `server(1)` and `server6(1)`.
const PORT: u16 = 4000;
/// A port that the pod may not reach.
const OTHER_PORT: u16 = 22;

/// A pod, and an uplink for which the kernel computes checksums.
struct Scene {
    agent: Agent,
    tap: Tap,
    uplink: Tap,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::builder()
            .config("ranges.internal", vec!["10.99.0.0/24"])
            .build();
        compute_checksums(lab.node(), "uplink");
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", "203.0.113.1:4000 [2001:db8::1]:4000")]);
        let agent = lab.start_agent(&[&pod]);
        Self {
            agent,
            tap: Tap::open(pod.netns(), "eth0"),
            uplink: Tap::open(lab.outside(), "eth0"),
            pod,
            lab,
        }
    }

    fn to(&self, dst: IpAddr) -> Ip {
        Ip::new(self.pod.address_for(dst), dst)
    }

    /// Sends an honest datagram to the allowed port, which opens a flow if there is none.
    #[track_caller]
    fn send_honest(&self, to: IpAddr, payload: &[u8]) {
        let own = self.pod.address_for(to);
        let frame = frames::udp(&self.pod, (own, 7), (to, PORT), payload);
        self.tap.send(&frame);
    }

    /// Asserts that a frame is dropped if its late checksum changes a judged field.
    #[track_caller]
    fn assert_dropped(&self, mut frame: Vec<u8>, sum: Sum, wanted: u16, send: fn(&Pod, &[u8])) {
        const SENTINEL: &[u8] = b"the honest one";
        finish(&self.pod, &mut frame);
        let free = frame.len() - 2;
        sum.arrange(&mut frame, free, wanted);
        let landed = sum.with_checksum_written(&frame);
        let tail = &landed[landed.len() - 4..];
        let mark = self.agent.mark();
        send(&self.pod, &frame);
        self.send_honest(server(1), SENTINEL);
        let first = self
            .uplink
            .receive(DEADLINE, |seen| {
                seen.ends_with(SENTINEL) || seen.ends_with(tail)
            })
            .expect("the honest one leaves");
        assert!(
            first.ends_with(SENTINEL),
            "the frame that left the node is not the judged one: {first:02x?}"
        );
        self.agent
            .wait_denial_from(mark, "the rewritten packet", |denial| {
                denial.of(&self.pod) && denial.reason == "malformed"
            });
    }
}

/// Options that extend the IPv4 header over the place of the checksum of a datagram without options.
const FOUR_BYTES: &[u8] = &[1, 1, 1, 1];

#[test]
fn a_late_checksum_over_a_udp_port_is_dropped() {
    let scene = Scene::new();
    let to = scene.to(server(1)).options(FOUR_BYTES);
    let frame = to.udp(7, PORT, b"to another port.");
    scene.assert_dropped(frame, UDP_SUM, OTHER_PORT, send_by_udp);
}

#[test]
fn a_late_checksum_over_a_tcp_port_is_dropped() {
    let scene = Scene::new();
    let to = scene.to(server(1)).options(FOUR_BYTES);
    for flags in [flag::SYN, flag::ACK] {
        let segment = [tcp(7, PORT, flags), b"to another port.".to_vec()].concat();
        let frame = to.frame(protocol::TCP, &segment);
        scene.assert_dropped(frame, UDP_SUM, OTHER_PORT, send_by_udp);
    }
}

#[test]
fn a_late_checksum_over_an_ipv6_address_is_dropped() {
    let scene = Scene::new();
    let plain = scene.to(server6(1));
    for to in [plain.clone(), plain.clone().padding(protocol::DESTINATION)] {
        let frame = to.udp(7, PORT, b"to another host.");
        scene.assert_dropped(frame, UDP_SUM, 0xbad, send_by_udp);
    }
    // The same with an open flow.
    scene.send_honest(server6(1), b"it is open now");
    let frame = plain.udp(7, PORT, b"to another host.");
    assert_eq!(
        frame[IPV6 - 16..IPV6],
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).octets()
    );
    scene.assert_dropped(frame, UDP_SUM, 0xbad, send_by_udp);
    let segment = [tcp(7, PORT, flag::ACK), b"to another host.".to_vec()].concat();
    let frame = plain.frame(protocol::TCP, &segment);
    scene.assert_dropped(frame, UDP_SUM, 0xbad, send_by_udp);
}

#[test]
fn a_late_checksum_over_the_port_of_an_open_flow_is_dropped() {
    let scene = Scene::new();
    scene.send_honest(server(1), b"it is open now");
    let frame = scene.to(server(1)).udp(7, PORT, b"a SYN has eighteen");
    assert_eq!(frame[IPV4 + 2..IPV4 + 4], PORT.to_be_bytes());
    scene.assert_dropped(frame, SHIFTED_TCP_SUM, OTHER_PORT, send_by_tun);
}

#[test]
fn a_late_checksum_cannot_turn_a_packet_into_an_unjudged_query() {
    let scene = Scene::new();
    let mut message = question(9, "evil.test", RecordType::A);
    // Two more bytes after the query, to make the sum fit.
    if message.len() % 2 == 1 {
        message.push(0);
    }
    message.extend([0; 2]);
    let to = scene.to(RESOLVER).options(FOUR_BYTES);
    // All ports but 53 of an internal address pass.
    scene.assert_dropped(to.udp(7, 54, &message), UDP_SUM, 53, send_by_udp);
    assert_eq!(scene.lab.dns().queries_for("evil.test"), 0);
}

/// A second resolver: its last group but one can be a checksum, which is never zero.
const SECOND_RESOLVER: Ipv6Addr = Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 1, 0x53);

#[test]
fn a_late_checksum_cannot_turn_a_packet_into_an_unheld_response() {
    const PAYLOAD: &[u8] = b"a response of some length";
    const OPTIONS: usize = 8;
    let lab = Lab::builder()
        .config(
            "dns.resolvers",
            vec![RESOLVER.to_string(), SECOND_RESOLVER.to_string()],
        )
        .build();
    let (cart, mail) = (lab.pod("shop", "cart"), lab.pod("shop", "mail"));
    compute_checksums(lab.node(), cart.interface());
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&cart]);
    // A neighbour that is not enforced.
    let forged = |src: IpAddr| {
        let mut frame = Ip::new(src, cart.ipv6()).udp(53, 4000, PAYLOAD);
        finish(&mail, &mut frame);
        frame
    };
    let sum = Sum::of_tun_udp(OPTIONS);
    let mut frame = forged(SECOND_RESOLVER.into());
    sum.arrange_in_place(&mut frame, 1);
    assert_eq!(
        sum.with_checksum_written(&frame),
        forged(SECOND_RESOLVER.into())
    );
    let inside = Tap::open(cart.netns(), "eth0");
    let mark = agent.mark();
    send_by_tun_udp(&mail, &frame, OPTIONS);
    let sentinel = forged(server6(1));
    Tap::open(mail.netns(), "eth0").send(&sentinel);
    let first = inside
        .receive(DEADLINE, |seen| seen.ends_with(PAYLOAD))
        .expect("an ordinary datagram arrives");
    assert_eq!(first[IPV6 - 32..IPV6 - 16], sentinel[IPV6 - 32..IPV6 - 16]);
    agent.wait_denial_from(mark, "the rewritten packet", |denial| {
        denial.of(&cart) && denial.reason == "malformed"
    });
}

#[test]
fn a_late_checksum_in_arp_is_dropped() {
    const OPTIONS: usize = 4;
    const TARGET_HARDWARE: usize = 32;
    let lab = Lab::new();
    let [cart, mail] = lab.two_pods_on_a_bridge();
    compute_checksums(lab.node(), mail.interface());
    lab.write_pod(&cart, &[("allow", "")]);
    let agent = lab.start_agent(&[&cart]);
    let neighbour = Tap::open(mail.netns(), "eth0");
    // Addressed to the neighbour alone, as a unicast ARP request or reply.
    let mut frame = arp(cart.ipv4(), mail.ipv4());
    frame[..6].copy_from_slice(&mail.hardware());
    frame[6..12].copy_from_slice(&cart.hardware());
    frame[22..28].copy_from_slice(&cart.hardware());
    let honest = frame.clone();
    let sum = Sum::of_tun_udp(OPTIONS);
    sum.arrange(&mut frame, TARGET_HARDWARE + 4, 0x0163);
    let mark = agent.mark();
    send_by_tun_udp(&cart, &frame, OPTIONS);
    Tap::open(cart.netns(), "eth0").send(&honest);
    let first = neighbour
        .receive(DEADLINE, |seen| seen[6..14] == honest[6..14])
        .expect("the honest one arrives");
    assert_eq!(first, honest, "the frame is not what was judged");
    agent.wait_denial_from(mark, "the rewritten frame", |denial| {
        denial.of(&cart) && denial.reason == "malformed"
    });
}

#[test]
fn honest_sockets_work_whoever_computes_their_checksums() {
    let scene = Scene::new();
    let _tcp = scene.lab.serve_tcp(PORT);
    let _udp = scene.lab.serve_udp(PORT);
    let long = vec![0x5a; 100_000];
    for to in [server(1), server6(1)] {
        let socket = scene.pod.udp_socket((to, PORT));
        let mut stream = scene.pod.reach_tcp((to, PORT));
        for _ in 0..3 {
            assert!(egress_tests::echo_on(&socket, &long[..1000], DEADLINE));
            // Fragmented, so that the pod's kernel computes the checksum.
            assert!(egress_tests::echo_on(&socket, &long[..5000], DEADLINE));
            assert!(egress_tests::exchange(&mut stream, &long, DEADLINE));
        }
    }
    assert!(scene.agent.denials().is_empty());
}
