//! Fragmented packets.

use egress_common::reason::Reason;
use egress_tests::{
    addresses::{server, server6},
    programs::{PORT, Programs},
    raw::{self, Ip, flag, protocol},
};

const UDP: u8 = protocol::UDP;
const TCP: u8 = protocol::TCP;

/// A datagram of 64 bytes to the allowed port.
fn datagram() -> Vec<u8> {
    raw::udp(7, PORT, &[0x5a; 56])
}

fn fragment(to: &Ip, id: u16, offset: u16, len: usize) -> Vec<u8> {
    let whole = datagram();
    let at = usize::from(offset);
    let more = at + len < whole.len();
    let to = to.clone().fragment(id, offset, more);
    to.frame(UDP, &whole[at..at + len])
}

#[test]
fn later_fragments_follow_a_first_that_passed() {
    let mut programs = Programs::new();
    for to in [server(1), server6(1)] {
        let to = programs.to(to);
        programs.leaves(&fragment(&to, 9, 0, 24));
        programs.leaves(&fragment(&to, 9, 24, 24));
        programs.leaves(&fragment(&to, 9, 48, 16));
        // Repeated and reordered, as on a real link.
        programs.leaves(&fragment(&to, 9, 48, 16));
        programs.leaves(&fragment(&to, 9, 24, 24));
    }
}

#[test]
fn later_fragments_do_not_outlive_the_policy_that_passed_their_first() {
    let mut programs = Programs::new();
    let to = programs.to(server(1));
    programs.leaves(&fragment(&to, 9, 0, 24));
    programs.leaves(&fragment(&to, 9, 24, 24));
    programs.change_policy(|_| {});
    programs.stays(&fragment(&to, 9, 48, 16), Reason::FragmentWithoutFirst);
}

#[test]
fn later_fragments_without_their_first_are_denied() {
    let mut programs = Programs::new();
    for to in [server(1), server6(1)] {
        let to = programs.to(to);
        programs.stays(&fragment(&to, 9, 24, 24), Reason::FragmentWithoutFirst);
        programs.leaves(&fragment(&to, 9, 0, 24));
        programs.leaves(&fragment(&to, 9, 24, 24));
        // Fragments of another packet, and of another protocol.
        programs.stays(&fragment(&to, 10, 24, 24), Reason::FragmentWithoutFirst);
        for other in [TCP, protocol::SCTP, protocol::GRE, protocol::DESTINATION] {
            let frame = to.clone().fragment(9, 24, false).frame(other, &[0x5a; 24]);
            programs.stays(&frame, Reason::FragmentWithoutFirst);
        }
    }
    // Fragments to another address.
    let elsewhere = programs.to(server(9));
    programs.stays(
        &fragment(&elsewhere, 9, 24, 24),
        Reason::FragmentWithoutFirst,
    );
}

#[test]
fn a_denied_first_fragment_denies_the_others() {
    let mut programs = Programs::new();
    for to in [server(9), server6(9)] {
        let to = programs.to(to);
        programs.stays(&fragment(&to, 9, 0, 24), Reason::NoRule);
        programs.stays(&fragment(&to, 9, 24, 40), Reason::FragmentWithoutFirst);
    }
    assert!(programs.flows().is_empty());
}

#[test]
fn a_first_fragment_with_a_truncated_header_is_denied() {
    let mut programs = Programs::new();
    for to in [server(1), server6(1)] {
        let to = programs.to(to).fragment(9, 0, true);
        programs.stays(&to.frame(UDP, &datagram()[..7]), Reason::Malformed);
        let segment = raw::tcp(7, PORT, flag::SYN);
        for len in [0, 4, 8, 16, 19] {
            programs.stays(&to.frame(TCP, &segment[..len]), Reason::Malformed);
        }
        programs.leaves(&to.frame(TCP, &segment));
        // A header whose length exceeds the first fragment.
        let mut longer = segment;
        longer[12] = 0x60;
        programs.stays(&to.frame(TCP, &longer), Reason::Malformed);
    }
}

#[test]
fn a_later_fragment_cannot_overwrite_a_header() {
    let mut programs = Programs::new();
    for to in [server(1), server6(1)] {
        let to = programs.to(to);
        let first = to.clone().fragment(9, 0, true);
        let segment = [raw::tcp(7, PORT, flag::SYN), vec![0x5a; 4]].concat();
        programs.leaves(&first.frame(TCP, &segment));
        // Attacks of RFC 1858 and RFC 3128: the later fragment replaces flags or ports.
        for offset in [8, 16] {
            let later = to.clone().fragment(9, offset, false);
            programs.stays(&later.frame(TCP, &[0x5a; 24]), Reason::Malformed);
        }
        let later = to.clone().fragment(9, 24, false);
        programs.leaves(&later.frame(TCP, &[0x5a; 24]));
    }
}

#[test]
fn a_later_fragment_cannot_overwrite_ports_behind_extension_headers() {
    let mut programs = Programs::new();
    // Destination options after the fragment header move the ports into reach of a later fragment, which
    // would begin at byte 8 with the protocol by which the first was judged.
    let options = [protocol::UDP, 0, 1, 4, 0, 0, 0, 0];
    let first = programs.to(server6(1)).fragment(9, 0, true);
    let content = [&options[..], &datagram()].concat();
    programs.stays(
        &first.frame(protocol::DESTINATION, &content),
        Reason::Malformed,
    );
    let later = programs.to(server6(1)).fragment(9, 8, false);
    let over = raw::udp(7, PORT + 1, &[0x5a; 56]);
    programs.stays(&later.frame(UDP, &over), Reason::FragmentWithoutFirst);
    for kind in [protocol::HOP_BY_HOP, protocol::ROUTING, protocol::FRAGMENT] {
        programs.stays(&first.frame(kind, &content), Reason::Malformed);
    }
}

#[test]
fn extension_headers_before_the_fragment_header_are_parsed() {
    let mut programs = Programs::new();
    let to = programs.to(server6(1)).padding(protocol::DESTINATION);
    programs.leaves(&fragment(&to, 9, 0, 24));
    programs.leaves(&fragment(&to, 9, 24, 40));
    let to = programs.to(server6(9)).padding(protocol::DESTINATION);
    programs.stays(&fragment(&to, 9, 0, 24), Reason::NoRule);
}

#[test]
fn an_atomic_fragment_is_judged_like_a_whole_packet() {
    // An atomic fragment (RFC 6946): the fragment header of an unfragmented packet.
    let mut programs = Programs::new();
    for (host, port, passes) in [(1, PORT, true), (1, PORT + 1, false), (9, PORT, false)] {
        let to = programs.to(server6(host)).fragment(9, 0, false);
        let frame = to.udp(7, port, b"hello");
        if passes {
            programs.leaves(&frame);
        } else {
            assert_eq!(programs.sends(&frame).denials.len(), 1);
        }
    }
    // Later fragments do not follow it.
    let to = programs.to(server6(1));
    programs.stays(&fragment(&to, 9, 24, 40), Reason::FragmentWithoutFirst);
}

#[test]
fn two_fragment_headers_are_refused() {
    let mut programs = Programs::new();
    for more in [false, true] {
        let to = programs
            .to(server6(1))
            .fragment(9, 0, false)
            .fragment(10, 0, more);
        let frame = to.udp(7, PORT, b"hello");
        programs.stays(&frame, Reason::Malformed);
    }
}

#[test]
fn fragments_of_a_reply_follow_their_first() {
    let mut programs = Programs::new();
    for peer in [server(9), server6(9)] {
        let (by, to) = (programs.by(peer), programs.to(peer));
        programs.arrives(&by.udp(PORT, 7, b"a question"));
        programs.leaves(&fragment(&to, 9, 0, 24));
        programs.leaves(&fragment(&to, 9, 24, 40));
    }
}
