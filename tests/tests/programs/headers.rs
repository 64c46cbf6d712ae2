//! How the programs parse headers: correct headers are read, lying and truncated ones are refused.

use egress_agent::datapath::{Action, Hook};
use egress_common::reason::Reason;
use egress_tests::{
    addresses::{RESOLVER, server, server6},
    programs::{PORT, Programs},
    raw::{self, ETHERNET, IPV4, IPV6, ether, flag, protocol},
};

/// The number of a server that no rule names.
const ELSEWHERE: u8 = 9;

#[test]
fn every_whole_packet_to_an_allowed_port_leaves() {
    let mut programs = Programs::new();
    for to in [server(1), server6(1)] {
        let to = programs.to(to);
        programs.leaves(&to.udp(7, PORT, b"hello"));
        programs.leaves(&to.udp(7, PORT, b""));
        programs.leaves(&to.tcp(7, PORT, flag::SYN));
        programs.leaves(&to.sctp(7, PORT));
        programs.leaves(&to.echo(7));
    }
    let counters = programs.counters();
    assert_eq!((counters.passed_packets, counters.denied_packets), (10, 0));
}

#[test]
fn a_denial_has_source_destination_and_protocol() {
    let mut programs = Programs::new();
    let denial = programs.stays(
        &programs.to(server(ELSEWHERE)).udp(7, PORT, b"hello"),
        Reason::NoRule,
    );
    assert_eq!((denial.src_port, denial.dst_port), (7, PORT));
    assert_eq!(denial.protocol, protocol::UDP);
    assert_eq!((denial.walked, denial.ether_type), (1, ether::IPV4));
    let denial = programs.stays(
        &programs.to(server6(1)).tcp(7, PORT + 1, flag::SYN),
        Reason::PortNotAllowed,
    );
    assert_eq!((denial.src_port, denial.dst_port), (7, PORT + 1));
    assert_eq!(programs.counters().denied_packets, 2);
}

#[test]
fn a_truncated_packet_does_not_leave() {
    let mut programs = Programs::new();
    for to in [server(1), server6(1)] {
        let to = programs.to(to);
        let whole = [
            to.udp(7, PORT, b"hello"),
            to.tcp(7, PORT, flag::SYN),
            to.sctp(7, PORT),
            to.echo(7),
        ];
        for frame in whole {
            for len in ip_header(&frame)..frame.len() {
                programs.stays(&frame[..len], Reason::Malformed);
            }
            programs.leaves(&frame);
        }
    }
}

/// The offset behind the IP header: newer kernels do not run a program on a shorter frame.
fn ip_header(frame: &[u8]) -> usize {
    if frame[ETHERNET] >> 4 == 4 {
        IPV4
    } else {
        IPV6
    }
}

#[test]
fn a_packet_with_a_truncated_transport_header_does_not_leave() {
    let mut programs = Programs::new();
    for to in [server(1), server6(1)] {
        let to = programs.to(to);
        let headers = [
            (protocol::TCP, raw::tcp(7, PORT, flag::SYN), 20),
            (protocol::UDP, raw::udp(7, PORT, b""), 8),
            (protocol::SCTP, raw::udp(7, PORT, b"sctp"), 12),
            (icmp(&to), vec![8, 0, 0, 0, 0, 7, 0, 1], 8),
        ];
        for (protocol, header, least) in headers {
            for len in 0..least {
                // The IP header's length is correct: there are no more bytes.
                let frame = to.frame(protocol, &header[..len]);
                programs.stays(&frame, Reason::Malformed);
            }
        }
    }
}

fn icmp(to: &raw::Ip) -> u8 {
    let v4 = to.frame(0, &[])[12..14] == ether::IPV4.to_be_bytes();
    if v4 { protocol::ICMP } else { protocol::ICMPV6 }
}

#[test]
fn a_truncated_query_is_neither_answered_nor_forwarded() {
    let mut programs = Programs::new();
    let frame = programs.to(RESOLVER).udp(7, 53, &raw::question());
    for len in IPV4..frame.len() {
        programs.stays(&frame[..len], Reason::Malformed);
    }
}

#[test]
fn wrong_length_fields_are_refused() {
    let mut programs = Programs::new();
    let v4 = programs.to(server(1));
    let v6 = programs.to(server6(1));
    for length in [0, 19, 20, 27, 36, u16::MAX] {
        // The packet has 35 bytes: 20 of IP, 8 of UDP, 7 of payload.
        let frame = v4.clone().length(length).udp(7, PORT, b"payload");
        programs.stays(&frame, Reason::Malformed);
    }
    for length in [0, 7, 16, u16::MAX] {
        let frame = v6.clone().length(length).udp(7, PORT, b"payload");
        programs.stays(&frame, Reason::Malformed);
    }
    for (to, at) in [(v4, IPV4), (v6, IPV6)] {
        for length in [0_u16, 7, 16, u16::MAX] {
            let mut frame = to.udp(7, PORT, b"payload");
            frame[at + 4..at + 6].copy_from_slice(&length.to_be_bytes());
            programs.stays(&frame, Reason::Malformed);
        }
        for words in 0..16_u8 {
            let mut frame = to.tcp(7, PORT, flag::ACK);
            frame[at + 12] = words << 4;
            if words == 5 {
                programs.leaves(&frame);
            } else {
                programs.stays(&frame, Reason::Malformed);
            }
        }
    }
}

#[test]
fn bytes_after_the_packet_in_its_frame_are_not_read() {
    let mut programs = Programs::new();
    for to in [server(1), server6(1)] {
        // A short packet in a frame of the minimum length (IEEE 802.3), padded.
        let mut frame = programs.to(to).udp(7, PORT, b"");
        frame.extend([0xff; 18]);
        programs.leaves(&frame);
    }
    // Ports after the end of the packet do not count.
    let mut frame = programs.to(server(1)).length(20).udp(7, PORT, b"");
    frame.extend([0xff; 18]);
    programs.stays(&frame, Reason::Malformed);
}

/// Options without arguments (RFC 791, section 3.1).
const END: u8 = 0;
const NOP: u8 = 1;

#[test]
fn ipv4_options_are_skipped_and_source_routes_are_refused() {
    let mut programs = Programs::new();
    let harmless: [&[u8]; 4] = [
        &[NOP, NOP, NOP, END],
        // Router alert (RFC 2113).
        &[148, 4, 0, 0],
        // Record route with room for one address.
        &[7, 7, 4, 0, 0, 0, 0, END],
        &[NOP; 40],
    ];
    for options in harmless {
        let frame = |host: u8| {
            let to = programs.to(server(host)).options(options);
            to.udp(7, PORT, b"hello")
        };
        let (allowed, denied) = (frame(1), frame(ELSEWHERE));
        programs.leaves(&allowed);
        programs.stays(&denied, Reason::NoRule);
    }
    let routes: [&[u8]; 5] = [
        // Loose and strict source routes to 203.0.113.9 (RFC 791, section 3.1).
        &[131, 7, 4, 203, 0, 113, 9, END],
        &[137, 7, 4, 203, 0, 113, 9, END],
        // After other options, and as the last byte.
        &[NOP, 131, 7, 4, 203, 0, 113, 9],
        &[NOP, NOP, NOP, 137],
        &[&[NOP; 36][..], &[131, 3, 4, END]].concat(),
    ];
    for options in routes {
        let to = programs.to(server(1)).options(options);
        programs.stays(&to.udp(7, PORT, b"hello"), Reason::Malformed);
    }
}

#[test]
fn an_ipv4_header_that_is_too_short_or_too_long_is_refused() {
    let mut programs = Programs::new();
    let whole = programs.to(server(1)).udp(7, PORT, b"hello");
    for first in 0..=u8::MAX {
        // Version and length of the header, in words; the packet is 33 bytes long.
        let mut frame = whole.clone();
        frame[ETHERNET] = first;
        match first {
            0x45 => programs.leaves(&frame),
            // With a longer header, words of the UDP header would be options, and the rest is no UDP header.
            _ => _ = programs.stays(&frame, Reason::Malformed),
        }
    }
    let mut frame = programs.to(server6(1)).udp(7, PORT, b"hello");
    for version in [0_u8, 4, 5, 7, 15] {
        frame[ETHERNET] = version << 4;
        programs.stays(&frame, Reason::Malformed);
    }
}

#[test]
fn extension_headers_do_not_hide_ports() {
    let mut programs = Programs::new();
    let kinds = [
        protocol::HOP_BY_HOP,
        protocol::DESTINATION,
        protocol::ROUTING,
    ];
    for kind in kinds {
        for (host, port) in [(1, PORT), (1, PORT + 1), (u16::from(ELSEWHERE), PORT)] {
            let mut to = programs.to(server6(host));
            to = if kind == protocol::ROUTING {
                // Type 0, no segments left.
                to.extension(kind, &[0, 0, 0, 0, 0, 0, 0])
            } else {
                to.padding(kind)
            };
            let frame = to.udp(7, port, b"hello");
            match (host, port) {
                (1, PORT) => programs.leaves(&frame),
                (1, _) => _ = programs.stays(&frame, Reason::PortNotAllowed),
                _ => _ = programs.stays(&frame, Reason::NoRule),
            }
        }
    }
    // One of 16 bytes, and one whose length exceeds the packet.
    let long = [&[1, 1, 12][..], &[0; 12]].concat();
    let to = programs.to(server6(1));
    programs.leaves(
        &to.clone()
            .extension(protocol::DESTINATION, &long)
            .udp(7, PORT, b""),
    );
    let beyond = [0xff, 1, 4, 0, 0, 0, 0];
    programs.stays(
        &to.extension(protocol::DESTINATION, &beyond)
            .udp(7, PORT, b""),
        Reason::Malformed,
    );
}

#[test]
fn a_chain_of_extension_headers_is_parsed_up_to_its_limit() {
    let mut programs = Programs::new();
    for headers in 0..12 {
        let mut to = programs.to(server6(1));
        let mut elsewhere = programs.to(server6(ELSEWHERE.into()));
        for _ in 0..headers {
            to = to.padding(protocol::DESTINATION);
            elsewhere = elsewhere.padding(protocol::DESTINATION);
        }
        if headers < egress_common::limits::EXTENSION_HEADERS {
            programs.leaves(&to.udp(7, PORT, b"hello"));
            programs.stays(&elsewhere.udp(7, PORT, b"hello"), Reason::NoRule);
        } else {
            programs.stays(&to.udp(7, PORT, b"hello"), Reason::Malformed);
        }
    }
    let every = programs
        .to(server6(1))
        .padding(protocol::HOP_BY_HOP)
        .padding(protocol::DESTINATION)
        .extension(protocol::ROUTING, &[0, 4, 0, 0, 0, 0, 0])
        .fragment(1, 0, false)
        .padding(protocol::DESTINATION)
        .udp(7, PORT, b"hello");
    programs.leaves(&every);
    // The UDP header of 8 bytes follows the last extension header.
    for len in IPV6..every.len() {
        programs.stays(&every[..len], Reason::Malformed);
        // The same with a length field that matches the truncation.
        let mut frame = every[..len].to_vec();
        let payload = (len - IPV6) as u16;
        frame[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&payload.to_be_bytes());
        programs.stays(&frame, Reason::Malformed);
    }
}

#[test]
fn a_routing_header_with_segments_left_is_refused() {
    let mut programs = Programs::new();
    let then = server6(ELSEWHERE.into());
    let std::net::IpAddr::V6(then) = then else {
        unreachable!()
    };
    // Routing types 0, 2 and 4 with one segment left (RFC 5095, RFC 6275, RFC 8754).
    for kind in [0, 2, 4] {
        let rest = [&[2, kind, 1, 0, 0, 0, 0][..], &then.octets()].concat();
        let to = programs.to(server6(1)).extension(protocol::ROUTING, &rest);
        programs.stays(&to.udp(7, PORT, b"hello"), Reason::Malformed);
    }
}

#[test]
fn a_jumbogram_is_refused() {
    let mut programs = Programs::new();
    // Jumbo payload (RFC 2675), with the length field at zero as it must be.
    let to = programs
        .to(server6(1))
        .extension(protocol::HOP_BY_HOP, &[0, 0xc2, 4, 0, 1, 0, 0])
        .length(0);
    programs.stays(&to.udp(7, PORT, b"hello"), Reason::Malformed);
}

#[test]
fn tagged_and_foreign_frames_do_not_leave() {
    let mut programs = Programs::new();
    let packet = programs
        .to(server(1))
        .packet(protocol::UDP, &raw::udp(7, PORT, b"hello, whoever you are"));
    let inner = [&ether::IPV4.to_be_bytes()[..], &packet].concat();
    for tag in [ether::VLAN, ether::SERVICE_VLAN] {
        for id in [[0, 0], [0, 5]] {
            let tagged = [&id[..], &inner].concat();
            let denial = programs.stays(&raw::ethernet(tag, &tagged), Reason::Malformed);
            assert_eq!((denial.walked, denial.ether_type), (0, tag));
        }
    }
    // PPPoE, MPLS, EAPOL, LLDP, a length of IEEE 802.3, and IP with the EtherType of the other family.
    for ether_type in [0x8864, 0x8847, 0x888e, 0x88cc, 40, ether::IPV6] {
        programs.stays(&raw::ethernet(ether_type, &packet), Reason::Malformed);
    }
    let packet = programs
        .to(server6(1))
        .packet(protocol::UDP, &raw::udp(7, PORT, b"hello"));
    programs.stays(&raw::ethernet(ether::IPV4, &packet), Reason::Malformed);
}

#[test]
fn invalid_tcp_flags_are_refused() {
    let mut programs = Programs::new();
    let to = programs.to(server(1));
    for flags in 0..=0x3f_u8 {
        let nonsense = flags & flag::SYN != 0 && flags & (flag::FIN | flag::RST) != 0;
        let frame = to.tcp(7, PORT, flags);
        if nonsense {
            programs.stays(&frame, Reason::Malformed);
        } else {
            programs.leaves(&frame);
        }
        let other = programs.to(server(ELSEWHERE)).tcp(7, PORT, flags);
        programs.stays(
            &other,
            if nonsense {
                Reason::Malformed
            } else {
                Reason::NoRule
            },
        );
    }
}

#[test]
fn protocols_without_ports_need_more_than_a_port() {
    let mut programs = Programs::new();
    let others = [
        protocol::IPIP,
        protocol::IPV6,
        protocol::GRE,
        protocol::ESP,
        protocol::AH,
        protocol::MOBILITY,
        protocol::UDP_LITE,
    ];
    // An inner packet that would be allowed, and bytes that look like its ports.
    let inner = raw::udp(7, PORT, b"hello");
    for to in [server(1), server6(1)] {
        for other in others {
            let frame = programs.to(to).frame(other, &inner);
            let denial = programs.stays(&frame, Reason::PortNotAllowed);
            assert_eq!((denial.protocol, denial.dst_port), (other, 0));
        }
    }
    programs.change_policy(|policy| policy.flags |= egress_common::records::POLICY_OPEN);
    for other in others {
        programs.leaves(&programs.to(server(1)).frame(other, &inner));
    }
}

#[test]
fn ping_is_not_every_icmp_message() {
    let mut programs = Programs::new();
    let (v4, v6) = (programs.to(server(1)), programs.to(server6(1)));
    programs.leaves(&v4.echo(7));
    programs.leaves(&v4.echo_reply(7));
    programs.leaves(&v6.echo(7));
    programs.leaves(&v6.echo_reply(7));
    let rest = [0; 32];
    for kind in (0..=u8::MAX).filter(|kind| ![0, 8].contains(kind)) {
        let denial = programs.stays(&v4.icmp(kind, 0, &rest), Reason::PortNotAllowed);
        assert_eq!(denial.icmp_type, kind);
    }
    for kind in (0..=u8::MAX).filter(|kind| ![128, 129].contains(kind)) {
        let frame = v6.icmp(kind, 0, &rest);
        assert_eq!(programs.sends(&frame).run.action, Action::Drop, "{kind}");
    }
    // The other family's ICMP.
    let message = [128, 0, 0, 0, 0, 7, 0, 1];
    programs.stays(&v4.frame(protocol::ICMPV6, &message), Reason::Malformed);
    programs.stays(&v6.frame(protocol::ICMP, &message), Reason::Malformed);
}

#[test]
fn ipv4_mapped_addresses_are_refused() {
    let mut programs = Programs::new();
    let mapped = |host: u8| -> std::net::Ipv6Addr {
        format!("::ffff:203.0.113.{host}")
            .parse()
            .expect("an address")
    };
    for host in [1, ELSEWHERE] {
        let frame = raw::Ip::new(programs.own6(), mapped(host)).udp(7, PORT, b"hello");
        programs.stays(&frame, Reason::Malformed);
    }
    let own = programs.own().to_ipv6_mapped();
    let frame = raw::Ip::new(own, mapped(1)).udp(7, PORT, b"hello");
    programs.stays(&frame, Reason::Malformed);
}

#[test]
fn only_malformed_packets_are_kept_from_the_pod() {
    let mut programs = Programs::new();
    for peer in [server(ELSEWHERE), server6(ELSEWHERE.into())] {
        let by = programs.by(peer);
        programs.arrives(&by.udp(7, 8080, b"hello"));
        programs.arrives(&by.tcp(7, 8080, flag::SYN));
        programs.arrives(&by.frame(protocol::GRE, b"whatever"));
        programs.arrives(&by.icmp(3, 1, &[0; 32]));
        let frame = by.udp(7, 8080, b"hello");
        let denial = programs
            .receives(&frame[..frame.len() - 1])
            .denied(Reason::Malformed);
        assert_eq!(denial.direction, egress_common::records::TO_POD);
    }
}

#[test]
fn the_programs_stay_far_below_the_verifiers_limit() {
    // The verifier's limit is 1,000,000 instructions, and a kernel that prunes less well visits more. If a
    // program comes near its budget, simplify the program; do not raise the budget.
    let mut programs = Programs::new();
    for (hook, budget) in [(Hook::FromPod, 150_000), (Hook::ToPod, 120_000)] {
        let verified = programs.verified_instructions(hook);
        assert!(
            verified <= budget,
            "{hook:?}: {verified} instructions of {budget}"
        );
    }
}
