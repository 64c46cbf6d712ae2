//! Somebody outside forges the segments of both ends: it makes a handshake with the pod in a server's name, and
//! sends the server a SYN in the pod's name. The pod agrees with it on the numbers. Together these would be a
//! connection between the pod and the server that the server seems to have opened.

use std::net::{IpAddr, SocketAddr, TcpListener};

use egress_tests::{
    DEADLINE, Lab, Pod, SHORT,
    addresses::{server, server6},
    frames::{self, Tap},
    raw::{ETHERNET, flag, transport_at},
    rewritten::nft,
};
use etherparse::ip_number::TCP;
use socket2::{Domain, Protocol, Socket, Type};

/// The server's port and the pod's.
const THERE: u16 = 8888;
const HERE: u16 = 5555;
/// The numbers of the SYN in the server's name, and of the one in the pod's name.
const FORGED: u32 = 1 << 30;
const OWN: u32 = 1 << 20;

/// Which handshake comes first.
#[derive(Clone, Copy)]
enum First {
    WithThePod,
    WithTheServer,
}

/// The pod, the server, and the helper outside that forges the segments of both.
struct Joined<'a> {
    lab: &'a Lab,
    pod: &'a Pod,
    server: SocketAddr,
    own: SocketAddr,
    /// On the pod's interface.
    tap: Tap,
    /// Where the server sends.
    outside: Tap,
}

impl<'a> Joined<'a> {
    fn new(lab: &'a Lab, pod: &'a Pod, server: IpAddr) -> Self {
        // The pod's own kernel knows nothing of the connection.
        nft(
            pod.netns(),
            "table inet silent { chain out { type filter hook output priority filter; tcp flags & rst == rst drop; }; }",
        );
        Self {
            lab,
            pod,
            server: SocketAddr::new(server, THERE),
            own: SocketAddr::new(pod.address_for(server), HERE),
            tap: Tap::open(pod.netns(), "eth0"),
            outside: Tap::open(lab.outside(), "eth0"),
        }
    }

    fn segment(
        &self,
        from: SocketAddr,
        to: SocketAddr,
        flags: u8,
        (sequence, acknowledged): (u32, u32),
        data: &[u8],
    ) -> Vec<u8> {
        let step = frames::from_pod(self.pod, from.ip(), to.ip());
        let mut step = step.tcp(from.port(), to.port(), sequence, 64_240);
        if flags & flag::SYN != 0 {
            step = step.syn();
        }
        if flags & flag::ACK != 0 {
            step = step.ack(acknowledged);
        }
        let mut frame = Vec::new();
        step.write(&mut frame, data).expect("a frame in memory");
        frame
    }

    /// The pod sends a segment to the server.
    fn pod_sends(&self, flags: u8, numbers: (u32, u32), data: &[u8]) {
        let frame = self.segment(self.own, self.server, flags, numbers, data);
        self.tap.send(&frame);
    }

    /// The helper sends a segment in the name of `from`.
    fn forge(&self, from: SocketAddr, to: SocketAddr, flags: u8, numbers: (u32, u32)) {
        let frame = self.segment(from, to, flags, numbers, b"");
        let sent = self.lab.outside().run(|| {
            let raw = Protocol::from(nix::libc::IPPROTO_RAW);
            let socket = Socket::new(Domain::for_address(to), Type::RAW, Some(raw))?;
            socket.send_to(&frame[ETHERNET..], &SocketAddr::new(to.ip(), 0).into())
        });
        sent.expect("send in another's name");
    }

    /// Where the TCP header is.
    fn at(&self) -> usize {
        transport_at(self.server.ip())
    }

    /// Whether this is a segment with these flags from the server's address to the pod's.
    fn is(&self, frame: &[u8], flags: u8) -> bool {
        frames::is(frame, self.server.ip(), self.own.ip(), TCP) && frame[self.at() + 13] == flags
    }

    /// Waits until the pod gets such a segment.
    #[track_caller]
    fn arrives(&self, flags: u8) {
        let seen = self.tap.receive(DEADLINE, |frame| self.is(frame, flags));
        seen.expect("a segment for the pod");
    }

    /// The same, whatever reaches the pod.
    fn handshake_with_pod(&self) {
        self.forge(self.server, self.own, flag::SYN, (FORGED, 0));
        self.pod_sends(flag::SYN | flag::ACK, (OWN, FORGED + 1), b"");
        self.forge(self.server, self.own, flag::ACK, (FORGED + 1, OWN + 1));
    }

    fn shake_hands_with_pod(&self) {
        self.forge(self.server, self.own, flag::SYN, (FORGED, 0));
        self.arrives(flag::SYN);
        self.pod_sends(flag::SYN | flag::ACK, (OWN, FORGED + 1), b"");
        self.forge(self.server, self.own, flag::ACK, (FORGED + 1, OWN + 1));
        self.arrives(flag::ACK);
    }

    /// Returns the server's number, which somebody may have sent to the pod.
    #[track_caller]
    fn call_server(&self) -> u32 {
        self.forge(self.own, self.server, flag::SYN, (OWN, 0));
        let syn_ack = flag::SYN | flag::ACK;
        let seen = self
            .outside
            .receive(DEADLINE, |frame| self.is(frame, syn_ack));
        let (seen, at) = (seen.expect("the server accepts"), self.at() + 4);
        u32::from_be_bytes(seen[at..at + 4].try_into().expect("four bytes"))
    }
}

#[track_caller]
fn assert_not_joined(peer: IpAddr, first: First) {
    let lab = Lab::new();
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&cart]);
    let listener = lab.outside().run(|| TcpListener::bind((peer, THERE)));
    let _listener = listener.expect("listen outside");
    let joined = Joined::new(&lab, &cart, peer);
    let number = match first {
        First::WithThePod => {
            joined.shake_hands_with_pod();
            joined.call_server()
        }
        First::WithTheServer => {
            let number = joined.call_server();
            agent.wait_denial("the SYN-ACK", |denial| {
                denial.of(&cart) && denial.reason == "tcp_unsolicited"
            });
            joined.handshake_with_pod();
            number
        }
    };
    let seen = Tap::open(lab.outside(), "eth0");
    joined.pod_sends(flag::ACK, (OWN + 1, number.wrapping_add(1)), b"stolen");
    let stolen = |frame: &[u8]| frame.windows(6).any(|window| window == b"stolen");
    assert_eq!(seen.receive(SHORT, stolen), None, "the pod's data leaves");
    agent.wait_denial("the pod's segment", |denial| {
        denial.is(&cart, "no_rule", peer, THERE)
    });
}

#[test]
fn a_handshake_with_the_pod_and_one_with_a_server_are_not_joined() {
    for peer in [server(9), server6(9)] {
        assert_not_joined(peer, First::WithThePod);
    }
}

#[test]
fn a_handshake_with_a_server_and_one_with_the_pod_are_not_joined() {
    for peer in [server(9), server6(9)] {
        assert_not_joined(peer, First::WithTheServer);
    }
}

#[track_caller]
fn assert_number_is_not_seen(peer: IpAddr) {
    let lab = Lab::new();
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&cart]);
    let listener = lab.outside().run(|| TcpListener::bind((peer, THERE)));
    let _listener = listener.expect("listen outside");
    let joined = Joined::new(&lab, &cart, peer);
    let number = joined.call_server();
    agent.wait_denial("the SYN-ACK", |denial| {
        denial.of(&cart) && denial.reason == "tcp_unsolicited"
    });
    // A segment with a wrong number, which the server answers with its own.
    let wrong = (OWN.wrapping_sub(1 << 20), number.wrapping_add(1));
    joined.forge(joined.own, joined.server, flag::ACK, wrong);
    let told = joined
        .outside
        .receive(DEADLINE, |frame| joined.is(frame, flag::ACK));
    told.expect("the server answers");
    let from_server = |frame: &[u8]| frames::is(frame, peer, joined.own.ip(), TCP);
    let seen = joined.tap.receive(SHORT, from_server);
    assert_eq!(seen, None, "the pod sees the server's number");
}

/// The pod could tell the number to the helper, which completes the connection in the pod's name. When the SYN-ACK is
/// forgotten, the pod could go on with it.
#[test]
fn the_pod_does_not_see_the_number_of_a_server_that_is_called_in_its_name() {
    for peer in [server(9), server6(9)] {
        assert_number_is_not_seen(peer);
    }
}
