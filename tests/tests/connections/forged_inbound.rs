//! Attempts of a pod to make its own connection look as if others had opened it: it sends frames in a peer's
//! name that the node routes back to the pod, falsifies its sockets' counters, or makes a handshake with
//! itself.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    mem::MaybeUninit,
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use egress_tests::{
    Agent, Builder, DEADLINE, Lab, Pod, SHORT, StopAtEnd,
    addresses::{server, server6},
    eventually,
    frames::{self, Tap},
    holds,
    ifb::Ifb,
    raw::{ETHERNET, flag, transport_at},
    rewritten::nft,
};
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

/// The peer's port and the pod's.
const THERE: u16 = 8888;
const HERE: u16 = 7777;

fn tracking() -> Builder {
    Lab::builder().tracking().config("onDeny", "reject")
}

/// A UDP datagram that the pod sends to itself in the name of `peer`.
fn datagram(pod: &Pod, peer: IpAddr) -> Vec<u8> {
    frames::udp(pod, (peer, THERE), (pod.address_for(peer), HERE), b"forged")
}

/// A TCP segment without data that the pod sends to itself in the name of `peer`.
fn segment(pod: &Pod, peer: IpAddr, flags: u8, sequence: u32, acknowledged: u32) -> Vec<u8> {
    let builder =
        frames::from_pod(pod, peer, pod.address_for(peer)).tcp(THERE, HERE, sequence, 64_240);
    let builder = if flags & flag::SYN != 0 {
        builder.syn()
    } else {
        builder
    };
    let builder = if flags & flag::ACK != 0 {
        builder.ack(acknowledged)
    } else {
        builder
    };
    let mut frame = Vec::new();
    builder
        .write(&mut frame, &[])
        .expect("a frame can be built");
    frame
}

/// The pod's socket of the forged flow.
fn socket(pod: &Pod, peer: IpAddr) -> UdpSocket {
    let socket = pod
        .netns()
        .run(|| UdpSocket::bind((pod.address_for(peer), HERE)));
    let socket = socket.expect("bind in the pod");
    socket.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    socket
}

/// A socket outside at the peer's address; it receives what the pod sends to the peer.
fn victim(lab: &Lab, peer: IpAddr) -> UdpSocket {
    let socket = lab.outside().run(|| UdpSocket::bind((peer, THERE)));
    let socket = socket.expect("bind outside");
    socket.set_read_timeout(Some(SHORT)).expect("a time-out");
    socket
}

/// True if the peer receives a datagram that the pod sends now.
fn hears(victim: &UdpSocket, own: &UdpSocket, peer: IpAddr) -> bool {
    let mut taken = [0; 64];
    let word = b"from now on";
    // The node may refuse it at once.
    let _ = own.send_to(word, (peer, THERE));
    loop {
        match victim.recv(&mut taken) {
            Ok(length) if taken[..length] == *word => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
}

/// The pod sends itself datagrams in the peer's name during the whole attachment.
#[track_caller]
fn assert_forging_during_attachment_opens_nothing(peer: IpAddr) {
    let lab = Lab::new();
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let (own, victim) = (socket(&cart, peer), victim(&lab, peer));
    let tap = Tap::open(cart.netns(), "eth0");
    let forged = datagram(&cart, peer);
    tap.send(&forged);
    own.recv(&mut [0; 16]).expect("the node sends it back");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let forging = StopAtEnd(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..50 {
                    tap.offer(&forged);
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        let agent = lab.start_agent(&[&cart]);
        let heard = hears(&victim, &own, peer);
        drop(forging);
        assert!(!heard, "the peer was reached");
        agent.wait_denial("a forged source", |denial| {
            denial.of(&cart) && denial.reason == "spoofed_source"
        });
    });
}

#[test]
fn a_pod_that_forges_datagrams_during_attachment_opens_no_flow() {
    assert_forging_during_attachment_opens_nothing(server(9));
}

#[test]
fn over_ipv6_a_pod_that_forges_datagrams_during_attachment_opens_no_flow() {
    assert_forging_during_attachment_opens_nothing(server6(9));
}

#[test]
fn a_forged_packet_that_waits_in_the_nodes_neighbour_queue_opens_no_flow() {
    let peer = server(9);
    let lab = Lab::new();
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let (own, victim) = (socket(&cart, peer), victim(&lab, peer));
    let tap = Tap::open(cart.netns(), "eth0");
    // While the pod does not answer ARP, the node queues packets for it: three seconds by default, here for
    // as long as the agent takes to start.
    let (address, interface) = (cart.ipv4(), cart.interface());
    let attempts = format!("/proc/sys/net/ipv4/neigh/{interface}/mcast_solicit");
    lab.node()
        .run(|| fs::write(attempts, "600"))
        .expect("a setting of the node");
    nft(
        cart.netns(),
        "table arp silent { chain out { type filter hook output priority filter; arp operation reply drop; }; }",
    );
    lab.node()
        .ip_batch(&format!("neigh flush dev {interface}\n"));
    tap.send(&datagram(&cart, peer));
    let agent = lab.start_agent(&[&cart]);
    lab.node().ip_batch(&format!(
        "neigh replace {address} lladdr 02:00:00:00:01:02 dev {interface}\n"
    ));
    own.recv(&mut [0; 16]).expect("the node sends it back");
    assert!(!hears(&victim, &own, peer), "the peer was reached");
    agent.wait_denial("the datagram", |denial| {
        denial.is(&cart, "no_rule", peer, THERE)
    });
}

/// Asserts that a datagram opens no flow if the pod sends it to itself in the peer's name, with `send`, in
/// audit mode, and is enforced afterwards.
#[track_caller]
fn assert_opens_nothing_after_audit(peer: IpAddr, send: impl FnOnce(&Pod)) -> Agent {
    let lab = Lab::new();
    let cart = lab.pod("shop", "cart");
    let allow = ("allow", "shop.test:443");
    lab.write_pod(&cart, &[allow, ("mode", "audit")]);
    let agent = lab.start_agent(&[&cart]);
    let (own, victim) = (socket(&cart, peer), victim(&lab, peer));
    send(&cart);
    own.recv(&mut [0; 16]).expect("audit mode stops nothing");
    agent.applies_policy_after(&cart, || lab.write_pod(&cart, &[allow]));
    assert!(!hears(&victim, &own, peer), "{peer} was reached");
    agent.wait_denial("the datagram", |denial| {
        denial.verdict == "dropped" && denial.is(&cart, "no_rule", peer, THERE)
    });
    agent
}

#[test]
fn a_datagram_forged_in_audit_mode_opens_no_flow_once_the_pod_is_enforced() {
    for peer in [server(9), server6(9)] {
        assert_opens_nothing_after_audit(peer, |cart| {
            Tap::open(cart.netns(), "eth0").send(&datagram(cart, peer));
        });
    }
}

#[test]
fn a_frame_that_skips_the_programs_in_audit_mode_opens_no_flow_once_the_pod_is_enforced() {
    for peer in [server(9), server6(9)] {
        let agent = assert_opens_nothing_after_audit(peer, |cart| {
            let tap = Tap::open(cart.netns(), "eth0");
            let _ifb = Ifb::redirect(cart);
            tap.send(&datagram(cart, peer));
        });
        agent.wait_log("why connections end", |line| {
            line.contains("that others have opened end")
        });
    }
}

#[test]
fn a_handshake_with_itself_in_audit_mode_opens_no_flow_once_the_pod_is_enforced() {
    let peer = server6(9);
    let lab = Lab::new();
    let cart = lab.pod("shop", "cart");
    let allow = ("allow", "shop.test:443");
    lab.write_pod(&cart, &[allow, ("mode", "audit")]);
    let agent = lab.start_agent(&[&cart]);
    let mut stream = handshake_through_node(&lab, &cart, peer);
    let seen = Tap::open(lab.outside(), "eth0");
    agent.applies_policy_after(&cart, || lab.write_pod(&cart, &[allow]));
    let _ = stream.write_all(b"stolen");
    assert_eq!(seen.receive(SHORT, contains(b"stolen")), None);
    agent.wait_denial("the segment", |denial| {
        denial.verdict == "dropped" && denial.is(&cart, "no_rule", peer, THERE)
    });
}

#[test]
fn an_inbound_connection_of_audit_mode_goes_on_once_the_pod_is_enforced() {
    let lab = Lab::new();
    let cart = lab.pod("shop", "cart");
    let allow = ("allow", "shop.test:443");
    lab.write_pod(&cart, &[allow, ("mode", "audit")]);
    let agent = lab.start_agent(&[&cart]);
    let listener = cart.listen_tcp(HERE);
    let to = SocketAddr::from((cart.ipv4(), HERE));
    let caller = lab.outside().run(|| TcpStream::connect(to));
    let mut caller = caller.expect("the pod is called");
    let (mut inner, _) = listener.accept().expect("a connection");
    agent.applies_policy_after(&cart, || lab.write_pod(&cart, &[allow]));
    inner.write_all(b"word").expect("the pod writes");
    caller.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    caller.read_exact(&mut [0; 4]).expect("the data arrives");
}

/// A predicate: the frame contains these bytes.
fn contains(bytes: &[u8]) -> impl Fn(&[u8]) -> bool {
    move |frame| frame.windows(bytes.len()).any(|window| window == bytes)
}

/// The acknowledgment number for the pod's SYN-ACK in `frame`.
fn ack_number(frame: &[u8], peer: IpAddr) -> u32 {
    let at = transport_at(peer) + 4;
    let number = frame[at..at + 4].try_into().expect("four bytes");
    u32::from_be_bytes(number).wrapping_add(1)
}

/// A predicate: the frame is the pod's SYN-ACK.
fn is_syn_ack(pod: &Pod, peer: IpAddr) -> impl Fn(&[u8]) -> bool {
    let src = pod.address_for(peer);
    let at = transport_at(peer) + 13;
    move |frame| {
        frames::is(frame, src, peer, etherparse::ip_number::TCP)
            && frame[at] == flag::SYN | flag::ACK
    }
}

/// Drops RSTs outside: otherwise the peer would reset a connection that it does not know.
fn without_resets(lab: &Lab) {
    nft(
        lab.outside(),
        "table inet silent { chain out { type filter hook output priority filter; tcp flags rst drop; }; }",
    );
}

/// Opens a connection whose peer's frames the pod forges and the node routes back. Returns the pod's end.
#[track_caller]
fn handshake_through_node(lab: &Lab, pod: &Pod, peer: IpAddr) -> TcpStream {
    without_resets(lab);
    let listener = pod.listen_tcp(HERE);
    let tap = Tap::open(pod.netns(), "eth0");
    tap.send(&segment(pod, peer, flag::SYN, 1000, 0));
    let answer = tap.receive(DEADLINE, is_syn_ack(pod, peer));
    let acknowledged = ack_number(&answer.expect("the pod answers"), peer);
    tap.send(&segment(pod, peer, flag::ACK, 1001, acknowledged));
    let (stream, from) = listener.accept().expect("a connection");
    assert_eq!(from.ip().to_canonical(), peer);
    stream
}

/// Opens the same connection with forged frames that do not leave the pod.
#[track_caller]
fn handshake_within(lab: &Lab, pod: &Pod, peer: IpAddr) -> TcpStream {
    without_resets(lab);
    let listener = pod
        .netns()
        .run(|| TcpListener::bind((pod.address_for(peer), HERE)));
    let listener = listener.expect("listen in the pod");
    let tap = Tap::open(pod.netns(), "eth0");
    let raw = pod.netns().run(|| {
        let raw = Protocol::from(libc::IPPROTO_RAW);
        Socket::new(Domain::IPV4, Type::RAW, Some(raw))
    });
    let raw = raw.expect("a raw socket");
    let to = SocketAddr::new(pod.address_for(peer), 0).into();
    let send = |frame: Vec<u8>| {
        raw.send_to(&frame[ETHERNET..], &to)
            .expect("send within the pod")
    };
    send(segment(pod, peer, flag::SYN, 1000, 0));
    let answer = tap.receive(DEADLINE, is_syn_ack(pod, peer));
    let acknowledged = ack_number(&answer.expect("the pod answers"), peer);
    send(segment(pod, peer, flag::ACK, 1001, acknowledged));
    listener.accept().expect("a connection").0
}

#[test]
fn a_handshake_of_a_pod_with_itself_does_not_count_as_inbound() {
    let peer = server(9);
    let lab = tracking().build();
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let mut stream = handshake_within(&lab, &cart, peer);
    let seen = Tap::open(lab.outside(), "eth0");
    stream.write_all(b"before").expect("write");
    assert!(seen.receive(DEADLINE, contains(b"before")).is_some());

    let agent = lab.start_agent(&[&cart]);
    let _ = stream.write_all(b"stolen");
    assert_eq!(seen.receive(SHORT, contains(b"stolen")), None);
    agent.wait_denial("the segment", |denial| {
        denial.is(&cart, "no_rule", peer, THERE)
    });
}

/// Sets a socket option to the given bytes.
#[track_caller]
fn set_option(socket: &TcpStream, level: libc::c_int, name: libc::c_int, value: &[u8]) {
    let length = libc::socklen_t::try_from(value.len()).expect("a short option");
    // SAFETY: pointer and length are those of `value`.
    let failed = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            length,
        )
    };
    assert_eq!(failed, 0, "{}", io::Error::last_os_error());
}

/// The kernel's counters of a connection (`TCP_INFO`): bytes acknowledged, sent and retransmitted.
#[track_caller]
fn tcp_counters(socket: &TcpStream) -> [u64; 3] {
    let mut info = MaybeUninit::<[u64; 32]>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of_val(&info)).expect("a length");
    // SAFETY: the kernel writes at most `length` bytes, which is as many as `info` has.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    assert_eq!(failed, 0, "{}", io::Error::last_os_error());
    // SAFETY: all of it was zeroed, and any bytes are numbers.
    let info = unsafe { info.assume_init() };
    [info[15], info[25], info[26]]
}

/// Falsifies the counters of a connection, by an option with which the kernel can send nothing.
#[track_caller]
fn falsify_counters(stream: &mut TcpStream, level: libc::c_int, name: libc::c_int, option: &[u8]) {
    set_option(stream, level, name, option);
    // The kernel counts the data as sent, but cannot send it.
    stream.write_all(b"x").expect("write");
    set_option(stream, level, name, &[]);
    let says = "the counters claim that the peer opened the connection";
    eventually(says, || {
        let [acknowledged, sent, again] = tcp_counters(stream);
        holds(acknowledged == 2 && sent == 2 && again == 0)
    });
    stream.set_read_timeout(Some(DEADLINE)).expect("a time-out");
}

/// Asserts that the connection is judged and denied.
#[track_caller]
fn assert_judged(lab: &Lab, cart: &Pod, stream: &mut TcpStream) {
    let agent = lab.start_agent(&[cart]);
    let outcome = stream
        .write_all(b"more")
        .and_then(|()| stream.read_exact(&mut [0; 4]));
    let kind = outcome.expect_err("the connection goes on").kind();
    assert_eq!(kind, io::ErrorKind::ConnectionReset);
    agent.wait_log("that it is judged", |line| {
        line.contains("are judged as the")
    });
}

/// Asserts that a connection to the peer is judged although an option falsified its counters.
#[track_caller]
fn assert_falsified_is_judged(
    lab: &Lab,
    peer: IpAddr,
    level: libc::c_int,
    name: libc::c_int,
    option: &[u8],
) {
    let _echo = lab.serve_tcp(THERE);
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let mut stream = cart.reach_tcp((peer, THERE));
    falsify_counters(&mut stream, level, name, option);
    stream.read_exact(&mut [0]).expect("the peer answers");
    assert_judged(lab, &cart, &mut stream);
}

/// A routing header of type 4 (RFC 8754) with 127 segments: no link of the laboratory carries a frame of that
/// size.
fn long_routing_header(to: Ipv6Addr) -> Vec<u8> {
    let mut header = vec![0, 254, 4, 126, 126, 0, 0, 0];
    header.extend(to.octets().repeat(127));
    header
}

#[test]
fn an_oversized_routing_header_does_not_make_a_connection_count_as_inbound() {
    for lab in [
        tracking().build(),
        Lab::builder().config("onDeny", "reject").build(),
    ] {
        let IpAddr::V6(to) = server6(9) else {
            unreachable!("an IPv6 address")
        };
        let header = long_routing_header(to);
        let (level, option) = (libc::IPPROTO_IPV6, libc::IPV6_RTHDR);
        assert_falsified_is_judged(&lab, to.into(), level, option, &header);
    }
}

#[test]
fn a_connection_that_conntrack_picked_up_midstream_does_not_count_as_inbound() {
    let IpAddr::V6(to) = server6(9) else {
        unreachable!("an IPv6 address")
    };
    let lab = Lab::builder().config("onDeny", "reject").build();
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let listener = lab.outside().run(|| TcpListener::bind((to, THERE)));
    let listener = listener.expect("listen outside");
    let mut stream = cart.reach_tcp((to, THERE));
    let (mut peer, _) = listener.accept().expect("the pod calls");
    let header = long_routing_header(to);
    falsify_counters(&mut stream, libc::IPPROTO_IPV6, libc::IPV6_RTHDR, &header);
    // Connection tracking starts only now, so it takes the next sender for the one who opened the connection.
    nft(
        lab.node(),
        "table inet late { chain forward { type filter hook forward priority filter; ct state new counter; }; }",
    );
    peer.write_all(b"word").expect("send to the pod");
    stream.read_exact(&mut [0; 4]).expect("the data arrives");
    assert_judged(&lab, &cart, &mut stream);
}

#[test]
fn a_source_route_to_nowhere_does_not_make_a_connection_count_as_inbound() {
    let lab = tracking().build();
    let mut route = vec![0x89, 7, 4];
    let IpAddr::V4(to) = server(9) else {
        unreachable!("an IPv4 address")
    };
    route.extend(to.octets());
    route.push(0);
    assert_falsified_is_judged(&lab, to.into(), libc::IPPROTO_IP, libc::IP_OPTIONS, &route);
}
