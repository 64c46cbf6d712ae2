//! Segments that no honest TCP stack sends to a resolver. The resolver reads only bytes that the agent has
//! judged.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod,
    addresses::{RESOLVER, server},
    dns::{Answer, framed_query, read_message},
    frames::{self, Tap},
    raw::flag,
};
use etherparse::ip_number;

/// The offset of the TCP header in a plain frame over IPv4.
const TCP: usize = 14 + 20;
/// The name that must not leave the node.
const SECRET: &[u8] = b"\x04evil\x04test";

/// A TCP connection that a pod's kernel has opened to the resolver, and a packet socket in that pod.
struct Scene {
    agent: Agent,
    stream: TcpStream,
    port: u16,
    /// Sequence numbers of the first byte of each stream.
    asked: u32,
    answered: u32,
    tap: Tap,
    uplink: Tap,
    pod: Pod,
    lab: Lab,
}

fn number(frame: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]])
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::new();
        lab.dns().addresses("shop.test", &[server(10)]);
        lab.dns().addresses("evil.test", &[server(66)]);
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", "shop.test:443")]);
        let agent = lab.start_agent(&[&pod]);
        let tap = Tap::open(pod.netns(), "eth0");
        let uplink = Tap::open(lab.outside(), "eth0");
        let stream = pod.reach_tcp((RESOLVER, 53));
        stream.set_nodelay(true).expect("TCP_NODELAY");
        let port = stream.local_addr().expect("a connected socket").port();
        let own = pod.ipv4().into();
        let accepted = tap
            .receive(DEADLINE, |frame| {
                frames::is(frame, RESOLVER, own, ip_number::TCP)
            })
            .expect("the SYN-ACK");
        Self {
            agent,
            stream,
            port,
            asked: number(&accepted, TCP + 8),
            answered: number(&accepted, TCP + 4).wrapping_add(1),
            tap,
            uplink,
            pod,
            lab,
        }
    }

    /// The same connection after a refused query: the agent now terminates both directions.
    #[track_caller]
    fn after_a_refusal() -> Self {
        let mut scene = Self::new();
        let evil = framed_query(7, "evil.test");
        scene.stream.write_all(&evil).expect("write");
        let refusal = scene.read_message();
        let count = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a short message");
        scene.asked = scene.asked.wrapping_add(count(&evil));
        scene.answered = scene.answered.wrapping_add(2 + count(&refusal));
        scene
    }

    /// Sends a segment without the pod's kernel, at this position of its stream and with these flags.
    #[track_caller]
    fn forge(&self, position: u32, flags: u8, payload: &[u8]) {
        let seq = self.asked.wrapping_add(position);
        self.forge_from(self.port, seq, flags, payload);
    }

    #[track_caller]
    fn forge_from(&self, port: u16, seq: u32, flags: u8, payload: &[u8]) {
        let mut step =
            frames::from_pod(&self.pod, self.pod.ipv4().into(), RESOLVER).tcp(port, 53, seq, 500);
        if flags & flag::ACK != 0 {
            step = step.ack(self.answered);
        }
        if flags & flag::SYN != 0 {
            step = step.syn();
        }
        if flags & flag::FIN != 0 {
            step = step.fin();
        }
        if flags & flag::RST != 0 {
            step = step.rst();
        }
        if flags & flag::URG != 0 {
            step = step.urg(1);
        }
        let mut frame = Vec::new();
        step.write(&mut frame, payload).expect("a frame");
        self.tap.send(&frame);
    }

    /// Asserts that the connection is reset in both directions, with a reason.
    #[track_caller]
    fn assert_reset(&mut self) {
        let read = self.stream.read_exact(&mut [0]);
        let error = read.expect_err("it is reset");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        self.agent.wait_denial("the connection", |d| {
            d.of(&self.pod) && d.reason == "dns_over_tcp"
        });
    }

    /// Asserts that the connection still works.
    #[track_caller]
    fn assert_works(&mut self) {
        self.stream
            .write_all(&framed_query(7, "shop.test"))
            .expect("write");
        self.assert_answered();
    }

    #[track_caller]
    fn assert_answered(&mut self) {
        let message = self.read_message();
        assert_eq!(Answer::read(&message).addresses, [server(10)]);
    }

    /// The next message.
    #[track_caller]
    fn read_message(&mut self) -> Vec<u8> {
        read_message(&mut self.stream).expect("a response")
    }

    /// Asserts that the secret name has not left the node. The SYN of a new connection marks the end of the
    /// capture.
    #[track_caller]
    fn assert_secret_stayed(&self) {
        let last = self.pod.reach_tcp((RESOLVER, 53));
        let port = last.local_addr().expect("a connected socket").port();
        let own: IpAddr = self.pod.ipv4().into();
        let seen = self.uplink.receive(DEADLINE, |frame| {
            let leaked = frame.windows(SECRET.len()).any(|w| w == SECRET);
            assert!(!leaked, "the name left the node: {frame:?}");
            frames::is(frame, own, RESOLVER, ip_number::TCP)
                && frame[TCP..TCP + 2] == port.to_be_bytes()
        });
        assert!(seen.is_some());
        assert_eq!(self.lab.dns().queries_for("evil.test"), 0);
    }
}

#[test]
fn a_retransmission_with_other_bytes_resets_the_connection() {
    let mut scene = Scene::new();
    let (allowed, evil) = (framed_query(7, "shop.test"), framed_query(7, "evil.test"));
    // The agent holds the first half; then it comes again with other bytes.
    scene.stream.write_all(&allowed[..20]).expect("write");
    let own = scene.pod.ipv4().into();
    let held = scene.tap.receive(DEADLINE, |frame| {
        frames::is(frame, RESOLVER, own, ip_number::TCP)
            && number(frame, TCP + 8) == scene.asked.wrapping_add(20)
    });
    assert!(held.is_some(), "what is held is acknowledged");
    scene.forge(0, flag::ACK, &evil);
    scene.assert_reset();
    scene.assert_secret_stayed();
}

#[test]
fn a_segment_out_of_order_is_compared_with_its_retransmission() {
    let mut scene = Scene::new();
    let (allowed, evil) = (framed_query(7, "shop.test"), framed_query(7, "evil.test"));
    scene.forge(10, flag::ACK, &evil[10..]);
    scene.stream.write_all(&allowed).expect("write");
    scene.assert_reset();
    scene.assert_secret_stayed();
}

#[test]
fn a_query_out_of_order_arrives() {
    let mut scene = Scene::new();
    let allowed = framed_query(7, "shop.test");
    scene.forge(10, flag::ACK, &allowed[10..]);
    scene.stream.write_all(&allowed).expect("write");
    scene.assert_answered();
    assert!(scene.agent.denials().is_empty());
}

#[test]
fn acknowledged_bytes_are_not_forwarded_again() {
    let mut scene = Scene::new();
    scene.assert_works();
    scene.forge(0, flag::ACK, &framed_query(7, "evil.test"));
    scene.assert_works();
    scene.assert_secret_stayed();
}

#[test]
fn another_syn_does_not_move_the_stream() {
    let mut scene = Scene::new();
    scene.assert_works();
    // The agent takes it for a new connection until the resolver's response to the SYN shows that it is not.
    let evil = framed_query(7, "evil.test");
    let allowed = framed_query(7, "shop.test");
    let moved = scene.asked.wrapping_add(allowed.len() as u32 + 7);
    scene.forge_from(scene.port, moved.wrapping_sub(1), flag::SYN, &[]);
    scene.forge_from(scene.port, moved, flag::ACK, &allowed);
    let evil_at = scene.asked.wrapping_add(allowed.len() as u32);
    scene.forge_from(scene.port, evil_at, flag::ACK, &evil);
    scene.assert_secret_stayed();
    assert_eq!(scene.lab.dns().queries_for("shop.test"), 1);
}

#[test]
fn no_data_leaves_before_the_handshake() {
    let scene = Scene::new();
    let evil = framed_query(7, "evil.test");
    scene.forge_from(4000, 100, flag::ACK, &evil);
    scene.forge_from(4001, 100, flag::SYN, &evil);
    scene.forge_from(4001, 101, flag::ACK, &evil);
    scene.forge_from(4002, 100, flag::FIN | flag::ACK, &evil);
    scene.forge_from(4003, 100, flag::RST, &evil);
    scene.forge_from(4004, 100, 0, &evil);
    scene.assert_secret_stayed();
}

#[test]
fn a_rst_and_a_fin_carry_no_data_out() {
    let scene = Scene::new();
    let evil = framed_query(7, "evil.test");
    scene.forge(5000, flag::RST | flag::ACK, &evil);
    scene.forge(0, flag::ACK, &evil);
    scene.assert_secret_stayed();
    let scene = Scene::new();
    scene.forge(0, flag::FIN | flag::ACK, &evil[..evil.len() - 1]);
    scene.assert_secret_stayed();
}

#[test]
fn urgent_data_resets_the_connection() {
    let mut scene = Scene::new();
    scene.forge(0, flag::ACK | flag::URG, &framed_query(7, "shop.test"));
    scene.assert_reset();
    assert!(scene.lab.dns().questions().is_empty());
}

#[test]
fn a_segment_with_a_wrong_checksum_is_ignored() {
    let mut scene = Scene::new();
    let own = scene.pod.ipv4().into();
    let step = frames::from_pod(&scene.pod, own, RESOLVER)
        .tcp(scene.port, 53, scene.asked, 500)
        .ack(scene.answered);
    let mut frame = Vec::new();
    step.write(&mut frame, &framed_query(7, "evil.test"))
        .expect("a frame");
    frame[TCP + 16] ^= 0x55;
    scene.tap.send(&frame);
    scene.assert_works();
    assert!(scene.agent.denials().is_empty());
    scene.lab.wait_loss_counted("dns_segments_damaged", 1);
    scene.assert_secret_stayed();
}

#[test]
fn an_acknowledgment_of_bytes_that_were_never_sent_is_ignored() {
    let mut scene = Scene::new();
    scene.answered = scene.answered.wrapping_add(5000);
    scene.forge(0, flag::ACK, &framed_query(7, "evil.test"));
    scene.assert_works();
    scene.assert_secret_stayed();
}

#[test]
fn after_a_refusal_a_retransmission_with_other_bytes_resets_the_connection() {
    let mut scene = Scene::after_a_refusal();
    let (allowed, evil) = (framed_query(7, "shop.test"), framed_query(7, "evil.test"));
    scene.forge(10, flag::ACK, &evil[10..]);
    scene.stream.write_all(&allowed).expect("write");
    scene.assert_reset();
    scene.assert_secret_stayed();
}

#[test]
fn after_a_refusal_only_judged_bytes_leave() {
    let mut scene = Scene::after_a_refusal();
    let (allowed, evil) = (framed_query(7, "shop.test"), framed_query(7, "evil.test"));
    // Bytes before the stream's position, an acknowledgment of bytes that were never sent, a SYN, and the end
    // of a query before its beginning.
    scene.forge(
        0_u32.wrapping_sub(allowed.len() as u32),
        flag::ACK,
        &allowed,
    );
    scene.forge(0_u32.wrapping_sub(20), flag::ACK, &evil[..20]);
    let answered = scene.answered;
    scene.answered = answered.wrapping_add(5000);
    scene.forge(0, flag::ACK, &evil);
    scene.answered = answered;
    scene.forge(10, flag::ACK, &allowed[10..]);
    scene.assert_works();
    scene.forge(0, flag::ACK, &evil);
    scene.assert_works();
    scene.assert_secret_stayed();
    assert_eq!(scene.lab.dns().queries_for("shop.test"), 2);
    scene.forge(2 * allowed.len() as u32, flag::ACK | flag::URG, &allowed);
    scene.assert_reset();
    scene.assert_secret_stayed();
}

#[test]
fn a_resolver_cannot_open_a_connection_to_the_pod() {
    let lab = Lab::builder().without_dns().build();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    let listener = pod.listen_tcp(8080);
    listener.set_nonblocking(true).expect("a listener");
    let connected = lab.outside().run(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
            .expect("a socket");
        let own = SocketAddr::new(RESOLVER, 53).into();
        socket.bind(&own).expect("the resolver's port is free");
        let pod = SocketAddr::new(pod.ipv4().into(), 8080).into();
        socket.connect_timeout(&pod, egress_tests::SHORT)
    });
    assert!(connected.is_err());
    assert!(listener.accept().is_err(), "nothing arrived");
    agent.wait_denial("the SYN", |d| d.of(&pod) && d.reason == "dns_over_tcp");
}
