//! Pods that send far more queries and connections than any program needs.

use std::{
    collections::HashSet,
    io::{Read as _, Write as _},
};

use egress_tests::{
    DEADLINE, Lab, Pod,
    addresses::{RESOLVER, numbered},
    dns::{Answer, DnsSocket, RecordType, ResponseCode, framed_query, read_message},
};

/// Queries these names below a wildcard, 100 at a time, and expects a response to each.
#[track_caller]
fn resolve_all(socket: &DnsSocket, names: std::ops::Range<u32>) {
    let mut names = names.peekable();
    while names.peek().is_some() {
        let mut open = HashSet::new();
        for number in names.by_ref().take(100) {
            let id = number as u16;
            let name = format!("n{number}.fresh.test");
            socket.ask(RESOLVER, id, &name, RecordType::A);
            open.insert(id);
        }
        while !open.is_empty() {
            let (bytes, _) = socket.receive(DEADLINE).expect("a response");
            let answer = Answer::read(&bytes);
            assert_eq!(answer.code, ResponseCode::NoError);
            assert!(open.remove(&answer.message.metadata.id));
        }
    }
}

#[test]
fn memory_stays_bounded_with_a_hundred_thousand_names() {
    const NAMES: u32 = 100_000;
    const LIMIT: u32 = 1024;
    const MIB: u64 = 1024;
    let lab = Lab::builder()
        .config("limits.addressesPerPod", LIMIT)
        .build();
    let _web = lab.serve_tcp(443);
    lab.dns().numbered("fresh.test");
    let pod: Pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*.fresh.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    let socket = pod.dns_socket();
    // Until every table is full.
    resolve_all(&socket, 0..10 * LIMIT);
    let before = agent.memory_kib("RssAnon");
    resolve_all(&socket, 10 * LIMIT..NAMES);
    let after = agent.memory_kib("RssAnon");
    assert!(after < before + 4 * MIB, "{before} KiB, then {after} KiB");
    for map in ["allow", "learned"] {
        let entries = lab.pod_entries(&pod, map).len();
        assert!(entries <= LIMIT as usize, "{map}: {entries} entries");
    }
    // The address that was resolved last is allowed.
    pod.talks_tcp((numbered(NAMES - 1), 443));
    assert!(agent.denials().is_empty());
}

#[test]
fn connections_to_a_resolver_are_bounded_and_the_newest_works() {
    // The limit in docs/dns-tcp.md, and one more.
    const CONNECTIONS: u32 = 257;
    let lab = Lab::new();
    lab.dns().numbered("fresh.test");
    let (pod, neighbour) = (lab.pod("shop", "cart"), lab.pod("shop", "neighbour"));
    for pod in [&pod, &neighbour] {
        lab.write_pod(pod, &[("allow", "*.fresh.test:443")]);
    }
    let agent = lab.start_agent(&[&pod, &neighbour]);
    let before = neighbour.reach_tcp((RESOLVER, 53));
    // The first part of a query, which the agent buffers.
    let bytes = framed_query(7, "n1.fresh.test");
    let mut all: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            let mut stream = pod.reach_tcp((RESOLVER, 53));
            stream.set_read_timeout(Some(DEADLINE)).expect("a time-out");
            stream.write_all(&bytes[..9]).expect("write");
            stream
        })
        .collect();
    agent.wait_denial("the least recently used connection", |d| {
        d.of(&pod) && d.reason == "dns_over_tcp"
    });
    let error = all[0].read(&mut [0]).expect_err("it is reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    for mut stream in [all.pop().expect("the newest"), before] {
        let rest = if stream.local_addr().expect("connected").ip() == pod.ipv4() {
            &bytes[9..]
        } else {
            &bytes[..]
        };
        stream.write_all(rest).expect("write");
        let message = read_message(&mut stream).expect("a response");
        assert_eq!(Answer::read(&message).addresses, [numbered(1)]);
    }
    assert!(!agent.denials().iter().any(|d| d.of(&neighbour)));
}
