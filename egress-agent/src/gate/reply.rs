//! Frames that the gate creates: refusals of queries, and rejections of denied packets.

use egress_common::{
    packet::{Packet, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
    protocol,
};
use etherparse::{PacketBuilder, icmpv4, icmpv6};

/// The hop limit of these frames.
const HOP_LIMIT: u8 = 64;

/// Most bytes of the rejected packet that an ICMP error quotes; well within the 576 bytes of RFC 1812,
/// section 4.3.2.3.
const QUOTED: usize = 128;

/// A UDP datagram back to the sender of `frame`, which `packet` describes.
pub(super) fn udp(frame: &[u8], packet: &Packet, payload: &[u8]) -> Option<Vec<u8>> {
    let (to, from) = macs(frame)?;
    let mut reply = Vec::with_capacity(payload.len() + 64);
    let ethernet = PacketBuilder::ethernet2(from, to);
    let step = if packet.version == 4 {
        ethernet.ipv4(v4(packet.dst), v4(packet.src), HOP_LIMIT)
    } else {
        ethernet.ipv6(packet.dst, packet.src, HOP_LIMIT)
    };
    step.udp(packet.dst_port, packet.src_port)
        .write(&mut reply, payload)
        .ok()?;
    Some(reply)
}

/// A frame that makes the sender of a denied packet give up at once: a reset for TCP, ICMP "communication
/// administratively prohibited" for everything else (RFC 1812, section 5.2.7.1; RFC 4443, section 3.1).
/// `None` when the packet must not be answered: ICMP errors, multicast, broadcast (RFC 1122, section 3.2.2).
pub(super) fn rejection(frame: &[u8], packet: &Packet) -> Option<Vec<u8>> {
    if is_group(packet) || is_icmp_error(packet) {
        return None;
    }
    if packet.protocol == protocol::TCP {
        return reset(frame, packet);
    }
    let (to, from) = macs(frame)?;
    let quoted = frame.get(14..)?;
    let quoted = quoted.get(..QUOTED).unwrap_or(quoted);
    let mut reply = Vec::with_capacity(256);
    let ethernet = PacketBuilder::ethernet2(from, to);
    if packet.version == 4 {
        let prohibited = icmpv4::DestUnreachableHeader::FilterProhibited;
        ethernet
            .ipv4(v4(packet.dst), v4(packet.src), HOP_LIMIT)
            .icmpv4(etherparse::Icmpv4Type::DestinationUnreachable(prohibited))
            .write(&mut reply, quoted)
            .ok()?;
    } else {
        let prohibited = icmpv6::DestUnreachableCode::Prohibited;
        ethernet
            .ipv6(packet.dst, packet.src, HOP_LIMIT)
            .icmpv6(etherparse::Icmpv6Type::DestinationUnreachable(prohibited))
            .write(&mut reply, quoted)
            .ok()?;
    }
    Some(reply)
}

/// A reset that the sender accepts (RFC 9293, section 3.5.2).
fn reset(frame: &[u8], packet: &Packet) -> Option<Vec<u8>> {
    if packet.tcp_flags & TCP_RST != 0 {
        return None;
    }
    let (to, from) = macs(frame)?;
    let header = frame.get(packet.l4_offset as usize..)?;
    let field = |at: usize| -> Option<u32> {
        Some(u32::from_be_bytes(header.get(at..at + 4)?.try_into().ok()?))
    };
    let (sequence, acknowledgment) = (field(4)?, field(8)?);
    let ethernet = PacketBuilder::ethernet2(from, to);
    let step = if packet.version == 4 {
        ethernet.ipv4(v4(packet.dst), v4(packet.src), HOP_LIMIT)
    } else {
        ethernet.ipv6(packet.dst, packet.src, HOP_LIMIT)
    };
    let step = if packet.tcp_flags & TCP_ACK != 0 {
        step.tcp(packet.dst_port, packet.src_port, acknowledgment, 0)
            .rst()
    } else {
        let flags = [TCP_SYN, TCP_FIN]
            .iter()
            .filter(|&&flag| packet.tcp_flags & flag != 0)
            .count() as u32;
        let length = tcp_payload_len(frame, packet)?;
        let acknowledged = sequence.wrapping_add(length).wrapping_add(flags);
        step.tcp(packet.dst_port, packet.src_port, 0, 0)
            .rst()
            .ack(acknowledged)
    };
    let mut reply = Vec::with_capacity(64);
    step.write(&mut reply, &[]).ok()?;
    Some(reply)
}

/// The length of the TCP payload according to the IP header: the ring may have only the beginning of the
/// frame.
fn tcp_payload_len(frame: &[u8], packet: &Packet) -> Option<u32> {
    let word = |at: usize| -> Option<u32> {
        Some(u32::from(u16::from_be_bytes(
            frame.get(at..at + 2)?.try_into().ok()?,
        )))
    };
    let end = if packet.version == 4 {
        14 + word(14 + 2)?
    } else {
        14 + 40 + word(14 + 4)?
    };
    let header = u32::from(*frame.get(packet.l4_offset as usize + 12)? >> 4) * 4;
    Some(end.saturating_sub(packet.l4_offset + header))
}

fn is_group(packet: &Packet) -> bool {
    if packet.version == 4 {
        let first = packet.dst[12];
        first >= 224
    } else {
        packet.dst[0] == 0xff
    }
}

fn is_icmp_error(packet: &Packet) -> bool {
    match packet.protocol {
        // Destination unreachable, source quench, redirect, time exceeded, parameter problem.
        protocol::ICMP => matches!(packet.icmp_type, 3 | 4 | 5 | 11 | 12),
        protocol::ICMPV6 => packet.icmp_type < 128 || packet.icmp_type == 137,
        _ => false,
    }
}

/// Source and destination MAC addresses of a frame.
fn macs(frame: &[u8]) -> Option<([u8; 6], [u8; 6])> {
    let destination = frame.get(0..6)?.try_into().ok()?;
    let source = frame.get(6..12)?.try_into().ok()?;
    Some((source, destination))
}

fn v4(address: [u8; 16]) -> [u8; 4] {
    [address[12], address[13], address[14], address[15]]
}

#[cfg(test)]
mod tests {
    use egress_common::packet::{Walked, walk};

    use super::*;

    fn walked(frame: &[u8]) -> Packet {
        let mut packet = Packet::EMPTY;
        assert_eq!(walk(&frame, &mut packet), Walked::Ip);
        packet
    }

    fn syn() -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 1, 2, 3], [203, 0, 113, 7], 64)
            .tcp(40_000, 443, 1000, 65_000)
            .syn()
            .write(&mut frame, &[])
            .unwrap();
        frame
    }

    #[test]
    fn a_syn_is_reset_with_the_acknowledgment_that_its_sender_accepts() {
        let frame = syn();
        let reply = rejection(&frame, &walked(&frame)).unwrap();
        let packet = walked(&reply);
        assert_eq!(packet.tcp_flags, TCP_RST | TCP_ACK);
        assert_eq!((packet.src_port, packet.dst_port), (443, 40_000));
        let at = packet.l4_offset as usize;
        assert_eq!(reply[at + 8..at + 12], 1001u32.to_be_bytes());
        assert_eq!(reply[0..6], [2; 6], "the reset goes back to the sender");
    }

    #[test]
    fn a_reset_and_an_icmp_error_are_not_answered() {
        let mut frame = syn();
        let packet = Packet {
            tcp_flags: TCP_RST,
            ..walked(&frame)
        };
        assert!(rejection(&frame, &packet).is_none());
        frame.clear();
        let error = icmpv4::DestUnreachableHeader::Port;
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 1, 2, 3], [203, 0, 113, 7], 64)
            .icmpv4(etherparse::Icmpv4Type::DestinationUnreachable(error))
            .write(&mut frame, &[0; 28])
            .unwrap();
        assert!(rejection(&frame, &walked(&frame)).is_none());
    }
}
