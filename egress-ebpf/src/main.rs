//! The programs at the host end of each pod's interface.
//!
//! [`from_pod`](from_pod::judge) judges everything the pod sends and takes its DNS questions;
//! [`to_pod`](to_pod::judge) takes the answers and notes what others open towards the pod. What
//! they decide is in `egress-common`, shared with the agent; here are only the hooks: reading the
//! packet, asking the maps, counting, reporting.

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
mod from_pod;
mod held;
mod link_local;
mod maps;
mod open_flow;
mod opening;
mod probe;
mod skb;
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
