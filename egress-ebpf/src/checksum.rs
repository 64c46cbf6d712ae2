//! Checksums that are still to be computed, and may be meant to land where they change what was
//! judged.
//!
//! A sender may leave a packet's checksum to whoever sends it on (`CHECKSUM_PARTIAL`): the packet
//! then carries the offset at which the sum is to be written. For a program with a packet socket and
//! `PACKET_VNET_HDR` (packet(7)) that offset is free to choose, and a sum that is written into the
//! destination port or into an IPv6 address after the verdict makes it another packet. No program of
//! this kind can read the offset, but two helpers behave differently because of it.

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_l4_csum_replace, bpf_skb_change_tail, bpf_skb_store_bytes},
};
use egress_common::{
    packet::{Fragment, Frame as _, Packet},
    protocol::bits,
};

use crate::skb::Skb;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// Some two bytes of every frame, at an even offset: a part of the source MAC address.
const SAMPLE: u32 = 6;

/// Whether a checksum that is still to be computed would be written before the packet's own
/// checksum field. The packet may have been cut short when it would.
#[inline(always)]
pub fn is_misplaced(skb: &Skb<'_>, packet: &Packet) -> bool {
    // What TCP, UDP and raw IP sockets send, the kernel has built itself.
    if is_from_ip_socket(skb) || !is_to_be_computed(skb) {
        return false;
    }
    let field = match packet.bit {
        bits::TCP => 16,
        bits::UDP => 6,
        bits::SCTP => 8,
        // Nobody else leaves a checksum to be computed.
        _ => return true,
    };
    if !matches!(packet.fragment, Fragment::None) {
        return true;
    }
    // A frame cannot be made so short that its checksum would lie beyond its end
    // (`__bpf_skb_min_len`, net/core/filter.c). One byte less than what the field needs is refused
    // when the sum belongs into the field or behind it, and granted when it belongs before.
    let needed = packet.l4_offset + field + 2;
    // SAFETY: the helper checks the length; no pointer into the packet is kept anywhere.
    unsafe { bpf_skb_change_tail(skb.0.skb.skb, needed - 1, 0) == 0 }
}

/// Whether a socket of the IP family sent the frame.
#[inline(always)]
pub fn is_from_ip_socket(skb: &Skb<'_>) -> bool {
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

/// Whether the frame's checksum is still to be computed: only then does replacing a part of "the
/// checksum" outside its pseudo-header change nothing (`inet_proto_csum_replace4`,
/// net/core/utils.c).
#[inline(always)]
fn is_to_be_computed(skb: &Skb<'_>) -> bool {
    let Some(before) = skb.read::<2>(SAMPLE) else {
        return true;
    };
    // SAFETY: the helpers check the offset; what was there is put back.
    unsafe {
        if bpf_l4_csum_replace(skb.0.skb.skb, SAMPLE, 0, 1, 2) != 0 {
            return true;
        }
        let Some(after) = skb.read::<2>(SAMPLE) else {
            return true;
        };
        if u16::from_ne_bytes(before) == u16::from_ne_bytes(after) {
            return true;
        }
        bpf_skb_store_bytes(skb.0.as_ptr().cast(), SAMPLE, before.as_ptr().cast(), 2, 0);
    }
    false
}
