//! The kernel's own record of a frame (`struct sk_buff`), of which the context shows a part only.
//!
//! At run time the context is that record. Its layout differs between kernels, so the agent takes the offsets
//! from the running kernel's types before it loads the programs (`FrameRecord` in the agent).

use core::{hint::black_box, mem::MaybeUninit};

use aya_ebpf::{
    Global,
    bindings::__sk_buff,
    helpers::{bpf_probe_read_kernel, generated},
};
use egress_common::limits::FRAME_RECORD_BYTES;

/// Offset of the first byte that is read.
#[unsafe(no_mangle)]
static RECORD_START: Global<u32> = Global::new(0);
/// How many bytes are read.
#[unsafe(no_mangle)]
static RECORD_LEN: Global<u32> = Global::new(0);
/// Where the byte with `ip_summed` is, from [`RECORD_START`] as all that follow.
#[unsafe(no_mangle)]
static SUMMED_AT: Global<u32> = Global::new(0);
/// Where in that byte.
#[unsafe(no_mangle)]
static SUMMED_SHIFT: Global<u32> = Global::new(0);
/// Where the byte with `csum_not_inet` is.
#[unsafe(no_mangle)]
static CRC_AT: Global<u32> = Global::new(0);
/// Its bit there.
#[unsafe(no_mangle)]
static CRC_BIT: Global<u32> = Global::new(0);
/// Where `csum_start` is, with `csum_offset` behind it.
#[unsafe(no_mangle)]
static SUM_AT: Global<u32> = Global::new(0);
/// Where `head` is, with `data` behind it.
#[unsafe(no_mangle)]
static HEAD_AT: Global<u32> = Global::new(0);

/// Where `end` is in the record: the offset, from `head`, of what is shared about the frame's data.
#[unsafe(no_mangle)]
static END_AT: Global<u32> = Global::new(0);
/// Where `gso_type` is in that.
#[unsafe(no_mangle)]
static GSO_TYPE_AT: Global<u32> = Global::new(0);

/// `SKB_GSO_FRAGLIST` (include/linux/skbuff.h), the same since it came with 5.6.
const LIST: u32 = 1 << 18;
/// `CHECKSUM_PARTIAL` (include/linux/skbuff.h).
const PARTIAL: u8 = 3;
/// Where an SCTP header has its checksum (RFC 9260, section 3.1).
const SCTP_CHECKSUM: i64 = 8;

/// There is no checksum that is still to be computed.
pub const NO_PLACE: i64 = i64::MAX;
/// The record cannot be read. No program has seen that.
const UNREADABLE: i64 = i64::MIN;

/// What is read.
#[repr(C, align(8))]
struct Bytes([u8; FRAME_RECORD_BYTES]);

/// Where in the frame a checksum will be written that is still to be computed, or [`NO_PLACE`].
///
/// A global function ([`crate`]).
#[unsafe(no_mangle)]
#[inline(never)]
#[expect(
    clippy::cast_ptr_alignment,
    reason = "the copy begins at a multiple of eight, as the record does, and fields are aligned in it"
)]
pub extern "C" fn checksum_place(frame: *mut __sk_buff) -> i64 {
    let mut bytes = MaybeUninit::<Bytes>::uninit();
    let start = bytes.as_mut_ptr().cast::<u8>();
    let at = |offset: &Global<u32>| {
        // SAFETY: the agent has made sure that all offsets are within what is read; the verifier knows them.
        unsafe { start.add(offset.load() as usize) }
    };
    let record = address_of(frame) + u64::from(RECORD_START.load());
    // SAFETY: the helper writes at most that many bytes, and returns an error for memory that is not there. The
    // fields have their natural alignment in the record, and so in a copy that begins at a multiple of eight.
    unsafe {
        if generated::bpf_probe_read_kernel(start.cast(), RECORD_LEN.load(), record as *const _)
            != 0
        {
            return UNREADABLE;
        }
        if (at(&SUMMED_AT).read() >> SUMMED_SHIFT.load()) & 3 != PARTIAL {
            return NO_PLACE;
        }
        let sum = at(&SUM_AT).cast::<u16>();
        let head = at(&HEAD_AT).cast::<i64>();
        let first = i64::from(sum.read()) - (head.add(1).read() - head.read());
        // A CRC32c goes to where SCTP has it, whatever `csum_offset` says (`skb_crc32c_csum_help`, net/core/dev.c).
        let is_crc = u32::from(at(&CRC_AT).read()) & CRC_BIT.load() != 0;
        let behind = if is_crc {
            SCTP_CHECKSUM
        } else {
            i64::from(sum.add(1).read())
        };
        first + behind
    }
}

/// Whether an aggregate is a list of packets, each with headers of its own. The context shows those of the first.
#[inline(always)]
pub fn is_packet_list(frame: *mut __sk_buff) -> bool {
    let record = address_of(frame);
    let end_at = record + u64::from(END_AT.load());
    let head_at = record + u64::from(RECORD_START.load()) + u64::from(HEAD_AT.load());
    // SAFETY: the helper returns an error for memory that is not there.
    unsafe {
        let end = bpf_probe_read_kernel(end_at as *const u32);
        let head = bpf_probe_read_kernel(head_at as *const u64);
        let (Ok(end), Ok(head)) = (end, head) else {
            return true;
        };
        let gso_type = head + u64::from(end) + u64::from(GSO_TYPE_AT.load());
        bpf_probe_read_kernel(gso_type as *const u32).map_or(true, |kinds| kinds & LIST != 0)
    }
}

/// The context's address as a number: the verifier allows no arithmetic on the context, but to swap its bytes makes a
/// number of it (for a program that may know addresses; `check_alu_op`, kernel/bpf/verifier.c).
#[inline(always)]
fn address_of(frame: *mut __sk_buff) -> u64 {
    black_box((frame as u64).swap_bytes()).swap_bytes()
}
