//! Where the running kernel keeps what the programs read of its own record of a frame (`struct sk_buff`).

use anyhow::{Result, ensure};
use egress_common::limits::FRAME_RECORD_BYTES;

use super::kernel_types::{Field, KernelTypes};

/// Offsets for `egress-ebpf/src/frame_record.rs`: from [`Self::start`], unless something else is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameRecord {
    /// Of the first byte that is read, in the record.
    pub(super) start: u32,
    /// How many bytes are read.
    pub(super) len: u32,
    /// Of the byte with `ip_summed`, and where in it.
    pub(super) summed: u32,
    pub(super) summed_shift: u32,
    /// Of the byte with `csum_not_inet`, and its bit there; no bit on kernels without SCTP.
    pub(super) crc: u32,
    pub(super) crc_bit: u32,
    /// Of `csum_start`; `csum_offset` follows.
    pub(super) sum: u32,
    /// Of `head`, from which offsets count; `data` follows.
    pub(super) head: u32,
    /// Of `end`, in the record: where what is shared about the frame's data begins, from `head`.
    pub(super) end: u32,
    /// Of `gso_type` in that (`struct skb_shared_info`).
    pub(super) gso_type: u32,
}

impl FrameRecord {
    /// Asks the kernel's types.
    ///
    /// # Errors
    ///
    /// When the kernel does not show them, or keeps its records in a way that the programs cannot read.
    pub(super) fn of_this_kernel() -> Result<Self> {
        let types = KernelTypes::of_this_kernel()?;
        let field = |name| types.field("sk_buff", name);
        let (summed, sum, head) = (field("ip_summed")?, field("csum_start")?, field("head")?);
        let crc = types.find("sk_buff", "csum_not_inet")?;
        ensure!(
            field("csum_offset")?.byte() == sum.byte() + 2
                && field("data")?.byte() == head.byte() + 8
                && summed.shift() < 7,
            "the kernel keeps its record of a frame in an order that the programs do not know"
        );
        let crc_bit = crc.map_or(0, |field| 1 << field.shift());
        let crc = crc.map_or(summed.byte(), Field::byte);
        let first = [summed.byte(), crc, sum.byte(), head.byte()];
        let start = first.into_iter().min().unwrap_or_default() & !7;
        let end = [summed.byte() + 1, crc + 1, sum.byte() + 4, head.byte() + 16];
        let len = end.into_iter().max().unwrap_or_default() - start;
        ensure!(
            len as usize <= FRAME_RECORD_BYTES,
            "the kernel keeps its record of a frame in {len} bytes; the programs read {FRAME_RECORD_BYTES}"
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
