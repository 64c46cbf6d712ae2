//! The source addresses that a pod may use.

use egress_common::{
    address::{self, Address},
    limits::OWN_ADDRESSES,
    packet::Packet,
    protocol::bits,
    reason::Reason,
    records::{POLICY_UNIDENTIFIED, Policy},
};

/// Whether the address is one of the pod's own.
#[inline(always)]
pub fn is_own(policy: &Policy, address: &Address) -> bool {
    let mut i = 0;
    while i < OWN_ADDRESSES {
        if i as u32 >= policy.own_len {
            return false;
        }
        if address::same(&policy.own[i], address) {
            return true;
        }
        i += 1;
    }
    false
}

/// Whether the packet is a DHCP request of a host without an address to all hosts on the link (RFC 2131,
/// section 4.1). The rules judge it: it leaves if an entry has the broadcast address with the port of DHCP
/// servers.
#[inline(always)]
pub fn asks_for_an_address(packet: &Packet) -> bool {
    packet.bit == bits::UDP
        && (packet.src_port, packet.dst_port) == (68, 67)
        && address::same(&packet.src, &address::UNSPECIFIED_V4)
        && address::same(&packet.dst, &address::BROADCAST_V4)
}

/// The reason for a packet whose source is not among the pod's own addresses.
#[inline(always)]
pub fn not_own(policy: &Policy) -> Reason {
    // The pod's own addresses are not known yet.
    if policy.flags & POLICY_UNIDENTIFIED != 0 && policy.own_len == 0 {
        Reason::PodUnknown
    } else {
        Reason::SpoofedSource
    }
}
