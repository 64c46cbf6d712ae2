//! Flows: open connections stay open as long as they may, and no longer.

use std::{collections::HashSet, net::IpAddr};

use egress_agent::datapath::{Action, Hook};
use egress_common::{
    address::from_v4,
    limits::{FLOW_ENTRIES, FlowLimits},
    reason::Reason,
    records::{
        FLOW_CUT, FLOW_IN, FLOW_OUT, INTERFACE_REJECT, INTERFACE_SOURCES, POLICY_OPEN,
        VERDICT_DROPPED,
    },
};
use egress_tests::{
    addresses::{RESOLVER, server, server6},
    programs::{ANYTHING, OTHERS, PORT, Programs, TO_PORT, address},
    raw::{self, Ip, flag, protocol},
};

/// Before any machine's current time.
const PAST_NS: u64 = 1;
const NEVER_NS: u64 = u64::MAX;

#[track_caller]
fn states(programs: &Programs) -> Vec<u8> {
    let mut states: Vec<_> = programs.flows().iter().map(|(_, f)| f.state).collect();
    states.sort_unstable();
    states
}

#[test]
fn an_expired_address_admits_no_new_flow_and_keeps_open_ones() {
    let mut programs = Programs::new();
    for host in [server(1), server6(1)] {
        let to = programs.to(host);
        programs.leaves(&to.tcp(7, PORT, flag::SYN));
        programs.leaves(&to.udp(7, PORT, b"hello"));
        programs.leaves(&to.sctp(7, PORT));
        programs.leaves(&to.echo(7));
        programs.allow(host, TO_PORT.or(OTHERS), PAST_NS);

        programs.stays(&to.tcp(8, PORT, flag::SYN), Reason::Expired);
        programs.stays(&to.tcp(8, PORT, flag::ACK), Reason::Expired);
        programs.stays(&to.udp(8, PORT, b"hello"), Reason::Expired);
        programs.stays(&to.sctp(8, PORT), Reason::Expired);
        programs.stays(&to.echo(8), Reason::Expired);
        // A SYN on the same ports opens a new connection.
        programs.stays(&to.tcp(7, PORT, flag::SYN), Reason::Expired);

        programs.leaves(&to.tcp(7, PORT, flag::ACK));
        programs.leaves(&to.udp(7, PORT, b"hello"));
        programs.leaves(&to.sctp(7, PORT));
        programs.leaves(&to.echo(7));
    }
    assert_eq!(programs.counters().passed_by_flow, 8);
}

#[test]
fn a_new_policy_keeps_the_connections_it_allows() {
    let mut programs = Programs::new();
    let to = programs.to(server(1));
    programs.leaves(&to.tcp(7, PORT, flag::SYN));
    programs.change_policy(|_| {});
    // Even a connection whose address has expired in the meantime.
    programs.allow(server(1), TO_PORT, PAST_NS);
    programs.leaves(&to.tcp(7, PORT, flag::ACK));
    programs.leaves(&to.tcp(7, PORT, flag::ACK));
    programs.stays(&to.tcp(8, PORT, flag::ACK), Reason::Expired);
    let [(_, flow)] = programs.flows()[..] else {
        panic!("one flow");
    };
    assert_eq!((flow.state, flow.policy().get()), (FLOW_OUT, 101));
}

#[test]
fn a_new_policy_cuts_flows_that_it_forbids() {
    let mut programs = Programs::new();
    let (to, by) = (programs.to(server(1)), programs.by(server(1)));
    programs.leaves(&to.tcp(7, PORT, flag::SYN));
    programs.leaves(&to.udp(7, PORT, b"hello"));
    programs.change_policy(|_| {});
    programs.stays(&to.tcp(7, PORT, flag::ACK), Reason::NoRule);
    programs.stays(&to.udp(7, PORT, b"hello"), Reason::NoRule);
    assert_eq!(states(&programs), [FLOW_CUT, FLOW_CUT]);

    // Packets from the other side do not make it the opener of the flow.
    programs.arrives(&by.udp(PORT, 7, b"still there?"));
    programs.arrives(&by.tcp(PORT, 7, flag::ACK));
    programs.arrives(&by.tcp(PORT, 7, flag::SYN));
    programs.stays(&to.udp(7, PORT, b"yes"), Reason::NoRule);
    programs.stays(&to.tcp(7, PORT, flag::SYN | flag::ACK), Reason::NoRule);
    assert_eq!(states(&programs), [FLOW_CUT, FLOW_CUT]);

    // When it is allowed again, the flow continues.
    programs.allow(server(1), TO_PORT, NEVER_NS);
    programs.leaves(&to.tcp(7, PORT, flag::ACK));
    programs.leaves(&to.udp(7, PORT, b"yes"));
    assert_eq!(states(&programs), [FLOW_OUT, FLOW_OUT]);
}

#[test]
fn a_flow_that_a_policy_cut_is_not_reopened_from_outside() {
    let mut programs = Programs::new();
    let (to, by) = (programs.to(server(1)), programs.by(server(1)));
    programs.leaves(&to.udp(7, PORT, b"hello"));
    programs.change_policy(|_| {});
    programs.arrives(&by.udp(PORT, 7, b"still there?"));
    programs.stays(&to.udp(7, PORT, b"yes"), Reason::NoRule);
}

#[test]
fn the_pod_may_answer_flows_that_others_open() {
    let mut programs = Programs::new();
    for peer in [server(9), server6(9)] {
        let (by, to) = (programs.by(peer), programs.to(peer));
        let answers = [
            (
                by.tcp(5000, 8080, flag::SYN),
                to.tcp(8080, 5000, flag::SYN | flag::ACK),
            ),
            (by.udp(5000, 8080, b"ping"), to.udp(8080, 5000, b"pong")),
            (by.sctp(5000, 8080), to.sctp(8080, 5000)),
            (by.echo(5000), to.echo_reply(5000)),
        ];
        for (question, answer) in &answers {
            programs.stays(answer, Reason::NoRule);
            programs.arrives(question);
            programs.leaves(answer);
            programs.leaves(answer);
        }
        // Permission to answer is not permission to connect: not on other ports, not to others, not with a
        // SYN.
        programs.stays(&to.tcp(8080, 5000, flag::SYN), Reason::NoRule);
        programs.stays(&to.tcp(8080, 5000, flag::SYN | flag::URG), Reason::NoRule);
        programs.stays(&to.tcp(8081, 5000, flag::ACK), Reason::NoRule);
        programs.stays(&to.udp(8080, 5001, b"pong"), Reason::NoRule);
        programs.stays(&to.echo_reply(5001), Reason::NoRule);
        let other = programs.to(server(8));
        programs.stays(&other.udp(8080, 5000, b"pong"), Reason::NoRule);
    }
    assert_eq!(states(&programs), [FLOW_IN; 8]);
    // A new policy does not affect flows that others opened.
    programs.change_policy(|_| {});
    let to = programs.to(server(9));
    programs.leaves(&to.tcp(8080, 5000, flag::ACK));
    programs.leaves(&to.udp(8080, 5000, b"pong"));
}

#[test]
fn only_packets_that_can_open_a_connection_open_a_flow() {
    let mut programs = Programs::new();
    let (by, to) = (programs.by(server(9)), programs.to(server(9)));
    let nothing = [
        by.tcp(5000, 8080, flag::ACK),
        by.tcp(5000, 8080, flag::RST),
        by.tcp(5000, 8080, 0),
        by.echo_reply(5000),
        by.icmp(3, 3, &[0; 32]),
        by.frame(protocol::GRE, &[0; 32]),
    ];
    for frame in &nothing {
        programs.arrives(frame);
    }
    assert!(programs.flows().is_empty());
    programs.stays(&to.tcp(8080, 5000, flag::ACK), Reason::NoRule);
    programs.stays(&to.echo_reply(5000), Reason::NoRule);
    programs.stays(&to.frame(protocol::GRE, &[0; 32]), Reason::NoRule);
    // A SYN-ACK is recorded, and opens nothing either.
    let accepts = by.tcp(5000, 8080, flag::SYN | flag::ACK);
    programs.receives(&accepts).denied(Reason::TcpUnsolicited);
    programs.stays(&to.tcp(8080, 5000, flag::ACK), Reason::NoRule);
}

#[test]
fn a_syn_needs_a_rule_even_on_a_known_flow() {
    let mut programs = Programs::new();
    let to = programs.to(server(1));
    programs.leaves(&to.tcp(7, PORT, flag::SYN));
    programs.arrives(&programs.by(server(1)).tcp(PORT, 7, flag::SYN | flag::ACK));
    programs.leaves(&to.tcp(7, PORT, flag::ACK));
    programs.allow(server(1), OTHERS, NEVER_NS);
    programs.leaves(&to.tcp(7, PORT, flag::ACK));
    for flags in [flag::SYN, flag::SYN | flag::PSH, flag::SYN | flag::URG] {
        programs.stays(&to.tcp(7, PORT, flags), Reason::PortNotAllowed);
    }
}

#[test]
fn a_packet_that_passed_only_in_audit_mode_opens_no_flow() {
    let mut programs = Programs::new();
    programs.audit();
    let (to, by) = (programs.to(server(9)), programs.by(server(9)));
    let frame = to.udp(7, PORT, b"hello");
    let outcome = programs.sends(&frame);
    assert_eq!(outcome.run.action, Action::Pass);
    outcome.reported(Reason::NoRule);
    programs.arrives(&by.udp(PORT, 7, b"hello yourself"));
    assert_eq!(states(&programs), [FLOW_CUT]);
    programs.sends(&frame).reported(Reason::NoRule);
    programs.set_interface(|interface| interface.mode = egress_common::records::MODE_ENFORCE);
    programs.stays(&frame, Reason::NoRule);
}

/// An ICMP or ICMPv6 "port unreachable" error about `quoted`, an Ethernet frame.
fn unreachable(to: &Ip, quoted: &[u8]) -> Vec<u8> {
    let rest = [&[0; 4], &quoted[raw::ETHERNET..]].concat();
    if quoted[raw::ETHERNET] >> 4 == 4 {
        to.icmp(3, 3, &rest)
    } else {
        to.icmp(1, 4, &rest)
    }
}

#[test]
fn a_pod_may_send_port_unreachable_errors() {
    let mut programs = Programs::new();
    for peer in [server(9), server6(9)] {
        let (by, to) = (programs.by(peer), programs.to(peer));
        for question in [by.udp(5000, 8080, b"ping"), by.sctp(5000, 8080)] {
            let error = unreachable(&to, &question);
            programs.stays(&error, Reason::NoRule);
            programs.arrives(&question);
            programs.leaves(&error);
        }
    }
    // Also about a flow that the pod opened itself.
    let (by, to) = (programs.by(server(1)), programs.to(server(1)));
    programs.leaves(&to.udp(7, PORT, b"hello"));
    let error = unreachable(&to, &by.udp(PORT, 7, b"late"));
    programs.leaves(&error);
    programs.change_policy(|_| {});
    programs.stays(&error, Reason::NoRule);
}

#[test]
fn an_icmp_error_cannot_carry_other_data() {
    let mut programs = Programs::new();
    for (peer, stranger) in [(server(9), server(8)), (server6(9), server6(8))] {
        let (by, to) = (programs.by(peer), programs.to(peer));
        let question = by.udp(5000, 8080, b"ping");
        programs.arrives(&question);
        let error = unreachable(&to, &question);
        programs.leaves(&error);

        // To another destination than the source of the quoted packet, or about a packet of another source.
        let elsewhere = programs.to(stranger);
        programs.stays(&unreachable(&elsewhere, &question), Reason::NoRule);
        let others = programs.by(stranger).udp(5000, 8080, b"ping");
        programs.stays(&unreachable(&to, &others), Reason::NoRule);
        programs.stays(&unreachable(&elsewhere, &others), Reason::NoRule);
        // About a packet that was never received.
        for quoted in [
            by.udp(5001, 8080, b"ping"),
            by.udp(5000, 8081, b"ping"),
            by.tcp(5000, 8080, flag::SYN),
            by.echo(5000),
            to.udp(8080, 5000, b"ping"),
        ] {
            programs.stays(&unreachable(&to, &quoted), Reason::NoRule);
        }
        // A quotation that is longer than an error may have, or too short to identify the flow.
        let long = by.udp(5000, 8080, &[0x5a; 1300]);
        programs.stays(&unreachable(&to, &long), Reason::NoRule);
        let header = raw::transport_at(peer);
        programs.stays(&unreachable(&to, &question[..header + 3]), Reason::NoRule);
        programs.stays(
            &unreachable(&to, &question[..raw::ETHERNET + 4]),
            Reason::NoRule,
        );
        // Another ICMP message with the same content.
        let mut other = error.clone();
        other[header] = if peer.is_ipv4() { 13 } else { 100 };
        programs.stays(&other, Reason::NoRule);
        // A later fragment has no ports.
        let piece = by
            .fragment(1, 800, false)
            .frame(protocol::UDP, &question[header..]);
        programs.stays(&unreachable(&to, &piece), Reason::NoRule);
    }
}

#[test]
fn every_open_flow_is_found_when_they_are_read_in_parts() {
    let mut programs = Programs::new();
    assert_eq!(programs.open_flows().0, HashSet::new());
    // One that is not established, and one that is closed.
    programs.leaves(&programs.to(server(1)).tcp(7, PORT, flag::SYN));
    programs.leaves(&programs.to(server6(1)).tcp(7, PORT, flag::SYN));
    programs.leaves(&programs.to(server6(1)).tcp(7, PORT, flag::RST));
    let mut expected = HashSet::from([address(server(1))]);
    let peers = (0..4000_u16).map(|number| {
        let [high, low] = number.to_be_bytes();
        from_v4([100, 64, high, low])
    });
    programs.has_open(peers.clone());
    expected.extend(peers);
    let (open, parts) = programs.open_flows();
    assert_eq!(open, expected);
    assert!(parts > 10, "{parts}");
}

#[test]
fn with_a_full_flow_map_allowed_connections_still_work() {
    let mut programs = Programs::new();
    let IpAddr::V4(own) = IpAddr::from(programs.own()) else {
        unreachable!()
    };
    let (to, by) = (programs.to(server(1)), programs.by(server(9)));
    programs.leaves(&to.tcp(7, PORT, flag::SYN));
    let flood = (0..FLOW_ENTRIES).map(|n| {
        let from = server(2 + (n >> 14) as u8);
        Ip::new(from, own).udp((n & 0x3fff) as u16, 9, b"flood")
    });
    programs.flood(Hook::ToPod, flood, 1);
    assert!(programs.counters().openings_evicted > 0);
    assert_eq!(programs.counters().flows_full, 0);

    programs.leaves(&to.tcp(7, PORT, flag::ACK));
    programs.leaves(&to.tcp(8, PORT, flag::SYN));
    programs.leaves(&to.tcp(8, PORT, flag::ACK));
    // A connection that only a flow would allow is denied.
    programs.stays(
        &programs.to(server(9)).udp(8080, 2, b"hello"),
        Reason::NoRule,
    );
    programs.arrives(&by.udp(2, 8080, b"hello"));
    programs.leaves(&programs.to(server(9)).udp(8080, 2, b"hello"));
}

#[test]
fn no_connection_begins_whose_destination_cannot_be_noted() {
    let mut programs = Programs::new();
    let (to, other) = (programs.to(server(1)), programs.to(server(2)));
    for host in [server(1), server(2)] {
        programs.allow(host, ANYTHING, NEVER_NS);
    }
    let places = FlowLimits::of(FLOW_ENTRIES).called as u16;
    let syns = (1..=places).map(|port| to.tcp(7, port, flag::SYN));
    programs.flood(Hook::FromPod, syns.collect::<Vec<_>>().into_iter(), 1);
    programs.leaves(&to.tcp(8, places, flag::SYN));

    let denial = programs.stays(&other.tcp(7, PORT, flag::SYN), Reason::DestinationsFull);
    assert_eq!(denial.verdict, VERDICT_DROPPED);
    // With `onDeny: reject`, too: it shall come again.
    programs.set_interface(|interface| interface.flags |= INTERFACE_REJECT);
    let denial = programs.stays(&other.tcp(7, PORT, flag::SYN), Reason::DestinationsFull);
    assert_eq!(denial.verdict, VERDICT_DROPPED);
    // A connection that is picked up in its middle is one, too, and the denied SYN has opened no flow for it.
    programs.stays(&other.tcp(7, PORT, flag::ACK), Reason::DestinationsFull);
    // While the agent is about to judge the pod, and to a resolver.
    programs.set_interface(|interface| interface.flags = INTERFACE_SOURCES);
    programs.stays(&other.tcp(7, PORT, flag::SYN), Reason::DestinationsFull);
    programs.set_interface(|interface| interface.flags = 0);
    let resolver = programs.to(RESOLVER);
    programs.stays(&resolver.tcp(7, 53, flag::SYN), Reason::DestinationsFull);

    // Nothing else needs a place there.
    programs.leaves(&other.udp(7, PORT, b"hello"));
    programs.leaves(&other.tcp(7, PORT, flag::RST));
    programs.arrives(&programs.by(server(9)).tcp(5000, 8080, flag::SYN));
    let answers = programs.to(server(9));
    programs.leaves(&answers.tcp(8080, 5000, flag::SYN | flag::ACK));
    programs.audit();
    programs.leaves(&other.tcp(7, PORT, flag::SYN));
}

#[test]
fn a_destination_stays_that_is_called_while_control_makes_room() {
    let places = FlowLimits::of(FLOW_ENTRIES).called as u16;
    let mut forgotten = 0;
    for sweep in 0..10 {
        let mut programs = Programs::new();
        programs.allow(server(1), ANYTHING, NEVER_NS);
        let known = 1..=places / 8 * 7;
        programs.notes_called(server(1), known.clone());
        // Not in the order in which they are removed, so that both meet somewhere.
        let to = programs.to(server(1));
        let called = known.rev().collect::<Vec<_>>();
        let syns = called.iter().map(|&port| to.tcp(7, port, flag::SYN));
        forgotten += programs.flood_amid_sweep(syns.collect());
        let noted = programs.called();
        let noted: HashSet<u16> = noted.iter().map(|(key, _)| key.peer_port).collect();
        let lost = called.iter().filter(|port| !noted.contains(port)).count();
        // Their connections did not begin: the kernel had no memory for the entry.
        let refused = programs.counters().flows_full;
        assert!(
            lost as u64 <= refused,
            "sweep {sweep} has removed {lost} destinations that were called; {refused} were refused"
        );
    }
    // A sweep that comes too late finds that all were called.
    assert_ne!(forgotten, 0, "no sweep made room");
}

#[test]
fn an_open_pod_reaches_all_but_protected_addresses() {
    let mut programs = Programs::new();
    let frame = programs.to(server(9)).udp(7, PORT, b"hello");
    programs.stays(&frame, Reason::NoRule);
    programs.change_policy(|policy| policy.flags |= POLICY_OPEN);
    programs.leaves(&frame);
    // Protected addresses stay closed.
    let metadata: IpAddr = [169, 254, 169, 254].into();
    programs.stays(
        &programs.to(metadata).tcp(7, 80, flag::SYN),
        Reason::Protected,
    );
}
