//! Checksums that are still to be computed, and would land where they change what was judged.
//!
//! A sender may leave a packet's checksum to whoever sends it on (`CHECKSUM_PARTIAL`): the packet
//! then carries the offset at which the sum is to be written. That offset does not have to fit the
//! headers. A program with a packet socket and `PACKET_VNET_HDR` (packet(7)) chooses it, and a pod
//! that rewrites the packets of its ordinary sockets (nftables, tc, a tun interface) leaves it where
//! it was. A sum that is written into a port or an IPv6 address after the verdict makes another
//! packet.
//!
//! So the place is compared with the headers that the walk has found, whoever has sent the packet.

use crate::{
    frame_record::{NO_PLACE, checksum_place},
    skb::Skb,
};

/// Whether a checksum that is still to be computed would be written before `earliest`, an offset in the frame.
/// `None` says that no sender leaves the checksum of such a packet to others: then any would.
#[inline(always)]
pub fn is_misplaced(skb: &Skb<'_>, earliest: Option<u32>) -> bool {
    let earliest = match earliest {
        Some(earliest) => i64::from(earliest),
        None => NO_PLACE,
    };
    checksum_place(skb.0.skb.skb) < earliest
}
