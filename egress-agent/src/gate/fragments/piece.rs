//! One fragment.

use std::ops::Range;

use egress_common::{
    ids::IfIndex,
    packet::{ETHERNET_LEN, Fragment, Packet},
};

use super::super::checksum;

const IP: usize = ETHERNET_LEN as usize;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const FRAGMENT_HEADER: usize = 8;

/// The longest content behind the IP header: the 16-bit length field includes the IPv4 header, but not the
/// IPv6 header.
const LONGEST_IPV4: usize = u16::MAX as usize - IPV4_HEADER;
const LONGEST_IPV6: usize = u16::MAX as usize;

/// A fragment from the ring.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Held<'a> {
    pub(in super::super) frame: &'a [u8],
    pub(in super::super) packet: &'a Packet,
    pub(in super::super) ifindex: IfIndex,
    /// Whether it waits to be put back; if not, the pod has it already (audit mode).
    pub(in super::super) is_taken: bool,
}

/// A fragment of an incomplete datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Piece {
    pub(in super::super) frame: Box<[u8]>,
    pub(in super::super) ifindex: IfIndex,
    pub(in super::super) is_taken: bool,
    pub(super) packet: Packet,
    /// The offset of its content in the datagram.
    pub(super) start: usize,
    pub(super) is_last: bool,
    content: Range<usize>,
}

impl Piece {
    /// Reads a fragment.
    ///
    /// A receiver that discards one fragment keeps the others, and may reassemble them with those of another
    /// datagram. So this refuses every fragment that a receiver may discard.
    ///
    /// # Errors
    ///
    /// The reason why it cannot be part of a datagram.
    pub(super) fn read(held: &Held<'_>) -> Result<Self, &'static str> {
        const SHORT: &str = "a fragment is shorter than its headers say";
        const LONGER: &str = "a fragment has options or further extension headers";
        let Held { frame, packet, .. } = *held;
        let half = |at: usize| -> Option<u16> {
            let bytes = frame.get(at..at + 2)?;
            Some(u16::from_be_bytes([bytes[0], bytes[1]]))
        };
        let (length, units, more, headers, longest) = if packet.version == 4 {
            if packet.l4_offset as usize != IP + IPV4_HEADER {
                return Err(LONGER);
            }
            let header = frame.get(IP..IP + IPV4_HEADER).ok_or(SHORT)?;
            if checksum::of_ipv4_header(header) != [0, 0] {
                return Err("the header checksum of a fragment is wrong");
            }
            let length = half(IP + 2).ok_or(SHORT)?;
            let fragment = half(IP + 6).ok_or(SHORT)?;
            let units = fragment & 0x1fff;
            (
                usize::from(length),
                units,
                fragment & 0x2000 != 0,
                IPV4_HEADER,
                LONGEST_IPV4,
            )
        } else {
            if packet.l4_offset as usize != IP + IPV6_HEADER + FRAGMENT_HEADER {
                return Err(LONGER);
            }
            let length = half(IP + 4).ok_or(SHORT)?;
            let fragment = half(IP + IPV6_HEADER + 2).ok_or(SHORT)?;
            (
                IPV6_HEADER + usize::from(length),
                fragment >> 3,
                fragment & 1 != 0,
                IPV6_HEADER + FRAGMENT_HEADER,
                LONGEST_IPV6,
            )
        };
        let content = IP + headers..IP + length;
        let len = frame.get(content.clone()).ok_or(SHORT)?.len();
        let start = usize::from(units) * 8;
        if len == 0 {
            return Err("a fragment is empty");
        }
        if more && len % 8 != 0 {
            return Err("the length of a fragment is not a multiple of 8");
        }
        if start + len > longest {
            return Err("the datagram is longer than the protocol allows");
        }
        Ok(Self {
            frame: frame.into(),
            ifindex: held.ifindex,
            is_taken: held.is_taken,
            packet: *packet,
            start,
            is_last: !more,
            content,
        })
    }

    /// Its part of the datagram.
    pub(super) fn content(&self) -> &[u8] {
        self.frame.get(self.content.clone()).unwrap_or_default()
    }

    /// The offset at which its part ends.
    pub(super) fn end(&self) -> usize {
        self.start + self.content.len()
    }

    /// The headers before its part.
    pub(super) fn headers(&self) -> &[u8] {
        self.frame.get(..self.content.start).unwrap_or_default()
    }

    /// The bytes that it counts in the budget.
    pub(super) fn kept(&self) -> usize {
        self.frame.len() + size_of::<Self>()
    }

    /// Whether it has the same interface, link header and protocol as the other.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        self.ifindex == other.ifindex
            && self.frame.get(..IP) == other.frame.get(..IP)
            && self.packet.protocol == other.packet.protocol
    }

    /// Whether it repeats the other.
    pub(super) fn repeats(&self, other: &Self) -> bool {
        self.start == other.start
            && self.is_last == other.is_last
            && self.content() == other.content()
    }

    /// Whether it has the transport header.
    pub(super) fn is_first(&self) -> bool {
        self.packet.fragment == Fragment::First
    }
}
