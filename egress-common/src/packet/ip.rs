//! IPv4 and IPv6 headers, their options and extensions.

use super::{ETHERNET_LEN, Fragment, Frame, Packet, transport::walk_transport};
use crate::{address, limits::EXTENSION_HEADERS, protocol};

pub(super) const IPV4_LOOSE_SOURCE_ROUTE: u8 = 131;
pub(super) const IPV4_STRICT_SOURCE_ROUTE: u8 = 137;

#[inline(always)]
pub(super) fn walk_ipv4(frame: &impl Frame, packet: &mut Packet) -> Option<()> {
    let header = frame.read::<20>(ETHERNET_LEN)?;
    let header_len = u32::from(header[0] & 0x0f) * 4;
    let flags_and_offset = u16::from_be_bytes([header[6], header[7]]);
    let more = flags_and_offset & 0x2000 != 0;
    let offset = flags_and_offset & 0x1fff;
    // The fields are copied at once: header bytes that are kept until later take room on the small stack.
    packet.src = address::from_v4([header[12], header[13], header[14], header[15]]);
    packet.dst = address::from_v4([header[16], header[17], header[18], header[19]]);
    packet.l4_offset = ETHERNET_LEN + header_len;
    packet.fragment_id = u32::from(u16::from_be_bytes([header[4], header[5]]));
    packet.fragment = fragment(offset, more);
    packet.protocol = header[9];
    packet.hop_limit = header[8];
    packet.version = 4;
    if header[0] >> 4 != 4 || header_len < 20 {
        return None;
    }
    let total_len = u32::from(u16::from_be_bytes([header[2], header[3]]));
    let end = if total_len == 0 && frame.is_aggregate() {
        frame.len()
    } else {
        ETHERNET_LEN + total_len
    };
    if end > frame.len() || ETHERNET_LEN + header_len > end {
        return None;
    }
    if header_len > 20 {
        walk_ipv4_options(frame, header_len)?;
    }
    walk_transport(frame, packet, offset, end)
}

/// Refuses source routes among the options (RFC 791, section 3.1).
///
/// Each byte is treated as if an option began there: an exact walk has more paths than the verifier explores.
/// Packets with options are so rare that one may be refused for a byte that only looks like a source route.
#[inline(always)]
fn walk_ipv4_options(frame: &impl Frame, header_len: u32) -> Option<()> {
    let mut word = 5;
    while word < 15 {
        let at = word * 4;
        if at >= header_len {
            return Some(());
        }
        let option = frame.read::<4>(ETHERNET_LEN + at)?;
        let mut i = 0;
        while i < 4 {
            if matches!(
                option[i],
                IPV4_LOOSE_SOURCE_ROUTE | IPV4_STRICT_SOURCE_ROUTE
            ) {
                return None;
            }
            i += 1;
        }
        word += 1;
    }
    Some(())
}

#[inline(always)]
pub(super) fn walk_ipv6(frame: &impl Frame, packet: &mut Packet) -> Option<()> {
    let header = frame.read::<8>(ETHERNET_LEN)?;
    packet.hop_limit = header[7];
    packet.version = 6;
    if header[0] >> 4 != 6 {
        return None;
    }
    let payload_len = u32::from(u16::from_be_bytes([header[4], header[5]]));
    let end = if payload_len == 0 && frame.is_aggregate() {
        frame.len()
    } else {
        ETHERNET_LEN + 40 + payload_len
    };
    if end > frame.len() {
        return None;
    }
    packet.src = frame.read::<16>(ETHERNET_LEN + 8)?;
    packet.dst = frame.read::<16>(ETHERNET_LEN + 24)?;
    // A mapped address on the wire would be mistaken for the IPv4 address in the maps. No such packet is
    // legitimate (RFC 4942, section 2.2).
    if address::is_v4(&packet.src) || address::is_v4(&packet.dst) {
        return None;
    }
    let mut protocol = header[6];
    let mut at = ETHERNET_LEN + 40;
    let mut fragment_kind = Fragment::None;
    let mut fragment_id = 0;
    let mut fragment_offset = 0;
    let mut has_fragment_header = false;
    let mut walked = 0;
    while walked < EXTENSION_HEADERS {
        match protocol {
            protocol::HOP_BY_HOP | protocol::DESTINATION_OPTIONS | protocol::ROUTING => {
                let extension = frame.read::<4>(at)?;
                // Segments left: the packet would be forwarded to another destination than its header has.
                if protocol == protocol::ROUTING && extension[3] != 0 {
                    return None;
                }
                protocol = extension[0];
                at += (u32::from(extension[1]) + 1) * 8;
            }
            protocol::FRAGMENT => {
                let extension = frame.read::<8>(at)?;
                // A second fragment header is refused even if the first one makes no fragment (RFC 6946).
                if has_fragment_header {
                    return None;
                }
                has_fragment_header = true;
                let offset_and_flags = u16::from_be_bytes([extension[2], extension[3]]);
                fragment_offset = offset_and_flags >> 3;
                fragment_kind = fragment(fragment_offset, offset_and_flags & 1 != 0);
                fragment_id =
                    u32::from_be_bytes([extension[4], extension[5], extension[6], extension[7]]);
                protocol = extension[0];
                at += 8;
                // A later fragment has an arbitrary part of the datagram here. In a first fragment the
                // transport header must follow, which no later fragment can overwrite (RFC 7112 requires the
                // whole header chain; no ordinary stack puts extension headers behind the fragment header).
                if !matches!(fragment_kind, Fragment::None) {
                    break;
                }
            }
            _ => break,
        }
        walked += 1;
    }
    if walked == EXTENSION_HEADERS || at > end {
        return None;
    }
    if matches!(fragment_kind, Fragment::First) && is_extension(protocol) {
        return None;
    }
    packet.l4_offset = at;
    packet.fragment_id = fragment_id;
    packet.fragment = fragment_kind;
    packet.protocol = protocol;
    walk_transport(frame, packet, fragment_offset, end)
}

#[inline(always)]
const fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        protocol::HOP_BY_HOP
            | protocol::DESTINATION_OPTIONS
            | protocol::ROUTING
            | protocol::FRAGMENT
    )
}

#[inline(always)]
const fn fragment(offset: u16, more: bool) -> Fragment {
    if offset != 0 {
        Fragment::Later
    } else if more {
        Fragment::First
    } else {
        Fragment::None
    }
}
