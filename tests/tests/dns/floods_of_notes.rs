//! A pod that gives the agent new notes all the time: many names take turns with the same addresses, and each response
//! tells the agent that these addresses now have another name.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use egress_tests::{
    Lab, Pod, StopAtEnd, UdpEcho,
    addresses::{RESOLVER, numbered},
    dns::{RecordType, ResponseCode, question},
    observed::HTTP,
};

/// Addresses in each response: as many as the programs read.
const ADDRESSES: u8 = 32;
/// Names that have these addresses.
const NAMES: u16 = 64;
/// The default of `limits.addressesPerPod`.
const PLACES: u32 = 4096;
/// The flows of the pod to each address of a full allow map: with those, the map of flows is full.
const FLOWS: usize = 4;
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

/// The address that a name has: the same one for all names that begin with an `n`, another one for each that begins with
/// an `r`.
fn address(label: &str, n: u8) -> Ipv4Addr {
    let number = label.strip_prefix('r').and_then(|n| n.parse::<u32>().ok());
    let Some(number) = number else {
        return Ipv4Addr::new(203, 0, 113, 100 + n);
    };
    match numbered(1000 + number * u32::from(ADDRESSES) + u32::from(n)) {
        IpAddr::V4(ip) => ip,
        IpAddr::V6(_) => unreachable!("the numbered addresses are IPv4 addresses"),
    }
}

/// Responds to each query with its name's addresses.
fn respond(socket: &UdpSocket, stop: &AtomicBool) {
    let mut message = [0; 1500];
    while !stop.load(Ordering::Relaxed) {
        let Ok((len, from)) = socket.recv_from(&mut message) else {
            continue;
        };
        let name = message[HEADER..len].iter().position(|&byte| byte == 0);
        let mut end = HEADER + name.expect("a name") + 5;
        let label = &message[HEADER + 1..][..usize::from(message[HEADER])];
        let label = String::from_utf8_lossy(label).into_owned();
        message[2..HEADER].copy_from_slice(&[0x81, 0x80, 0, 1, 0, ADDRESSES, 0, 0, 0, 0]);
        for n in 0..ADDRESSES {
            let record = [&RECORD[..], &address(&label, n).octets()].concat();
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

/// Fills the pod's allow map with addresses to which the pod has open flows, so that none can be evicted.
fn fill(pod: &Pod) {
    let sockets: Vec<UdpSocket> = pod.netns().run(|| {
        let bind = || UdpSocket::bind((IpAddr::from(pod.ipv4()), 0)).expect("a socket");
        (0..FLOWS).map(|_| bind()).collect()
    });
    for socket in &sockets {
        socket.set_read_timeout(POLL).expect("a time-out");
    }
    for n in 0..PLACES / u32::from(ADDRESSES) {
        for address in pod.lookup(&format!("r{n}.flood.test")) {
            for socket in &sockets {
                let to = SocketAddr::new(address, 443);
                // A flow is established when the pod sends again after a reply.
                for _ in 0..2 {
                    socket.send_to(b"x", to).expect("it is allowed");
                    socket.recv(&mut [0; 100]).expect("a reply");
                }
            }
        }
    }
}

/// Starts a flood in one pod, and then lets a neighbour ask. `is_full` is whether the flooding pod's allow map has no room.
fn flood_beside_a_neighbour(is_full: bool) {
    let lab = Lab::builder()
        .without_dns()
        .config("dns.learn", "kernel")
        .config("http", HTTP)
        .build();
    let (pod, neighbour) = (lab.pod("shop", "cart"), lab.pod("shop", "neighbour"));
    lab.write_pod(&pod, &[("allow", "*.flood.test:443")]);
    lab.write_pod(&neighbour, &[("allow", "shop.test:443")]);
    let bound = lab.outside().run(|| UdpSocket::bind((RESOLVER, 53)));
    let resolver = bound.expect("the resolver's port is free");
    resolver.set_read_timeout(POLL).expect("a time-out");
    let _echo = UdpEcho::start(lab.outside(), 443);
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
        if is_full {
            fill(&pod);
        }
        for _ in 0..SOCKETS {
            scope.spawn(|| flood(&pod, &stop));
        }
        agent.wait_denial("a query of the flood that was one too many", |denial| {
            denial.of(&pod) && denial.reason == "dns_not_held"
        });
        if is_full {
            agent.wait_log("learned addresses without room", |line| {
                line.contains("has no room for addresses that the programs have learned")
            });
        }
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
    if is_full {
        let unnoted = lab.metrics().get("egress_agent_notes_without_room_total");
        assert!(unnoted >= 1.0, "{unnoted}");
    }
}

#[test]
fn new_names_of_learned_addresses_do_not_keep_the_dns_of_others_waiting() {
    flood_beside_a_neighbour(false);
}

#[test]
fn new_names_without_room_in_the_allow_map_do_not_keep_the_dns_of_others_waiting() {
    flood_beside_a_neighbour(true);
}
