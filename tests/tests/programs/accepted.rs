//! Connections that the other side has accepted: it did not open them, so the pod may not answer it.

use std::{collections::HashMap, net::IpAddr};

use egress_agent::datapath::{Action, Hook};
use egress_common::{
    reason::Reason,
    records::{FLOW_OUT, INTERFACE_SOURCES, MODE_ENFORCE},
};
use egress_tests::{
    addresses::{numbered, server, server6},
    programs::{PORT, Programs, TO_PORT},
    raw::{Ip, flag},
};

use crate::openings::{ANSWER, CALL, FLOOD, OWN, PAST_NS, PEER, accept, states};

const SYN_ACK: u8 = flag::SYN | flag::ACK;
const NEVER_NS: u64 = u64::MAX;
const SECOND_NS: u64 = 1_000_000_000;
/// The pod's maps that have flows which others open.
const INBOUND: [&str; 2] = ["opening", "inbound"];
/// The number of the peer's own SYN-ACK.
const THERE: u32 = 0x3000_ffff;

/// The segments of a peer and the pod, between which somebody outside joins two handshakes.
struct Joined {
    syn: Vec<u8>,
    /// The pod's SYN-ACK for the forged SYN.
    answer: Vec<u8>,
    /// The forged acknowledgment of it.
    ack: Vec<u8>,
    /// The peer's SYN-ACK for a SYN in the pod's name.
    accepts: Vec<u8>,
    /// The packets that the pod sends to the peer then.
    data: Vec<u8>,
}

impl Joined {
    fn with(programs: &Programs, peer: IpAddr) -> Self {
        let (by, to) = (programs.by(peer), programs.to(peer));
        Self {
            syn: by.tcp_segment(CALL, flag::SYN, (PEER, 0), b""),
            answer: to.tcp_segment(ANSWER, SYN_ACK, (OWN, PEER + 1), b""),
            ack: by.tcp_segment(CALL, flag::ACK, (PEER + 1, OWN + 1), b""),
            accepts: by.tcp_segment(CALL, SYN_ACK, (THERE, OWN + 1), b""),
            data: to.tcp_segment(ANSWER, flag::ACK, (OWN + 1, THERE + 1), b"secret"),
        }
    }

    /// The peer's SYN-ACK does not reach the pod.
    #[track_caller]
    fn accepts(&self, programs: &mut Programs) {
        let run = programs.receives(&self.accepts);
        run.denied(Reason::TcpUnsolicited);
    }

    /// Asserts that no SYN in the peer's name opens the connection, and that the pod's data stays.
    #[track_caller]
    fn stays_closed(&self, programs: &mut Programs) {
        for _ in 0..2 {
            programs.receives(&self.syn);
            assert_eq!(programs.sends(&self.answer).run.action, Action::Drop);
            programs.receives(&self.ack);
            assert_eq!(programs.sends(&self.data).run.action, Action::Drop);
        }
    }
}

/// The values of the pod's flows that others open, as another CPU may have read them.
fn read(programs: &Programs) -> HashMap<(&'static str, Vec<u8>), Vec<u8>> {
    let mut found = HashMap::new();
    for map in INBOUND {
        programs.rewrite(map, |key, value| {
            found.insert((map, key.to_vec()), value.to_vec());
        });
    }
    found
}

/// Writes the values back.
fn write(programs: &Programs, read: &HashMap<(&'static str, Vec<u8>), Vec<u8>>) {
    for map in INBOUND {
        programs.rewrite(map, |key, value| {
            if let Some(before) = read.get(&(map, key.to_vec())) {
                value.copy_from_slice(before);
            }
        });
    }
}

/// Lets this time pass for flows that others have opened.
fn pass(programs: &Programs, seconds: u64) {
    for map in INBOUND {
        programs.rewrite(map, |_, value| {
            let (last_seen, _) = value.split_at_mut(8);
            let seen_ns = u64::from_ne_bytes(last_seen.try_into().expect("eight bytes"));
            let earlier = seen_ns.saturating_sub(seconds * SECOND_NS);
            last_seen.copy_from_slice(&earlier.to_ne_bytes());
        });
    }
}

#[test]
fn a_cpu_that_writes_the_flow_back_does_not_undo_a_syn_ack() {
    let mut programs = Programs::new();
    for peer in [server(9), server6(9)] {
        let joined = Joined::with(&programs, peer);
        // Before the handshake with the pod is complete, and after.
        programs.arrives(&joined.syn);
        let opened = read(&programs);
        joined.accepts(&mut programs);
        write(&programs, &opened);
        joined.stays_closed(&mut programs);
    }
    for peer in [server(8), server6(8)] {
        let joined = Joined::with(&programs, peer);
        accept(&mut programs, peer, CALL.0);
        let established = read(&programs);
        joined.accepts(&mut programs);
        write(&programs, &established);
        programs.stays(&joined.data, Reason::NoRule);
        joined.stays_closed(&mut programs);
        write(&programs, &established);
        joined.stays_closed(&mut programs);
    }
}

#[test]
fn a_flow_that_closes_and_opens_again_stays_accepted() {
    let mut programs = Programs::new();
    let joined = Joined::with(&programs, server(9));
    let reset = programs
        .by(server(9))
        .tcp_segment(CALL, flag::RST, (PEER + 1, 0), b"");
    programs.arrives(&joined.syn);
    programs.arrives(&reset);
    let closed = read(&programs);
    joined.accepts(&mut programs);
    write(&programs, &closed);
    for _ in 0..2 {
        programs.receives(&reset);
        joined.stays_closed(&mut programs);
    }
}

#[test]
fn a_syn_ack_is_remembered_for_longer_than_a_syn_cookie_is_valid() {
    let mut programs = Programs::new();
    for peer in [server(9), server6(9)] {
        let joined = Joined::with(&programs, peer);
        joined.accepts(&mut programs);
        pass(&programs, 121);
        joined.stays_closed(&mut programs);
    }
}

#[test]
fn the_pod_does_not_see_the_number_of_a_server_that_accepts() {
    let mut programs = Programs::new();
    for peer in [server(9), server6(9)] {
        let joined = Joined::with(&programs, peer);
        let by = programs.by(peer);
        // A server that waits for the end of a handshake answers a wrong number with its own (RFC 9293, section
        // 3.10.7.4), and a RST may have it, too.
        let others = [
            by.tcp_segment(CALL, flag::ACK, (THERE + 1, OWN + 1), b""),
            by.tcp_segment(CALL, flag::RST | flag::ACK, (THERE + 1, OWN + 1), b""),
            by.tcp_segment(CALL, flag::ACK, (THERE + 1, OWN + 1), b"greeting"),
        ];
        joined.accepts(&mut programs);
        for frame in &others {
            programs.receives(frame).denied(Reason::TcpUnsolicited);
        }
        // Its other connections are not concerned.
        accept(&mut programs, peer, CALL.0 + 1);
    }
    for peer in [server(8), server6(8)] {
        let joined = Joined::with(&programs, peer);
        accept(&mut programs, peer, CALL.0);
        joined.accepts(&mut programs);
        let number = programs.by(peer);
        let number = number.tcp_segment(CALL, flag::ACK, (THERE + 1, OWN + 1), b"");
        programs.receives(&number).denied(Reason::TcpUnsolicited);
    }
}

#[test]
fn a_flood_does_not_make_the_pod_forget_who_has_accepted() {
    let mut programs = Programs::new();
    let (unknown, opened) = (
        Joined::with(&programs, server(9)),
        Joined::with(&programs, server(8)),
    );
    accept(&mut programs, server(8), CALL.0);
    unknown.accepts(&mut programs);
    opened.accepts(&mut programs);
    let established = read(&programs);
    let own = programs.own();
    let syn = |n| Ip::new(numbered(n), own).tcp(5000, 8080, flag::SYN);
    programs.flood(Hook::ToPod, (0..FLOOD).map(syn), 1);
    write(&programs, &established);
    unknown.stays_closed(&mut programs);
    opened.stays_closed(&mut programs);
    // SYN-ACKs in one host's name, from every port.
    let by = programs.by(server(7));
    let accepts = |n: u32| by.tcp(1024 + n as u16, 8080, SYN_ACK);
    programs.flood(Hook::ToPod, (0..FLOOD).map(accepts), 1);
    programs.drain();
    unknown.stays_closed(&mut programs);
    // Others open their connections meanwhile. (Some may be of one group with those that have accepted.)
    let mut gets_through = |host: u8| {
        let peer = Joined::with(&programs, server(host));
        programs.receives(&peer.syn);
        programs.sends(&peer.answer).run.action == Action::Pass
    };
    let through = (20..40).filter(|host| gets_through(*host)).count();
    assert!(through >= 17, "{through} of 20 peers get through");
}

#[test]
fn a_flood_of_forged_syn_acks_does_not_end_connections() {
    let mut programs = Programs::new();
    accept(&mut programs, server(8), CALL.0);
    let own = programs.own();
    let accepts = |n| Ip::new(numbered(n), own).tcp(5000, 8080, SYN_ACK);
    programs.flood(Hook::ToPod, (0..FLOOD).map(accepts), 1);
    programs.drain();
    let to = programs.to(server(8));
    programs.leaves(&to.tcp_segment(ANSWER, flag::ACK, (OWN + 5, PEER + 1), b"data"));
    let by = programs.by(server(8));
    programs.arrives(&by.tcp_segment(CALL, flag::ACK, (PEER + 1, OWN + 9), b"data"));
}

#[test]
fn a_connection_of_the_pod_whose_flow_was_evicted_is_still_accepted() {
    let mut programs = Programs::new();
    let (to, by) = (programs.to(server(1)), programs.by(server(1)));
    programs.leaves(&to.tcp(7, PORT, flag::SYN));
    let flood = (0..2000_u16).map(|n| to.tcp(10_000 + n, PORT, flag::SYN));
    programs.flood(Hook::FromPod, flood, 1);
    let flows = programs.flows();
    assert!(flows.iter().all(|(key, _)| key.pod_port != 7), "evicted");
    programs.arrives(&by.tcp(PORT, 7, SYN_ACK));
    programs.leaves(&to.tcp(7, PORT, flag::ACK));
    programs.arrives(&by.tcp(PORT, 7, flag::ACK));
    programs.leaves(&to.tcp(7, PORT, flag::ACK));
    assert!(states(&programs).contains(&(FLOW_OUT, true)));
    programs.allow(server(1), TO_PORT, PAST_NS);
    programs.leaves(&to.tcp(7, PORT, flag::ACK));
}

#[test]
fn a_connection_that_the_rules_allow_works_after_a_syn_ack_that_came_first() {
    let mut programs = Programs::new();
    let (to, by) = (programs.to(server(1)), programs.by(server(1)));
    let first = programs.receives(&by.tcp(PORT, 7, SYN_ACK));
    first.denied(Reason::TcpUnsolicited);
    programs.leaves(&to.tcp(7, PORT, flag::SYN));
    programs.arrives(&by.tcp(PORT, 7, SYN_ACK));
    programs.leaves(&to.tcp(7, PORT, flag::ACK));
    programs.arrives(&by.tcp(PORT, 7, flag::ACK));
    programs.leaves(&to.tcp(7, PORT, flag::ACK));
    assert!(states(&programs).contains(&(FLOW_OUT, true)));
}

#[test]
fn audit_mode_and_the_first_moments_of_a_pod_only_note_a_syn_ack() {
    let mut programs = Programs::new();
    let (noted, reported) = (
        Joined::with(&programs, server(9)),
        Joined::with(&programs, server(8)),
    );
    programs.set_interface(|interface| interface.flags = INTERFACE_SOURCES);
    programs.arrives(&noted.accepts);
    programs.set_interface(|interface| interface.flags = 0);
    noted.stays_closed(&mut programs);

    programs.audit();
    let run = programs.receives(&reported.accepts);
    run.reported(Reason::TcpUnsolicited);
    assert_eq!(run.run.action, Action::Pass);
    programs.set_interface(|interface| interface.mode = MODE_ENFORCE);
    reported.stays_closed(&mut programs);
}

/// In audit mode, and in the first moments of a pod, the pod sees the server's number. It could tell it to somebody who
/// completes the connection in its name, and go on with it when the record is gone.
#[test]
fn a_connection_that_was_joined_before_enforcement_does_not_outlive_the_record() {
    let mut programs = Programs::new();
    let (audited, sources) = (server(9), server(8));
    for peer in [audited, sources] {
        accept(&mut programs, peer, CALL.0);
    }
    let forged = Joined::with(&programs, sources);
    programs.set_interface(|interface| interface.flags = INTERFACE_SOURCES);
    programs.arrives(&forged.accepts);
    programs.set_interface(|interface| interface.flags = 0);
    programs.audit();
    // The pod's own SYN. The address and port are noted, and the flow stays.
    let own = programs.to(audited);
    programs.sends(&own.tcp_segment(ANSWER, flag::SYN, (OWN, 0), b""));
    let called = Joined::with(&programs, audited);
    programs.receives(&called.accepts);
    programs.set_interface(|interface| interface.mode = MODE_ENFORCE);
    pass(&programs, 181);
    for joined in [forged, called] {
        programs.stays(&joined.data, Reason::NoRule);
    }
}

#[test]
fn a_syn_ack_for_another_address_is_not_recorded_for_the_pod() {
    let mut programs = Programs::new();
    let other: IpAddr = [10, 1, 0, 77].into();
    programs.arrives(&Ip::new(server(9), other).tcp(CALL.0, CALL.1, SYN_ACK));
    assert_eq!(programs.flows(), []);
}

#[test]
fn connections_noted_in_quarantine_count_for_the_pod() {
    let mut programs = Programs::new();
    let joined = Joined::with(&programs, server(9));
    joined.accepts(&mut programs);
    programs.becomes_another_pods();
    programs.takes_noted();
    joined.stays_closed(&mut programs);
}

/// The flow of the forged handshake is older than the pod's own connections to the server, and their destination is
/// noted.
#[test]
fn a_server_that_the_pod_calls_accepts_only_the_pods_own_connections() {
    let mut programs = Programs::new();
    for (peer, port) in [(server(1), 7), (server6(1), 8)] {
        let (by, to) = (programs.by(peer), programs.to(peer));
        let (there, here) = ((PORT, CALL.1), (CALL.1, PORT));
        let accepts = by.tcp_segment(there, SYN_ACK, (THERE, OWN + 1), b"");
        let data = to.tcp_segment(here, flag::ACK, (OWN + 1, THERE + 1), b"secret");
        accept(&mut programs, peer, PORT);
        programs.allow(peer, TO_PORT, NEVER_NS);
        programs.leaves(&to.tcp(port, PORT, flag::SYN));
        programs.arrives(&by.tcp(PORT, port, SYN_ACK));
        programs.leaves(&to.tcp(port, PORT, flag::ACK));
        programs.change_policy(|_| {});
        programs.receives(&accepts).denied(Reason::TcpUnsolicited);
        programs.stays(&data, Reason::NoRule);
    }
}

#[test]
fn what_a_pod_takes_over_from_its_quarantine_leaves_room_for_what_comes_later() {
    let mut programs = Programs::new();
    // As many connections as the queue has places.
    let by = programs.by(server(7));
    let records = |n: u32| by.tcp(1024 + n as u16, 8080, SYN_ACK);
    programs.flood(Hook::ToPod, (0..3072).map(records), 1);
    programs.drain();
    programs.becomes_another_pods();
    programs.takes_noted();
    // The pod opens a connection, and somebody outside floods it in many names.
    programs.allow(server(1), TO_PORT, NEVER_NS);
    let (to, by) = (programs.to(server(1)), programs.by(server(1)));
    programs.leaves(&to.tcp(7, PORT, flag::SYN));
    flood(&mut programs);
    for host in 20..40 {
        let joined = Joined::with(&programs, server(host));
        let accepted = programs.receives(&joined.accepts);
        assert_eq!(accepted.run.action, Action::Drop);
        let number = programs.by(server(host));
        let number = number.tcp_segment(CALL, flag::ACK, (THERE + 1, OWN + 1), b"");
        assert_eq!(programs.receives(&number).run.action, Action::Drop);
        if host == 20 {
            // The connection leaves a place behind.
            for _ in 0..2 {
                programs.arrives(&by.tcp(PORT, 7, SYN_ACK));
                programs.leaves(&to.tcp(7, PORT, flag::ACK));
            }
        }
        joined.stays_closed(&mut programs);
    }
}

#[test]
fn a_flood_while_a_pod_takes_over_from_its_quarantine_does_not_fail_it() {
    let mut programs = Programs::new();
    let (mut first, mut second) = (None, None);
    programs.set_interface(|interface| first = Some(*interface));
    let by = programs.by(server(7));
    let records = |n: u32| by.tcp(1024 + n as u16, 8080, SYN_ACK);
    programs.flood(Hook::ToPod, (0..3072).map(records), 1);
    programs.drain();
    programs.becomes_another_pods();
    programs.set_interface(|interface| second = Some(*interface));
    programs.takes_noted();
    programs.set_interface(|interface| *interface = first.expect("it was read"));
    flood(&mut programs);
    programs.set_interface(|interface| *interface = second.expect("it was read"));
    programs.takes_noted();
}

#[test]
fn a_sweep_leaves_records_to_the_programs() {
    let mut programs = Programs::new();
    let joined = Joined::with(&programs, server(20));
    joined.accepts(&mut programs);
    programs.sweeps_at(NEVER_NS);
    joined.stays_closed(&mut programs);
}

/// SYN-ACKs in more names than there is room for.
fn flood(programs: &mut Programs) {
    let own = programs.own();
    let accepts = |n| Ip::new(numbered(n), own).tcp(5000, 8080, SYN_ACK);
    programs.flood(Hook::ToPod, (0..FLOOD).map(accepts), 1);
    programs.drain();
}
