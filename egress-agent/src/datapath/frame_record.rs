//! The layout of the running kernel's own record of a frame (`struct sk_buff`), for the programs that read
//! it.

use anyhow::{Result, ensure};
use egress_common::limits::FRAME_RECORD_BYTES;

use super::kernel_types::{Field, KernelTypes};

/// Offsets for `egress-ebpf/src/frame_record.rs`, counted from [`Self::start`] unless stated otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameRecord {
    /// Offset in the record of the first byte that is read.
    pub(super) start: u32,
    /// How many bytes are read.
    pub(super) len: u32,
    /// Offset of the byte with `ip_summed`, and the shift in it.
    pub(super) summed: u32,
    pub(super) summed_shift: u32,
    /// Offset of the byte with `csum_not_inet`, and its bit there; no bit on kernels without SCTP.
    pub(super) crc: u32,
    pub(super) crc_bit: u32,
    /// Offset of `csum_start`; `csum_offset` follows.
    pub(super) sum: u32,
    /// Offset of `head`, from which other offsets count; `data` follows.
    pub(super) head: u32,
    /// Offset in the record of `end`: the start of `struct skb_shared_info`, counted from `head`.
    pub(super) end: u32,
    /// Offset of `gso_type` in `struct skb_shared_info`.
    pub(super) gso_type: u32,
}

impl FrameRecord {
    /// Reads the offsets from the kernel's types.
    ///
    /// # Errors
    ///
    /// When the kernel does not provide its types, or the programs cannot read its layout.
    pub(super) fn of_this_kernel() -> Result<Self> {
        let types = KernelTypes::of_this_kernel()?;
        let field = |name| types.field("sk_buff", name);
        let (summed, sum, head) = (field("ip_summed")?, field("csum_start")?, field("head")?);
        let crc = types.find("sk_buff", "csum_not_inet")?;
        ensure!(
            field("csum_offset")?.byte() == sum.byte() + 2
                && field("data")?.byte() == head.byte() + 8
                && summed.shift() < 7,
            "the kernel's record of a frame (struct sk_buff) has a layout that the programs do not support"
        );
        let crc_bit = crc.map_or(0, |field| 1 << field.shift());
        let crc = crc.map_or(summed.byte(), Field::byte);
        let first = [summed.byte(), crc, sum.byte(), head.byte()];
        let start = first.into_iter().min().unwrap_or_default() & !7;
        let end = [summed.byte() + 1, crc + 1, sum.byte() + 4, head.byte() + 16];
        let len = end.into_iter().max().unwrap_or_default() - start;
        ensure!(
            len as usize <= FRAME_RECORD_BYTES,
            "the kernel's record of a frame (struct sk_buff) spans {len} bytes; the programs read \
             {FRAME_RECORD_BYTES}"
        );
        Ok(Self {
            start,
            len,
            summed: summed.byte() - start,
            summed_shift: summed.shift(),
            crc: crc - start,
            crc_bit,
            sum: sum.byte() - start,
            head: head.byte() - start,
            end: field("end")?.byte(),
            gso_type: types.field("skb_shared_info", "gso_type")?.byte(),
        })
    }
}
