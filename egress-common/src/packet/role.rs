//! The role of a packet for its flow and on its link.

use super::icmp::{
    ICMP_ECHO, ICMP_PARAMETER_PROBLEM, ICMP_TIME_EXCEEDED, ICMP_UNREACHABLE, ICMPV6_ECHO,
    ICMPV6_MLD_DONE, ICMPV6_MLD_REPORT, ICMPV6_MLD2_REPORT, ICMPV6_NEIGHBOUR_ADVERTISEMENT,
    ICMPV6_NEIGHBOUR_SOLICITATION, ICMPV6_PARAMETER_PROBLEM, ICMPV6_ROUTER_SOLICITATION,
    ICMPV6_UNREACHABLE,
};
use super::{ETHERNET_LEN, Fragment, Frame, Packet, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};
use crate::{
    address::{self, Address},
    protocol::{self, bits},
    records::{FLOW_KEY_FLOW, FLOW_KEY_FRAGMENT, FlowKey},
};

/// The offset of TCP's checksum (RFC 9293, section 3.1).
pub(super) const TCP_CHECKSUM: u32 = 16;
/// The offset of UDP's checksum (RFC 768).
pub(super) const UDP_CHECKSUM: u32 = 6;
/// The offset of SCTP's checksum (RFC 9260, section 3.1).
const SCTP_CHECKSUM: u32 = 8;

/// The longest frame with an ICMP error that passes because of a flow: RFC 1812, section 4.3.2.3, and RFC
/// 4443, section 2.4, limit the packet.
const ICMP_ERROR_FRAME_MAX: u32 = ETHERNET_LEN + 576;
/// See [`ICMP_ERROR_FRAME_MAX`].
pub(super) const ICMPV6_ERROR_FRAME_MAX: u32 = ETHERNET_LEN + 1280;

/// The offset of the header length in a TCP header.
const TCP_DATA_OFFSET: u32 = 12;

impl Packet {
    /// An empty record.
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

    /// The number that a port class compares: the destination port in host byte order, or the protocol number
    /// for a protocol without a bit of its own ([`bits::OTHER`]).
    #[inline(always)]
    pub const fn class_port(&self) -> u16 {
        if self.bit == bits::OTHER {
            self.protocol as u16
        } else {
            self.dst_port
        }
    }

    /// The offset in the frame of the first byte to which a checksum may be written after the verdict without
    /// changing what was judged: the transport's own checksum field. `None` when no sender leaves the
    /// checksum of such a packet to others: the kernel computes that of ICMP at once, and that of a packet
    /// before it is fragmented.
    #[inline(always)]
    pub const fn earliest_checksum(&self) -> Option<u32> {
        if !matches!(self.fragment, Fragment::None) {
            return None;
        }
        match self.bit {
            bits::TCP => Some(self.l4_offset + TCP_CHECKSUM),
            bits::UDP => Some(self.l4_offset + UDP_CHECKSUM),
            bits::SCTP => Some(self.l4_offset + SCTP_CHECKSUM),
            // Only the protocol of a tunnel packet was judged; the packet inside may be any.
            bits::OTHER => Some(self.l4_offset),
            _ => None,
        }
    }

    /// Whether this is a TCP packet that opens a connection.
    #[inline(always)]
    pub const fn opens_tcp(&self) -> bool {
        self.protocol == protocol::TCP && self.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// Whether this is a TCP packet that accepts a connection: a SYN-ACK.
    #[inline(always)]
    pub const fn accepts_tcp(&self) -> bool {
        self.protocol == protocol::TCP && self.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN | TCP_ACK
    }

    /// Whether this packet passes if its flow is known. An opening packet, and a message that belongs to no
    /// flow, need the rules.
    #[inline(always)]
    pub const fn may_follow_flow(&self) -> bool {
        match self.bit {
            bits::TCP => !self.opens_tcp(),
            bits::ICMP_OTHER => self.is_neighbour_message(),
            _ => true,
        }
    }

    /// Whether this packet to the pod opens a flow that the pod may answer.
    ///
    /// A TCP connection begins with a SYN, ICMP echo with a request, UDP and SCTP with any packet (a
    /// handshake of SCTP may be repeated after the path restarts, RFC 9260, section 5.2). The pod may answer
    /// and solicit a neighbour that solicits or advertises.
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

    /// Whether this packet from the pod may answer a flow that the other side opened.
    ///
    /// Until the other side has completed the handshake of a TCP connection, only answers to the handshake
    /// may leave: the SYN may have a forged source. An echo request is no answer.
    #[inline(always)]
    pub fn may_answer(&self, frame: &impl Frame, is_established: bool) -> bool {
        match self.bit {
            bits::TCP => is_established || self.answers_handshake(frame),
            bits::ICMP_ECHO => !matches!(self.icmp_type, ICMP_ECHO | ICMPV6_ECHO),
            _ => true,
        }
    }

    /// Whether this is a SYN-ACK, an ACK or a RST without data (RFC 9293, section 3.5).
    #[inline(always)]
    fn answers_handshake(&self, frame: &impl Frame) -> bool {
        self.tcp_flags & TCP_FIN == 0
            && self.tcp_flags & (TCP_ACK | TCP_RST) != 0
            && !self.may_carry_tcp_data(frame)
    }

    /// Whether a TCP packet may have data; true if that is uncertain.
    #[inline(always)]
    fn may_carry_tcp_data(&self, frame: &impl Frame) -> bool {
        if frame.is_aggregate() || !matches!(self.fragment, Fragment::None) {
            return true;
        }
        let (at, before) = if self.version == 4 {
            (ETHERNET_LEN + 2, ETHERNET_LEN)
        } else {
            (ETHERNET_LEN + 4, ETHERNET_LEN + 40)
        };
        let (Some(len), Some(header)) = (
            frame.read::<2>(at),
            frame.read::<1>(self.l4_offset + TCP_DATA_OFFSET),
        ) else {
            return true;
        };
        let end = before + u32::from(u16::from_be_bytes(len));
        end != self.l4_offset + u32::from(header[0] >> 4) * 4
    }

    /// The lower halves of a TCP packet's sequence and acknowledgment numbers.
    #[inline(always)]
    pub fn tcp_numbers(&self, frame: &impl Frame) -> Option<(u16, u16)> {
        let numbers = frame.read::<8>(self.l4_offset + 4)?;
        Some((
            u16::from_be_bytes([numbers[2], numbers[3]]),
            u16::from_be_bytes([numbers[6], numbers[7]]),
        ))
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

    /// Whether this is a multicast listener report (RFC 2710, RFC 3810).
    #[inline(always)]
    pub const fn is_listener_report(&self) -> bool {
        matches!(
            self.icmp_type,
            ICMPV6_MLD_REPORT | ICMPV6_MLD_DONE | ICMPV6_MLD2_REPORT
        )
    }

    /// Whether this is a neighbour solicitation.
    #[inline(always)]
    pub const fn is_neighbour_solicitation(&self) -> bool {
        self.is_neighbour_message() && self.icmp_type == ICMPV6_NEIGHBOUR_SOLICITATION
    }

    /// Whether this is a neighbour advertisement, which claims its target address.
    #[inline(always)]
    pub const fn is_neighbour_advertisement(&self) -> bool {
        self.is_neighbour_message() && self.icmp_type == ICMPV6_NEIGHBOUR_ADVERTISEMENT
    }

    /// The target of a neighbour solicitation or advertisement (RFC 4861, section 4.3).
    #[inline(always)]
    pub fn neighbour_target(&self, frame: &impl Frame) -> Option<Address> {
        frame.read(self.l4_offset + 8)
    }

    /// The key of the flow that an ICMP error from a pod is about: the flow of the packet that it quotes.
    /// `None` when this is no error, when it is longer than an error may be, or when it does not go to the
    /// source of the quoted packet.
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
            // A quoted packet with options is not parsed.
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
            // A quoted packet with extension headers is not parsed, either.
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

    /// Whether this is a message that a host needs for IPv6 on its own link: neighbour and router
    /// solicitation, neighbour advertisement (RFC 4861) and multicast listener reports (RFC 3810), to a
    /// link-local or link-scoped multicast address. Pods may not send router advertisements and redirects.
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

    /// The key of this packet's flow, for a packet from a pod.
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

    /// The key of this packet's flow, for a packet to a pod.
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

    /// Turns the key of this packet's flow into the key under which the verdict on its fragments is
    /// remembered.
    #[inline(always)]
    pub const fn name_fragments(&self, key: &mut FlowKey) {
        key.pod_port = (self.fragment_id >> 16) as u16;
        key.peer_port = self.fragment_id as u16;
        key.kind = FLOW_KEY_FRAGMENT;
    }
}
