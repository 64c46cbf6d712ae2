use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::{
    ip::{IPV4_LOOSE_SOURCE_ROUTE, IPV4_STRICT_SOURCE_ROUTE},
    role::ICMPV6_ERROR_FRAME_MAX,
    *,
};
use crate::{
    limits::EXTENSION_HEADERS,
    protocol::{self, bits},
    records::{FLOW_KEY_FLOW, FlowKey},
};

const SRC: [u8; 4] = [10, 1, 1, 2];
const DST: [u8; 4] = [203, 0, 113, 1];
const SRC6: Address = [0xfd, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
const DST6: Address = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

fn ethernet(ether_type: u16, packet: &[u8]) -> Vec<u8> {
    [&[2; 12], &ether_type.to_be_bytes()[..], packet].concat()
}

/// An IPv4 frame: flags and offset, options, protocol, payload.
fn v4(fragment: u16, options: &[u8], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let header_len = 20 + options.len();
    let total = (header_len + payload.len()) as u16;
    let mut packet = vec![0x40 | (header_len / 4) as u8, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 9]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(SRC);
    packet.extend(DST);
    packet.extend(options);
    packet.extend(payload);
    ethernet(ETHER_IPV4, &packet)
}

/// An IPv6 frame: extension headers (kind, and all bytes but the first), protocol, payload.
fn v6(extensions: &[(u8, &[u8])], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut content = Vec::new();
    for (i, (_, rest)) in extensions.iter().enumerate() {
        content.push(extensions.get(i + 1).map_or(protocol, |(kind, _)| *kind));
        content.extend(*rest);
    }
    content.extend(payload);
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((content.len() as u16).to_be_bytes());
    packet.push(extensions.first().map_or(protocol, |(kind, _)| *kind));
    packet.push(64);
    packet.extend(SRC6);
    packet.extend(DST6);
    packet.extend(content);
    ethernet(ETHER_IPV6, &packet)
}

const UDP: [u8; 12] = [0, 7, 0x0f, 0xa0, 0, 12, 0, 0, 1, 2, 3, 4];
const TCP: [u8; 20] = [
    0, 7, 0x0f, 0xa0, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, TCP_SYN, 0xff, 0xff, 0, 0, 0, 0,
];
const ECHO: [u8; 8] = [8, 0, 0, 0, 0, 7, 0, 1];
const ECHO6: [u8; 8] = [128, 0, 0, 0, 0, 7, 0, 1];
const PADDING: [u8; 7] = [0, 1, 4, 0, 0, 0, 0];
const MORE: u16 = 0x2000;

fn arp() -> Vec<u8> {
    let fixed = [0, 1, 8, 0, 6, 4, 0, 1];
    let packet = [&fixed[..], &[2; 6], &SRC, &[0; 6], &DST].concat();
    ethernet(ETHER_ARP, &packet)
}

fn walked(frame: &[u8]) -> (Walked, Packet) {
    let mut packet = Packet::EMPTY;
    let walked = walk(&frame, &mut packet);
    (walked, packet)
}

#[track_caller]
fn read(frame: &[u8]) -> Packet {
    let (walked, packet) = walked(frame);
    assert_eq!(walked, Walked::Ip);
    packet
}

#[track_caller]
fn refused(frame: &[u8]) {
    assert_eq!(walked(frame).0, Walked::Malformed);
}

/// An unfragmented frame of each kind.
fn whole() -> Vec<Vec<u8>> {
    let fragment: &[u8] = &[0, 0, 0, 0, 0, 0, 9];
    let first: &[u8] = &[0, 0, 1, 0, 0, 0, 9];
    let later: &[u8] = &[0, 0, 64, 0, 0, 0, 9];
    vec![
        v4(0, &[], protocol::UDP, &UDP),
        v4(0, &[], protocol::TCP, &TCP),
        v4(0, &[], protocol::SCTP, &UDP),
        v4(0, &[], protocol::ICMP, &ECHO),
        v4(0, &[1, 1, 1, 0], protocol::UDP, &UDP),
        v4(MORE, &[], protocol::UDP, &UDP),
        v4(8, &[], protocol::UDP, &UDP),
        v6(&[], protocol::UDP, &UDP),
        v6(&[], protocol::TCP, &TCP),
        v6(&[], protocol::SCTP, &UDP),
        v6(&[], protocol::ICMPV6, &ECHO6),
        v6(&[(protocol::FRAGMENT, fragment)], protocol::UDP, &UDP),
        v6(&[(protocol::FRAGMENT, first)], protocol::UDP, &UDP),
        v6(&[(protocol::FRAGMENT, later)], protocol::UDP, &UDP),
        v6(
            &[
                (protocol::HOP_BY_HOP, &PADDING),
                (protocol::DESTINATION_OPTIONS, &PADDING),
                (protocol::ROUTING, &[0, 4, 0, 0, 0, 0, 0]),
            ],
            protocol::UDP,
            &UDP,
        ),
    ]
}

#[test]
fn addresses_and_ports_are_read() {
    let packet = read(&v4(0, &[], protocol::UDP, &UDP));
    assert_eq!(packet.src, address::from_v4(SRC));
    assert_eq!(packet.dst, address::from_v4(DST));
    assert_eq!((packet.src_port, packet.dst_port), (7, 4000));
    assert_eq!((packet.version, packet.bit), (4, bits::UDP));
    let packet = read(&v6(&[], protocol::TCP, &TCP));
    assert_eq!((packet.src, packet.dst), (SRC6, DST6));
    assert_eq!((packet.src_port, packet.dst_port), (7, 4000));
    assert_eq!((packet.version, packet.bit), (6, bits::TCP));
    assert!(packet.opens_tcp());
    for frame in [
        v4(0, &[], protocol::ICMP, &ECHO),
        v6(&[], protocol::ICMPV6, &ECHO6),
    ] {
        let packet = read(&frame);
        assert_eq!((packet.src_port, packet.dst_port), (7, 7));
        assert_eq!(packet.bit, bits::ICMP_ECHO);
    }
}

#[test]
fn arp_is_read_when_it_is_whole_and_nothing_more() {
    let whole = arp();
    let (result, packet) = walked(&whole);
    assert_eq!(result, Walked::Arp);
    assert_eq!(packet.src, address::from_v4(SRC));
    assert_eq!(packet.dst, address::from_v4(DST));
    for len in 0..whole.len() {
        assert_eq!(walked(&whole[..len]).0, Walked::NotIp, "{len} bytes");
    }
    let mut long = whole;
    long.resize(ARP_FRAME_MAX as usize, 0);
    assert_eq!(walked(&long).0, Walked::Arp);
    long.push(0);
    assert_eq!(walked(&long).0, Walked::NotIp);
}

#[test]
fn no_cut_frame_is_an_ip_packet() {
    for frame in whole() {
        assert_eq!(walked(&frame).0, Walked::Ip);
        for len in 0..frame.len() {
            assert_ne!(walked(&frame[..len]).0, Walked::Ip, "{len} of {frame:02x?}");
        }
    }
}

#[test]
fn source_routes_are_refused_wherever_they_stand() {
    for route in [IPV4_LOOSE_SOURCE_ROUTE, IPV4_STRICT_SOURCE_ROUTE] {
        for at in 0..40 {
            let mut options = [1; 40];
            options[at] = route;
            refused(&v4(0, &options, protocol::UDP, &UDP));
        }
    }
    read(&v4(0, &[1; 40], protocol::UDP, &UDP));
    // The options end with the header; the datagram follows.
    let mut datagram = UDP;
    datagram[0] = IPV4_LOOSE_SOURCE_ROUTE;
    read(&v4(0, &[1; 4], protocol::UDP, &datagram));
}

#[test]
fn extension_headers_are_walked_up_to_the_bound() {
    for headers in 0..2 * EXTENSION_HEADERS {
        let chain = vec![(protocol::DESTINATION_OPTIONS, &PADDING[..]); headers];
        let frame = v6(&chain, protocol::UDP, &UDP);
        if headers < EXTENSION_HEADERS {
            assert_eq!(read(&frame).dst_port, 4000);
        } else {
            refused(&frame);
        }
    }
    let route: &[u8] = &[0, 0, 1, 0, 0, 0, 0];
    refused(&v6(&[(protocol::ROUTING, route)], protocol::UDP, &UDP));
}

#[test]
fn a_fragment_header_stands_alone_and_next_to_the_transport() {
    let fragment = |flags: u8| [0, 0, flags, 0, 0, 0, 9];
    for (flags, kind) in [
        (0, Fragment::None),
        (1, Fragment::First),
        (64, Fragment::Later),
    ] {
        let bytes = fragment(flags);
        let one = (protocol::FRAGMENT, &bytes[..]);
        let packet = read(&v6(&[one], protocol::UDP, &UDP));
        assert_eq!((packet.fragment, packet.protocol), (kind, protocol::UDP));
        if kind != Fragment::Later {
            refused(&v6(&[one, one], protocol::UDP, &UDP));
        }
        let options = (protocol::DESTINATION_OPTIONS, &PADDING[..]);
        let before = v6(&[options, one], protocol::UDP, &UDP);
        assert_eq!(read(&before).protocol, protocol::UDP);
        let behind = v6(&[one, options], protocol::UDP, &UDP);
        match kind {
            Fragment::None => assert_eq!(read(&behind).dst_port, 4000),
            Fragment::First => refused(&behind),
            // Its key differs from that of any first fragment.
            Fragment::Later => {
                assert_eq!(read(&behind).protocol, protocol::DESTINATION_OPTIONS);
            }
        }
    }
}

#[test]
fn a_tcp_header_is_not_overwritten_by_a_later_fragment() {
    for offset in [1, 2] {
        refused(&v4(offset, &[], protocol::TCP, &TCP));
    }
    assert_eq!(
        read(&v4(3, &[], protocol::TCP, &TCP)).fragment,
        Fragment::Later
    );
    for len in 0..20 {
        refused(&v4(MORE, &[], protocol::TCP, &TCP[..len]));
    }
}

#[test]
fn impossible_flags_are_refused() {
    for flags in 0..=u8::MAX {
        let mut segment = TCP;
        segment[13] = flags;
        let frame = v4(0, &[], protocol::TCP, &segment);
        if flags & TCP_SYN != 0 && flags & (TCP_FIN | TCP_RST) != 0 {
            refused(&frame);
        } else {
            assert_eq!(read(&frame).tcp_flags, flags);
        }
    }
}

#[test]
fn mapped_addresses_are_refused_on_the_wire() {
    let frame = v6(&[], protocol::UDP, &UDP);
    for at in [22, 38] {
        let mut mapped = frame.clone();
        mapped[at..at + 16].copy_from_slice(&address::from_v4(DST));
        refused(&mapped);
    }
}

#[test]
fn an_icmp_error_names_the_flow_it_is_about() {
    /// The packet that came in, as the error quotes it: with source and destination swapped.
    fn quote(frame: &[u8], at: usize, len: usize) -> Vec<u8> {
        let mut packet = frame[14..].to_vec();
        let at = at - 14;
        let (src, dst) = packet[at..at + 2 * len].split_at_mut(len);
        src.swap_with_slice(dst);
        packet
    }
    let incoming = quote(&v4(0, &[], protocol::UDP, &UDP), 26, 4);
    let message = [&[3, 3, 0, 0, 0, 0, 0, 0][..], &incoming].concat();
    let frame = v4(0, &[], protocol::ICMP, &message);
    let packet = read(&frame);
    let expected = FlowKey {
        pod_addr: address::from_v4(SRC),
        peer_addr: address::from_v4(DST),
        pod_port: 4000,
        peer_port: 7,
        protocol: protocol::UDP,
        kind: FLOW_KEY_FLOW,
        pad: 0,
    };
    assert_eq!(packet.quoted_flow(&frame.as_slice()), Some(expected));
    // The pod may not send an error about a packet that went out.
    let outgoing = &v4(0, &[], protocol::UDP, &UDP)[14..];
    let message = [&[3, 3, 0, 0, 0, 0, 0, 0][..], outgoing].concat();
    let frame = v4(0, &[], protocol::ICMP, &message);
    assert_eq!(read(&frame).quoted_flow(&frame.as_slice()), None);

    let incoming = quote(&v6(&[], protocol::UDP, &UDP), 22, 16);
    let message = [&[1, 4, 0, 0, 0, 0, 0, 0][..], &incoming].concat();
    let frame = v6(&[], protocol::ICMPV6, &message);
    let expected = FlowKey {
        pod_addr: SRC6,
        peer_addr: DST6,
        ..expected
    };
    assert_eq!(read(&frame).quoted_flow(&frame.as_slice()), Some(expected));
    // A padded error is too long: it would have more than it may quote.
    let mut long = frame;
    long.resize(ICMPV6_ERROR_FRAME_MAX as usize + 1, 0);
    assert_eq!(read(&long).quoted_flow(&long.as_slice()), None);
}

/// The end of the IP packet in a frame, by its own length field.
fn packet_end(frame: &[u8]) -> usize {
    let field = |at: usize| usize::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
    match ether_type(&frame) {
        ETHER_IPV4 => 14 + field(16),
        _ => 14 + 40 + field(18),
    }
}

/// Asserts the invariants for any frame.
fn check(frame: &[u8]) {
    let (result, packet) = walked(frame);
    if result != Walked::Ip {
        return;
    }
    let end = packet_end(frame);
    assert!(end <= frame.len());
    let at = packet.l4_offset as usize;
    assert!(at <= end);
    if packet.fragment == Fragment::Later {
        assert_eq!((packet.src_port, packet.dst_port, packet.bit), (0, 0, 0));
    } else if packet.bit & bits::WITH_PORTS != 0 {
        assert!(at + 8 <= end, "the ports are in the packet");
        let ports = [packet.src_port.to_be_bytes(), packet.dst_port.to_be_bytes()].concat();
        assert_eq!(frame[at..at + 4], ports);
    } else if packet.bit != bits::ICMP_ECHO {
        assert_eq!((packet.src_port, packet.dst_port), (0, 0));
    }
    let _ = packet.quoted_flow(&frame);
    let _ = packet.neighbour_target(&frame);
    agrees(frame, &packet);
}

/// Asserts that etherparse reads the same, if it can read the frame.
fn agrees(frame: &[u8], packet: &Packet) {
    let Ok(other) = SlicedPacket::from_ethernet(frame) else {
        return;
    };
    let (src, dst, payload, authenticated) = match &other.net {
        Some(NetSlice::Ipv4(ip)) => (
            address::from_v4(ip.header().source()),
            address::from_v4(ip.header().destination()),
            ip.payload(),
            ip.extensions().auth.is_some(),
        ),
        Some(NetSlice::Ipv6(ip)) => (
            ip.header().source(),
            ip.header().destination(),
            ip.payload(),
            ip.extensions()
                .clone()
                .into_iter()
                .any(|e| matches!(e, etherparse::Ipv6ExtensionSlice::Authentication(_))),
        ),
        _ => panic!("etherparse sees no IP in {frame:02x?}"),
    };
    assert_eq!((packet.src, packet.dst), (src, dst));
    // etherparse parses what follows an authentication header, which is a protocol of its own here, and the
    // content of later fragments.
    if authenticated || packet.fragment == Fragment::Later {
        return;
    }
    assert_eq!(packet.protocol, payload.ip_number.0);
    assert_eq!(packet.fragment == Fragment::None, !payload.fragmented);
    match other.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let ports = (tcp.source_port(), tcp.destination_port());
            assert_eq!((packet.src_port, packet.dst_port), ports);
            assert_eq!(packet.opens_tcp(), tcp.syn() && !tcp.ack());
        }
        Some(TransportSlice::Udp(udp)) => {
            let ports = (udp.source_port(), udp.destination_port());
            assert_eq!((packet.src_port, packet.dst_port), ports);
        }
        Some(TransportSlice::Icmpv4(icmp)) => {
            assert_eq!(packet.icmp_type, icmp.type_u8());
            assert_eq!(packet.icmp_code, icmp.code_u8());
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            assert_eq!(packet.icmp_type, icmp.type_u8());
            assert_eq!(packet.icmp_code, icmp.code_u8());
        }
        Some(TransportSlice::Igmp(_)) | None => {}
    }
}

/// A valid frame with a few wrong bytes, cut or lengthened.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..5);
    (
        prop::sample::select(whole()),
        changes,
        0..40_usize,
        0..20_usize,
    )
        .prop_map(|(mut frame, changes, cut, added)| {
            for (at, value) in changes {
                // The EtherType stays unchanged: other frames are not walked.
                let at = at.index(frame.len());
                if !(12..14).contains(&at) {
                    frame[at] = value;
                }
            }
            if cut < 10 {
                frame.truncate(frame.len() - cut);
            }
            frame.extend(vec![0x5a; added]);
            frame
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_are_walked_safely(
        ether_type in prop::sample::select(vec![ETHER_IPV4, ETHER_IPV6, ETHER_ARP]),
        first in prop::sample::select(vec![0x45, 0x46, 0x4f, 0x60]),
        mut bytes in prop::collection::vec(any::<u8>(), 0..120),
    ) {
        if let Some(byte) = bytes.first_mut() {
            *byte = first;
        }
        check(&ethernet(ether_type, &bytes));
    }

    #[test]
    fn damaged_frames_are_read_as_others_read_them(frame in damaged()) {
        check(&frame);
    }
}
