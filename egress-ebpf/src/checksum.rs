//! Detects checksums that a device will compute later, and that would overwrite judged header fields.
//!
//! A sender may leave a packet's checksum to the device that sends it on (`CHECKSUM_PARTIAL`): the packet
//! then has the offset at which the sum is to be written. That offset may not fit the headers. A program with
//! a packet socket and `PACKET_VNET_HDR` (packet(7)) chooses it. A pod that rewrites the packets of its
//! ordinary sockets (nftables, tc, a tun interface) leaves it unchanged. If the sum is written into a port or
//! an IPv6 address after the verdict, another packet leaves than the one that was judged.
//!
//! So the programs compare the offset with the headers that the walk has found, for every packet.

use crate::{
    frame_record::{NO_PLACE, checksum_place},
    skb::Skb,
};

/// Whether a checksum that is still to be computed would be written before `earliest`, an offset in the
/// frame. `None` means that no sender leaves the checksum of such a packet to others: then any offset is
/// misplaced.
#[inline(always)]
pub fn is_misplaced(skb: &Skb<'_>, earliest: Option<u32>) -> bool {
    let earliest = match earliest {
        Some(earliest) => i64::from(earliest),
        None => NO_PLACE,
    };
    checksum_place(skb.0.skb.skb) < earliest
}
