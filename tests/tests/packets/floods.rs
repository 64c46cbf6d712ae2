//! A pod that asks for more than anybody needs.

use std::{
    collections::HashSet,
    fs,
    io::{Read as _, Write as _},
};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod,
    addresses::{RESOLVER, numbered},
    dns::{Answer, DnsSocket, RecordType, ResponseCode, question},
};

/// Memory of the agent's own, in KiB.
#[track_caller]
fn memory(agent: &Agent) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid()));
    let status = status.expect("the agent runs");
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    let field = line.and_then(|l| l.split_whitespace().next());
    field.expect("RssAnon").parse().expect("a number")
}

/// Asks for `names` names below a wildcard, many at a time; each is answered.
#[track_caller]
fn asks(socket: &DnsSocket, names: std::ops::Range<u32>) {
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
            let (bytes, _) = socket.receive(DEADLINE).expect("an answer");
            let answer = Answer::read(&bytes);
            assert_eq!(answer.code, ResponseCode::NoError);
            assert!(open.remove(&answer.message.metadata.id));
        }
    }
}

#[test]
fn a_hundred_thousand_names_leave_memory_bounded() {
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
    asks(&socket, 0..10 * LIMIT);
    let before = memory(&agent);
    asks(&socket, 10 * LIMIT..NAMES);
    let after = memory(&agent);
    assert!(after < before + 4 * MIB, "{before} KiB, then {after} KiB");
    let allowed = lab.allowed(&pod);
    assert!(allowed.len() <= LIMIT as usize, "{} entries", allowed.len());
    // And what was resolved last is open.
    pod.talks_tcp((numbered(NAMES - 1), 443));
    assert!(agent.denials().is_empty());
}

#[test]
fn connections_with_a_resolver_are_bounded_and_the_newest_works() {
    // As many as docs/dns-tcp.md says, and one more.
    const CONNECTIONS: u32 = 257;
    let lab = Lab::new();
    lab.dns().numbered("fresh.test");
    let (pod, neighbour) = (lab.pod("shop", "cart"), lab.pod("shop", "neighbour"));
    for pod in [&pod, &neighbour] {
        lab.write_pod(pod, &[("allow", "*.fresh.test:443")]);
    }
    let agent = lab.start_agent(&[&pod, &neighbour]);
    let before = neighbour.reach_tcp((RESOLVER, 53));
    // The beginning of a question, which the agent keeps.
    let question = question(7, "n1.fresh.test", RecordType::A);
    let length = u16::try_from(question.len()).expect("a short question");
    let bytes = [&length.to_be_bytes(), question.as_slice()].concat();
    let mut all: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            let mut stream = pod.reach_tcp((RESOLVER, 53));
            stream.set_read_timeout(Some(DEADLINE)).expect("a time-out");
            stream.write_all(&bytes[..9]).expect("write");
            stream
        })
        .collect();
    agent.wait_denial("the connection used longest ago", |d| {
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
        let mut length = [0; 2];
        stream.read_exact(&mut length).expect("an answer");
        let mut message = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut message).expect("an answer");
        assert_eq!(Answer::read(&message).addresses, [numbered(1)]);
    }
    assert!(!agent.denials().iter().any(|d| d.of(&neighbour)));
}
