//! Checksums: completes those that the sender left to the hardware, and detects wrong ones.

use egress_common::packet::Packet;
use etherparse::checksum::Sum16BitWords;

/// Completes the UDP checksum of a frame if the field has only the sum of the pseudo-header. A sender leaves
/// that for an interface that would complete it (`CHECKSUM_PARTIAL`, include/linux/skbuff.h). Any other value
/// stays as it is: a wrong checksum must stay wrong, so that the receiver detects it.
pub(super) fn complete_udp(frame: &mut [u8], packet: &Packet) {
    let at = packet.l4_offset as usize;
    let Some(header) = frame.get(at..at + 8) else {
        return;
    };
    let len = u16::from_be_bytes([header[4], header[5]]);
    let pseudo = pseudo_header(packet, len);
    // The sums are in the machine's byte order, in which the frame's words were added.
    let partial = (!pseudo.ones_complement()).to_ne_bytes();
    if header[6..8] != partial {
        return;
    }
    let Some(datagram) = frame.get(at..at + usize::from(len)) else {
        return;
    };
    let Some((header, payload)) = datagram.split_at_checked(8) else {
        return;
    };
    let checksum = pseudo
        .add_slice(&header[..6])
        .add_slice(payload)
        .to_ones_complement_with_no_zero();
    frame[at + 6..at + 8].copy_from_slice(&checksum.to_ne_bytes());
}

/// Whether the checksum of a UDP datagram is right. The datagram's length is that of its own length field.
/// Over IPv4 a checksum of zero means that there is none (RFC 768; RFC 8200, section 8.1).
pub(super) fn is_right_udp(frame: &[u8], packet: &Packet) -> bool {
    let at = packet.l4_offset as usize;
    let Some(len) = frame.get(at + 4..at + 6) else {
        return false;
    };
    let len = u16::from_be_bytes([len[0], len[1]]);
    let Some(datagram) = frame.get(at..at + usize::from(len)) else {
        return false;
    };
    match datagram.get(6..8) {
        None => false,
        Some([0, 0]) => packet.version == 4,
        Some(_) => {
            pseudo_header(packet, len)
                .add_slice(datagram)
                .ones_complement()
                == 0
        }
    }
}

/// The state of a TCP checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checksum {
    /// It is right.
    Whole,
    /// It is only the sum of the pseudo-header; see [`complete_udp`].
    Partial,
    /// It is wrong: the receiver will drop the segment.
    Wrong,
}

/// The state of a segment's TCP checksum. `sum` is the field of its header.
pub(super) fn of_tcp(segment: &[u8], sum: [u8; 2], packet: &Packet) -> Checksum {
    let Ok(len) = u16::try_from(segment.len()) else {
        return Checksum::Wrong;
    };
    let pseudo = pseudo_header(packet, len);
    let partial = (!pseudo.ones_complement()).to_ne_bytes();
    // A segment with a right checksum adds up to all ones (RFC 1071). For one in 65,536 the right checksum
    // equals the sum of the pseudo-header; nothing has to be completed then.
    if pseudo.add_slice(segment).ones_complement() == 0 {
        Checksum::Whole
    } else if sum == partial {
        Checksum::Partial
    } else {
        Checksum::Wrong
    }
}

/// The offset of the checksum in a TCP header.
const TCP_CHECKSUM: usize = 16;

/// Writes the TCP checksum of a frame whose IP packet ends at `end`.
pub(super) fn write_tcp(frame: &mut [u8], end: usize, packet: &Packet) {
    let at = packet.l4_offset as usize;
    let Some(segment) = frame.get_mut(at..end) else {
        return;
    };
    let Ok(len) = u16::try_from(segment.len()) else {
        return;
    };
    let Some(field) = segment.get_mut(TCP_CHECKSUM..TCP_CHECKSUM + 2) else {
        return;
    };
    field.fill(0);
    let checksum = pseudo_header(packet, len)
        .add_slice(segment)
        .ones_complement()
        .to_ne_bytes();
    if let Some(field) = segment.get_mut(TCP_CHECKSUM..TCP_CHECKSUM + 2) {
        field.copy_from_slice(&checksum);
    }
}

/// The checksum of an IPv4 header whose checksum field is zero. Zero if the field has the right checksum.
pub(super) fn of_ipv4_header(header: &[u8]) -> [u8; 2] {
    Sum16BitWords::new()
        .add_slice(header)
        .ones_complement()
        .to_ne_bytes()
}

fn pseudo_header(packet: &Packet, len: u16) -> Sum16BitWords {
    let sum = Sum16BitWords::new();
    let sum = if packet.version == 4 {
        sum.add_slice(&packet.src[12..])
            .add_slice(&packet.dst[12..])
    } else {
        sum.add_slice(&packet.src).add_slice(&packet.dst)
    };
    sum.add_2bytes([0, packet.protocol])
        .add_2bytes(len.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use egress_common::packet::{Walked, walk};
    use etherparse::PacketBuilder;

    use super::*;

    fn frame() -> (Vec<u8>, Packet) {
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 1, 2, 3], [10, 99, 0, 53], 64)
            .udp(40_000, 53);
        let mut frame = Vec::new();
        builder
            .write(&mut frame, b"an odd number of bytes!")
            .unwrap();
        let mut packet = Packet::EMPTY;
        assert_eq!(walk(&frame.as_slice(), &mut packet), Walked::Ip);
        (frame, packet)
    }

    #[test]
    fn a_partial_checksum_becomes_whole() {
        let (whole, packet) = frame();
        let mut partial = whole.clone();
        let at = packet.l4_offset as usize;
        let len = u16::from_be_bytes([whole[at + 4], whole[at + 5]]);
        let sum = !pseudo_header(&packet, len).ones_complement();
        partial[at + 6..at + 8].copy_from_slice(&sum.to_ne_bytes());
        assert_ne!(partial, whole);
        complete_udp(&mut partial, &packet);
        assert_eq!(partial, whole);
    }

    #[test]
    fn a_right_checksum_is_whole_even_when_it_looks_partial() {
        let mut found = 0;
        for payload in 0..=u16::MAX {
            let mut frame = Vec::new();
            PacketBuilder::ethernet2([2; 6], [4; 6])
                .ipv4([10, 1, 2, 3], [10, 99, 0, 53], 64)
                .tcp(40_000, 53, 1, 2)
                .write(&mut frame, &payload.to_be_bytes())
                .unwrap();
            let mut packet = Packet::EMPTY;
            assert_eq!(walk(&frame.as_slice(), &mut packet), Walked::Ip);
            let segment = &frame[packet.l4_offset as usize..];
            let sum = [segment[TCP_CHECKSUM], segment[TCP_CHECKSUM + 1]];
            assert_eq!(of_tcp(segment, sum, &packet), Checksum::Whole);
            let len = segment.len() as u16;
            let partial = !pseudo_header(&packet, len).ones_complement();
            found += u32::from(sum == partial.to_ne_bytes());
        }
        assert!(found > 0, "no payload makes the two the same");
    }

    #[test]
    fn a_udp_checksum_is_right_or_left_out_over_ipv4() {
        let (mut frame, packet) = frame();
        let at = packet.l4_offset as usize;
        assert!(is_right_udp(&frame, &packet));
        let mut damaged = frame.clone();
        damaged[at + 9] ^= 1;
        assert!(!is_right_udp(&damaged, &packet));
        // The length field points beyond the end of the frame.
        let mut longer = frame.clone();
        longer[at + 5] += 1;
        assert!(!is_right_udp(&longer, &packet));
        frame[at + 6..at + 8].fill(0);
        assert!(is_right_udp(&frame, &packet));
        let ipv6 = Packet {
            version: 6,
            ..packet
        };
        assert!(!is_right_udp(&frame, &ipv6));
    }

    #[test]
    fn a_wrong_checksum_stays_wrong() {
        let (mut frame, packet) = frame();
        frame[packet.l4_offset as usize + 7] ^= 0x55;
        let before = frame.clone();
        complete_udp(&mut frame, &packet);
        assert_eq!(frame, before);
    }
}
