//! The programs at the host end of each pod's interface.
//!
//! [`from_pod`](from_pod::judge) judges everything the pod sends and takes its DNS questions;
//! [`to_pod`](to_pod::judge) takes the answers and notes what others open towards the pod. What
//! they decide is in `egress-common`, shared with the agent; here are only the hooks: reading the
//! packet, asking the maps, counting, reporting.
//!
//! # Global functions
//!
//! The kernel's verifier follows each path through a program. A function that it can see into is part of every
//! path that leads to its call. A *global* function (one with external linkage, `extern "C"` and `no_mangle`) is
//! verified once and on its own, for any arguments (`do_check_subprogs`, kernel/bpf/verifier.c). So each part with
//! many paths is such a function. This is what it has to keep to:
//!
//! - Parameters are numbers, the context, or pointers to memory of a fixed size. The pointers may be null.
//! - The caller's memory is writable and has no byte that was never written: a constant, or padding, is refused.
//! - It returns a number.
//! - Up to kernel 6.1, a map takes no such pointer for a key or a value: they are copied first.
//!
//! Kernels below 5.12 know no global functions with pointers. The agent takes the linkage from the programs there,
//! and the verifier sees into every function. What `Skb::forget_path` and its like forget keeps that below the
//! verifier's limit.

#![no_std]
#![no_main]
#![expect(
    clippy::needless_pass_by_value,
    reason = "`#[classifier]` hands the context over"
)]
#![expect(
    unreachable_pub,
    reason = "nothing outside a program reaches into it; `pub` here means: for the other modules"
)]
#![expect(
    missing_docs,
    reason = "what `#[classifier]` makes of a program has no room for docs"
)]

mod checksum;
mod counters;
mod denials;
mod flows;
mod forged;
mod frame_record;
mod from_pod;
mod hardware;
mod headers;
mod held;
mod housekeeping;
mod link_local;
mod maps;
mod open_flow;
mod opening;
mod probe;
mod skb;
mod sources;
mod to_pod;

use aya_ebpf::{macros::classifier, programs::TcContext};

/// The packet is none of our business any more: the next program on the hook, or the stack, goes
/// on with it. `TC_ACT_UNSPEC` is `TCX_NEXT` (`include/uapi/linux/bpf.h`).
const PASS: i32 = -1;

/// `TC_ACT_SHOT`.
const DROP: i32 = 2;

/// Hook: tcx ingress (clsact ingress below kernel 6.6) of the host end of a pod's interface.
#[classifier]
#[inline(always)]
pub fn from_pod(ctx: TcContext) -> i32 {
    from_pod::judge(&ctx)
}

/// Hook: tcx egress (clsact egress below kernel 6.6) of the host end of a pod's interface.
#[classifier]
#[inline(always)]
pub fn to_pod(ctx: TcContext) -> i32 {
    to_pod::judge(&ctx)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// The helpers these programs call are offered to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
