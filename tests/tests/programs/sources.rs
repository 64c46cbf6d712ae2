//! The source addresses from which a pod may send, and the link-local messages that IPv6 and ARP need.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use egress_common::reason::Reason;
use egress_tests::{
    addresses::{RESOLVER, server, server6},
    programs::{PORT, Programs},
    raw::{self, Ip, ether, protocol},
};

const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const MLD_REPORT: u8 = 131;
const MLD_DONE: u8 = 132;
const MLD2_REPORT: u8 = 143;

/// The pod's link-local address, and the node's.
const LINK: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const NODE_LINK: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// The node's address on the pod's network, and a neighbouring pod's.
const NODE: Ipv6Addr = Ipv6Addr::new(0xfd01, 1, 0, 0, 0, 0, 0, 1);
const NEIGHBOUR: Ipv6Addr = Ipv6Addr::new(0xfd01, 1, 0, 0, 0, 0, 0, 3);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
const ALL_MLD2_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x16);

/// The solicited-node multicast group of an address (RFC 4291, section 2.7.1).
fn solicited(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b] = address.segments();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | a & 0xff, b)
}

/// A neighbour discovery message with its target and a link-layer address option.
fn neighbour(src: Ipv6Addr, dst: Ipv6Addr, kind: u8, target: Ipv6Addr) -> Vec<u8> {
    let option = [
        if kind == SOLICITATION { 1 } else { 2 },
        1,
        2,
        0,
        0,
        0,
        0,
        2,
    ];
    let rest = [&[0; 4][..], &target.octets(), &option].concat();
    Ip::new(src, dst).hops(255).icmp(kind, 0, &rest)
}

#[test]
fn a_packet_from_a_forged_source_does_not_leave() {
    let mut programs = Programs::new();
    let forged = |programs: &mut Programs, src: &str, to: IpAddr| {
        let src: IpAddr = src.parse().expect("an address");
        let denial = programs.stays(
            &Ip::new(src, to).udp(7, PORT, b"forged"),
            Reason::SpoofedSource,
        );
        assert_eq!(denial.walked, 1);
    };
    for src in [
        "10.1.1.3",
        "10.99.0.53",
        "127.0.0.1",
        "0.0.0.0",
        "203.0.113.1",
    ] {
        forged(&mut programs, src, server(1));
        forged(&mut programs, src, RESOLVER);
    }
    for src in [
        "fd01:1::3",
        "::1",
        "::",
        "fe80::2",
        "::10.1.1.2",
        "2001:db8::1",
    ] {
        forged(&mut programs, src, server6(1));
    }
    // The source is checked before ports and rules, and behind any header options.
    let other: IpAddr = Ipv4Addr::new(10, 1, 1, 3).into();
    let options = Ip::new(other, server(1)).options(&[1, 1, 1, 0]);
    programs.stays(&options.udp(7, PORT, b"forged"), Reason::SpoofedSource);
    let later = Ip::new(other, server(1)).fragment(1, 800, false);
    programs.stays(
        &later.frame(protocol::UDP, b"forged"),
        Reason::SpoofedSource,
    );
}

#[test]
fn a_pod_without_addresses_sends_nothing() {
    let mut programs = Programs::new();
    programs.change_policy(|policy| policy.own_len = 0);
    let frame = programs.to(server(1)).udp(7, PORT, b"hello");
    programs.stays(&frame, Reason::SpoofedSource);
    let (own, node) = (programs.own(), Ipv4Addr::new(10, 1, 1, 1));
    programs.stays(&raw::arp(own, node), Reason::SpoofedSource);
}

#[test]
fn arp_is_allowed_only_from_the_pods_own_address() {
    let mut programs = Programs::new();
    let (own, node) = (programs.own(), Ipv4Addr::new(10, 1, 1, 1));
    programs.leaves(&raw::arp(own, node));
    // A gratuitous ARP, and the probe before an address is used (RFC 5227).
    programs.leaves(&raw::arp(own, own));
    programs.leaves(&raw::arp(Ipv4Addr::UNSPECIFIED, own));
    for other in [
        node,
        Ipv4Addr::new(10, 1, 1, 3),
        Ipv4Addr::new(10, 99, 0, 53),
    ] {
        let denial = programs.stays(&raw::arp(other, own), Reason::SpoofedSource);
        assert_eq!(denial.ether_type, ether::ARP);
    }
    programs.arrives(&raw::arp(node, own));
}

#[test]
fn arp_cannot_carry_other_data() {
    let mut programs = Programs::new();
    let whole = raw::arp(programs.own(), Ipv4Addr::new(10, 1, 1, 1));
    let mut padded = whole.clone();
    padded.resize(60, 0);
    programs.leaves(&padded);
    padded.resize(65, 0x5a);
    programs.stays(&padded, Reason::Malformed);
    padded.resize(1400, 0x5a);
    programs.stays(&padded, Reason::Malformed);
    for len in raw::ETHERNET..whole.len() {
        programs.stays(&whole[..len], Reason::Malformed);
    }
    for at in 14..20 {
        // Another kind of hardware, protocol or address length.
        let mut other = whole.clone();
        other[at] ^= 0x11;
        programs.stays(&other, Reason::Malformed);
    }
}

#[test]
fn neighbour_discovery_works_on_the_link() {
    let mut programs = Programs::new();
    let own = programs.own6();
    // Duplicate address detection, then solicitations from either address (RFC 4862, RFC 4861).
    programs.leaves(&neighbour(
        Ipv6Addr::UNSPECIFIED,
        solicited(own),
        SOLICITATION,
        own,
    ));
    programs.leaves(&neighbour(LINK, solicited(NODE), SOLICITATION, NODE));
    programs.leaves(&neighbour(own, solicited(NODE), SOLICITATION, NODE));
    programs.leaves(&neighbour(own, NODE_LINK, SOLICITATION, NODE_LINK));
    programs.leaves(&neighbour(own, NODE_LINK, ADVERTISEMENT, own));
    programs.leaves(&neighbour(LINK, ALL_NODES, ADVERTISEMENT, LINK));
    let solicits = Ip::new(LINK, ALL_ROUTERS).hops(255);
    programs.leaves(&solicits.icmp(ROUTER_SOLICITATION, 0, &[0; 4]));
    // A report of MLDv2 comes with a router alert (RFC 3810, section 5).
    let report = Ip::new(LINK, ALL_MLD2_ROUTERS)
        .hops(1)
        .extension(protocol::HOP_BY_HOP, &[0, 5, 2, 0, 0, 1, 0]);
    programs.leaves(&report.icmp(MLD2_REPORT, 0, &[0; 24]));
    for kind in [MLD_REPORT, MLD_DONE] {
        let report = Ip::new(LINK, ALL_ROUTERS).hops(1);
        programs.leaves(&report.icmp(kind, 0, &[0; 20]));
    }
}

#[test]
fn a_pod_cannot_act_as_a_router() {
    let mut programs = Programs::new();
    let own = programs.own6();
    for dst in [ALL_NODES, NODE_LINK] {
        for kind in [ROUTER_ADVERTISEMENT, REDIRECT] {
            let from_own = Ip::new(own, dst).hops(255).icmp(kind, 0, &[0; 36]);
            programs.stays(&from_own, Reason::Protected);
            let from_link = Ip::new(LINK, dst).hops(255).icmp(kind, 0, &[0; 36]);
            programs.stays(&from_link, Reason::SpoofedSource);
        }
    }
}

#[test]
fn an_advertisement_of_another_address_does_not_leave() {
    let mut programs = Programs::new();
    let own = programs.own6();
    for target in [NODE, NEIGHBOUR, Ipv6Addr::UNSPECIFIED] {
        for src in [own, LINK] {
            for dst in [ALL_NODES, NODE_LINK] {
                let frame = neighbour(src, dst, ADVERTISEMENT, target);
                programs.stays(&frame, Reason::SpoofedSource);
            }
        }
    }
    // A message without a target.
    let frame = Ip::new(own, ALL_NODES)
        .hops(255)
        .icmp(ADVERTISEMENT, 0, &[0; 4]);
    programs.stays(&frame, Reason::SpoofedSource);
}

#[test]
fn link_messages_stay_on_the_link() {
    let mut programs = Programs::new();
    let own = programs.own6();
    let IpAddr::V6(far) = server6(9) else {
        unreachable!()
    };
    for kind in [SOLICITATION, ADVERTISEMENT] {
        let frame = neighbour(own, far, kind, own);
        programs.stays(&frame, Reason::NoRule);
        let frame = neighbour(LINK, far, kind, own);
        programs.stays(&frame, Reason::SpoofedSource);
    }
    // A group that routers forward (site-local scope), and a message that a router has forwarded.
    let site = Ipv6Addr::new(0xff05, 0, 0, 0, 0, 0, 0, 2);
    let frame = Ip::new(own, site)
        .hops(255)
        .icmp(ROUTER_SOLICITATION, 0, &[0; 4]);
    programs.stays(&frame, Reason::Protected);
    let frame = Ip::new(own, ALL_ROUTERS)
        .hops(254)
        .icmp(ROUTER_SOLICITATION, 0, &[0; 4]);
    programs.stays(&frame, Reason::Protected);
    // A fragmented message (RFC 6980).
    let frame = Ip::new(own, ALL_ROUTERS)
        .hops(255)
        .fragment(1, 0, true)
        .icmp(ROUTER_SOLICITATION, 0, &[0; 4]);
    programs.stays(&frame, Reason::Protected);
}

#[test]
fn the_pod_may_answer_solicitations_from_every_address_of_the_node() {
    let mut programs = Programs::new();
    let own = programs.own6();
    let answer = neighbour(own, NODE, ADVERTISEMENT, own);
    programs.stays(&answer, Reason::NoRule);
    programs.arrives(&neighbour(NODE, solicited(own), SOLICITATION, own));
    programs.leaves(&answer);
    // From now on the pod may check that the node is still reachable (RFC 4861, section 7.3), and nothing
    // else.
    programs.leaves(&neighbour(own, NODE, SOLICITATION, NODE));
    let other = Ip::new(own, NODE).hops(255);
    programs.stays(
        &other.icmp(ROUTER_ADVERTISEMENT, 0, &[0; 36]),
        Reason::NoRule,
    );
    programs.stays(&other.echo(7), Reason::NoRule);
    programs.stays(&other.udp(7, PORT, b"hello"), Reason::NoRule);
    programs.stays(
        &neighbour(own, NODE, ADVERTISEMENT, NEIGHBOUR),
        Reason::SpoofedSource,
    );
}

#[test]
fn an_answered_solicitation_makes_a_neighbour() {
    let mut programs = Programs::new();
    let own = programs.own6();
    let check = neighbour(own, NODE, SOLICITATION, NODE);
    programs.leaves(&neighbour(own, solicited(NODE), SOLICITATION, NODE));
    programs.arrives(&neighbour(NODE, own, ADVERTISEMENT, NODE));
    programs.leaves(&check);
}

#[test]
fn a_forwarded_solicitation_makes_no_neighbour() {
    let mut programs = Programs::new();
    let own = programs.own6();
    let IpAddr::V6(far) = server6(9) else {
        unreachable!()
    };
    let mut frame = neighbour(far, own, SOLICITATION, own);
    frame[raw::ETHERNET + 7] = 254; // a router has forwarded it
    programs.arrives(&frame);
    programs.stays(&neighbour(own, far, ADVERTISEMENT, own), Reason::NoRule);
    assert!(programs.flows().is_empty());
}
