//! A pod that gives the agent new notes all the time: many names take turns with the same addresses, and each response
//! tells the agent that these addresses now have another name.

use std::{
    net::{IpAddr, Ipv4Addr, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use egress_tests::{
    Lab, Pod, StopAtEnd,
    addresses::RESOLVER,
    dns::{RecordType, ResponseCode, question},
};

/// Addresses in each response: as many as the programs read.
const ADDRESSES: u8 = 32;
/// Names that have these addresses.
const NAMES: u16 = 64;
/// Sockets of the pod, each in a thread of its own, and the queries that each has open.
const SOCKETS: usize = 4;
const OPEN: usize = 120;
const HEADER: usize = 12;
/// A pointer to the name in the question, type A, class IN, a TTL of 300 seconds, 4 bytes of data.
const RECORD: [u8; 12] = [0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 0x2c, 0, 4];
/// How long a stub resolver waits until it repeats a query.
const PATIENCE: Duration = Duration::from_secs(5);
const POLL: Option<Duration> = Some(Duration::from_millis(20));

fn names() -> impl Iterator<Item = String> {
    (0..NAMES).map(|n| format!("n{n}.flood.test"))
}

/// Responds to each query with the same addresses.
fn respond(socket: &UdpSocket, stop: &AtomicBool) {
    let mut message = [0; 1500];
    while !stop.load(Ordering::Relaxed) {
        let Ok((len, from)) = socket.recv_from(&mut message) else {
            continue;
        };
        let name = message[HEADER..len].iter().position(|&byte| byte == 0);
        let mut end = HEADER + name.expect("a name") + 5;
        message[2..HEADER].copy_from_slice(&[0x81, 0x80, 0, 1, 0, ADDRESSES, 0, 0, 0, 0]);
        for n in 0..ADDRESSES {
            let address = Ipv4Addr::new(203, 0, 113, 100 + n).octets();
            let record = [&RECORD[..], &address].concat();
            message[end..end + record.len()].copy_from_slice(&record);
            end += record.len();
        }
        let _ = socket.send_to(&message[..end], from);
    }
}

/// Queries the names in turns, and has so many queries open all the time.
fn flood(pod: &Pod, stop: &AtomicBool) {
    let socket = pod.netns().run(|| {
        let socket = UdpSocket::bind((IpAddr::from(pod.ipv4()), 0)).expect("a socket");
        socket.connect((RESOLVER, 53)).expect("a route");
        socket
    });
    socket.set_read_timeout(POLL).expect("a time-out");
    let queries: Vec<_> = names()
        .map(|name| question(0, &name, RecordType::A))
        .collect();
    let (mut id, mut open) = (0_u16, 0);
    while !stop.load(Ordering::Relaxed) {
        while open < OPEN {
            let mut query = queries[usize::from(id % NAMES)].clone();
            query[..2].copy_from_slice(&id.to_be_bytes());
            let _ = socket.send(&query);
            id = id.wrapping_add(1);
            open += 1;
        }
        // Queries that nobody answers in time are lost.
        open = socket.recv(&mut [0; 1500]).map_or(0, |_| open - 1);
    }
}

#[test]
fn new_names_of_learned_addresses_do_not_keep_the_dns_of_others_waiting() {
    let lab = Lab::builder()
        .without_dns()
        .config("dns.learn", "kernel")
        .build();
    let (pod, neighbour) = (lab.pod("shop", "cart"), lab.pod("shop", "neighbour"));
    lab.write_pod(&pod, &[("allow", "*.flood.test:443")]);
    lab.write_pod(&neighbour, &[("allow", "shop.test:443")]);
    let bound = lab.outside().run(|| UdpSocket::bind((RESOLVER, 53)));
    let resolver = bound.expect("the resolver's port is free");
    resolver.set_read_timeout(POLL).expect("a time-out");
    let agent = lab.start_agent(&[&pod, &neighbour]);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let flood_ends = StopAtEnd(&stop);
        for _ in 0..2 {
            scope.spawn(|| respond(&resolver, &stop));
        }
        // The agent decides the names, and the programs learn the addresses.
        for name in names() {
            assert_eq!(pod.lookup(&name).len(), usize::from(ADDRESSES));
        }
        for _ in 0..SOCKETS {
            scope.spawn(|| flood(&pod, &stop));
        }
        agent.wait_denial("a query of the flood that was one too many", |denial| {
            denial.of(&pod) && denial.reason == "dns_not_held"
        });
        // The gate refuses this name. Nothing is sent twice.
        let refused: Vec<_> = (0..10)
            .map(|_| neighbour.try_resolve(RESOLVER, "other.test", RecordType::A, PATIENCE))
            .map_while(|answer| answer.map(|answer| answer.code))
            .collect();
        drop(flood_ends);
        assert_eq!(
            refused,
            [ResponseCode::NXDomain; 10],
            "then one waited too long"
        );
    });
}
