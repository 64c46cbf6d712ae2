//! DNS at the pod's interface: the frames that the programs take for the agent, and the frames that the agent
//! puts back.

use egress_agent::datapath::{Action, Hook, Marks};
use egress_common::{
    reason::Reason,
    records::{
        HELD_ANSWER, HELD_QUESTION, HELD_REJECT, INTERFACE_REJECT, MODE_RELEASED,
        POLICY_UNIDENTIFIED, Probes, VERDICT_AUDITED, VERDICT_DROPPED, VERDICT_REJECTED,
    },
};
use egress_tests::{
    addresses::{RESOLVER, RESOLVER6, STRANGER, server, server6},
    programs::{ANYTHING, Outcome, PORT, Programs},
    raw::{self, ETHERNET, Ip, flag, protocol},
};

const DNS: u16 = 53;

/// Asserts that the frame is in the ring unchanged, and that the program took it from the hook.
#[track_caller]
fn assert_taken(outcome: &Outcome, kind: u8, frame: &[u8]) {
    let (head, bytes) = outcome.taken();
    assert_eq!(bytes, frame);
    assert_eq!((head.kind, head.taken), (kind, 1));
    assert_eq!(usize::from(head.l3_offset), ETHERNET);
}

#[test]
fn a_query_is_held_byte_for_byte() {
    let mut programs = Programs::new();
    for resolver in [RESOLVER, RESOLVER6] {
        let frame = programs.to(resolver).udp(7, DNS, &raw::question());
        assert_taken(&programs.sends(&frame), HELD_QUESTION, &frame);
    }
    // With any header options and trailing bytes, and whether or not it is a valid query.
    let to = programs.to(RESOLVER);
    let mut padded = to.udp(7, DNS, &raw::question());
    padded.extend([0x5a; 30]);
    let to6 = programs.to(RESOLVER6);
    let frames = [
        padded,
        to.clone()
            .options(&[1, 1, 1, 0])
            .udp(7, DNS, &raw::question()),
        to6.padding(protocol::HOP_BY_HOP)
            .fragment(1, 0, false)
            .udp(7, DNS, &raw::question()),
        to.udp(DNS, DNS, &raw::question()),
        to.udp(7, DNS, b""),
        to.udp(7, DNS, &[0x5a; 1400]),
        to.udp(7, DNS, &[0x5a; 3000]),
    ];
    for frame in frames {
        assert_taken(&programs.sends(&frame), HELD_QUESTION, &frame);
    }
    assert_eq!(programs.counters().held_questions, 9);
    assert!(
        programs.flows().is_empty(),
        "a flow would let DNS pass unheld"
    );
}

#[test]
fn a_response_is_held_byte_for_byte() {
    let mut programs = Programs::new();
    for resolver in [RESOLVER, RESOLVER6] {
        for port in [7, DNS] {
            let frame = programs.by(resolver).udp(DNS, port, &raw::question());
            assert_taken(&programs.receives(&frame), HELD_ANSWER, &frame);
        }
    }
    assert_eq!(programs.counters().held_answers, 4);
    assert!(
        programs.flows().is_empty(),
        "a flow would let DNS pass unheld"
    );
}

#[test]
fn a_query_is_held_even_if_a_rule_allows_the_resolver() {
    let mut programs = Programs::new();
    programs.allow(RESOLVER, ANYTHING, u64::MAX);
    let frame = programs.to(RESOLVER).udp(7, DNS, &raw::question());
    assert_taken(&programs.sends(&frame), HELD_QUESTION, &frame);
    let frame = programs.to(RESOLVER).tcp(7, DNS, flag::SYN);
    assert_taken(&programs.sends(&frame), HELD_QUESTION, &frame);
    // Other ports and protocols of the resolver are ordinary.
    let to = programs.to(RESOLVER);
    programs.leaves(&to.udp(7, 5353, &raw::question()));
    programs.leaves(&to.sctp(7, DNS));
    programs.leaves(&to.echo(DNS));
    programs.leaves(&to.udp(DNS, 5353, b"from port 53"));
    let by = programs.by(RESOLVER);
    programs.arrives(&by.udp(5353, DNS, &raw::question()));
    programs.arrives(&by.echo(DNS));
}

#[test]
fn port_53_of_other_servers_is_ordinary_traffic() {
    let mut programs = Programs::new();
    let frame = programs.to(STRANGER).udp(7, DNS, &raw::question());
    programs.stays(&frame, Reason::NoRule);
    programs.allow(STRANGER, ANYTHING, u64::MAX);
    programs.leaves(&frame);
    programs.arrives(&programs.by(STRANGER).udp(DNS, 7, &raw::question()));
}

#[test]
fn a_segment_of_dns_over_tcp_is_held_in_every_state() {
    let mut programs = Programs::new();
    for resolver in [RESOLVER, RESOLVER6] {
        for flags in [flag::SYN, flag::SYN | flag::ACK, flag::ACK, flag::RST, 0] {
            // Even if the resolver opens the connection.
            let frame = programs.by(resolver).tcp(DNS, 7, flags);
            assert_taken(&programs.receives(&frame), HELD_ANSWER, &frame);
            let frame = programs.to(resolver).tcp(7, DNS, flags);
            assert_taken(&programs.sends(&frame), HELD_QUESTION, &frame);
        }
    }
    assert!(
        programs.flows().is_empty(),
        "a flow would let DNS pass unheld"
    );
}

#[test]
fn a_frame_of_any_size_is_held() {
    let mut programs = Programs::new();
    for resolver in [RESOLVER, RESOLVER6] {
        // Sizes around the ring's record sizes; a test run takes no longer frame.
        for len in [1, 400, 440, 460, 480, 1960, 1980, 2000, 2040, 3000] {
            let mut segment = raw::tcp(DNS, 7, flag::ACK);
            segment.resize(20 + len, 0x5a);
            let frame = programs.by(resolver).frame(protocol::TCP, &segment);
            assert_taken(&programs.receives(&frame), HELD_ANSWER, &frame);
        }
    }
}

#[test]
fn a_query_from_a_forged_source_is_not_held() {
    let mut programs = Programs::new();
    let forged = Ip::new(server(9), RESOLVER).udp(7, DNS, &raw::question());
    programs.stays(&forged, Reason::SpoofedSource);
}

#[test]
fn a_fragmented_query_is_denied() {
    let mut programs = Programs::new();
    for resolver in [RESOLVER, RESOLVER6] {
        let to = programs.to(resolver);
        let datagram = raw::udp(7, DNS, &raw::question());
        let first = to.clone().fragment(9, 0, true);
        programs.stays(
            &first.frame(protocol::UDP, &datagram[..16]),
            Reason::DnsFragmented,
        );
        let later = to.fragment(9, 16, false);
        programs.stays(
            &later.frame(protocol::UDP, &datagram[16..]),
            Reason::FragmentWithoutFirst,
        );
    }
}

#[test]
fn fragments_from_a_resolver_are_held_byte_for_byte() {
    let mut programs = Programs::new();
    for resolver in [RESOLVER, RESOLVER6] {
        let by = programs.by(resolver);
        for from in [DNS, PORT] {
            let datagram = raw::udp(from, 7, &[0x5a; 56]);
            let pieces = [(0, 16), (16, 40), (40, 64)].map(|(start, end)| {
                let by = by.clone().fragment(9, start as u16, end < datagram.len());
                by.frame(protocol::UDP, &datagram[start..end])
            });
            // In any order: only the agent knows to which datagram a fragment belongs.
            for piece in pieces.iter().rev() {
                assert_taken(&programs.receives(piece), HELD_ANSWER, piece);
            }
        }
        // The pod would reassemble a first fragment that is too small for its header, without the agent's
        // verdict.
        let tiny = by.clone().fragment(9, 0, true);
        let tiny = tiny.frame(protocol::UDP, &raw::udp(DNS, 7, b"")[..7]);
        programs.receives(&tiny).denied(Reason::Malformed);
        // A TCP segment is never fragmented by an honest sender (path MTU discovery).
        let first = by.fragment(9, 0, true).tcp(DNS, 7, flag::ACK);
        programs.receives(&first).denied(Reason::DnsFragmented);
    }
    for stranger in [STRANGER, egress_tests::addresses::server6(9)] {
        let by = programs.by(stranger);
        for (start, more) in [(0, true), (16, false)] {
            let by = by.clone().fragment(9, start, more);
            programs.arrives(&by.udp(DNS, 7, &[0x5a; 16]));
        }
    }
}

#[test]
fn fragments_that_a_pod_could_reassemble_into_a_response_are_held() {
    let mut programs = Programs::new();
    // For IPv6 only the first fragment's protocol matters, and headers before the fragment header are
    // skipped.
    let later = programs.by(RESOLVER6).fragment(9, 80, false);
    for protocol in [
        protocol::TCP,
        protocol::ICMPV6,
        protocol::DESTINATION,
        protocol::FRAGMENT,
        253,
    ] {
        let piece = later.frame(protocol, &[0x5a; 24]);
        assert_taken(&programs.receives(&piece), HELD_ANSWER, &piece);
    }
    let mut behind = programs.by(RESOLVER6);
    for kind in [protocol::HOP_BY_HOP, protocol::DESTINATION] {
        behind = behind.padding(kind);
        let piece = behind.clone().fragment(9, 80, false);
        let piece = piece.frame(protocol::UDP, &[0x5a; 24]);
        assert_taken(&programs.receives(&piece), HELD_ANSWER, &piece);
    }
    // For IPv4 the protocol is part of a datagram's identity.
    let by = programs.by(RESOLVER);
    for protocol in [protocol::TCP, protocol::ICMP, 253] {
        let piece = by.clone().fragment(9, 80, false);
        programs.arrives(&piece.frame(protocol, &[0x5a; 24]));
    }
    let with_options = by.options(&[1, 1, 1, 0]).fragment(9, 80, false);
    let piece = with_options.frame(protocol::UDP, &[0x5a; 24]);
    assert_taken(&programs.receives(&piece), HELD_ANSWER, &piece);
    assert!(programs.flows().is_empty());
}

#[test]
fn the_pod_may_reply_to_a_fragmented_datagram_from_another_port_of_a_resolver() {
    let mut programs = Programs::new();
    for resolver in [RESOLVER, RESOLVER6] {
        let (by, to) = (programs.by(resolver), programs.to(resolver));
        let reply = to.udp(7, 9999, b"a reply");
        programs.stays(&reply, Reason::NoRule);
        let first = by.fragment(9, 0, true).udp(9999, 7, &[0x5a; 56]);
        assert_taken(&programs.receives(&first), HELD_ANSWER, &first);
        programs.leaves(&reply);
    }
    assert_eq!(programs.flows().len(), 2);
}

#[test]
fn a_fragment_is_denied_when_the_ring_is_full() {
    let mut programs = Programs::new();
    let piece = programs.by(RESOLVER).fragment(9, 1400, true);
    let piece = piece.frame(protocol::UDP, &[0x5a; 2800]);
    programs.flood(Hook::ToPod, [piece].into_iter(), 300);
    let counters = programs.counters();
    assert!(counters.held_answers < 300, "{counters:?}");
    assert_eq!(counters.held_answers + counters.denied_packets, 300);
}

#[test]
fn a_query_is_denied_when_the_ring_is_full() {
    let mut programs = Programs::new();
    // A frame of this length takes 16 KiB of the ring, which has 4 MiB.
    let frame = programs.to(RESOLVER).udp(7, DNS, &[0x5a; 3000]);
    // One pod cannot fill the ring.
    programs.flood(Hook::FromPod, [frame.clone()].into_iter(), 300);
    let counters = programs.counters();
    assert!(counters.held_limited > 0, "{counters:?}");
    assert_eq!(counters.held_lost, 0, "{counters:?}");
    assert_eq!(counters.held_questions + counters.held_limited, 300);
    // Ten more pods fill it.
    for _ in 0..10 {
        programs.becomes_another_pods();
        programs.flood(Hook::FromPod, [frame.clone()].into_iter(), 300);
    }
    let counters = programs.counters();
    assert!(counters.held_lost > 0, "{counters:?}");
    let denied = counters.held_lost + counters.held_limited;
    assert_eq!(counters.held_questions + denied, 11 * 300);
    assert_eq!(counters.denied_packets, denied);
    let (held, denials) = programs.drain();
    assert_eq!(held as u64, counters.held_questions);
    assert_eq!(denials as u64, denied);
    assert_taken(&programs.sends(&frame), HELD_QUESTION, &frame);

    let answer = programs.by(RESOLVER).udp(DNS, 7, &[0x5a; 3000]);
    programs.flood(Hook::ToPod, [answer].into_iter(), 300);
    let after = programs.counters();
    assert!(after.held_answers < 300, "{after:?}");
    let denied = after.denied_packets - counters.denied_packets;
    assert_eq!(
        after.held_answers + denied,
        300,
        "a response was delivered without being held"
    );
}

#[test]
fn a_flood_of_queries_leaves_room_for_other_pods() {
    let mut programs = Programs::new();
    let frame = programs.to(RESOLVER).udp(7, DNS, &raw::question());
    programs.flood(Hook::FromPod, [frame].into_iter(), 8000);
    let counters = programs.counters();
    assert!(counters.held_limited > 0, "{counters:?}");
    assert_eq!(counters.held_lost, 0, "one pod filled the ring");
    assert_eq!(counters.held_questions + counters.held_limited, 8000);
}

#[test]
fn in_audit_mode_dns_is_copied_and_passes() {
    let mut programs = Programs::new();
    programs.audit();
    let copied = |outcome: &Outcome, kind: u8, frame: &[u8]| {
        assert_eq!(outcome.run.action, Action::Pass);
        let [(head, bytes)] = &outcome.held[..] else {
            panic!("one held frame: {outcome:?}");
        };
        assert_eq!((head.kind, head.taken), (kind, 0));
        assert_eq!(bytes, frame);
    };
    let question = programs.to(RESOLVER).udp(7, DNS, &raw::question());
    copied(&programs.sends(&question), HELD_QUESTION, &question);
    let answer = programs.by(RESOLVER).udp(DNS, 7, &raw::question());
    copied(&programs.receives(&answer), HELD_ANSWER, &answer);
    for (start, more) in [(0, true), (16, false)] {
        let piece = programs.by(RESOLVER).fragment(9, start, more);
        let piece = piece.udp(DNS, 7, &[0x5a; 16]);
        copied(&programs.receives(&piece), HELD_ANSWER, &piece);
    }
}

#[test]
fn in_audit_mode_every_denial_is_reported_and_nothing_dropped() {
    let mut programs = Programs::new();
    let frames = [
        (
            programs.to(server(9)).udp(7, PORT, b"hello"),
            Reason::NoRule,
        ),
        (
            Ip::new(server(9), server(1)).udp(7, PORT, b"hello"),
            Reason::SpoofedSource,
        ),
        (raw::ethernet(0x8100, &[0; 40]), Reason::Malformed),
        (
            programs.to(server(1)).tcp(7, PORT + 1, flag::SYN),
            Reason::PortNotAllowed,
        ),
    ];
    for (mode, action, verdict) in [
        ("enforce", Action::Drop, VERDICT_DROPPED),
        ("audit", Action::Pass, VERDICT_AUDITED),
    ] {
        if mode == "audit" {
            programs.audit();
        }
        for (frame, reason) in &frames {
            let outcome = programs.sends(frame);
            assert_eq!(outcome.run.action, action, "{mode}: {outcome:?}");
            assert_eq!(outcome.reported(*reason).verdict, verdict);
        }
    }
    let counters = programs.counters();
    assert_eq!((counters.denied_packets, counters.audited_packets), (4, 4));
}

#[test]
fn frames_that_the_agent_puts_back_are_not_judged_again() {
    let mut programs = Programs::new();
    let Marks {
        deliver, bounce, ..
    } = programs.marks();
    let question = programs.to(RESOLVER).udp(7, DNS, &raw::question());
    let answer = programs.by(RESOLVER).udp(DNS, 7, &raw::question());

    let turned = programs.run_marked(Hook::ToPod, bounce, &question);
    assert_eq!(
        (turned.run.action, turned.run.mark),
        (Action::Redirect, bounce)
    );
    // Each mark is cleared when it has served its purpose, so that later programs do not see it.
    for (hook, mark, frame) in [
        (Hook::FromPod, bounce, &question),
        (Hook::ToPod, deliver, &answer),
    ] {
        let passed = programs.run_marked(hook, mark, frame);
        passed.passed();
        assert_eq!(passed.run.mark, 0);
    }
}

#[test]
fn other_marks_have_no_effect() {
    let mut programs = Programs::new();
    let Marks {
        deliver,
        bounce,
        again,
        ..
    } = programs.marks();
    let question = programs.to(RESOLVER).udp(7, DNS, &raw::question());
    let answer = programs.by(RESOLVER).udp(DNS, 7, &raw::question());
    for mark in [0, 1, 0xffff_ffff, !bounce, bounce ^ 1, deliver, again] {
        let outcome = programs.run_marked(Hook::FromPod, mark, &question);
        assert_taken(&outcome, HELD_QUESTION, &question);
    }
    for mark in [0, 1, 0xffff_ffff, !deliver, deliver ^ 1] {
        let outcome = programs.run_marked(Hook::ToPod, mark, &answer);
        assert_taken(&outcome, HELD_ANSWER, &answer);
    }
}

#[test]
fn a_probe_is_redirected_counted_and_dropped() {
    let mut programs = Programs::new();
    let Marks { probe, .. } = programs.marks();
    let v4 = programs.to(server(9)).udp(9, 9, b"probe");
    let v6 = programs.to(server6(9)).udp(9, 9, b"probe");
    assert_eq!((programs.probes().v4, programs.probes().v6), (0, 0));
    for (frame, counted) in [(&v4, (1, 0)), (&v6, (1, 1))] {
        let turned = programs.run_marked(Hook::ToPod, probe, frame);
        assert_eq!(
            (turned.run.action, turned.run.mark),
            (Action::Redirect, probe)
        );
        let counted_once = programs.run_marked(Hook::FromPod, probe, frame);
        assert_eq!(counted_once.run.action, Action::Drop);
        assert!(counted_once.denials.is_empty() && counted_once.held.is_empty());
        let Probes { v4, v6 } = programs.probes();
        assert_eq!((v4, v6), counted);
    }
    // Without the mark it is an ordinary packet.
    programs.stays(&v4, Reason::NoRule);
}

#[test]
fn a_frame_with_the_again_mark_is_redirected_without_a_mark() {
    let mut programs = Programs::new();
    let Marks { again, .. } = programs.marks();
    let frame = programs.to(server(9)).udp(7, PORT, b"hello");
    let turned = programs.run_marked(Hook::ToPod, again, &frame);
    assert_eq!((turned.run.action, turned.run.mark), (Action::Redirect, 0));
    programs.stays(&frame, Reason::NoRule);
}

#[test]
fn queries_of_an_unknown_pod_are_held_and_everything_else_is_denied() {
    let mut programs = Programs::new();
    programs.change_policy(|policy| policy.flags |= POLICY_UNIDENTIFIED);
    for resolver in [RESOLVER, RESOLVER6] {
        let to = programs.to(resolver);
        let question = to.udp(7, DNS, &raw::question());
        assert_taken(&programs.sends(&question), HELD_QUESTION, &question);
        for frame in [
            to.tcp(7, DNS, flag::SYN),
            to.clone()
                .fragment(1, 0, true)
                .udp(7, DNS, &raw::question()),
        ] {
            programs.stays(&frame, Reason::PodUnknown);
        }
    }
    let frame = programs.to(server(9)).udp(7, PORT, b"hello");
    programs.stays(&frame, Reason::PodUnknown);
}

#[test]
fn a_released_pod_is_not_judged_although_the_programs_are_attached() {
    let mut programs = Programs::new();
    programs.set_interface(|interface| interface.mode = MODE_RELEASED);
    let sent = [
        programs.to(server(9)).udp(7, PORT, b"hello"),
        programs.to(RESOLVER).udp(7, DNS, &raw::question()),
        programs.to(RESOLVER).tcp(7, DNS, flag::SYN),
        raw::arp(std::net::Ipv4Addr::new(192, 0, 2, 9), programs.own()),
        vec![0; 60],
    ];
    for frame in &sent {
        programs.leaves(frame);
    }
    let came = [
        programs.by(RESOLVER).udp(DNS, 7, &raw::question()),
        programs.by(server(9)).udp(7, PORT, b"hello"),
    ];
    for frame in &came {
        programs.arrives(frame);
    }
    assert!(programs.flows().is_empty());
}

#[test]
fn an_interface_without_an_entry_lets_nothing_out() {
    let mut programs = Programs::new();
    programs.forget_interface();
    let frames = [
        programs.to(server(1)).udp(7, PORT, b"hello"),
        programs.to(RESOLVER).udp(7, DNS, &raw::question()),
        raw::arp(programs.own(), programs.own()),
    ];
    for frame in &frames {
        let outcome = programs.sends(frame);
        assert_eq!(outcome.run.action, Action::Drop);
        assert!(outcome.denials.is_empty() && outcome.held.is_empty());
    }
    assert_eq!(programs.counters().no_policy, 3);
}

#[test]
fn packets_to_reject_are_passed_to_the_agent() {
    let mut programs = Programs::new();
    programs.set_interface(|interface| interface.flags = INTERFACE_REJECT);
    let to = programs.to(server(9));
    for frame in [
        to.udp(7, PORT, b"hello"),
        to.udp(7, PORT, &[0x5a; 1400]),
        to.tcp(7, PORT, flag::SYN),
    ] {
        let outcome = programs.sends(&frame);
        assert_eq!(outcome.run.action, Action::Drop);
        assert_eq!(outcome.reported(Reason::NoRule).verdict, VERDICT_REJECTED);
        let [(head, bytes)] = &outcome.held[..] else {
            panic!("one held frame: {outcome:?}");
        };
        assert_eq!(head.kind, HELD_REJECT);
        assert_eq!(bytes[..], frame[..frame.len().min(192)]);
    }
    // Nothing is sent to a forged source, and no reset in response to a reset.
    let forged = Ip::new(server(9), server(1)).udp(7, PORT, b"hello");
    programs.stays(&forged, Reason::SpoofedSource);
    programs.stays(&to.tcp(7, PORT, flag::RST), Reason::NoRule);
    programs.stays(&raw::ethernet(0x8100, &[0; 40]), Reason::Malformed);
}
