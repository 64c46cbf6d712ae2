//! The header walk: reads addresses, protocol and ports of an Ethernet frame.
//!
//! The walk is strict. A packet that a receiver might read differently is malformed: truncated headers,
//! source routes (they hide the final destination), first fragments without the whole transport header, and
//! later fragments that could overwrite it (RFC 3128, RFC 7112).

mod icmp;
mod ip;
mod link;
mod plain;
mod role;
mod transport;

use crate::address::{self, Address};
use ip::{walk_ipv4, walk_ipv6};
pub use link::same_hardware;
pub use plain::{Plain, walk_plain};

/// Length of an Ethernet header without tags.
pub const ETHERNET_LEN: u32 = 14;
/// EtherType of IPv4.
pub const ETHER_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ETHER_ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const ETHER_IPV6: u16 = 0x86dd;

/// The longest ARP frame that passes: the smallest Ethernet frame and its checksum. An ARP packet for IPv4
/// has 28 bytes (RFC 826); the bytes after it must be zero.
pub const ARP_FRAME_MAX: u32 = 64;
/// The fixed part of an ARP packet for IPv4 over Ethernet: hardware type, protocol type and the
/// lengths of both addresses (RFC 826).
const ARP_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];

/// Length of an ARP packet for IPv4 over Ethernet.
const ARP_LEN: u32 = 28;
/// Operations of ARP.
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;

/// TCP FIN.
pub const TCP_FIN: u8 = 0x01;
/// TCP SYN.
pub const TCP_SYN: u8 = 0x02;
/// TCP RST.
pub const TCP_RST: u8 = 0x04;
/// TCP ACK.
pub const TCP_ACK: u8 = 0x10;

/// The bytes of a frame, in any kind of memory.
pub trait Frame {
    /// Length of the frame in bytes, its Ethernet header included.
    fn len(&self) -> u32;

    /// Whether the frame is empty.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `N` bytes at `offset`, or `None` when the frame is too short.
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;

    /// Whether the frame has a VLAN tag outside of its bytes.
    fn is_tagged(&self) -> bool;

    /// Whether the frame is an aggregate of several packets that will be segmented later; its length fields
    /// may then be zero.
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

/// The header fields of an IP packet.
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
    /// The bit of [`bits`] for `protocol` and, for ICMP, its type.
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

/// The result of a header walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Walked {
    /// ARP of ordinary length; `src` and `dst` of the packet are its protocol addresses.
    Arp,
    /// An IP packet.
    Ip,
    /// Another EtherType, or a VLAN tag.
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

/// Walks the headers of an Ethernet frame and fills `packet`, which is complete only when the result is
/// [`Walked::Ip`]. (The caller provides the record, because a BPF program has a stack of 512 bytes without
/// room for copies.)
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
    let operation = u16::from_be_bytes(frame.read(ETHERNET_LEN + 6)?);
    // The sender's hardware address must be that of the frame.
    let is_sender = link::same_hardware(&frame.read(6)?, &frame.read(ETHERNET_LEN + 8)?);
    if !matches!(operation, ARP_REQUEST | ARP_REPLY) || !is_sender {
        return None;
    }
    let mut at = ETHERNET_LEN + ARP_LEN;
    while at < ARP_FRAME_MAX {
        if at < frame.len() && frame.read::<1>(at)? != [0] {
            return None;
        }
        at += 1;
    }
    packet.src = address::from_v4(frame.read(ETHERNET_LEN + 14)?);
    packet.dst = address::from_v4(frame.read(ETHERNET_LEN + 24)?);
    Some(())
}

#[cfg(test)]
mod tests;
