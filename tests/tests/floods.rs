//! A pod that asks for more names than anybody needs.

use std::{collections::HashSet, fs};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod,
    addresses::{RESOLVER, numbered},
    dns::{Answer, DnsSocket, RecordType, ResponseCode},
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
