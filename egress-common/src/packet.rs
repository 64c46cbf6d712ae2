//! The header walk: from an Ethernet frame to who speaks to whom.
//!
//! It is strict. What a receiver might read differently than we do is malformed: truncated headers,
//! source routes (they hide the final destination), first fragments without a whole transport
//! header and later fragments that could overwrite one (RFC 3128, RFC 7112).

use crate::{
    address::{self, Address},
    limits::EXTENSION_HEADERS,
    protocol::{self, bits},
    records::{FLOW_KEY_FLOW, FLOW_KEY_FRAGMENT, FlowKey},
};

/// Length of an Ethernet header without tags.
pub const ETHERNET_LEN: u32 = 14;
/// EtherType of IPv4.
pub const ETHER_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ETHER_ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const ETHER_IPV6: u16 = 0x86dd;

/// Longest ARP frame that passes: the smallest Ethernet frame with a little room for trailers. An
/// ARP packet for IPv4 is 28 bytes (RFC 826); anything more is somebody's payload.
pub const ARP_FRAME_MAX: u32 = 64;
/// The fixed part of an ARP packet for IPv4 over Ethernet: hardware type, protocol type and the
/// lengths of both addresses (RFC 826).
const ARP_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];

/// Longest frame with an ICMP error that a flow lets pass: RFC 1812, section 4.3.2.3, and RFC 4443,
/// section 2.4, bound the packet.
const ICMP_ERROR_FRAME_MAX: u32 = ETHERNET_LEN + 576;
/// See [`ICMP_ERROR_FRAME_MAX`].
const ICMPV6_ERROR_FRAME_MAX: u32 = ETHERNET_LEN + 1280;

/// TCP FIN.
pub const TCP_FIN: u8 = 0x01;
/// TCP SYN.
pub const TCP_SYN: u8 = 0x02;
/// TCP RST.
pub const TCP_RST: u8 = 0x04;
/// TCP ACK.
pub const TCP_ACK: u8 = 0x10;

const IPV4_LOOSE_SOURCE_ROUTE: u8 = 131;
const IPV4_STRICT_SOURCE_ROUTE: u8 = 137;

const ICMP_ECHO_REPLY: u8 = 0;
const ICMP_ECHO: u8 = 8;
const ICMP_UNREACHABLE: u8 = 3;
const ICMP_TIME_EXCEEDED: u8 = 11;
const ICMP_PARAMETER_PROBLEM: u8 = 12;
const ICMPV6_UNREACHABLE: u8 = 1;
const ICMPV6_PARAMETER_PROBLEM: u8 = 4;
const ICMPV6_ECHO: u8 = 128;
const ICMPV6_ECHO_REPLY: u8 = 129;
const ICMPV6_ROUTER_SOLICITATION: u8 = 133;
const ICMPV6_NEIGHBOUR_SOLICITATION: u8 = 135;
const ICMPV6_NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const ICMPV6_MLD_REPORT: u8 = 131;
const ICMPV6_MLD_DONE: u8 = 132;
const ICMPV6_MLD2_REPORT: u8 = 143;

/// Bytes of a frame, wherever they lie.
pub trait Frame {
    /// Length of the frame in bytes, its Ethernet header included.
    fn len(&self) -> u32;

    /// Whether the frame is empty.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `N` bytes at `offset`, or `None` when the frame ends before.
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;

    /// Whether the frame carries a VLAN tag that is not among its bytes.
    fn is_tagged(&self) -> bool;

    /// Whether the frame stands for several packets that will be cut later; its length fields may
    /// then be zero.
    fn is_aggregate(&self) -> bool;
}

impl Frame for &[u8] {
    fn len(&self) -> u32 {
        <[u8]>::len(self) as u32
    }

    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        self.get(start..start.checked_add(N)?)?.try_into().ok()
    }

    fn is_tagged(&self) -> bool {
        false
    }

    fn is_aggregate(&self) -> bool {
        false
    }
}

/// Which part of a packet this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Fragment {
    /// The whole packet.
    None,
    /// The first of several: it has the transport header.
    First,
    /// A later one: it has no ports.
    Later,
}

/// What the headers of an IP packet say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
    /// Source port, host byte order; for ICMP echo the identifier; otherwise 0.
    pub src_port: u16,
    /// Destination port, host byte order; for ICMP echo the identifier; otherwise 0.
    pub dst_port: u16,
    /// Offset of the transport header from the start of the frame.
    pub l4_offset: u32,
    /// Identification of a fragmented packet.
    pub fragment_id: u32,
    /// Which part of a packet this is.
    pub fragment: Fragment,
    /// IP protocol number of the transport header.
    pub protocol: u8,
    /// The bit of [`bits`] for `protocol` (and, for ICMP, the type).
    pub bit: u8,
    /// TCP flags, or 0.
    pub tcp_flags: u8,
    /// ICMP type, or 0.
    pub icmp_type: u8,
    /// ICMP code, or 0.
    pub icmp_code: u8,
    /// IPv4 TTL or IPv6 hop limit.
    pub hop_limit: u8,
    /// 4 or 6.
    pub version: u8,
}

/// What a frame turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Walked {
    /// ARP of ordinary length; the packet's `src` and `dst` are its protocol addresses.
    Arp,
    /// An IP packet.
    Ip,
    /// An EtherType we do not speak, or a VLAN tag.
    NotIp,
    /// Truncated, or with headers that cannot be trusted.
    Malformed,
}

/// EtherType of the frame in host byte order; 0 when it is shorter than an Ethernet header.
#[inline(always)]
pub fn ether_type(frame: &impl Frame) -> u16 {
    match frame.read::<2>(12) {
        Some(bytes) => u16::from_be_bytes(bytes),
        None => 0,
    }
}

/// Walks the headers of an Ethernet frame and fills `packet`, which is whole only when the result
/// is [`Walked::Ip`]. (The record is the caller's because a BPF program has 512 bytes of stack and
/// none to spare for copies.)
#[inline(always)]
pub fn walk(frame: &impl Frame, packet: &mut Packet) -> Walked {
    if frame.is_tagged() {
        return Walked::NotIp;
    }
    let walked = match ether_type(frame) {
        ETHER_IPV4 => walk_ipv4(frame, packet),
        ETHER_IPV6 => walk_ipv6(frame, packet),
        ETHER_ARP => {
            return match walk_arp(frame, packet) {
                Some(()) => Walked::Arp,
                None => Walked::NotIp,
            };
        }
        _ => return Walked::NotIp,
    };
    match walked {
        Some(()) => Walked::Ip,
        None => Walked::Malformed,
    }
}

#[inline(always)]
fn walk_arp(frame: &impl Frame, packet: &mut Packet) -> Option<()> {
    if frame.len() > ARP_FRAME_MAX || frame.read::<6>(ETHERNET_LEN)? != ARP_IPV4 {
        return None;
    }
    packet.src = address::from_v4(frame.read(ETHERNET_LEN + 14)?);
    packet.dst = address::from_v4(frame.read(ETHERNET_LEN + 24)?);
    Some(())
}

#[inline(always)]
fn walk_ipv4(frame: &impl Frame, packet: &mut Packet) -> Option<()> {
    let header = frame.read::<20>(ETHERNET_LEN)?;
    let header_len = u32::from(header[0] & 0x0f) * 4;
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
    let flags_and_offset = u16::from_be_bytes([header[6], header[7]]);
    let more = flags_and_offset & 0x2000 != 0;
    let offset = flags_and_offset & 0x1fff;
    packet.src = address::from_v4([header[12], header[13], header[14], header[15]]);
    packet.dst = address::from_v4([header[16], header[17], header[18], header[19]]);
    packet.l4_offset = ETHERNET_LEN + header_len;
    packet.fragment_id = u32::from(u16::from_be_bytes([header[4], header[5]]));
    packet.fragment = fragment(offset, more);
    packet.protocol = header[9];
    packet.hop_limit = header[8];
    packet.version = 4;
    walk_transport(frame, packet, offset, end)
}

/// Refuses source routes among the options (RFC 791, section 3.1).
///
/// Every byte is looked at as if it began an option: the exact walk has more paths than a verifier
/// explores, and a packet with options is rare enough to be refused for a byte that only looks like
/// a source route.
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
fn walk_ipv6(frame: &impl Frame, packet: &mut Packet) -> Option<()> {
    let header = frame.read::<8>(ETHERNET_LEN)?;
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
    // A mapped address on the wire would be taken for the IPv4 address in the maps; no such packet
    // is legitimate (RFC 4942, section 2.2).
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
                // Segments left: the packet would go on to somewhere else than it says.
                if protocol == protocol::ROUTING && extension[3] != 0 {
                    return None;
                }
                protocol = extension[0];
                at += (u32::from(extension[1]) + 1) * 8;
            }
            protocol::FRAGMENT => {
                let extension = frame.read::<8>(at)?;
                // Not even behind one that makes no fragment (RFC 6946).
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
                // What follows in a later fragment is a middle of something; in a first one it must
                // be the transport header, where no later fragment reaches it (RFC 7112 asks for
                // the whole chain; nobody fragments behind more of it).
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
    packet.hop_limit = header[7];
    packet.version = 6;
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

/// Reads ports, flags and types. `offset` is the fragment offset in units of 8 bytes, `end` the
/// end of the IP packet in the frame.
#[inline(always)]
fn walk_transport(frame: &impl Frame, packet: &mut Packet, offset: u16, end: u32) -> Option<()> {
    let at = packet.l4_offset;
    packet.src_port = 0;
    packet.dst_port = 0;
    packet.bit = 0;
    packet.tcp_flags = 0;
    packet.icmp_type = 0;
    packet.icmp_code = 0;
    if matches!(packet.fragment, Fragment::Later) {
        // Bytes below 24 could overwrite the TCP header of the first fragment.
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
            // ICMP belongs to IPv4 and ICMPv6 to IPv6; crossed, neither side would answer.
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

impl Packet {
    /// A packet of which nothing is known yet.
    pub const EMPTY: Self = Self {
        src: address::UNSPECIFIED,
        dst: address::UNSPECIFIED,
        src_port: 0,
        dst_port: 0,
        l4_offset: 0,
        fragment_id: 0,
        fragment: Fragment::None,
        protocol: 0,
        bit: 0,
        tcp_flags: 0,
        icmp_type: 0,
        icmp_code: 0,
        hop_limit: 0,
        version: 0,
    };

    /// Whether this is a TCP packet that opens a connection.
    #[inline(always)]
    pub const fn opens_tcp(&self) -> bool {
        self.protocol == protocol::TCP && self.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// Whether a flow that this packet belongs to lets it pass; an opening packet and a message
    /// that belongs to no flow need the rules.
    #[inline(always)]
    pub const fn may_follow_flow(&self) -> bool {
        match self.bit {
            bits::TCP => !self.opens_tcp(),
            bits::ICMP_OTHER => self.is_neighbour_message(),
            _ => true,
        }
    }

    /// Whether this packet, seen on its way to the pod, opens a flow that the pod may answer.
    ///
    /// A TCP connection begins with a SYN, ICMP echo with a request; UDP and SCTP with any packet
    /// (SCTP's handshake may be retried after a restart of the path, RFC 9260, section 5.2). A
    /// neighbour that solicits or advertises may be answered and asked.
    #[inline(always)]
    pub const fn opens_inbound(&self) -> bool {
        match self.bit {
            bits::TCP => self.opens_tcp(),
            bits::UDP | bits::SCTP => true,
            bits::ICMP_ECHO => matches!(self.icmp_type, ICMP_ECHO | ICMPV6_ECHO),
            bits::ICMP_OTHER => self.is_neighbour_message(),
            _ => false,
        }
    }

    /// Whether this is a neighbour solicitation or advertisement that no router has forwarded
    /// (RFC 4861, sections 7.1.1 and 7.1.2).
    #[inline(always)]
    pub const fn is_neighbour_message(&self) -> bool {
        self.version == 6
            && self.protocol == protocol::ICMPV6
            && self.hop_limit == 255
            && matches!(self.fragment, Fragment::None)
            && matches!(
                self.icmp_type,
                ICMPV6_NEIGHBOUR_SOLICITATION | ICMPV6_NEIGHBOUR_ADVERTISEMENT
            )
    }

    /// Whether this is an advertisement: it says whose address its target is.
    #[inline(always)]
    pub const fn is_neighbour_advertisement(&self) -> bool {
        self.is_neighbour_message() && self.icmp_type == ICMPV6_NEIGHBOUR_ADVERTISEMENT
    }

    /// The target of a neighbour solicitation or advertisement (RFC 4861, section 4.3).
    #[inline(always)]
    pub fn neighbour_target(&self, frame: &impl Frame) -> Option<Address> {
        frame.read(self.l4_offset + 8)
    }

    /// Key of the flow that an ICMP error from a pod speaks of: the flow that the packet which it
    /// quotes came in on. `None` when this is no error, when it is longer than an error may be, or
    /// when it goes to somebody else than the quoted packet came from.
    #[inline(always)]
    pub fn quoted_flow(&self, frame: &impl Frame) -> Option<FlowKey> {
        if self.bit != bits::ICMP_OTHER || !matches!(self.fragment, Fragment::None) {
            return None;
        }
        let at = self.l4_offset + 8;
        let mut key = self.flow_from_pod();
        let transport = if self.version == 4 {
            if !matches!(
                self.icmp_type,
                ICMP_UNREACHABLE | ICMP_TIME_EXCEEDED | ICMP_PARAMETER_PROBLEM
            ) || frame.len() > ICMP_ERROR_FRAME_MAX
            {
                return None;
            }
            let header = frame.read::<20>(at)?;
            let fragment_offset = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
            // A quoted packet with options is not looked into.
            if header[0] != 0x45 || fragment_offset != 0 {
                return None;
            }
            let src = address::from_v4([header[12], header[13], header[14], header[15]]);
            let dst = address::from_v4([header[16], header[17], header[18], header[19]]);
            if !address::same(&src, &self.dst) || !address::same(&dst, &self.src) {
                return None;
            }
            key.protocol = header[9];
            at + 20
        } else {
            if !matches!(
                self.icmp_type,
                ICMPV6_UNREACHABLE..=ICMPV6_PARAMETER_PROBLEM
            ) || frame.len() > ICMPV6_ERROR_FRAME_MAX
            {
                return None;
            }
            let header = frame.read::<8>(at)?;
            if header[0] >> 4 != 6
                || !address::same(&frame.read(at + 8)?, &self.dst)
                || !address::same(&frame.read(at + 24)?, &self.src)
            {
                return None;
            }
            // Nor is one with extension headers.
            key.protocol = header[6];
            at + 40
        };
        if !matches!(key.protocol, protocol::TCP | protocol::UDP | protocol::SCTP) {
            return None;
        }
        let ports = frame.read::<4>(transport)?;
        key.peer_port = u16::from_be_bytes([ports[0], ports[1]]);
        key.pod_port = u16::from_be_bytes([ports[2], ports[3]]);
        Some(key)
    }

    /// Whether this is what a host needs to speak IPv6 on its own link: neighbour and router
    /// solicitation, neighbour advertisement (RFC 4861) and multicast listener reports (RFC 3810),
    /// to a link-local or link-scoped multicast address. Router advertisements and redirects are
    /// not for pods to send.
    #[inline(always)]
    pub const fn is_link_housekeeping(&self) -> bool {
        if self.version != 6
            || self.protocol != protocol::ICMPV6
            || !matches!(self.fragment, Fragment::None)
        {
            return false;
        }
        let hops = match self.icmp_type {
            ICMPV6_ROUTER_SOLICITATION
            | ICMPV6_NEIGHBOUR_SOLICITATION
            | ICMPV6_NEIGHBOUR_ADVERTISEMENT => 255,
            ICMPV6_MLD_REPORT | ICMPV6_MLD_DONE | ICMPV6_MLD2_REPORT => 1,
            _ => return false,
        };
        self.hop_limit == hops
            && (address::is_v6_link_local(&self.dst)
                || address::is_v6_link_local_multicast(&self.dst))
    }

    /// Key of the flow this packet belongs to, seen from a pod that sent it.
    #[inline(always)]
    pub const fn flow_from_pod(&self) -> FlowKey {
        FlowKey {
            pod_addr: self.src,
            peer_addr: self.dst,
            pod_port: self.src_port,
            peer_port: self.dst_port,
            protocol: self.protocol,
            kind: FLOW_KEY_FLOW,
            pad: 0,
        }
    }

    /// Key of the flow this packet belongs to, seen from a pod that it is for.
    #[inline(always)]
    pub const fn flow_to_pod(&self) -> FlowKey {
        FlowKey {
            pod_addr: self.dst,
            peer_addr: self.src,
            pod_port: self.dst_port,
            peer_port: self.src_port,
            protocol: self.protocol,
            kind: FLOW_KEY_FLOW,
            pad: 0,
        }
    }

    /// Key under which the verdict on a fragmented packet from a pod is remembered.
    #[inline(always)]
    pub const fn fragment_from_pod(&self) -> FlowKey {
        FlowKey {
            pod_addr: self.src,
            peer_addr: self.dst,
            pod_port: (self.fragment_id >> 16) as u16,
            peer_port: self.fragment_id as u16,
            protocol: self.protocol,
            kind: FLOW_KEY_FRAGMENT,
            pad: 0,
        }
    }
}

#[cfg(test)]
#[path = "packet_tests.rs"]
mod tests;
