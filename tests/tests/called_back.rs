//! A connection of the pod that its policy has ended, and that the server still has open, does not go on as
//! one that the server has opened: somebody outside sends a SYN in the server's name, the pod answers with the
//! numbers of the old connection, and the server acknowledges them (RFC 5961, section 4.2).

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
};

use egress_tests::{
    DEADLINE, Lab, Pod, SHORT,
    addresses::{server, server6},
    eventually,
    frames::{self, Tap},
    observed::HTTP,
    raw::{ETHERNET, IPV4, IPV6, flag},
};
use etherparse::ip_number::TCP;
use socket2::{Domain, Protocol, Socket, Type};

/// The server's port.
const THERE: u16 = 8888;
/// How far outside of a window a sequence number is.
const FAR: u32 = 1 << 30;

/// A connection of the pod, and the numbers of its next segment.
struct Connection<'a> {
    pod: &'a Pod,
    peer: IpAddr,
    stream: TcpStream,
    /// Where the pod's frames leave the pod, and the peer's arrive.
    tap: Tap,
    sequence: u32,
    acknowledges: u32,
    _server: TcpStream,
}

impl<'a> Connection<'a> {
    /// Opens it, and sends something on it that the server acknowledges.
    fn open(lab: &Lab, pod: &'a Pod, peer: IpAddr) -> Self {
        let listener = lab.outside().run(|| TcpListener::bind((peer, THERE)));
        let listener = listener.expect("listen outside");
        let mut stream = pod.reach_tcp((peer, THERE));
        let (server, _) = listener.accept().expect("the pod calls");
        let tap = Tap::open(pod.netns(), "eth0");
        stream.write_all(b"before").expect("write");
        let at = tcp_at(peer);
        let seen = tap.receive(DEADLINE, |frame| {
            frames::is(frame, peer, own(pod, peer), TCP) && frame[at + 13] == flag::ACK
        });
        let seen = seen.expect("the server acknowledges");
        let number = |at: usize| u32::from_be_bytes(seen[at..at + 4].try_into().expect("four"));
        Self {
            pod,
            peer,
            stream,
            tap,
            sequence: number(at + 8),
            acknowledges: number(at + 4),
            _server: server,
        }
    }

    fn own(&self) -> SocketAddr {
        let own = self.stream.local_addr().expect("an address");
        SocketAddr::new(own.ip().to_canonical(), own.port())
    }

    /// Sends a frame of the connection's, with flags and a number of the pod's choice.
    fn send(&self, sequence: u32, flags: u8) {
        let own = self.own();
        let builder = frames::from_pod(self.pod, own.ip(), self.peer)
            .tcp(own.port(), THERE, sequence, 64_240)
            .ack(self.acknowledges);
        let builder = match flags {
            flag::SYN => builder.syn(),
            flag::RST => builder.rst(),
            _ => builder,
        };
        let mut frame = Vec::new();
        builder.write(&mut frame, &[]).expect("a frame in memory");
        self.tap.send(&frame);
    }

    /// Whether something that the pod sends from now on leaves, after a handshake in the server's name.
    fn is_stolen(&mut self, lab: &Lab) -> bool {
        let own = self.own();
        let seen = Tap::open(lab.outside(), "eth0");
        let frame = frames::from_pod(self.pod, self.peer, own.ip())
            .tcp(THERE, own.port(), FAR, 64_240)
            .syn();
        let mut syn = Vec::new();
        frame.write(&mut syn, &[]).expect("a frame in memory");
        let raw = lab.outside().run(|| {
            let raw = Protocol::from(nix::libc::IPPROTO_RAW);
            Socket::new(Domain::for_address(own), Type::RAW, Some(raw))
        });
        let to = SocketAddr::new(own.ip(), 0).into();
        raw.expect("a raw socket")
            .send_to(&syn[ETHERNET..], &to)
            .expect("send in the server's name");
        let at = tcp_at(self.peer);
        let arrived = self.tap.receive(DEADLINE, |frame| {
            frames::is(frame, self.peer, own.ip(), TCP) && frame[at + 13] == flag::SYN
        });
        assert!(arrived.is_some(), "the SYN does not arrive");
        self.send(self.sequence.wrapping_sub(1), flag::SYN);
        // The server's acknowledgment, if the segment above has left.
        let _ = self.tap.receive(SHORT, |frame| {
            frames::is(frame, self.peer, own.ip(), TCP) && frame[at + 13] == flag::ACK
        });
        let _ = self.stream.write_all(b"stolen");
        let stolen = |frame: &[u8]| frame.windows(6).any(|window| window == b"stolen");
        seen.receive(SHORT, stolen).is_some()
    }
}

/// The pod's address of the family of `peer`.
fn own(pod: &Pod, peer: IpAddr) -> IpAddr {
    match peer {
        IpAddr::V4(_) => pod.ipv4().into(),
        IpAddr::V6(_) => pod.ipv6().into(),
    }
}

/// Where the TCP header begins in a frame.
fn tcp_at(peer: IpAddr) -> usize {
    if peer.is_ipv4() { IPV4 } else { IPV6 }
}

#[track_caller]
fn ends_when_the_pod_begins_to_be_enforced(peer: IpAddr) {
    let lab = Lab::builder().build();
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let mut connection = Connection::open(&lab, &cart, peer);
    let agent = lab.start_agent(&[&cart]);
    assert!(!connection.is_stolen(&lab), "the connection goes on");
    agent.wait_denial("the SYN-ACK", |denial| {
        denial.is(&cart, "no_rule", peer, THERE)
    });
}

#[test]
fn a_connection_from_before_the_agent_does_not_go_on_as_the_servers() {
    ends_when_the_pod_begins_to_be_enforced(server(9));
}

#[test]
fn over_ipv6_a_connection_from_before_the_agent_does_not_go_on_as_the_servers() {
    ends_when_the_pod_begins_to_be_enforced(server6(9));
}

#[test]
fn a_connection_that_the_pod_has_made_the_agent_forget_does_not_go_on_as_the_servers() {
    let peer = server(9);
    // Four flows of the pod's that are not established.
    let lab = Lab::builder().config("limits.flowsPerPod", 64).build();
    let cart = lab.pod("shop", "cart");
    let _web = lab.serve_tcp(443);
    lab.write_pod(&cart, &[("allow", &format!("{peer} {}", server(10)))]);
    let agent = lab.start_agent(&[&cart]);
    let mut connection = Connection::open(&lab, &cart, peer);
    // The server takes no notice of it, but the flow is closed, and the pod's next ones push it out.
    connection.send(connection.sequence.wrapping_add(FAR), flag::RST);
    for _ in 0..8 {
        drop(cart.reach_tcp((server(10), 443)));
    }
    agent.applies(&cart, || {
        lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    });
    assert!(!connection.is_stolen(&lab), "the connection goes on");
}

#[test]
fn a_destination_that_the_pod_still_uses_is_kept_when_others_give_way() {
    let peer = server(9);
    // Sixteen destinations of the pod's.
    let lab = Lab::builder()
        .config("limits.flowsPerPod", 64)
        .config("http", HTTP)
        .build();
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", &format!("{peer} {}", server(10)))]);
    let agent = lab.start_agent(&[&cart]);
    let mut connection = Connection::open(&lab, &cart, peer);
    for port in 1..=12 {
        let refused = cart
            .netns()
            .run(|| TcpStream::connect_timeout(&(server(10), port).into(), DEADLINE));
        assert!(refused.is_err(), "nobody listens there");
    }
    let evicted = || lab.metrics().get("egress_agent_destinations_evicted_total");
    eventually("destinations give way", || (evicted() > 0.0).then_some(()));
    agent.applies(&cart, || {
        lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    });
    assert!(!connection.is_stolen(&lab), "the connection goes on");
}

#[test]
fn what_a_server_opens_from_another_port_is_answered() {
    let peer = server(9);
    let lab = Lab::builder().build();
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let _connection = Connection::open(&lab, &cart, peer);
    let _agent = lab.start_agent(&[&cart]);
    let listener = cart.listen_tcp(80);
    let to = SocketAddr::new(own(&cart, peer), 80);
    let client = lab
        .outside()
        .run(|| TcpStream::connect_timeout(&to, DEADLINE));
    let mut client = client.expect("the pod is reached");
    let (mut server, _) = listener.accept().expect("a connection");
    client.write_all(b"hello").expect("write");
    let mut heard = [0; 5];
    std::io::Read::read_exact(&mut server, &mut heard).expect("it is heard");
    assert_eq!(&heard, b"hello");
}
