//! The programs at the host's end of each pod's interface.
//!
//! [`from_pod`](from_pod::judge) judges everything that the pod sends, and holds its DNS queries.
//! [`to_pod`](to_pod::judge) holds the responses, and records the flows that others open towards the pod. The
//! decisions are in `egress-common`, shared with the agent. This crate has only the hooks: it reads the
//! packet, looks up the maps, counts and reports.
//!
//! # Global functions
//!
//! The kernel's verifier follows each path through a program. An ordinary function is part of every path that
//! leads to its call. A *global* function (one with external linkage, `extern "C"` and `no_mangle`) is
//! verified once and on its own, for any arguments (`do_check_subprogs`, kernel/bpf/verifier.c). So each part
//! with many paths is such a function. The rules for it:
//!
//! - Parameters are numbers, the context, or pointers to memory of a fixed size. The pointers may be null. An id
//!   is passed as its number: the kernel takes no structure as a parameter.
//! - The caller's memory must be writable and fully written: a constant, or padding, is refused.
//! - The return value is a number.
//! - Up to kernel 6.1, a map accepts no such pointer as a key or a value: the data is copied first.
//!
//! Kernels below 5.12 do not support global functions with pointers. There the agent removes the external
//! linkage from the programs, and the verifier follows every function. `Skb::forget_path` and similar
//! functions keep that within the verifier's limit.

#![no_std]
#![no_main]
#![expect(
    clippy::needless_pass_by_value,
    reason = "`#[classifier]` hands the context over"
)]
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "a key or value that is not borrowed would be copied to the stack, which is small"
)]
#![expect(
    unreachable_pub,
    reason = "nothing outside a program reaches into it; `pub` here means: for the other modules"
)]
#![expect(
    missing_docs,
    reason = "what `#[classifier]` makes of a program has no room for docs"
)]

mod accepted;
mod checksum;
mod counters;
mod decided;
mod denials;
mod entries;
mod flows;
mod forged;
mod frame_record;
mod from_pod;
mod hardware;
mod headers;
mod held;
mod housekeeping;
mod learn;
mod link_local;
mod maps;
mod message;
mod open_flow;
mod opening;
mod probe;
mod rules;
mod skb;
mod sources;
mod to_pod;
mod unread;

use aya_ebpf::{macros::classifier, programs::TcContext};

/// The programs let the packet pass: the next program on the hook, or the stack, handles it. `TC_ACT_UNSPEC`
/// is `TCX_NEXT` (`include/uapi/linux/bpf.h`).
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

// Only GPL-compatible programs may call the helpers that these programs use.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
