//! Transport headers: ports, flags, ICMP types.

use super::icmp::{ICMP_ECHO, ICMP_ECHO_REPLY, ICMPV6_ECHO, ICMPV6_ECHO_REPLY};
use super::{Fragment, Frame, Packet, TCP_FIN, TCP_RST, TCP_SYN};
use crate::protocol::{self, bits};

/// Reads ports, flags and types. `offset` is the fragment offset in units of 8 bytes; `end` is the end of the
/// IP packet in the frame.
#[inline(always)]
pub(super) fn walk_transport(
    frame: &impl Frame,
    packet: &mut Packet,
    offset: u16,
    end: u32,
) -> Option<()> {
    let at = packet.l4_offset;
    packet.src_port = 0;
    packet.dst_port = 0;
    packet.bit = 0;
    packet.tcp_flags = 0;
    packet.icmp_type = 0;
    packet.icmp_code = 0;
    if matches!(packet.fragment, Fragment::Later) {
        // A fragment with an offset below 24 bytes could overwrite the TCP header of the first one.
        return if packet.protocol == protocol::TCP && offset < 3 {
            None
        } else {
            Some(())
        };
    }
    match packet.protocol {
        protocol::TCP => {
            if at + 20 > end {
                return None;
            }
            let header = frame.read::<14>(at)?;
            let header_len = u32::from(header[12] >> 4) * 4;
            if header_len < 20 || at + header_len > end {
                return None;
            }
            packet.src_port = u16::from_be_bytes([header[0], header[1]]);
            packet.dst_port = u16::from_be_bytes([header[2], header[3]]);
            packet.tcp_flags = header[13];
            if packet.tcp_flags & TCP_SYN != 0 && packet.tcp_flags & (TCP_FIN | TCP_RST) != 0 {
                return None;
            }
            packet.bit = bits::TCP;
        }
        protocol::UDP => {
            if at + 8 > end {
                return None;
            }
            let header = frame.read::<6>(at)?;
            packet.src_port = u16::from_be_bytes([header[0], header[1]]);
            packet.dst_port = u16::from_be_bytes([header[2], header[3]]);
            let len = u32::from(u16::from_be_bytes([header[4], header[5]]));
            if len < 8 && !frame.is_aggregate() {
                return None;
            }
            if matches!(packet.fragment, Fragment::None) && at + len > end {
                return None;
            }
            packet.bit = bits::UDP;
        }
        protocol::SCTP => {
            if at + 12 > end {
                return None;
            }
            let header = frame.read::<4>(at)?;
            packet.src_port = u16::from_be_bytes([header[0], header[1]]);
            packet.dst_port = u16::from_be_bytes([header[2], header[3]]);
            packet.bit = bits::SCTP;
        }
        protocol::ICMP | protocol::ICMPV6 => {
            if at + 8 > end {
                return None;
            }
            // ICMP is for IPv4 and ICMPv6 for IPv6; no host answers the other combination.
            if (packet.protocol == protocol::ICMP) != (packet.version == 4) {
                return None;
            }
            let header = frame.read::<6>(at)?;
            packet.icmp_type = header[0];
            packet.icmp_code = header[1];
            let echo = if packet.version == 4 {
                matches!(header[0], ICMP_ECHO | ICMP_ECHO_REPLY)
            } else {
                matches!(header[0], ICMPV6_ECHO | ICMPV6_ECHO_REPLY)
            };
            if echo {
                packet.src_port = u16::from_be_bytes([header[4], header[5]]);
                packet.dst_port = packet.src_port;
                packet.bit = bits::ICMP_ECHO;
            } else {
                packet.bit = bits::ICMP_OTHER;
            }
        }
        _ => packet.bit = bits::OTHER,
    }
    Some(())
}
