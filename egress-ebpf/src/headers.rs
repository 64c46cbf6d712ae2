//! The header walk for both programs.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use egress_common::packet::{Packet, Walked, walk};

use crate::skb::Skb;

// Older kernels' verifiers refuse a pointer to memory that was never written, including padding.
const _: () = assert!(size_of::<Packet>() == 52, "a packet has padding");

/// Walks the headers of a frame and fills `packet`, see [`walk`].
#[inline(always)]
pub fn read(ctx: &TcContext, packet: &mut Packet) -> Walked {
    let frame = ctx.skb.skb;
    if own_headers(frame) == 0 {
        return Walked::Malformed;
    }
    walk_headers(frame, packet)
}

/// A global function ([`crate`]): the walk has many paths, and the verifier follows none of them beyond the
/// end of this function.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn walk_headers(frame: *mut __sk_buff, packet: *mut Packet) -> Walked {
    // SAFETY: the pointer is null or points to the caller's memory; the verifier has checked this.
    let Some(packet) = (unsafe { packet.as_mut() }) else {
        return Walked::Malformed;
    };
    walk(&Skb(&TcContext::new(frame)), packet)
}

/// See [`Skb::own_headers`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn own_headers(frame: *mut __sk_buff) -> u32 {
    u32::from(Skb(&TcContext::new(frame)).own_headers())
}
