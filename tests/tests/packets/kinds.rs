//! Packets of every kind, sent by ordinary programs and by forgers.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    thread,
};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod, SHORT,
    addresses::{server, server6},
    frames::{self, Tap},
};
use etherparse::{
    IpFragOffset, IpHeaders, Ipv4Extensions, Ipv4Options, Ipv6Extensions, Ipv6RawExtHeader,
    PacketBuilder, ip_number,
};

/// The port that [`Wire`] allows.
const PORT: u16 = 4000;

/// A pod that may send UDP and TCP to port 4000 of `server(1)` and `server6(1)`; a tap in the pod, and one on
/// the frames that leave the node.
struct Wire {
    agent: Agent,
    tap: Tap,
    uplink: Tap,
    pod: Pod,
    lab: Lab,
}

impl Wire {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::new();
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", "203.0.113.1:4000 [2001:db8::1]:4000")]);
        let agent = lab.start_agent(&[&pod]);
        let tap = Tap::open(pod.netns(), "eth0");
        let uplink = Tap::open(lab.outside(), "eth0");
        Self {
            agent,
            tap,
            uplink,
            pod,
            lab,
        }
    }

    /// Asserts that this frame is dropped: sends it and then a harmless one, of which only the latter leaves
    /// the node.
    #[track_caller]
    fn assert_dropped(&self, frame: &[u8], reason: &str) {
        const SENTINEL: &[u8] = b"the harmless one";
        let own = self.pod.ipv4().into();
        let mark = self.agent.mark();
        self.tap.send(frame);
        self.tap.send(&frames::udp(
            &self.pod,
            (own, 1),
            (server(1), PORT),
            SENTINEL,
        ));
        let content = &frame[14..];
        let tail = &content[content.len() - content.len().min(8)..];
        let first = self.uplink.receive(DEADLINE, |seen| {
            seen.ends_with(SENTINEL) || (!tail.is_empty() && seen.ends_with(tail))
        });
        assert!(
            first.is_some_and(|seen| seen.ends_with(SENTINEL)),
            "the frame left the node"
        );
        self.agent
            .wait_denial_from(mark, reason, |d| d.of(&self.pod) && d.reason == reason);
    }

    /// Asserts that this frame leaves the node.
    #[track_caller]
    fn assert_passes(&self, frame: &[u8]) {
        self.tap.send(frame);
        let tail = &frame[frame.len() - 8..];
        assert!(
            self.uplink
                .receive(DEADLINE, |seen| seen.ends_with(tail))
                .is_some()
        );
    }

    fn own(&self) -> IpAddr {
        self.pod.ipv4().into()
    }

    fn own6(&self) -> IpAddr {
        self.pod.ipv6().into()
    }
}

#[test]
fn a_forged_source_address_stays_on_the_node() {
    let wire = Wire::new();
    let stranger = "10.1.200.2".parse().expect("an address");
    let stranger6 = "fd01:c8::2".parse().expect("an address");
    let (v4, v6) = ((server(1), PORT), (server6(1), PORT));
    wire.assert_dropped(
        &frames::udp(&wire.pod, (stranger, 7), v4, b"forged by v4"),
        "spoofed_source",
    );
    let line = wire
        .agent
        .wait_denial("the forged one", |d| d.src_ip == Some(stranger));
    assert_eq!((line.dst_ip, line.dst_port), (Some(server(1)), Some(PORT)));
    wire.assert_passes(&frames::udp(&wire.pod, (wire.own6(), 7), v6, b"not forged"));
    wire.tap
        .send(&frames::udp(&wire.pod, (stranger6, 7), v6, b"forged by v6"));
    wire.agent.wait_denial("the forged one", |d| {
        d.src_ip == Some(stranger6) && d.reason == "spoofed_source"
    });
}

#[test]
fn a_pod_cannot_send_from_a_neighbours_address() {
    let wire = Wire::new();
    let neighbour = wire.lab.pod("shop", "mail");
    wire.lab
        .write_pod(&neighbour, &[("allow", "203.0.113.1:4000")]);
    wire.agent.wait_enforcing(&neighbour);
    let borrowed = neighbour.ipv4().into();
    let frame = frames::udp(&wire.pod, (borrowed, 7), (server(1), PORT), b"borrowed");
    wire.assert_dropped(&frame, "spoofed_source");
}

#[test]
fn tagged_truncated_and_foreign_frames_stay_on_the_node() {
    let wire = Wire::new();
    let good = frames::udp(
        &wire.pod,
        (wire.own(), 7),
        (server(1), PORT),
        b"tagged frame",
    );
    let mut tagged = good.clone();
    tagged.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
    wire.assert_dropped(&tagged, "malformed");

    let mut foreign = good.clone();
    foreign[12..14].copy_from_slice(&[0x88, 0xb5]); // IEEE 802, local experimental
    foreign.extend(b"foreign!");
    let wire = Wire::new();
    wire.assert_dropped(&foreign, "malformed");

    let wire = Wire::new();
    let mut longer_header = good;
    longer_header[14] = 0x4f; // a header of 60 bytes where there are not so many
    longer_header.truncate(14 + 40);
    wire.assert_dropped(&longer_header, "malformed");
}

#[test]
fn ip_options_and_extension_headers_do_not_hide_ports() {
    let wire = Wire::new();
    let with_options = |dst: u8, payload: &[u8]| {
        let (IpAddr::V4(src), IpAddr::V4(dst)) = (wire.own(), server(dst)) else {
            unreachable!()
        };
        let mut header = frames::ipv4_header(src, dst);
        header.options = Ipv4Options::try_from(&[1, 1, 1, 0][..]).expect("four bytes of options");
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(wire.pod.hardware(), wire.pod.gateway_hardware())
            .ip(IpHeaders::Ipv4(header, Ipv4Extensions::default()))
            .udp(7, PORT)
            .write(&mut frame, payload)
            .expect("a frame can be built");
        frame
    };
    let with_extension = |dst: u16, payload: &[u8]| {
        let (IpAddr::V6(src), IpAddr::V6(dst)) = (wire.own6(), server6(dst)) else {
            unreachable!()
        };
        let padding = [1, 4, 0, 0, 0, 0]; // PadN (RFC 8200, section 4.2)
        let options = Ipv6RawExtHeader::new_raw(ip_number::UDP, &padding).expect("eight bytes");
        let extensions = Ipv6Extensions {
            destination_options: Some(options),
            ..Ipv6Extensions::default()
        };
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(wire.pod.hardware(), wire.pod.gateway_hardware())
            .ip(IpHeaders::Ipv6(frames::ipv6_header(src, dst), extensions))
            .udp(7, PORT)
            .write(&mut frame, payload)
            .expect("a frame can be built");
        frame
    };
    wire.assert_passes(&with_options(1, b"allowed with options"));
    wire.assert_passes(&with_extension(1, b"allowed with an extension"));
    wire.assert_dropped(&with_options(9, b"denied with options"), "no_rule");
    wire.tap
        .send(&with_extension(9, b"denied with an extension"));
    let line = wire.agent.wait_denial("the one with an extension", |d| {
        d.dst_ip == Some(server6(9))
    });
    assert_eq!(
        (line.dst_port, line.reason.as_str()),
        (Some(PORT), "no_rule")
    );
}

#[test]
fn later_fragments_follow_the_verdict_of_the_first() {
    let lab = Lab::new();
    let _echo = lab.serve_udp(PORT);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "203.0.113.1:4000 [2001:db8::1]:4000")]);
    let agent = lab.start_agent(&[&pod]);
    let large = vec![0x5a; 20_000];
    for (allowed, denied) in [(server(1), server(9)), (server6(1), server6(9))] {
        assert!(
            pod.echo_udp((allowed, PORT), &large, DEADLINE),
            "no echo from {allowed}"
        );
        assert!(
            !pod.echo_udp((denied, PORT), &large, SHORT),
            "an echo from {denied}"
        );
        agent.wait_denial("its first fragment", |d| {
            d.is(&pod, "no_rule", denied, PORT)
        });
    }
}

#[test]
fn a_fragment_without_its_first_stays_on_the_node() {
    let wire = Wire::new();
    let (IpAddr::V4(src), IpAddr::V4(dst)) = (wire.own(), server(1)) else {
        unreachable!()
    };
    let mut header = frames::ipv4_header(src, dst);
    header.identification = 0x4242;
    header.fragment_offset = IpFragOffset::try_new(100).expect("an offset of 13 bits");
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(wire.pod.hardware(), wire.pod.gateway_hardware())
        .ip(IpHeaders::Ipv4(header, Ipv4Extensions::default()))
        .write(&mut frame, ip_number::UDP, b"the rest of something")
        .expect("a frame can be built");
    wire.assert_dropped(&frame, "fragment_without_first");
}

#[test]
fn ping_needs_an_entry_without_a_port() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    let entries = "203.0.113.1 203.0.113.2:443 203.0.113.3/icmp 2001:db8::1 [2001:db8::2]:443";
    lab.write_pod(&pod, &[("allow", entries)]);
    let agent = lab.start_agent(&[&pod]);
    for allowed in [server(1), server(3), server6(1)] {
        assert!(pod.ping(allowed, DEADLINE), "no reply from {allowed}");
    }
    for (denied, protocol) in [(server(2), "icmp"), (server6(2), "icmpv6")] {
        assert!(!pod.ping(denied, SHORT), "a reply from {denied}");
        let line = agent.wait_denial("a ping", |d| d.of(&pod) && d.dst_ip == Some(denied));
        assert_eq!(line.protocol.as_deref(), Some(protocol));
    }
}

#[test]
fn sctp_is_judged_by_its_ports() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(
        &pod,
        &[("allow", "203.0.113.1:3868/sctp 203.0.113.2:3868/tcp")],
    );
    let agent = lab.start_agent(&[&pod]);
    let tap = Tap::open(pod.netns(), "eth0");
    let uplink = Tap::open(lab.outside(), "eth0");
    tap.send(&frames::sctp_init(&pod, (server(1), 3869), 7));
    tap.send(&frames::sctp_init(&pod, (server(2), 3868), 8));
    tap.send(&frames::sctp_init(&pod, (server(1), 3868), 9));
    let own = pod.ipv4().into();
    let first = uplink
        .receive(DEADLINE, |f| {
            [server(1), server(2)]
                .iter()
                .any(|to| frames::is(f, own, *to, ip_number::SCTP))
        })
        .expect("the allowed one");
    assert_eq!(
        first[14 + 20..14 + 24],
        [0, 9, 0x0f, 0x1c],
        "ports 9 and 3868"
    );
    for to in [(server(1), 3869), (server(2), 3868)] {
        let line = agent.wait_denial("an INIT", |d| d.is(&pod, "port_not_allowed", to.0, to.1));
        assert_eq!(line.protocol.as_deref(), Some("sctp"));
    }
}

#[test]
fn a_pod_without_allowed_destinations_still_answers_connections() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "")]);
    let agent = lab.start_agent(&[&pod]);
    for own in [IpAddr::from(pod.ipv4()), pod.ipv6().into()] {
        let tcp = pod.listen_tcp(8080);
        let server = thread::spawn(move || {
            let (mut stream, peer) = tcp.accept().expect("a connection from outside");
            let mut request = [0; 4];
            stream.read_exact(&mut request).expect("a request");
            stream.write_all(&request).expect("send a response");
            peer
        });
        let to = SocketAddr::new(own, 8080);
        let connected = lab
            .outside()
            .run(|| TcpStream::connect_timeout(&to, DEADLINE));
        let mut stream = connected.unwrap_or_else(|e| panic!("connect to the pod at {to}: {e}"));
        assert!(
            egress_tests::exchange(&mut stream, b"ping", DEADLINE),
            "no answer from {to}"
        );
        let peer = server.join().expect("the pod's server").ip().to_canonical();

        // Permission to answer is not permission to connect.
        agent.denies_tcp(&pod, (peer, 9999), "no_rule");
    }
}

#[test]
fn a_pod_without_allowed_destinations_still_answers_datagrams() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "")]);
    let _agent = lab.start_agent(&[&pod]);
    for own in [IpAddr::from(pod.ipv4()), pod.ipv6().into()] {
        let to = SocketAddr::new(own, 8080);
        let socket = pod
            .netns()
            .run(|| UdpSocket::bind(to))
            .expect("bind a UDP socket in a pod");
        let server = thread::spawn(move || {
            socket
                .set_read_timeout(Some(DEADLINE))
                .expect("a time-out that is not zero");
            let mut buffer = [0; 64];
            let (length, peer) = socket
                .recv_from(&mut buffer)
                .expect("a datagram from outside");
            socket
                .send_to(&buffer[..length], peer)
                .expect("send a response");
        });
        let client = lab.outside().run(|| {
            let unspecified: IpAddr = if own.is_ipv4() {
                [0; 4].into()
            } else {
                [0_u8; 16].into()
            };
            UdpSocket::bind((unspecified, 0)).and_then(|s| s.connect(to).map(|()| s))
        });
        let client = client.expect("a UDP socket outside");
        assert!(
            egress_tests::echo_on(&client, b"ping", DEADLINE),
            "no answer from {to}"
        );
        server.join().expect("the pod's server");
    }
}

#[test]
fn with_reject_denied_programs_fail_at_once() {
    let lab = Lab::builder().config("onDeny", "reject").build();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    for to in [(server(9), 80), (server6(9), 80)] {
        let error = pod.connect_tcp(to, DEADLINE).expect_err("it is denied");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");

        let socket = pod.udp_socket(to);
        socket
            .set_read_timeout(Some(DEADLINE))
            .expect("a time-out that is not zero");
        socket.send(b"hello").expect("send a datagram");
        let error = socket.recv(&mut [0; 64]).expect_err("it is denied");
        assert_ne!(
            error.kind(),
            ErrorKind::WouldBlock,
            "no ICMP error came back"
        );

        for protocol in ["tcp", "udp"] {
            let line = agent.wait_denial(protocol, |d| {
                d.is(&pod, "no_rule", to.0, to.1) && d.protocol.as_deref() == Some(protocol)
            });
            assert_eq!(
                (line.event.as_str(), line.verdict.as_str()),
                ("denied", "rejected")
            );
        }
    }
}

#[test]
fn a_late_checksum_cannot_overwrite_the_judged_port() {
    /// The offset of the UDP header, and the offsets of its destination port and checksum.
    const UDP: u16 = 14 + 20;
    const PORT_FIELD: u16 = 2;
    const CHECKSUM_FIELD: u16 = 6;
    let wire = Wire::new();
    let own: IpAddr = wire.pod.ipv4().into();
    let frame = |payload: &[u8]| frames::udp(&wire.pod, (own, 7), (server(1), PORT), payload);
    let sender = Tap::open(wire.pod.netns(), "eth0");
    sender.expect_offsets();

    let mark = wire.agent.mark();
    sender.send_with_checksum_at(&frame(b"forged"), UDP, PORT_FIELD);
    sender.send_with_checksum_at(&frame(b"forged"), UDP - 4, 0);
    sender.send_with_checksum_at(&frame(b"honest"), UDP, CHECKSUM_FIELD);
    let left = wire
        .uplink
        .receive(DEADLINE, |frame| {
            [b"forged", b"honest"]
                .iter()
                .any(|payload| frame.windows(6).any(|bytes| bytes == *payload))
        })
        .expect("the honest packet passes");
    assert!(left.windows(6).any(|bytes| bytes == b"honest"), "{left:?}");
    wire.agent
        .wait_denial_from(mark, "the forged ones", |denial| {
            denial.reason == "malformed" && denial.pod == "cart"
        });
}
