//! Multipath TCP (RFC 8684) orders a stream by numbers of its own, and joins several connections. The agent
//! disables it on connections to a resolver, so the resolver reads only bytes that the agent has judged.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    process::Command,
};

use egress_tests::{
    Agent, DEADLINE, Lab, Namespace, Pod, TcpEcho,
    addresses::{RESOLVER, RESOLVER6, server},
    dns::{Answer, RecordType, framed, framed_query, question},
    eventually,
    frames::{self, Tap},
    holds,
    raw::flag,
};
use etherparse::ip_number;
use socket2::{Domain, Protocol, Socket, Type};

/// The offset of the TCP header in a plain frame over IPv4.
const TCP: usize = 14 + 20;

fn number(frame: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]])
}

/// A resolver that supports multipath TCP, and two pods; one of them is not enforced, for comparison.
struct Scene {
    _web: TcpEcho,
    agent: Agent,
    pod: Pod,
    free: Pod,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::new();
        let web = lab.serve_tcp(443);
        lab.dns().addresses("shop.test", &[server(10)]);
        lab.dns().addresses("evil.test", &[server(66)]);
        let (pod, free) = (lab.pod("shop", "cart"), lab.pod("shop", "free"));
        lab.write_pod(&pod, &[("allow", "shop.test:443 203.0.113.20:53")]);
        let agent = lab.start_agent(&[&pod]);
        Self {
            _web: web,
            agent,
            pod,
            free,
            lab,
        }
    }

    /// A counter of the resolver's kernel.
    #[track_caller]
    fn mptcp_counter(&self, name: &str) -> u64 {
        self.lab.outside().counter("MPTcpExt:", name)
    }
}

#[track_caller]
fn run_in(namespace: &Namespace, program: &str, arguments: &[&str]) {
    let mut command = Command::new(program);
    let output = namespace.run(|| command.args(arguments).output());
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
}

/// Sends a query over a multipath TCP socket, calls `between`, and sends another query.
#[track_caller]
fn query_twice(pod: &Pod, resolver: IpAddr, between: impl FnOnce()) {
    let address = SocketAddr::new(resolver, 53);
    let mut stream: TcpStream = pod.netns().run(|| {
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::MPTCP))
            .expect("a kernel with CONFIG_MPTCP");
        socket
            .connect_timeout(&address.into(), DEADLINE)
            .expect("connect to the resolver");
        socket.into()
    });
    stream.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    let mut asks = || {
        let question = framed_query(7, "shop.test");
        // In two parts, which two paths could share.
        let (first, second) = question.split_at(20);
        stream.write_all(first).expect("write");
        stream.write_all(second).expect("write");
        let mut length = [0; 2];
        stream.read_exact(&mut length).expect("a response");
        let mut message = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut message).expect("a response");
        assert_eq!(Answer::read(&message).addresses, [server(10)]);
    };
    asks();
    between();
    asks();
}

#[test]
fn multipath_tcp_clients_fall_back_to_tcp_and_get_their_response() {
    let scene = Scene::new();
    for (before, resolver) in [RESOLVER, RESOLVER6].into_iter().enumerate() {
        query_twice(&scene.pod, resolver, || ());
        assert_eq!(scene.mptcp_counter("MPCapableSYNRX"), before as u64);
        query_twice(&scene.free, resolver, || ());
        assert_eq!(scene.mptcp_counter("MPCapableACKRX"), before as u64 + 1);
    }
    scene.pod.talks_tcp((server(10), 443));
    assert!(scene.agent.denials().is_empty());
}

#[test]
fn a_second_path_cannot_join_a_connection_to_a_resolver() {
    let scene = Scene::new();
    // The resolver announces another address of its own, to which the pod may connect.
    let other = server(20);
    let _other = scene.lab.serve_dns(&[other]);
    let invite = format!("mptcp endpoint add {other} signal");
    let accept = "mptcp limits set subflows 4 add_addr_accepted 4";
    for (namespace, line) in [
        (scene.lab.outside(), invite.as_str()),
        (scene.lab.outside(), accept),
        (scene.pod.netns(), accept),
        (scene.free.netns(), accept),
    ] {
        run_in(namespace, "ip", &line.split(' ').collect::<Vec<_>>());
    }
    query_twice(&scene.free, RESOLVER, || {
        eventually("a second path, without the agent", || {
            holds(scene.mptcp_counter("MPJoinAckRx") == 1)
        });
    });
    query_twice(&scene.pod, RESOLVER, || ());
    scene.pod.reach_tcp((other, 53));
    assert_eq!(scene.mptcp_counter("MPCapableSYNRX"), 1);
    assert_eq!(scene.mptcp_counter("MPJoinSynRx"), 1);
}

/// The maximum segment size that the pod announces.
const LONGEST: u16 = 300;

/// Options of multipath TCP (RFC 8684, sections 3.1 and 3.3).
mod option {
    /// The pod's key.
    const KEY: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];
    /// The last 64 bits of its SHA-256: the initial data sequence number.
    const FIRST: u64 = 0xf5a1_01d3_d29d_6f72;

    pub(super) fn capable() -> Vec<u8> {
        vec![30, 4, 1, 1]
    }

    /// For the segment that acknowledges the SYN: both keys. The resolver's key differs per connection.
    pub(super) fn capable_with_keys(port: u16) -> Vec<u8> {
        let theirs = u64::from(port).to_be_bytes();
        [&[30, 20, 1, 1][..], &KEY, &theirs].concat()
    }

    /// Maps the first `length` bytes of the connection to a place in the stream that begins `before` bytes
    /// before its start.
    pub(super) fn mapping(before: u16, length: u16) -> Vec<u8> {
        let place = FIRST.wrapping_add(1).wrapping_sub(before.into());
        let mut option = vec![30, 18, 0x20, 0x0c];
        option.extend(place.to_be_bytes());
        option.extend([0, 0, 0, 1]);
        option.extend(length.to_be_bytes());
        option.extend([1, 1]);
        option
    }
}

/// Queries an allowed name. The padding of the query (RFC 7830) ends with another query. The mapping claims
/// that the resolver already has the connection's first bytes, so that its stream begins with the hidden
/// query. The first segment that the resolver gets has `skipped` bytes.
#[track_caller]
fn send_hidden_query(pod: &Pod, port: u16, skipped: u16) {
    // The pod's kernel does not know the connection, and would reset it.
    let ruleset = "add table ip lab; \
        add chain ip lab out { type filter hook output priority 0; }; \
        add rule ip lab out tcp flags rst drop";
    run_in(pod.netns(), "nft", &[ruleset]);
    let hidden = framed_query(9, "evil.test");
    let mut shown = question(7, "shop.test", RecordType::A);
    let before = 2 + shown.len() + 4;
    let padding = [vec![0; usize::from(skipped) - before], hidden].concat();
    let length = u16::try_from(padding.len()).expect("it is short");
    let data = shown.len() - 2;
    shown[data..].copy_from_slice(&(length + 4).to_be_bytes());
    shown.extend([0, 12]);
    shown.extend(length.to_be_bytes());
    shown.extend(padding);
    let shown = framed(&shown);

    let tap = Tap::open(pod.netns(), "eth0");
    let own: IpAddr = pod.ipv4().into();
    let send = |seq: u32, ack: Option<u32>, options: &[u8], payload: &[u8]| {
        let mut step = frames::from_pod(pod, own, RESOLVER).tcp(port, 53, seq, 60_000);
        step = match ack {
            Some(ack) => step.ack(ack),
            None => step.syn(),
        };
        let mut frame = Vec::new();
        step.options_raw(options)
            .expect("a few options")
            .write(&mut frame, payload)
            .expect("a frame");
        tap.send(&frame);
    };
    let [high, low] = LONGEST.to_be_bytes();
    let mut options = vec![2, 4, high, low];
    options.extend(option::capable());
    send(100, None, &options, &[]);
    let accepted = tap
        .receive(DEADLINE, |frame| {
            frames::is(frame, RESOLVER, own, ip_number::TCP)
                && frame[TCP + 13] == flag::SYN | flag::ACK
        })
        .expect("the SYN-ACK");
    let ack = Some(number(&accepted, TCP + 4).wrapping_add(1));
    send(101, ack, &option::capable_with_keys(port), &[]);
    let mapping = option::mapping(skipped, u16::try_from(shown.len()).expect("short"));
    let (first, second) = shown.split_at(skipped.into());
    send(101, ack, &mapping, first);
    send(101 + u32::from(skipped), ack, &mapping, second);
    // The resolver responds to whichever query it has read.
    tap.receive(DEADLINE, |frame| {
        frames::is(frame, RESOLVER, own, ip_number::TCP) && frame.len() > TCP + 60
    })
    .expect("a response");
}

#[test]
fn a_query_cannot_hide_behind_multipath_tcp_mappings() {
    let scene = Scene::new();
    // With SYN cookies the resolver knows of a connection only what the third segment contains.
    scene.lab.outside().run(|| {
        std::fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").expect("SYN cookies");
    });
    send_hidden_query(&scene.free, 4000, LONGEST);
    assert_eq!(
        scene.lab.dns().queries_for("evil.test"),
        1,
        "without the agent"
    );
    // The agent forwards held segments as one, shortened to leave room for the options.
    send_hidden_query(&scene.pod, 4001, LONGEST - 20);
    send_hidden_query(&scene.pod, 4002, LONGEST);
    assert_eq!(scene.lab.dns().queries_for("evil.test"), 1);
    assert_eq!(scene.lab.dns().queries_for("shop.test"), 2);
}
