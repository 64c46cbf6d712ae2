//! Flows that others open: which packets a pod may answer with, and which flows are evicted when there are
//! many.

use std::{net::IpAddr, time::Duration};

use egress_agent::datapath::Hook;
use egress_common::{
    classes::ClassSet,
    limits::{FLOW_ENTRIES, FlowLimits},
    reason::Reason,
    records::{FLOW_IN, FLOW_OUT, FLOW_SEEN_AGAIN},
};
use egress_tests::{
    addresses::{numbered, server, server6},
    programs::{ANYTHING, PORT, Programs, TO_PORT},
    raw::{Ip, flag},
};

/// Before any machine's current time.
pub(crate) const PAST_NS: u64 = 1;
const NEVER_NS: u64 = u64::MAX;
/// The port from which a peer connects, and the port to which it connects.
pub(crate) const CALL: (u16, u16) = (5000, 8080);
pub(crate) const ANSWER: (u16, u16) = (8080, 5000);
/// The initial sequence numbers of the peer and of the pod.
pub(crate) const PEER: u32 = 0x1000_ffff;
pub(crate) const OWN: u32 = 0x2000_ffff;
/// More than the limit of flows that are not established.
pub(crate) const FLOOD: u32 = 17_000;

/// A connection that a peer opens and the pod accepts.
#[track_caller]
pub(crate) fn accept(programs: &mut Programs, peer: IpAddr, port: u16) {
    let (by, to) = (programs.by(peer), programs.to(peer));
    let (call, answer) = ((port, CALL.1), (CALL.1, port));
    programs.arrives(&by.tcp_segment(call, flag::SYN, (PEER, 0), b""));
    let syn_ack = flag::SYN | flag::ACK;
    programs.leaves(&to.tcp_segment(answer, syn_ack, (OWN, PEER + 1), b""));
    programs.arrives(&by.tcp_segment(call, flag::ACK, (PEER + 1, OWN + 1), b""));
    programs.leaves(&to.tcp_segment(answer, flag::ACK, (OWN + 1, PEER + 1), b"data"));
}

/// A connection that the pod opens and a server accepts.
#[track_caller]
fn connect(programs: &mut Programs, host: IpAddr, port: u16) {
    let (to, by) = (programs.to(host), programs.by(host));
    programs.leaves(&to.tcp(port, PORT, flag::SYN));
    programs.arrives(&by.tcp(PORT, port, flag::SYN | flag::ACK));
    programs.leaves(&to.tcp(port, PORT, flag::ACK));
}

pub(crate) fn states(programs: &Programs) -> Vec<(u8, bool)> {
    let flows = programs.flows();
    let state =
        |flow: &egress_common::records::Flow| (flow.state, flow.seen & FLOW_SEEN_AGAIN != 0);
    let mut states: Vec<_> = flows.iter().map(|(_, flow)| state(flow)).collect();
    states.sort_unstable();
    states
}

#[test]
fn a_packet_for_another_address_opens_no_flow() {
    let mut programs = Programs::new();
    let mut frames = Vec::new();
    for other in ["10.1.0.77", "fd01::77"] {
        let other: IpAddr = other.parse().expect("an address");
        let src = if other.is_ipv4() {
            server(1)
        } else {
            server6(1)
        };
        let ip = Ip::new(src, other);
        frames.extend([
            ip.tcp(7, 8080, flag::SYN),
            ip.udp(7, 8080, b"hello"),
            ip.echo(7),
        ]);
    }
    for frame in &frames {
        // As a bridge floods it to every port.
        programs.arrives(frame);
    }
    assert_eq!(programs.flows(), []);
    let to_own = programs.by(server(1)).udp(7, 8080, b"hello");
    programs.arrives(&to_own);
    assert_eq!(programs.flows().len(), 1);
    // While the pod's addresses are unknown, all packets count.
    programs.change_policy(|policy| policy.own_len = 0);
    programs.arrives(&frames[1]);
    assert_eq!(programs.flows().len(), 2);
}

#[test]
fn a_syn_lets_no_data_out_before_the_handshake_is_complete() {
    let mut programs = Programs::new();
    for peer in [server(9), server6(9)] {
        let (by, to) = (programs.by(peer), programs.to(peer));
        let data = to.tcp_segment(ANSWER, flag::ACK, (OWN + 1, PEER + 1), b"secret");
        let syn_ack = to.tcp_segment(ANSWER, flag::SYN | flag::ACK, (OWN, PEER + 1), b"");
        programs.arrives(&by.tcp_segment(CALL, flag::SYN, (PEER, 0), b""));
        programs.stays(&data, Reason::NoRule);
        let with_data = to.tcp_segment(ANSWER, flag::SYN | flag::ACK, (OWN, PEER + 1), b"secret");
        programs.stays(&with_data, Reason::NoRule);
        programs.leaves(&syn_ack);
        programs.leaves(&syn_ack);
        programs.stays(&data, Reason::NoRule);
        let fin = to.tcp_segment(ANSWER, flag::FIN | flag::ACK, (OWN + 1, PEER + 1), b"");
        programs.stays(&fin, Reason::NoRule);

        // A peer that did not see the pod's sequence number cannot acknowledge it.
        programs.arrives(&by.tcp_segment(CALL, flag::ACK, (PEER + 1, OWN + 2), b""));
        programs.arrives(&by.tcp_segment(CALL, flag::SYN, (PEER, 0), b""));
        programs.stays(&data, Reason::NoRule);

        programs.arrives(&by.tcp_segment(CALL, flag::ACK, (PEER + 1, OWN + 1), b""));
        programs.leaves(&data);
        programs.leaves(&fin);
    }
    assert_eq!(states(&programs), [(FLOW_IN, true); 2]);
}

#[test]
fn a_peer_that_accepts_a_connection_has_not_opened_it() {
    let mut programs = Programs::new();
    let syn_ack = flag::SYN | flag::ACK;
    for peer in [server(9), server6(9)] {
        let (by, to) = (programs.by(peer), programs.to(peer));
        let accepts = by.tcp_segment(CALL, syn_ack, (PEER + 7, OWN + 1), b"");
        let data = to.tcp_segment(ANSWER, flag::ACK, (OWN + 1, PEER + 8), b"secret");
        accept(&mut programs, peer, CALL.0);
        programs.leaves(&data);
        programs.receives(&accepts).denied(Reason::TcpUnsolicited);
        programs.stays(&data, Reason::NoRule);
        // Neither a close nor another handshake makes the peer the opener.
        programs.receives(&by.tcp_segment(CALL, flag::RST, (PEER + 1, 0), b""));
        programs.receives(&by.tcp_segment(CALL, flag::SYN, (PEER, 0), b""));
        programs.receives(&by.tcp_segment(CALL, flag::ACK, (PEER + 1, OWN + 1), b""));
        programs.stays(
            &to.tcp_segment(ANSWER, syn_ack, (OWN, PEER + 1), b""),
            Reason::NoRule,
        );
        programs.stays(&data, Reason::NoRule);
        // Its other connections go on.
        accept(&mut programs, peer, CALL.0 + 1);
    }
}

#[test]
fn a_peer_that_has_accepted_a_connection_does_not_open_it_later() {
    let mut programs = Programs::new();
    let syn_ack = flag::SYN | flag::ACK;
    for peer in [server(9), server6(9)] {
        let (by, to) = (programs.by(peer), programs.to(peer));
        let accepts = by.tcp_segment(CALL, syn_ack, (PEER, OWN + 1), b"");
        programs.receives(&accepts).denied(Reason::TcpUnsolicited);
        programs.receives(&by.tcp_segment(CALL, flag::SYN, (PEER, 0), b""));
        let answer = to.tcp_segment(ANSWER, syn_ack, (OWN, PEER + 1), b"");
        programs.stays(&answer, Reason::NoRule);
        programs.receives(&by.tcp_segment(CALL, flag::ACK, (PEER + 1, OWN + 1), b""));
        let data = to.tcp_segment(ANSWER, flag::ACK, (OWN + 1, PEER + 1), b"secret");
        programs.stays(&data, Reason::NoRule);
    }
}

#[test]
fn a_closed_port_may_answer_with_a_reset() {
    let mut programs = Programs::new();
    let (by, to) = (programs.by(server(9)), programs.to(server(9)));
    programs.arrives(&by.tcp_segment(CALL, flag::SYN, (PEER, 0), b""));
    let reset = flag::RST | flag::ACK;
    programs.leaves(&to.tcp_segment(ANSWER, reset, (0, PEER + 1), b""));
    let data = to.tcp_segment(ANSWER, reset, (0, PEER + 1), b"secret");
    programs.stays(&data, Reason::NoRule);
}

#[test]
fn a_pod_may_reply_to_a_ping_but_not_ping_back() {
    let mut programs = Programs::new();
    for peer in [server(9), server6(9)] {
        let (by, to) = (programs.by(peer), programs.to(peer));
        programs.arrives(&by.echo(7));
        programs.leaves(&to.echo_reply(7));
        programs.stays(&to.echo(7), Reason::NoRule);
    }
}

#[test]
fn only_the_peers_packets_keep_an_inbound_flow_alive() {
    let mut programs = Programs::new();
    let (by, to) = (programs.by(server(9)), programs.to(server(9)));
    programs.arrives(&by.udp(5000, 8080, b"ping"));
    let seen = |programs: &Programs| programs.flows()[0].1.last_seen_ns;
    let opened = seen(&programs);
    std::thread::sleep(Duration::from_millis(1100));
    programs.leaves(&to.udp(8080, 5000, b"pong"));
    programs.leaves(&to.udp(8080, 5000, b"pong"));
    assert_eq!(seen(&programs), opened);
    programs.arrives(&by.udp(5000, 8080, b"ping"));
    assert!(seen(&programs) > opened);
}

#[test]
fn a_new_deny_entry_cuts_inbound_flows() {
    let mut programs = Programs::new();
    for peer in [server(9), server6(9)] {
        let (by, to) = (programs.by(peer), programs.to(peer));
        accept(&mut programs, peer, 5000);
        programs.arrives(&by.udp(5000, 8080, b"ping"));
        programs.arrives(&by.sctp(5000, 8080));
        programs.arrives(&by.echo(5000));
        let answers = [
            to.tcp_segment(ANSWER, flag::ACK, (OWN + 5, PEER + 1), b"data"),
            to.udp(8080, 5000, b"pong"),
            to.sctp(8080, 5000),
            to.echo_reply(5000),
        ];
        for answer in &answers {
            programs.leaves(answer);
        }
        programs.change_policy(|policy| policy.deny = ANYTHING);
        for answer in &answers {
            programs.leaves(answer);
        }
        programs.change_policy(|_| {});
        programs.allow(peer, ANYTHING, NEVER_NS);
        for answer in &answers {
            programs.stays(answer, Reason::DenyRule);
        }
        // An ICMP error about the flow is an answer, too.
        let error = to.icmp_unreachable(&by.udp(5000, 8080, b"ping"));
        programs.stays(&error, Reason::DenyRule);
        // When the address is allowed again, the flow continues.
        programs.change_policy(|policy| policy.deny = ClassSet::EMPTY);
        for answer in &answers {
            programs.leaves(answer);
        }
    }
}

#[test]
fn with_a_deny_entry_the_pod_cannot_answer() {
    let mut programs = Programs::new();
    programs.change_policy(|policy| policy.deny = ANYTHING);
    programs.allow(server(9), ANYTHING, NEVER_NS);
    let (by, to) = (programs.by(server(9)), programs.to(server(9)));
    programs.arrives(&by.udp(5000, 8080, b"ping"));
    programs.stays(&to.udp(8080, 5000, b"pong"), Reason::DenyRule);
    programs.arrives(&by.tcp_segment(CALL, flag::SYN, (PEER, 0), b""));
    let syn_ack = flag::SYN | flag::ACK;
    let syn_ack = to.tcp_segment(ANSWER, syn_ack, (OWN, PEER + 1), b"");
    programs.stays(&syn_ack, Reason::DenyRule);
    // Other peers get their answers.
    accept(&mut programs, server(8), 5000);

    programs.audit();
    programs.sends(&syn_ack).reported(Reason::DenyRule);
}

#[test]
fn a_flood_from_outside_neither_ends_connections_nor_blocks_new_ones() {
    let mut programs = Programs::new();
    accept(&mut programs, server(9), 5000);
    connect(&mut programs, server(1), 7);
    programs.allow(server(1), TO_PORT, PAST_NS);
    let own = programs.own();
    let udp = |n| Ip::new(numbered(n), own).udp(5000, 9, b"flood");
    programs.flood(Hook::ToPod, (0..FLOOD).map(udp), 1);
    assert_still_works(&mut programs);
    let syn = |n| Ip::new(numbered(n), own).tcp(5000, 8080, flag::SYN);
    programs.flood(Hook::ToPod, (0..FLOOD).map(syn), 1);
    assert_still_works(&mut programs);
    let counters = programs.counters();
    let room = u64::from(FlowLimits::of(FLOW_ENTRIES).opening());
    assert!(counters.openings_evicted >= 2 * u64::from(FLOOD) - room);
    assert_eq!((counters.flows_evicted, counters.flows_full), (0, 0));
}

/// Asserts that the connections of
/// [`a_flood_from_outside_neither_ends_connections_nor_blocks_new_ones`] go on, and that new connections
/// are accepted.
#[track_caller]
fn assert_still_works(programs: &mut Programs) {
    let to = programs.to(server(9));
    programs.leaves(&to.tcp_segment(ANSWER, flag::ACK, (OWN + 5, PEER + 1), b"data"));
    programs.leaves(&programs.to(server(1)).tcp(7, PORT, flag::ACK));
    accept(programs, server(8), 6000);
}

#[test]
fn a_flood_from_the_pod_neither_ends_connections_nor_blocks_new_ones() {
    let mut programs = Programs::new();
    accept(&mut programs, server(9), 5000);
    connect(&mut programs, server(1), 7);
    let to = programs.to(server(1));
    let flood = (0..FLOOD).map(|n| to.tcp(10_000 + n as u16, PORT, flag::SYN));
    programs.flood(Hook::FromPod, flood, 1);
    programs.allow(server(1), TO_PORT, PAST_NS);
    assert_still_works(&mut programs);
    assert_eq!(programs.counters().flows_evicted, 0);
}

#[test]
fn a_server_with_many_short_connections_accepts_each() {
    let mut programs = Programs::new();
    accept(&mut programs, server(9), 5000);
    for n in 0..4000 {
        let peer = numbered(n);
        let (by, to) = (programs.by(peer), programs.to(peer));
        accept(&mut programs, peer, 5000);
        let fin = flag::FIN | flag::ACK;
        programs.leaves(&to.tcp_segment(ANSWER, fin, (OWN + 5, PEER + 1), b""));
        programs.arrives(&by.tcp_segment(CALL, fin, (PEER + 1, OWN + 6), b""));
        programs.leaves(&to.tcp_segment(ANSWER, flag::ACK, (OWN + 6, PEER + 2), b""));
    }
    let to = programs.to(server(9));
    programs.leaves(&to.tcp_segment(ANSWER, flag::ACK, (OWN + 5, PEER + 1), b"data"));
    let counters = programs.counters();
    assert_eq!((counters.openings_evicted, counters.flows_evicted), (0, 0));
}

#[test]
fn a_forged_reset_does_not_end_a_connection() {
    let mut programs = Programs::new();
    connect(&mut programs, server(1), 7);
    let (to, by) = (programs.to(server(1)), programs.by(server(1)));
    programs.arrives(&by.tcp(PORT, 7, flag::RST));
    programs.allow(server(1), TO_PORT, PAST_NS);
    programs.leaves(&to.tcp(7, PORT, flag::ACK));
    // It is established again, so a flood does not evict it.
    programs.allow(server(1), TO_PORT, NEVER_NS);
    let flood = (0..FLOOD).map(|n| to.tcp(10_000 + n as u16, PORT, flag::SYN));
    programs.flood(Hook::FromPod, flood, 1);
    programs.allow(server(1), TO_PORT, PAST_NS);
    programs.leaves(&to.tcp(7, PORT, flag::ACK));
}

#[test]
fn a_closed_connection_frees_its_flow_entry() {
    let mut programs = Programs::new();
    connect(&mut programs, server(1), 7);
    assert_eq!(states(&programs), [(FLOW_OUT, true)]);
    let (to, by) = (programs.to(server(1)), programs.by(server(1)));
    programs.leaves(&to.tcp(7, PORT, flag::FIN | flag::ACK));
    programs.arrives(&by.tcp(PORT, 7, flag::FIN | flag::ACK));
    programs.allow(server(1), TO_PORT, PAST_NS);
    programs.leaves(&to.tcp(7, PORT, flag::ACK));
    programs.allow(server(1), TO_PORT, NEVER_NS);
    let flood = (0..2000_u16).map(|n| to.tcp(10_000 + n, PORT, flag::SYN));
    programs.flood(Hook::FromPod, flood, 1);
    programs.allow(server(1), TO_PORT, PAST_NS);
    programs.stays(&to.tcp(7, PORT, flag::ACK), Reason::Expired);
}

/// A pod that cannot take over its connections stays in quarantine, where its own policy does not hold.
#[test]
fn a_pod_with_more_connections_than_it_may_have_leaves_quarantine() {
    let mut programs = Programs::new();
    let peer = server(9);
    let (by, to) = (programs.by(peer), programs.to(peer));
    let call = |n: u32| ((5000 + n % 60_000) as u16, (8080 + n / 60_000) as u16);
    let all = FLOW_ENTRIES + FlowLimits::of(FLOW_ENTRIES).opening_to_pod;
    let syns = (0..all).map(|n| by.tcp_segment(call(n), flag::SYN, (PEER, 0), b""));
    let answers = (0..all).map(|n| {
        let (there, here) = call(n);
        to.tcp_segment((here, there), flag::SYN | flag::ACK, (OWN, PEER + 1), b"")
    });
    let acks = (0..all).map(|n| by.tcp_segment(call(n), flag::ACK, (PEER + 1, OWN + 1), b""));
    for ((syn, answer), ack) in syns.zip(answers).zip(acks) {
        programs.flood(Hook::ToPod, [syn].into_iter(), 1);
        programs.flood(Hook::FromPod, [answer].into_iter(), 1);
        programs.flood(Hook::ToPod, [ack].into_iter(), 1);
    }
    let inbound = programs.flows().len();
    assert_eq!(inbound, all as usize);
    programs.becomes_another_pods();
    assert_eq!(programs.takes_inbound(), FLOW_ENTRIES as usize);
    // The latest connection continues.
    let (there, here) = call(all - 1);
    programs.leaves(&to.tcp_segment((here, there), flag::ACK, (OWN + 1, PEER + 1), b"data"));
}

/// Nor does a pod stay there that goes on connecting while it leaves.
#[test]
fn a_pod_with_more_destinations_than_it_may_have_leaves_quarantine() {
    let mut programs = Programs::new();
    let to = programs.to(server(1));
    programs.allow(server(1), ANYTHING, NEVER_NS);
    let places = FlowLimits::of(FLOW_ENTRIES).called as u16;
    let syns = |from: u16| {
        let syns = (from..from + places).map(|port| to.tcp(7, port, flag::SYN));
        syns.collect::<Vec<_>>().into_iter()
    };
    programs.flood(Hook::FromPod, syns(1), 1);
    programs.becomes_another_pods();
    programs.allow(server(1), ANYTHING, NEVER_NS);
    let own = syns(1 + places);
    programs.flood(Hook::FromPod, own, 1);
    programs.takes_noted();
}
