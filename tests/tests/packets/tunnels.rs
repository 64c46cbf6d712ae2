//! Tunnelled packets that a node would unpack and forward.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod, SHORT,
    addresses::server,
    echo_on, eventually,
    frames::{self, Tap},
    holds,
    raw::{Ip, protocol, udp},
    rewritten::finish,
};

/// The node's address on the link to the outside.
const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 98, 0, 1));
const VXLAN: u16 = 4789;
const GENEVE: u16 = 6081;
/// The id of the inner network, and the node's hardware address in it.
const NETWORK: u32 = 7;
const INNER: [u8; 6] = [2, 0, 0, 0, 7, 1];

struct Scene {
    agent: Agent,
    tap: Tap,
    uplink: Tap,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    /// A node with a VXLAN interface that accepts packets from everybody and forwards them, and a pod.
    #[track_caller]
    fn new(annotations: &[(&str, &str)]) -> Self {
        let lab = Lab::builder()
            .config("ranges.internal", vec!["10.98.0.0/24", "10.1.0.0/16"])
            .build();
        lab.node().ip_batch(&format!(
            "link add overlay address 02:00:00:00:07:01 type vxlan id {NETWORK} dstport {VXLAN} local {NODE}\n\
             addr add 10.77.0.1/24 dev overlay\n\
             link set overlay up\n"
        ));
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, annotations);
        let agent = lab.start_agent(&[&pod]);
        Self {
            agent,
            tap: Tap::open(pod.netns(), "eth0"),
            uplink: Tap::open(lab.outside(), "eth0"),
            pod,
            lab,
        }
    }

    /// A datagram of the pod to the node, from and to these ports.
    fn to_node(&self, from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
        let frame = Ip::new(self.pod.ipv4(), NODE).udp(from, to, payload);
        self.finished(frame)
    }

    fn finished(&self, mut frame: Vec<u8>) -> Vec<u8> {
        finish(&self.pod, &mut frame);
        frame
    }

    /// A tunnelled datagram to a server that no policy names.
    fn tunnelled(&self, from: u16, payload: &[u8]) -> Vec<u8> {
        self.tunnelled_to(NODE, from, payload)
    }

    fn tunnelled_to(&self, end: IpAddr, from: u16, payload: &[u8]) -> Vec<u8> {
        let inner = Ip::new(Ipv4Addr::new(10, 77, 0, 2), server(66)).udp(7, 9999, payload);
        self.in_tunnel(end, from, inner)
    }

    fn in_tunnel(&self, end: IpAddr, from: u16, inner: Vec<u8>) -> Vec<u8> {
        let mut inner = self.finished(inner);
        inner[..6].copy_from_slice(&INNER);
        let mut packet = vec![8, 0, 0, 0];
        packet.extend((NETWORK << 8).to_be_bytes());
        packet.extend(inner);
        let frame = Ip::new(self.pod.ipv4(), end).udp(from, VXLAN, &packet);
        self.finished(frame)
    }

    /// True if a frame that ends with this payload leaves the node before an honest one that is sent now.
    #[track_caller]
    fn leaves(&self, payload: &[u8]) -> bool {
        const SENTINEL: &[u8] = b"the honest one";
        let own = self.pod.ipv4().into();
        self.tap.send(&frames::udp(
            &self.pod,
            (own, 1),
            (server(1), 4000),
            SENTINEL,
        ));
        let first = self.uplink.receive(DEADLINE, |seen| {
            seen.ends_with(SENTINEL) || seen.ends_with(payload)
        });
        first.expect("the honest one leaves").ends_with(payload)
    }

    #[track_caller]
    fn wait_denied(&self, mark: usize, what: &str) {
        self.agent.wait_denial_from(mark, what, |denial| {
            denial.of(&self.pod) && denial.reason == "tunnel" && denial.dst_ip == Some(NODE)
        });
    }
}

#[test]
fn a_pod_cannot_leave_through_the_nodes_vxlan() {
    // A policy that lists an address, one that allows everything, and one that only denies.
    let policies: [&[(&str, &str)]; 3] = [
        &[("allow", "203.0.113.1:4000")],
        &[("allow", "*"), ("deny", "203.0.113.66")],
        &[("deny", "203.0.113.66")],
    ];
    for policy in policies {
        let scene = Scene::new(policy);
        let mark = scene.agent.mark();
        scene.tap.send(&scene.tunnelled(7, b"inside"));
        assert!(!scene.leaves(b"inside"), "it left: {policy:?}");
        scene.wait_denied(mark, "the tunnelled packet");
    }
}

#[test]
fn a_packet_forged_through_a_tunnel_in_audit_mode_opens_no_flow_once_the_pod_is_enforced() {
    let allow = ("allow", "203.0.113.1:4000");
    // A `deny` entry gives the tunnel another verdict.
    for rules in [&[allow][..], &[allow, ("deny", "10.98.0.1")]] {
        let scene = Scene::new(&[rules, &[("mode", "audit")]].concat());
        let own = scene
            .pod
            .netns()
            .run(|| UdpSocket::bind((scene.pod.ipv4(), 9999)));
        let own = own.expect("a UDP socket in the pod");
        own.set_read_timeout(Some(DEADLINE)).expect("a time-out");
        let called = Ip::new(server(66), scene.pod.ipv4()).udp(7, 9999, b"called");
        scene.tap.send(&scene.in_tunnel(NODE, 7, called));
        own.recv(&mut [0; 16]).expect("audit mode stops nothing");
        scene
            .agent
            .applies_policy_after(&scene.pod, || scene.lab.write_pod(&scene.pod, rules));
        own.send_to(b"stolen", (server(66), 7))
            .expect("the pod answers");
        assert!(!scene.leaves(b"stolen"), "it left: {rules:?}");
    }
}

#[test]
fn an_address_entry_allows_a_tunnel() {
    let scene = Scene::new(&[("allow", "203.0.113.1:4000 10.98.0.1:4789/udp")]);
    scene.tap.send(&scene.tunnelled(7, b"inside"));
    assert!(scene.leaves(b"inside"));
    // The entry opens no other tunnel, and nothing else at that address.
    let mark = scene.agent.mark();
    scene.tap.send(&scene.to_node(7, GENEVE, b"inside"));
    scene.wait_denied(mark, "another tunnel");
}

#[test]
fn encapsulating_protocols_do_not_reach_the_node() {
    let scene = Scene::new(&[("allow", "203.0.113.1:4000")]);
    let to = Ip::new(scene.pod.ipv4(), NODE);
    let inner = Ip::new(scene.pod.ipv4(), server(66)).packet(protocol::UDP, &udp(7, 9, b"inside"));
    for kind in [
        protocol::IPIP,
        protocol::IPV6,
        protocol::GRE,
        protocol::ESP,
        protocol::AH,
        97,
        115,
        protocol::UDP_LITE,
        137,
        253,
    ] {
        let mark = scene.agent.mark();
        scene.tap.send(&scene.finished(to.frame(kind, &inner)));
        // Fragmented, too.
        let first = to.clone().fragment(9, 0, true).frame(kind, &inner[..32]);
        scene.tap.send(&scene.finished(first));
        let mut count = 0;
        scene.agent.wait_denial_from(mark, "both", |denial| {
            if denial.of(&scene.pod)
                && denial.reason == "tunnel"
                && denial.protocol.as_deref() == Some(&kind.to_string())
            {
                count += denial.count;
            }
            count >= 2
        });
    }
    assert!(!scene.leaves(b"inside"));
    // A protocol that carries no other passes as before.
    assert!(scene.pod.ping(NODE, DEADLINE));
}

#[test]
fn a_packet_from_a_tunnels_port_opens_no_tunnel_back() {
    let scene = Scene::new(&[("allow", "203.0.113.1:4000")]);
    // As a neighbour would send it in the node's name.
    let hello = frames::udp_to(
        &scene.pod,
        (NODE, VXLAN),
        (scene.pod.ipv4().into(), 4444),
        b"hello",
    );
    let inside = Tap::open(scene.pod.netns(), "eth0");
    Tap::open(scene.lab.node(), scene.pod.interface()).send(&hello);
    assert!(
        inside
            .receive(DEADLINE, |seen| seen.ends_with(b"hello"))
            .is_some(),
        "it arrives"
    );
    let mark = scene.agent.mark();
    scene.tap.send(&scene.tunnelled(4444, b"inside"));
    assert!(!scene.leaves(b"inside"));
    scene.wait_denied(mark, "the answer");
}

#[test]
fn a_packet_from_a_tunnels_port_behind_nat64_opens_no_tunnel_back() {
    // One external and one internal address, as a NAT64 translator writes them.
    let scene = Scene::new(&[("allow", "203.0.113.1:4000")]);
    let inside = Tap::open(scene.pod.netns(), "eth0");
    let node = Tap::open(scene.lab.node(), scene.pod.interface());
    let ordinary: IpAddr = "64:ff9b::203.0.113.7".parse().expect("an address");
    let internal: IpAddr = "64:ff9b::10.98.0.2".parse().expect("an address");
    for (peer, passes) in [(ordinary, true), (internal, false)] {
        let own = scene.pod.ipv6().into();
        let hello = frames::udp_to(&scene.pod, (peer, VXLAN), (own, 4444), b"hello");
        node.send(&hello);
        let arrives = inside.receive(DEADLINE, |seen| seen.ends_with(b"hello"));
        assert!(arrives.is_some(), "the datagram does not arrive");
        let mark = scene.agent.mark();
        let payload: &[u8] = if passes { b"outside" } else { b"inside" };
        let answer = frames::udp(&scene.pod, (own, 4444), (peer, VXLAN), payload);
        scene.tap.send(&answer);
        if passes {
            let leaves = scene
                .uplink
                .receive(DEADLINE, |seen| seen.ends_with(payload));
            assert!(leaves.is_some(), "an answer to a host outside");
            continue;
        }
        assert!(!scene.leaves(b"inside"));
        scene
            .agent
            .wait_denial_from(mark, "the response", |denial| {
                denial.of(&scene.pod) && denial.reason == "tunnel" && denial.dst_ip == Some(peer)
            });
    }
}

#[test]
fn a_reply_is_judged_again_when_its_port_becomes_a_tunnel_port() {
    const PORT: u16 = 9000;
    let scene = Scene::new(&[("allow", "203.0.113.1:4000")]);
    let inside = Tap::open(scene.pod.netns(), "eth0");
    let node = Tap::open(scene.lab.node(), scene.pod.interface());
    let own = scene.pod.ipv4().into();
    let peer = (IpAddr::from([10, 98, 0, 2]), PORT);
    node.send(&frames::udp_to(&scene.pod, peer, (own, 4444), b"hello"));
    let arrives = inside.receive(DEADLINE, |seen| seen.ends_with(b"hello"));
    assert!(arrives.is_some(), "the datagram does not arrive");
    let answer = |payload: &[u8]| frames::udp(&scene.pod, (own, 4444), peer, payload);
    scene.tap.send(&answer(b"before"));
    let leaves = scene
        .uplink
        .receive(DEADLINE, |seen| seen.ends_with(b"before"));
    assert!(leaves.is_some(), "an answer");
    scene.lab.edit_config("ranges.tunnels", vec!["9000/udp"]);
    scene
        .agent
        .applies_policy_after(&scene.pod, || scene.agent.reload());
    let mark = scene.agent.mark();
    scene.tap.send(&answer(b"inside"));
    assert!(!scene.leaves(b"inside"));
    scene
        .agent
        .wait_denial_from(mark, "the response", |denial| {
            denial.of(&scene.pod) && denial.reason == "tunnel" && denial.dst_ip == Some(peer.0)
        });
}

#[test]
fn a_tunnel_to_any_address_of_the_node_is_denied() {
    let scene = Scene::new(&[("allow", "*")]);
    let docker = IpAddr::from([172, 31, 9, 1]);
    // An address in a prefix that is routed to the node itself.
    let routed = IpAddr::from([172, 31, 10, 77]);
    let wait_denied = |dst: IpAddr| {
        let mark = scene.agent.mark();
        scene.tap.send(&scene.tunnelled_to(dst, 7, b"inside"));
        assert!(!scene.leaves(b"inside"), "{dst}");
        scene.agent.wait_denial_from(mark, "the tunnel", |denial| {
            denial.of(&scene.pod) && denial.reason == "tunnel" && denial.dst_ip == Some(dst)
        });
    };
    // Before the node has the address, it is an external address.
    assert_eq!(
        scene.lab.explain(&scene.pod, "172.31.9.1:4789/udp").1["decision"],
        "allowed"
    );
    scene.lab.node().ip_batch(
        "link add docker0 type bridge\naddr add 172.31.9.1/24 dev docker0\nlink set docker0 up\n\
         route add local 172.31.10.0/24 dev lo\n",
    );
    // The kernel has the address before the route. The agent may read its addresses in between.
    for address in [docker, routed] {
        eventually(&format!("{address} is known"), || {
            let target = format!("{address}:4789/udp");
            holds(scene.lab.explain(&scene.pod, &target).1["reason"] == "tunnel")
        });
        wait_denied(address);
    }
    // Traffic that is no tunnel passes as before, to the node and past it.
    assert!(scene.pod.ping(docker, DEADLINE));
    scene.lab.node().ip_batch("link del docker0\n");
    eventually("the address is not the node's any more", || {
        let (_, text) = scene.lab.explain(&scene.pod, "172.31.9.1:4789/udp");
        (text["decision"] == "allowed").then_some(())
    });
}

#[test]
fn a_flow_is_judged_again_when_its_port_becomes_a_tunnel_port() {
    const PORT: u16 = 9000;
    let scene = Scene::new(&[("allow", "203.0.113.1:4000")]);
    let neighbour = scene.lab.pod("shop", "mail");
    let to = (IpAddr::from(neighbour.ipv4()), PORT);
    let echo = neighbour
        .netns()
        .run(|| std::net::UdpSocket::bind(to))
        .expect("a socket of the neighbour's");
    echo.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    let socket = scene.pod.udp_socket(to);
    let answers = |timeout| {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _ = echo.set_read_timeout(Some(timeout));
                let mut buffer = [0; 64];
                if let Ok((length, from)) = echo.recv_from(&mut buffer) {
                    let _ = echo.send_to(&buffer[..length], from);
                }
            });
            echo_on(&socket, b"hello", timeout)
        })
    };
    assert!(answers(DEADLINE), "an internal address");
    scene.lab.edit_config("ranges.tunnels", vec!["9000/udp"]);
    scene.agent.reload();
    let mark = scene.agent.mark();
    eventually("the flow is cut", || {
        let _ = socket.send(b"hello");
        let denials = scene.agent.denials();
        let cut = |denial: &egress_tests::Denial| {
            denial.reason == "tunnel" && denial.dst_port == Some(PORT)
        };
        denials[mark.min(denials.len())..]
            .iter()
            .any(cut)
            .then_some(())
    });
    while echo.recv(&mut [0; 64]).is_ok() && answers(SHORT) {}
    assert!(!answers(SHORT), "the flow is cut");
}

#[test]
fn explain_shows_the_entry_that_allows_a_tunnel() {
    let scene = Scene::new(&[("allow", "*")]);
    let (_, text) = scene.lab.explain(&scene.pod, "10.98.0.1:4789/udp");
    assert_eq!(
        (text["decision"].as_str(), text["reason"].as_str()),
        (Some("denied"), Some("tunnel"))
    );
    assert_eq!(
        text["hint"],
        "add `10.98.0.1:4789/udp` to egress-agent.dev/allow"
    );
    let (_, text) = scene.lab.explain(&scene.pod, "10.98.0.1:4788/udp");
    assert_eq!(text["decision"], "allowed", "{text:#}");
}
