//! The kernel's own record of a frame (`struct sk_buff`), of which the context exposes only a part.
//!
//! At run time the context is a pointer to that record. Its layout differs between kernels, so the agent
//! reads the offsets from the running kernel's type information before it loads the programs (`FrameRecord`
//! in the agent).

use core::{hint::black_box, mem::MaybeUninit};

use aya_ebpf::{
    Global,
    bindings::__sk_buff,
    helpers::{bpf_probe_read_kernel, generated},
};
use egress_common::limits::FRAME_RECORD_BYTES;

/// The offset of the first byte that is read.
#[unsafe(no_mangle)]
static RECORD_START: Global<u32> = Global::new(0);
/// The number of bytes that are read.
#[unsafe(no_mangle)]
static RECORD_LEN: Global<u32> = Global::new(0);
/// The offset of the byte with `ip_summed`; this and the following offsets are relative to [`RECORD_START`].
#[unsafe(no_mangle)]
static SUMMED_AT: Global<u32> = Global::new(0);
/// The position of `ip_summed` in that byte.
#[unsafe(no_mangle)]
static SUMMED_SHIFT: Global<u32> = Global::new(0);
/// The offset of the byte with `csum_not_inet`.
#[unsafe(no_mangle)]
static CRC_AT: Global<u32> = Global::new(0);
/// The mask of `csum_not_inet` in that byte.
#[unsafe(no_mangle)]
static CRC_BIT: Global<u32> = Global::new(0);
/// The offset of `csum_start`; `csum_offset` follows it.
#[unsafe(no_mangle)]
static SUM_AT: Global<u32> = Global::new(0);
/// The offset of `head`; `data` follows it.
#[unsafe(no_mangle)]
static HEAD_AT: Global<u32> = Global::new(0);

/// The offset of `end` in the record: `end` is the offset of `struct skb_shared_info` from `head`.
#[unsafe(no_mangle)]
static END_AT: Global<u32> = Global::new(0);
/// The offset of `gso_type` in `struct skb_shared_info`.
#[unsafe(no_mangle)]
static GSO_TYPE_AT: Global<u32> = Global::new(0);

/// `SKB_GSO_FRAGLIST` (include/linux/skbuff.h), unchanged since Linux 5.6.
const LIST: u32 = 1 << 18;
/// `CHECKSUM_PARTIAL` (include/linux/skbuff.h).
const PARTIAL: u8 = 3;
/// The offset of the checksum in an SCTP header (RFC 9260, section 3.1).
const SCTP_CHECKSUM: i64 = 8;

/// The frame has no checksum that is still to be computed.
pub const NO_PLACE: i64 = i64::MAX;
/// The record cannot be read. This has never been observed.
const UNREADABLE: i64 = i64::MIN;

/// The bytes that are read.
#[repr(C, align(8))]
struct Bytes([u8; FRAME_RECORD_BYTES]);

/// The offset in the frame at which a checksum that is still to be computed will be written, or [`NO_PLACE`].
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
        // A CRC32c is written to SCTP's checksum field, whatever `csum_offset` is (`skb_crc32c_csum_help`,
        // net/core/dev.c).
        let is_crc = u32::from(at(&CRC_AT).read()) & CRC_BIT.load() != 0;
        let behind = if is_crc {
            SCTP_CHECKSUM
        } else {
            i64::from(sum.add(1).read())
        };
        first + behind
    }
}

/// Whether an aggregate is a list of packets, each with its own headers. The context exposes only the first
/// packet.
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

/// The context's address as a number. The verifier allows no arithmetic on the context, but a byte swap turns
/// the pointer into a number (for a program that may read addresses; `check_alu_op`, kernel/bpf/verifier.c).
#[inline(always)]
fn address_of(frame: *mut __sk_buff) -> u64 {
    black_box((frame as u64).swap_bytes()).swap_bytes()
}
