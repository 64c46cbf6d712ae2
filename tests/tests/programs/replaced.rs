//! Entries whose memory becomes another entry's while a program reads it.

use egress_agent::datapath::{Action, Hook};
use egress_common::reason::Reason;
use egress_tests::{
    addresses::{server, server6},
    programs::{PORT, Programs},
    raw::flag,
};

#[test]
fn no_packet_is_judged_by_a_neighbours_entry() {
    let mut programs = Programs::new();
    let frame = programs.to(server(66)).tcp(1, PORT, flag::SYN);
    let before = programs.counters();
    let times = 4_000_000;
    programs.flood_amid_changes(&frame, times);
    let counted = programs.counters();
    let passed = counted.passed_packets - before.passed_packets;
    let audited = counted.audited_packets - before.audited_packets;
    assert_eq!((passed, audited), (0, 0), "{counted:?}");
    let denied = counted.denied_packets - before.denied_packets;
    let no_policy = counted.no_policy - before.no_policy;
    assert_eq!(denied + no_policy, u64::from(times), "{counted:?}");
}

#[test]
fn an_entry_of_another_interface_does_not_count() {
    let mut programs = Programs::new();
    let leaves = programs.to(server(1)).tcp(1, PORT, flag::SYN);
    let arrives = programs.by(server(1)).tcp(PORT, 1, flag::SYN | flag::ACK);
    programs.leaves(&leaves);
    programs.arrives(&arrives);
    programs.rewrite_shared("interfaces", |_, value| value[16] ^= 1);
    for (hook, frame) in [(Hook::FromPod, leaves), (Hook::ToPod, arrives)] {
        let outcome = programs.run_marked(hook, 0, &frame);
        assert_eq!(outcome.run.action, Action::Drop, "{outcome:?}");
    }
    assert_eq!(programs.counters().no_policy, 2);
}

#[test]
fn an_entry_of_another_address_allows_nothing() {
    let mut programs = Programs::new();
    programs.pin_allow();
    for to in [server(1), server6(1)] {
        let frame = programs.to(to).tcp(1, PORT, flag::SYN);
        programs.leaves(&frame);
    }
    programs.rewrite("allow", |key, value| {
        assert_eq!(value[40..], *key, "the value repeats the key");
        value[55] ^= 1;
    });
    for to in [server(1), server6(1)] {
        let frame = programs.to(to).tcp(2, PORT, flag::SYN);
        programs.stays(&frame, Reason::NoRule);
    }
}

#[test]
fn a_flow_of_another_key_admits_nothing() {
    for is_established in [true, false] {
        let mut programs = Programs::new();
        programs.pin_allow();
        let to = programs.to(server(1));
        programs.leaves(&to.tcp(1, PORT, flag::SYN));
        let later = to.tcp(1, PORT, flag::ACK);
        if is_established {
            let answer = programs.by(server(1)).tcp(PORT, 1, flag::SYN | flag::ACK);
            programs.arrives(&answer);
            programs.leaves(&later);
        }
        programs.rewrite("allow", |_, value| value[32..40].fill(0));
        programs.leaves(&later);
        give_flows_another_key(&programs);
        programs.stays(&later, Reason::Expired);
    }
}

#[test]
fn a_flow_of_another_key_is_not_answered() {
    let mut programs = Programs::new();
    let by = programs.by(server(2));
    programs.arrives(&by.udp(1, 2, b"ask"));
    let answer = programs.to(server(2)).udp(2, 1, b"tell");
    programs.leaves(&answer);
    give_flows_another_key(&programs);
    programs.stays(&answer, Reason::NoRule);
}

/// Changes the key that each flow repeats.
fn give_flows_another_key(programs: &Programs) {
    let mut changed = 0;
    for map in ["flows", "inbound", "opening"] {
        programs.rewrite(map, |key, value| {
            assert_eq!(value[16..], *key, "the value repeats the key");
            value[16 + 31] ^= 1;
            changed += 1;
        });
    }
    assert_ne!(changed, 0);
}
