//! The short walk, for the form that most packets have.

use super::{
    ETHER_IPV4, ETHER_IPV6, ETHERNET_LEN, Frame, Packet, TCP_SYN, ether_type,
    role::{TCP_CHECKSUM, UDP_CHECKSUM},
};
use crate::{
    address,
    protocol::{self, bits},
    records::{FLOW_KEY_FLOW, FlowKey},
};

/// The offset of the transport header after an IPv4 header without options.
const BEHIND_IPV4: u32 = ETHERNET_LEN + 20;
/// The same after an IPv6 header without extension headers.
const BEHIND_IPV6: u32 = ETHERNET_LEN + 40;

/// The fields of a packet that a flow needs to recognise it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plain {
    /// The key of its flow, as for a packet from the pod.
    pub key: FlowKey,
    /// TCP flags, or 0.
    pub tcp_flags: u8,
    /// The bit of [`bits`] for its protocol.
    pub bit: u8,
    /// The offset of its checksum field from the start of the frame.
    pub checksum: u32,
}

impl Plain {
    /// An empty record.
    pub const EMPTY: Self = Self {
        key: Packet::EMPTY.flow_from_pod(),
        tcp_flags: 0,
        bit: 0,
        checksum: 0,
    };

    /// See [`Packet::earliest_checksum`].
    #[inline(always)]
    pub const fn earliest_checksum(&self) -> Option<u32> {
        Some(self.checksum)
    }
}

/// Walks the headers of a plain packet: an unfragmented TCP or UDP packet that opens no connection, without
/// IP options or extension headers. Returns `false` for every other frame, including malformed ones;
/// [`walk`](super::walk) then classifies it. For plain packets both walks agree.
///
/// All offsets are constants, so that a program can read the packet in place.
#[inline(always)]
pub fn walk_plain(frame: &impl Frame, plain: &mut Plain) -> bool {
    if frame.is_tagged() {
        return false;
    }
    let walked = match ether_type(frame) {
        ETHER_IPV4 => plain_ipv4(frame, plain),
        ETHER_IPV6 => plain_ipv6(frame, plain),
        _ => None,
    };
    walked.is_some()
}

#[inline(always)]
fn plain_ipv4(frame: &impl Frame, plain: &mut Plain) -> Option<()> {
    let header = frame.read::<20>(ETHERNET_LEN)?;
    let total_len = u32::from(u16::from_be_bytes([header[2], header[3]]));
    let is_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    if header[0] != 0x45 || is_fragment {
        return None;
    }
    let key = &mut plain.key;
    key.pod_addr = address::from_v4([header[12], header[13], header[14], header[15]]);
    key.peer_addr = address::from_v4([header[16], header[17], header[18], header[19]]);
    key.protocol = header[9];
    plain_transport::<BEHIND_IPV4>(frame, plain, ETHERNET_LEN + total_len)
}

#[inline(always)]
fn plain_ipv6(frame: &impl Frame, plain: &mut Plain) -> Option<()> {
    let header = frame.read::<40>(ETHERNET_LEN)?;
    let payload_len = u32::from(u16::from_be_bytes([header[4], header[5]]));
    if header[0] >> 4 != 6 {
        return None;
    }
    let key = &mut plain.key;
    key.pod_addr = frame.read(ETHERNET_LEN + 8)?;
    key.peer_addr = frame.read(ETHERNET_LEN + 24)?;
    if address::is_v4(&key.pod_addr) || address::is_v4(&key.peer_addr) {
        return None;
    }
    key.protocol = header[6];
    plain_transport::<BEHIND_IPV6>(frame, plain, BEHIND_IPV6 + payload_len)
}

/// `end` is the end of the IP packet in the frame.
#[inline(always)]
fn plain_transport<const AT: u32>(frame: &impl Frame, plain: &mut Plain, end: u32) -> Option<()> {
    if end > frame.len() {
        return None;
    }
    let key = &mut plain.key;
    let ports = match key.protocol {
        protocol::TCP => {
            let header = frame.read::<14>(AT)?;
            let header_len = u32::from(header[12] >> 4) * 4;
            plain.tcp_flags = header[13];
            if header_len < 20 || AT + header_len > end || plain.tcp_flags & TCP_SYN != 0 {
                return None;
            }
            plain.bit = bits::TCP;
            plain.checksum = AT + TCP_CHECKSUM;
            [header[0], header[1], header[2], header[3]]
        }
        protocol::UDP => {
            let header = frame.read::<6>(AT)?;
            let len = u32::from(u16::from_be_bytes([header[4], header[5]]));
            if len < 8 || AT + len > end {
                return None;
            }
            plain.tcp_flags = 0;
            plain.bit = bits::UDP;
            plain.checksum = AT + UDP_CHECKSUM;
            [header[0], header[1], header[2], header[3]]
        }
        _ => return None,
    };
    key.pod_port = u16::from_be_bytes([ports[0], ports[1]]);
    key.peer_port = u16::from_be_bytes([ports[2], ports[3]]);
    key.kind = FLOW_KEY_FLOW;
    key.pad = 0;
    Some(())
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;
    use crate::packet::{Fragment, Walked, walk};

    /// A frame of an open connection or of UDP, over IPv4 or IPv6.
    fn frames() -> impl Strategy<Value = Vec<u8>> {
        let ports = any::<(u16, u16)>();
        let payload = prop::collection::vec(any::<u8>(), 0..20);
        (any::<bool>(), any::<bool>(), ports, payload).prop_map(|(v6, tcp, (from, to), payload)| {
            let link = PacketBuilder::ethernet2([2; 6], [4; 6]);
            let step = if v6 {
                link.ipv6([0xfd; 16], [0x20; 16], 64)
            } else {
                link.ipv4([10, 0, 0, 2], [203, 0, 113, 1], 64)
            };
            let mut frame = Vec::new();
            if tcp {
                step.tcp(from, to, 1, 2).ack(3).write(&mut frame, &payload)
            } else {
                step.udp(from, to).write(&mut frame, &payload)
            }
            .expect("a frame in memory");
            frame
        })
    }

    fn check(frame: &[u8]) -> Result<bool, TestCaseError> {
        let mut plain = Plain::EMPTY;
        if !walk_plain(&frame, &mut plain) {
            return Ok(false);
        }
        let mut packet = Packet::EMPTY;
        prop_assert_eq!(walk(&frame, &mut packet), Walked::Ip);
        prop_assert_eq!(plain.key, packet.flow_from_pod());
        prop_assert_eq!(plain.tcp_flags, packet.tcp_flags);
        prop_assert_eq!(plain.bit, packet.bit);
        prop_assert_eq!(plain.earliest_checksum(), packet.earliest_checksum());
        prop_assert_eq!(packet.fragment, Fragment::None);
        prop_assert!(packet.may_follow_flow());
        Ok(true)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn most_packets_are_plain(frame in frames()) {
            prop_assert!(check(&frame)?);
        }

        #[test]
        fn the_short_walk_reads_the_same_as_the_full_walk(
            frame in frames(),
            changes in prop::collection::vec((0..74usize, any::<u8>()), 1..4),
            cut in prop::option::of(0..90usize),
        ) {
            let mut frame = frame;
            for (at, byte) in changes {
                if let Some(place) = frame.get_mut(at) {
                    *place = byte;
                }
            }
            frame.truncate(cut.unwrap_or(frame.len()));
            check(&frame)?;
        }
    }
}
