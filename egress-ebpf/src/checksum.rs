//! Checksums that are still to be computed, and would land where they change what was judged.
//!
//! A sender may leave a packet's checksum to whoever sends it on (`CHECKSUM_PARTIAL`): the packet
//! then carries the offset at which the sum is to be written. That offset does not have to fit the
//! headers. A program with a packet socket and `PACKET_VNET_HDR` (packet(7)) chooses it, and a pod
//! that rewrites the packets of its ordinary sockets (nftables, tc, a tun interface) leaves it where
//! it was. A sum that is written into a port or an IPv6 address after the verdict makes another
//! packet.
//!
//! No program of this kind can read the offset, but some helpers behave differently because of it.
//! So it is compared with the headers that the walk has found, whoever has sent the packet.

use aya_ebpf::{
    bindings::{BPF_CSUM_LEVEL_DEC, BPF_CSUM_LEVEL_INC, BPF_CSUM_LEVEL_QUERY},
    helpers::{bpf_csum_level, bpf_csum_update, bpf_skb_change_tail, bpf_skb_vlan_pop},
};

use crate::{maps::CHECKSUM_PLACES, skb::Skb};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// `-EINVAL`.
const INVALID: i64 = -22;

/// Whether a checksum that is still to be computed would be written before `earliest`, an offset in
/// the frame. `None` says that no sender leaves the checksum of such a packet to others: then any
/// would. The packet may have been cut short when the answer is yes.
///
/// What the program has learned of pointers into the packet is void afterwards.
#[inline(always)]
pub fn is_misplaced(skb: &Skb<'_>, earliest: Option<u32>) -> bool {
    if CHECKSUM_PLACES.load() == 0 && is_from_ip_socket(skb) {
        return false;
    }
    if !is_to_be_computed(skb) {
        return false;
    }
    let Some(earliest) = earliest else {
        return true;
    };
    // SAFETY: the helpers take any frame and check the length; no pointer into the packet is kept
    // anywhere.
    unsafe {
        // Where the sum is to begin may lie before the frame, because what came there was taken off.
        // The helper below cannot tell that from a place inside. This one takes a tag off, which the
        // frame does not have, and then sees to it that such a sum is not computed at all
        // (`bpf_pull_mac_rcsum`, net/core/filter.c; `skb_postpull_rcsum`, include/linux/skbuff.h).
        bpf_skb_vlan_pop(skb.0.skb.skb);
        // A frame cannot be made so short that its checksum would lie beyond its end
        // (`__bpf_skb_min_len`, net/core/filter.c). One byte less than what a sum at the earliest
        // place needs is invalid when the sum belongs there or behind. In every other case the helper
        // cuts the frame, or refuses for another reason.
        bpf_skb_change_tail(skb.0.skb.skb, earliest + 1, 0) != INVALID
    }
}

/// Whether the frame's checksum is still to be computed.
///
/// A program may raise and lower the count of checksums in a frame that somebody has verified
/// (`bpf_csum_level`, net/core/filter.c). For a frame of which nobody says anything the count begins
/// with that; for one whose checksum is to be computed, or whose sum hardware has supplied, nothing
/// changes.
#[inline(always)]
fn is_to_be_computed(skb: &Skb<'_>) -> bool {
    let frame = skb.0.skb.skb;
    // SAFETY: the helpers take any frame, and what is raised is lowered again.
    unsafe {
        bpf_csum_level(frame, BPF_CSUM_LEVEL_INC.into());
        let is_counted = bpf_csum_level(frame, BPF_CSUM_LEVEL_QUERY.into()) >= 0;
        if is_counted {
            bpf_csum_level(frame, BPF_CSUM_LEVEL_DEC.into());
            return false;
        }
        // Adds nothing to the sum that hardware has supplied, if it has.
        bpf_csum_update(frame, 0) < 0
    }
}

/// Whether a socket of the IP family sent the frame. Its pod may have rewritten it since, so this says
/// enough only where the kernel does not tell more.
#[inline(always)]
fn is_from_ip_socket(skb: &Skb<'_>) -> bool {
    // SAFETY: the context is valid while the program runs, and the socket with it.
    unsafe {
        let socket = (*skb.0.skb.skb).__bindgen_anon_2.sk;
        if socket.is_null() {
            return false;
        }
        let family = (*socket).family;
        family == AF_INET || family == AF_INET6
    }
}
