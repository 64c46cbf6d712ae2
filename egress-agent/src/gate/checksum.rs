//! Completing a UDP checksum that the sender left to the hardware.

use egress_common::packet::Packet;
use etherparse::checksum::Sum16BitWords;

/// Makes the UDP checksum of a frame whole when it is only the sum of the pseudo-header, which is
/// what a sender leaves there for an interface that would complete it (`CHECKSUM_PARTIAL`,
/// include/linux/skbuff.h). Any other value stays as it is: a checksum that is wrong must stay
/// wrong, so that the receiver sees it.
pub(super) fn complete_udp(frame: &mut [u8], packet: &Packet) {
    let at = packet.l4_offset as usize;
    let Some(header) = frame.get(at..at + 8) else {
        return;
    };
    let len = u16::from_be_bytes([header[4], header[5]]);
    let pseudo = pseudo_header(packet, len);
    // The sums are in the order of the machine's bytes, as the frame's words were added.
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

fn pseudo_header(packet: &Packet, udp_len: u16) -> Sum16BitWords {
    let sum = Sum16BitWords::new();
    let sum = if packet.version == 4 {
        sum.add_slice(&packet.src[12..])
            .add_slice(&packet.dst[12..])
    } else {
        sum.add_slice(&packet.src).add_slice(&packet.dst)
    };
    sum.add_2bytes([0, packet.protocol])
        .add_2bytes(udp_len.to_be_bytes())
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
    fn a_wrong_checksum_stays_wrong() {
        let (mut frame, packet) = frame();
        frame[packet.l4_offset as usize + 7] ^= 0x55;
        let before = frame.clone();
        complete_udp(&mut frame, &packet);
        assert_eq!(frame, before);
    }
}
