//! The policy ends a connection of the pod, and the server still has it open. Such a connection must not
//! count as one that the server opened. The attack: somebody outside sends a SYN in the server's name, the
//! pod answers with the sequence numbers of the old connection, and the server acknowledges them (RFC 5961,
//! section 4.2).

use std::{
    io::{self, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use egress_common::records::{INTERFACE_SETTLING, INTERFACE_SOURCES, MODE_RELEASED};
use egress_tests::{
    Cluster, DEADLINE, Lab, Pod, SHORT,
    addresses::{RESOLVER, server, server6},
    cluster::allow,
    eventually,
    frames::{self, Tap},
    holds,
    observed::HTTP,
    raw::{ETHERNET, flag, transport_at},
};
use etherparse::ip_number::TCP;
use socket2::{Domain, Protocol, Socket, Type};

/// The server's port.
const THERE: u16 = 8888;
/// A distance that puts a sequence number outside any window.
const FAR: u32 = 1 << 30;

/// A connection that the pod opened, and the numbers of its next segment.
struct Connection<'a> {
    pod: &'a Pod,
    peer: IpAddr,
    stream: TcpStream,
    /// Captures on the pod's interface, and sends frames from it.
    tap: Tap,
    sequence: u32,
    acknowledges: u32,
    _server: TcpStream,
}

impl<'a> Connection<'a> {
    /// Opens a connection, and sends data on it that the server acknowledges.
    fn open(lab: &Lab, pod: &'a Pod, peer: IpAddr) -> Self {
        Self::open_from(lab, pod, peer, 0)
    }

    /// Opens a connection from a given port of the pod.
    fn open_from(lab: &Lab, pod: &'a Pod, peer: IpAddr, port: u16) -> Self {
        let listener = lab.outside().run(|| TcpListener::bind((peer, THERE)));
        let listener = listener.expect("listen outside");
        let opened = pod.netns().run(|| -> io::Result<TcpStream> {
            let socket = Socket::new(
                Domain::for_address((peer, THERE).into()),
                Type::STREAM,
                None,
            )?;
            socket.bind(&SocketAddr::new(pod.address_for(peer), port).into())?;
            socket.connect(&SocketAddr::new(peer, THERE).into())?;
            Ok(socket.into())
        });
        let mut stream = opened.expect("the server is reached");
        let (server, _) = listener.accept().expect("the pod calls");
        let tap = Tap::open(pod.netns(), "eth0");
        stream.write_all(b"before").expect("write");
        let at = transport_at(peer);
        let seen = tap.receive(DEADLINE, |frame| {
            frames::is(frame, peer, pod.address_for(peer), TCP) && frame[at + 13] == flag::ACK
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

    /// Sends a segment of the connection with the given sequence number and flags.
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

    /// Forges a handshake in the server's name; true if the pod's data then still leaves the node.
    fn is_stolen(&mut self, lab: &Lab) -> bool {
        self.forge_handshake(lab);
        self.leaves(lab)
    }

    /// Somebody outside sends a SYN in the server's name, and the pod answers with the connection's numbers.
    fn forge_handshake(&self, lab: &Lab) {
        let own = self.own();
        Forger::open(lab, self.pod, self.peer, own).send(flag::SYN);
        let at = transport_at(self.peer);
        let arrived = self.tap.receive(DEADLINE, |frame| {
            frames::is(frame, self.peer, own.ip(), TCP) && frame[at + 13] == flag::SYN
        });
        assert!(arrived.is_some(), "the SYN does not arrive");
        self.send(self.sequence.wrapping_sub(1), flag::SYN);
        // The server acknowledges the segment above if it has left the node.
        let _ = self.tap.receive(SHORT, |frame| {
            frames::is(frame, self.peer, own.ip(), TCP) && frame[at + 13] == flag::ACK
        });
    }

    /// True if data that the pod sends now leaves the node.
    fn leaves(&mut self, lab: &Lab) -> bool {
        let seen = Tap::open(lab.outside(), "eth0");
        let _ = self.stream.write_all(b"stolen");
        let stolen = |frame: &[u8]| frame.windows(6).any(|window| window == b"stolen");
        seen.receive(SHORT, stolen).is_some()
    }
}

/// A sender outside that forges segments in the server's name.
struct Forger {
    socket: Socket,
    to: SocketAddr,
    /// One segment of each kind.
    syn: Vec<u8>,
    ack: Vec<u8>,
}

impl Forger {
    fn open(lab: &Lab, pod: &Pod, peer: IpAddr, to: SocketAddr) -> Self {
        let segment = || frames::from_pod(pod, peer, to.ip()).tcp(THERE, to.port(), FAR, 64_240);
        let bytes = |step: etherparse::PacketBuilderStep<etherparse::TcpHeader>| {
            let mut frame = Vec::new();
            step.write(&mut frame, &[]).expect("a frame in memory");
            frame.split_off(ETHERNET)
        };
        let socket = lab.outside().run(|| {
            let raw = Protocol::from(nix::libc::IPPROTO_RAW);
            Socket::new(Domain::for_address(to), Type::RAW, Some(raw))
        });
        Self {
            socket: socket.expect("a raw socket"),
            to: SocketAddr::new(to.ip(), 0),
            syn: bytes(segment().syn()),
            ack: bytes(segment().ack(1)),
        }
    }

    fn send(&self, flag: u8) {
        let segment = if flag == flag::SYN {
            &self.syn
        } else {
            &self.ack
        };
        let sent = self.socket.send_to(segment, &self.to.into());
        sent.expect("send in the server's name");
    }
}

#[track_caller]
fn assert_a_reopened_connection_is_judged(peer: IpAddr) {
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
fn a_connection_older_than_the_agent_cannot_be_reopened_in_the_servers_name() {
    assert_a_reopened_connection_is_judged(server(9));
}

#[test]
fn over_ipv6_a_connection_older_than_the_agent_cannot_be_reopened_in_the_servers_name() {
    assert_a_reopened_connection_is_judged(server6(9));
}

#[test]
fn syns_during_attachment_do_not_keep_a_denied_connection_open() {
    let lab = Lab::builder().build();
    let peer = server(9);
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let mut connection = Connection::open(&lab, &cart, peer);
    let forger = Forger::open(&lab, &cart, peer, connection.own());
    let begun = AtomicBool::new(false);
    let _agent = thread::scope(|scope| {
        scope.spawn(|| {
            while !begun.load(Ordering::Relaxed) {
                forger.send(flag::SYN);
                thread::sleep(Duration::from_millis(1));
            }
        });
        let agent = lab.start_agent(&[&cart]);
        begun.store(true, Ordering::Relaxed);
        agent
    });
    assert!(!connection.is_stolen(&lab), "the connection goes on");
}

#[test]
fn a_connection_that_audit_mode_let_out_cannot_be_reopened_in_the_servers_name() {
    const HERE: u16 = 5555;
    let lab = Lab::builder().build();
    let peer = server(9);
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443"), ("mode", "audit")]);
    let agent = lab.start_agent(&[&cart]);
    // The SYN comes before the pod connects, so that the server seems to have opened the flow.
    Forger::open(&lab, &cart, peer, (cart.address_for(peer), HERE).into()).send(flag::SYN);
    eventually("the server's SYN is there", || {
        let flows = lab.pod_entries(&cart, "opening");
        holds(flows.iter().any(|flow| flow["value"]["flow"]["state"] == 2))
    });
    let mut connection = Connection::open_from(&lab, &cart, peer, HERE);
    connection.forge_handshake(&lab);
    agent.applies_policy_after(&cart, || {
        lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    });
    assert!(!connection.leaves(&lab), "the connection goes on");
}

#[test]
fn the_next_agent_judges_a_pod_that_an_agent_had_only_begun_to_enforce() {
    let (settling, sources) = (INTERFACE_SOURCES | INTERFACE_SETTLING, INTERFACE_SOURCES);
    for flags in [settling, sources] {
        let lab = Lab::builder().build();
        let (peer, caller) = (server(9), server(10));
        let cart = lab.pod("shop", "cart");
        lab.write_pod(&cart, &[("allow", "shop.test:443")]);
        let mut agent = lab.start_agent(&[&cart]);
        agent.kill();
        // As an agent leaves it that is killed in its first moments with the pod.
        lab.rewrite_shared("interfaces", |_, interface| {
            // After the pod, the policy and the mode.
            interface[12..16].copy_from_slice(&flags.to_ne_bytes());
        });
        let mut connection = Connection::open(&lab, &cart, peer);
        let agent = lab.start_agent(&[&cart]);
        assert!(!connection.leaves(&lab), "it goes on");
        agent.wait_denial("its next segment", |denial| {
            denial.is(&cart, "no_rule", peer, THERE)
        });
        assert!(!connection.is_stolen(&lab), "the connection goes on");
        agent.denies_tcp(&cart, (caller, 443), "address_not_learned");
        // Connections that others open from now on are answered.
        let listener = cart.listen_tcp(80);
        let to = SocketAddr::new(cart.address_for(peer), 80);
        let client = lab
            .outside()
            .run(|| TcpStream::connect_timeout(&to, DEADLINE));
        client.expect("the pod is reached");
        listener.accept().expect("a connection");
    }
}

#[test]
fn a_tcp_connection_to_a_resolver_is_noted_as_opened_by_the_pod() {
    let lab = Lab::builder()
        .config(
            "dns.resolvers",
            vec![RESOLVER.to_string(), server(9).to_string()],
        )
        .build();
    let peer = server(9);
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&cart]);
    let listener = lab.outside().run(|| TcpListener::bind((peer, 53)));
    let _listener = listener.expect("listen outside");
    let _stream = cart.reach_tcp((peer, 53));
    let called = lab.pod_entries(&cart, "called");
    assert!(
        called.iter().any(|flow| flow["key"]["peer_port"] == 53),
        "{called:?}"
    );
}

#[test]
fn a_forged_segment_does_not_block_a_client_of_the_pod() {
    let lab = Lab::builder().build();
    let peer = server(9);
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443"), ("mode", "audit")]);
    let agent = lab.start_agent(&[&cart]);
    let listener = cart.listen_tcp(80);
    let address = SocketAddr::new(cart.address_for(peer), 80);
    // The pod's kernel answers with a RST.
    let tap = Tap::open(cart.netns(), "eth0");
    Forger::open(&lab, &cart, peer, address).send(flag::ACK);
    let at = transport_at(peer);
    let reset = tap.receive(DEADLINE, |frame| {
        frames::is(frame, address.ip(), peer, TCP) && frame[at + 13] & flag::RST != 0
    });
    assert!(reset.is_some(), "the pod does not answer");
    agent.applies_policy_after(&cart, || {
        lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    });
    let client = lab.outside().run(|| -> io::Result<Socket> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(peer, THERE).into())?;
        socket.connect_timeout(&address.into(), DEADLINE)?;
        Ok(socket)
    });
    client.expect("the pod is reached");
    listener.accept().expect("a connection");
}

#[test]
fn a_connection_whose_flow_was_evicted_cannot_be_reopened_in_the_servers_name() {
    let peer = server(9);
    // The pod may have four flows that are not established.
    let lab = Lab::builder().config("limits.flowsPerPod", 64).build();
    let cart = lab.pod("shop", "cart");
    let _web = lab.serve_tcp(443);
    lab.write_pod(&cart, &[("allow", &format!("{peer} {}", server(10)))]);
    let agent = lab.start_agent(&[&cart]);
    let mut connection = Connection::open(&lab, &cart, peer);
    // The server ignores this segment, but the agent notes the flow as closed, and the pod's next flows evict
    // it.
    connection.send(connection.sequence.wrapping_add(FAR), flag::RST);
    for _ in 0..8 {
        drop(cart.reach_tcp((server(10), 443)));
    }
    agent.applies_policy_after(&cart, || {
        lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    });
    assert!(!connection.is_stolen(&lab), "the connection goes on");
}

#[test]
fn a_destination_in_use_is_kept_when_others_are_evicted() {
    let peer = server(9);
    // The pod may have sixteen destinations.
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
    agent.applies_policy_after(&cart, || {
        lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    });
    assert!(!connection.is_stolen(&lab), "the connection goes on");
}

#[test]
fn a_connection_without_room_for_its_destination_waits_and_is_then_noted() {
    let peer = server(9);
    // Sixteen destinations of the pod's.
    let lab = Lab::builder().config("limits.flowsPerPod", 64).build();
    let cart = lab.pod("shop", "cart");
    let _web = lab.serve_tcp(443);
    lab.write_pod(&cart, &[("allow", &format!("{peer} {}", server(10)))]);
    let agent = lab.start_agent(&[&cart]);
    let tap = Tap::open(cart.netns(), "eth0");
    let flood: Vec<Vec<u8>> = (1000..1200)
        .map(|port| {
            let mut frame = Vec::new();
            let syn =
                frames::from_pod(&cart, cart.address_for(peer), server(10)).tcp(7, port, 1, 1);
            let written = syn.syn().write(&mut frame, &[]);
            written.expect("a frame in memory");
            frame
        })
        .collect();
    for frame in &flood {
        tap.send(frame);
    }
    let mut connection = Connection::open(&lab, &cart, peer);
    // Its flow is closed, and the pod's next ones push it out.
    connection.send(connection.sequence.wrapping_add(FAR), flag::RST);
    for _ in 0..8 {
        drop(cart.reach_tcp((server(10), 443)));
    }
    agent.applies_policy_after(&cart, || {
        lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    });
    assert!(!connection.is_stolen(&lab), "the connection goes on");
    agent.wait_denial("that there is no room", |denial| {
        denial.of(&cart) && denial.reason == "destinations_full"
    });
    agent.wait_log("what makes room", |line| {
        line.contains("WARN") && line.contains("raise limits.flowsPerPod")
    });
}

#[test]
fn the_pod_answers_a_connection_that_the_server_opens_from_another_port() {
    let peer = server(9);
    let lab = Lab::builder().build();
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let _connection = Connection::open(&lab, &cart, peer);
    let _agent = lab.start_agent(&[&cart]);
    let listener = cart.listen_tcp(80);
    let to = SocketAddr::new(cart.address_for(peer), 80);
    let client = lab
        .outside()
        .run(|| TcpStream::connect_timeout(&to, DEADLINE));
    let mut client = client.expect("the pod is reached");
    let (mut server, _) = listener.accept().expect("a connection");
    client.write_all(b"hello").expect("write");
    let mut heard = [0; 5];
    std::io::Read::read_exact(&mut server, &mut heard).expect("the data arrives");
    assert_eq!(&heard, b"hello");
}

#[test]
fn quarantine_remembers_the_connections_of_a_pod_that_is_gone() {
    let cluster = Cluster::new();
    let lab = &cluster.lab;
    let peer = server(9);
    let shop = cluster.namespace("shop", &serde_json::Value::Null);
    let agent = cluster.start_agent();
    let net = cluster.quarantined(&agent, &shop, "cart");
    let (object, uid) = cluster.create(&shop, "cart", &allow(&format!("{peer}:{THERE}")));
    let mut cart = cluster.pod_without_processes(object, &uid, net);
    cart.running().start_container();
    agent.wait_enforcing(cart.net());
    cluster.set_addresses(&cart);
    let mut connection = Connection::open(lab, cart.net(), peer);
    // The pod's object goes, and its processes stay.
    let interface = cart.net().interface().to_owned();
    agent.quarantines_after(&interface, || cluster.server.delete(cart.object()));
    lab.wait_own(&[cart.net().ipv4().into(), cart.net().ipv6().into()]);
    assert!(!connection.is_stolen(lab));
}

#[test]
fn a_pod_that_was_released_when_the_agent_was_killed_begins_anew() {
    let lab = Lab::builder().build();
    let peer = server(9);
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let mut agent = lab.start_agent(&[&cart]);
    agent.kill();
    lab.rewrite_shared("interfaces", |_, interface| {
        interface[8..12].copy_from_slice(&MODE_RELEASED.to_ne_bytes());
    });
    let mut connection = Connection::open(&lab, &cart, peer);
    let _agent = lab.start_agent(&[&cart]);
    assert!(!connection.is_stolen(&lab));
}
