//! The limit of connections per pod (`limits.flowsPerPod`), and which connections are evicted above it.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use egress_tests::{
    DEADLINE, Lab, Pod, SHORT,
    addresses::{numbered, server},
    dns::address,
    eventually, exchange, holds,
    observed::HTTP,
};
use etherparse::PacketBuilder;
use socket2::{Domain, Protocol, Socket, Type};

use crate::callers::{Inbound, PORT};

/// The protocol of raw packets whose sender writes the IP header too, raw(7).
const IPPROTO_RAW: i32 = 255;
/// The lowest value of `limits.flowsPerPod`.
const FEW: usize = 64;

/// Sends `count` SYNs to the pod, each from an address that never answers.
#[track_caller]
fn flood_of_syns(lab: &Lab, pod: &Pod, count: u32) {
    let raw = Protocol::from(IPPROTO_RAW);
    let socket = lab
        .outside()
        .run(|| Socket::new(Domain::IPV4, Type::RAW, Some(raw)))
        .expect("a raw socket");
    let to = SocketAddr::from((pod.ipv4(), 0)).into();
    for n in 0..count {
        let from = Ipv4Addr::from_bits(Ipv4Addr::new(100, 64, 0, 0).to_bits() + n);
        let mut packet = Vec::new();
        PacketBuilder::ipv4(from.octets(), pod.ipv4().octets(), 64)
            .tcp(40_000, PORT, n, 65_535)
            .syn()
            .write(&mut packet, &[])
            .expect("a packet in memory");
        socket.send_to(&packet, &to).expect("the SYN leaves");
    }
}

#[test]
fn half_open_connections_from_outside_neither_end_connections_nor_block_new_ones() {
    let lab = Lab::builder().exact_lifetimes().build();
    let _web = lab.serve_tcp(443);
    lab.dns().answer("shop.test", [address(server(10)).ttl(1)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    let listener = pod.listen_tcp(PORT);
    let mut before = Inbound::open_from(&lab, server(9), &pod, &listener);
    let mut outbound = pod.talks_tcp_within_ttl("shop.test", (server(10), 443));

    // Twice the pod's limit at once: as many SYNs as would otherwise come in some minutes.
    flood_of_syns(&lab, &pod, 40_000);
    let mut during = Inbound::open_from(&lab, server(9), &pod, &listener);
    eventually("the name has expired", || {
        holds(pod.connect_tcp((server(10), 443), SHORT).is_err())
    });
    assert!(during.is_answered(DEADLINE), "a new connection");
    assert!(before.is_answered(DEADLINE), "a connection from before");
    assert!(exchange(&mut outbound, b"still here", DEADLINE));
}

#[test]
fn above_the_limit_the_inbound_connections_idle_longest_are_evicted() {
    let lab = Lab::builder()
        .config("limits.flowsPerPod", FEW)
        .config("http", HTTP)
        .build();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "203.0.113.10:443")]);
    let agent = lab.start_agent(&[&pod]);
    let listener = pod.listen_tcp(PORT);
    let mut outbound = pod.talks_tcp((server(10), 443));
    let mut connections = Vec::new();
    for n in 0..3 * FEW as u32 {
        connections.push(Inbound::open_from(&lab, numbered(n), &pod, &listener));
        // Stays below the rate at which the agent makes room.
        assert!(connections.last_mut().expect("one").is_answered(DEADLINE));
        std::thread::sleep(Duration::from_millis(30));
    }

    agent.wait_log("that connections were evicted", |line| {
        line.contains("have evicted the inbound connections that were silent for longest")
    });
    let newest = connections.len() - 8;
    for connection in &mut connections[newest..] {
        assert!(connection.is_answered(DEADLINE), "a new connection");
    }
    assert!(
        !connections[0].is_answered(SHORT),
        "the oldest connection exceeds the limit"
    );
    assert!(
        exchange(&mut outbound, b"still here", DEADLINE),
        "outbound connections have a limit of their own"
    );
    let series = "egress_agent_flows_evicted_total{why=\"over_pod_share\"}";
    eventually("they are counted", || {
        holds(lab.metrics().get(series) > 0.0)
    });
}

#[test]
fn above_the_limit_connections_that_the_pod_opened_go_on() {
    let lab = Lab::builder().config("limits.flowsPerPod", FEW).build();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let agent = lab.start_agent(&[&pod]);
    pod.lookup("shop.test");
    let mut connections: Vec<TcpStream> = (0..2 * FEW)
        .map(|_| pod.talks_tcp((server(10), 443)))
        .collect();
    for connection in &mut connections {
        assert!(
            exchange(connection, b"still here", DEADLINE),
            "the rules allow a connection that has no flow entry"
        );
    }
    agent.wait_log("that there is no place for all", |line| {
        line.contains("raise limits.flowsPerPod")
    });
}
