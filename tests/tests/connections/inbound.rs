//! Connections and datagrams from outside to a pod: the pod may answer them however many there are, unless a
//! `deny` entry forbids it.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, UdpSocket},
    thread,
};

use egress_tests::{
    DEADLINE, Lab, Pod, SHORT,
    addresses::{numbered, server},
    exchange,
};
use socket2::SockRef;

use crate::callers::{Inbound, PORT, call};

/// Opens a UDP socket outside that has sent a datagram to `inner`, the pod's socket.
#[track_caller]
fn asked(lab: &Lab, from: IpAddr, inner: &UdpSocket, pod: &Pod) -> UdpSocket {
    let outer = lab.outside().run(|| UdpSocket::bind((from, 0)));
    let outer = outer.expect("a UDP socket");
    outer
        .connect((pod.ipv4(), PORT))
        .and_then(|()| outer.send(b"hello"))
        .expect("a datagram to the pod");
    let mut buffer = [0; 16];
    inner.recv(&mut buffer).expect("the pod gets the datagram");
    outer
}

/// True if the pod's answer arrives.
fn is_answered(inner: &UdpSocket, outer: &UdpSocket, timeout: std::time::Duration) -> bool {
    let to = outer.local_addr().expect("an address");
    inner.send_to(b"answer", to).expect("the pod answers");
    outer.set_read_timeout(Some(timeout)).expect("a time-out");
    let mut buffer = [0; 16];
    outer.recv(&mut buffer).is_ok()
}

fn udp_server(pod: &Pod) -> UdpSocket {
    let socket = pod.netns().run(|| UdpSocket::bind((pod.ipv4(), PORT)));
    let socket = socket.expect("a UDP socket in the pod");
    socket
        .set_read_timeout(Some(DEADLINE))
        .expect("a time-out that is not zero");
    socket
}

#[test]
fn a_new_deny_entry_cuts_connections_that_its_host_opened() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    let (denied, other) = (server(9), server(20));
    let (listener, datagrams) = (pod.listen_tcp(PORT), udp_server(&pod));
    let mut inbound = Inbound::open_from(&lab, denied, &pod, &listener);
    let mut of_other = Inbound::open_from(&lab, other, &pod, &listener);
    let asker = asked(&lab, denied, &datagrams, &pod);
    assert!(inbound.is_answered(DEADLINE));
    assert!(is_answered(&datagrams, &asker, DEADLINE));

    let edited = [("allow", "shop.test:443"), ("deny", "203.0.113.9")];
    agent.applies_policy_after(&pod, || lab.write_pod(&pod, &edited));
    assert!(
        !is_answered(&datagrams, &asker, SHORT),
        "the pod answered a denied address"
    );
    assert!(
        !inbound.is_answered(SHORT),
        "the pod went on talking to a denied address"
    );
    agent.wait_denial("an answer", |d| {
        d.is(
            &pod,
            "deny_rule",
            denied,
            inbound.caller.local_addr().map_or(0, |own| own.port()),
        )
    });
    assert!(
        of_other.is_answered(DEADLINE),
        "the edit cut what it does not name"
    );
}

#[test]
fn a_denied_host_gets_no_answer() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("deny", "203.0.113.9")]);
    let agent = lab.start_agent(&[&pod]);
    let datagrams = udp_server(&pod);
    let asker = asked(&lab, server(9), &datagrams, &pod);
    assert!(!is_answered(&datagrams, &asker, SHORT));
    let port = asker.local_addr().expect("an address").port();
    agent.wait_denial("the answer", |d| d.is(&pod, "deny_rule", server(9), port));
    let asker = asked(&lab, server(20), &datagrams, &pod);
    assert!(is_answered(&datagrams, &asker, DEADLINE));
}

#[test]
fn a_flood_of_datagrams_leaves_the_pod_reachable() {
    const FLOOD: u32 = 17_000;
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "203.0.113.10:443")]);
    let agent = lab.start_agent(&[&pod]);
    let listener = pod.listen_tcp(PORT);
    let mut inbound = Inbound::open_from(&lab, server(9), &pod, &listener);
    let mut outbound = pod.talks_tcp((server(10), 443));

    lab.outside().run(|| {
        for n in 0..FLOOD {
            let socket = UdpSocket::bind((numbered(n), 5000)).expect("a UDP socket");
            socket
                .send_to(b"flood", (pod.ipv4(), 9))
                .expect("a datagram to the pod");
        }
    });

    let mut new = Inbound::open_from(&lab, server(9), &pod, &listener);
    assert!(new.is_answered(DEADLINE), "a new connection does not work");
    assert!(
        inbound.is_answered(DEADLINE),
        "an established connection was lost"
    );
    assert!(exchange(&mut outbound, b"still here", DEADLINE));
    agent.wait_log("whose flows were evicted", |line| {
        line.contains("have evicted flows that were not established")
    });
}

#[test]
fn a_busy_server_answers_every_short_connection() {
    const CONNECTIONS: u32 = 17_000;
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    let listener = pod.listen_tcp(PORT);
    let socket = SockRef::from(&listener);
    socket
        .set_read_timeout(Some(2 * DEADLINE))
        .expect("a time-out that is not zero");
    let mut inbound = Inbound::open_from(&lab, server(9), &pod, &listener);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..CONNECTIONS {
                let (mut stream, _) = listener.accept().expect("a connection");
                stream.write_all(b"hello").expect("the pod writes");
            }
        });
        for n in 0..CONNECTIONS {
            let mut stream = call(&lab, numbered(n % 1000), &pod)
                .unwrap_or_else(|error| panic!("connection {n}: {error}"));
            stream.set_read_timeout(Some(DEADLINE)).expect("a time-out");
            let mut heard = Vec::new();
            stream
                .read_to_end(&mut heard)
                .unwrap_or_else(|error| panic!("connection {n}: {error}"));
            assert_eq!(heard, b"hello", "connection {n}");
        }
    });
    assert!(
        inbound.is_answered(DEADLINE),
        "a connection that was open before was lost"
    );
}
