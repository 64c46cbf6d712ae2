//! Tests of the laboratory itself: without an agent every destination is reachable. So a destination that
//! another test finds unreachable was denied by the agent.

use std::{fs, net::SocketAddr, path::Path};

use egress_tests::{
    DEADLINE, Lab, SHORT,
    addresses::{RESOLVER, STRANGER, numbered, server, server6},
    dns::{RecordType, ResponseCode, Send, address, cname, hints},
    echo_on, eventually, exchange,
    frames::{self, Tap},
    holds, leftovers,
};
use etherparse::ip_number;

#[test]
fn without_an_agent_a_pod_resolves_and_connects() {
    let lab = Lab::new();
    let web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.dns().addresses("shop.test", &[server(10), server6(10)]);

    assert_eq!(pod.lookup("shop.test"), [server(10)]);
    assert_eq!(pod.lookup6("shop.test"), [server6(10)]);
    for address in [server(10), server6(10)] {
        let to = SocketAddr::new(address, 443);
        let mut stream = pod.reach_tcp(to);
        assert!(
            exchange(&mut stream, b"hello", DEADLINE),
            "no echo from {to}"
        );
        assert_eq!(web.connections_to(to), 1);
    }
    assert_eq!(web.peers()[0].ip(), pod.ipv4());
    assert_eq!(pod.syn_retransmissions(), 0);
    assert_eq!(lab.dns().queries_for("shop.test"), 2);
    assert_eq!(
        pod.resolve("other.test", RecordType::A).code,
        ResponseCode::NXDomain
    );
}

#[test]
fn a_port_without_a_server_refuses_and_a_route_to_nowhere_times_out() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    let refused = pod
        .connect_tcp((server(1), 9), DEADLINE)
        .expect_err("nobody listens");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    let nowhere: std::net::IpAddr = "192.0.2.1".parse().expect("an address");
    assert!(pod.connect_tcp((nowhere, 443), SHORT).is_err());
}

#[test]
fn udp_and_ping_are_answered_from_the_address_that_was_asked() {
    let lab = Lab::builder().mtu(9000).build();
    let echo = lab.serve_udp(4000);
    let pod = lab.pod("shop", "cart");
    for address in [server(7), numbered(77_777), server6(7)] {
        let socket = pod.udp_socket((address, 4000));
        assert!(
            echo_on(&socket, b"hello", DEADLINE),
            "no echo from {address}"
        );
        assert!(
            echo_on(&socket, &vec![7; 20_000], DEADLINE),
            "no echo of fragments from {address}"
        );
        assert_eq!(echo.datagrams_to(SocketAddr::new(address, 4000)), 2);
        assert!(pod.ping(address, DEADLINE), "no echo reply from {address}");
    }
}

#[test]
fn the_dns_server_sends_the_configured_responses() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.dns().answer(
        "a.test",
        [cname("b.test"), cname("c.test"), address(server(3)).ttl(7)],
    );
    let answer = pod.resolve("a.test", RecordType::A);
    assert_eq!(answer.addresses, [server(3)]);
    let owners: Vec<_> = answer
        .message
        .answers
        .iter()
        .map(|r| r.name.to_ascii())
        .collect();
    assert_eq!(owners, ["a.test.", "b.test.", "c.test."]);
    assert_eq!(answer.message.answers[2].ttl, 7);

    lab.dns().numbered("fresh.test");
    assert_eq!(pod.lookup("n5.fresh.test"), [numbered(5)]);

    lab.dns()
        .answer("https.test", [hints(&[server(4), server6(4)])]);
    assert_eq!(
        pod.resolve("https.test", RecordType::HTTPS)
            .message
            .answers
            .len(),
        1
    );

    // From another address, from another port, with another id, and then correctly.
    lab.dns().on("forged.test", |asked| {
        let answer = Send::answer(asked, &[address(server(66))]);
        vec![
            answer.clone().from(SocketAddr::new(STRANGER, 53)),
            answer.clone().from(SocketAddr::new(RESOLVER, 5353)),
            answer.clone().with_id(asked.id.wrapping_add(1)),
            answer,
        ]
    });
    let socket = pod.dns_socket();
    socket.ask(RESOLVER, 9, "forged.test", RecordType::A);
    let got: Vec<_> = (0..4)
        .map(|n| {
            socket
                .receive(DEADLINE)
                .unwrap_or_else(|| panic!("response {n}"))
        })
        .collect();
    assert_eq!(got[0].1, SocketAddr::new(STRANGER, 53));
    assert_eq!(got[1].1, SocketAddr::new(RESOLVER, 5353));
    assert_eq!(got[2].0[..2], [0, 10]);
    assert_eq!(got[3].0[..2], [0, 9]);

    // An unsolicited datagram.
    lab.dns().send(RESOLVER, socket.address(), b"anything");
    assert_eq!(socket.receive(DEADLINE).expect("a datagram").0, b"anything");
}

#[test]
fn frames_of_any_kind_leave_the_node() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    let tap = Tap::open(pod.netns(), "eth0");
    let uplink = Tap::open(lab.outside(), "eth0");
    let forged = "10.7.7.7".parse().expect("an address");
    tap.send(&frames::udp(
        &pod,
        (forged, 1000),
        (server(1), 2000),
        b"forged",
    ));
    let seen = uplink.receive(DEADLINE, |frame| {
        frames::is(frame, forged, server(1), ip_number::UDP)
    });
    assert!(seen.is_some_and(|frame| frame.ends_with(b"forged")));

    tap.send(&frames::sctp_init(&pod, (server(1), 3868), 1000));
    let own = pod.ipv4().into();
    let seen = uplink.receive(DEADLINE, |f| frames::is(f, own, server(1), ip_number::SCTP));
    assert!(seen.is_some());
}

#[test]
fn nothing_is_left_when_a_laboratory_is_dropped() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let (directory, bpffs) = (lab.directory().to_owned(), lab.bpffs());
    let names = [lab.node(), lab.outside(), pod.netns()].map(|n| n.name().to_owned());
    let mounted = || {
        let mounts = fs::read_to_string("/proc/self/mounts").expect("the list of mounts");
        mounts
            .lines()
            .any(|line| line.split(' ').nth(1).map(Path::new) == Some(&bpffs))
    };
    let existing = || leftovers(std::process::id());
    assert!(mounted());
    assert!(
        names.iter().all(|name| existing().contains(name)),
        "{names:?}: {:?}",
        existing()
    );

    drop((lab, pod));
    eventually("the mount is gone", || holds(!mounted()));
    assert!(!directory.exists());
    assert!(
        !names.iter().any(|name| existing().contains(name)),
        "left: {:?}",
        existing()
    );
}
