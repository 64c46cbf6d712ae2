//! Reading a socket buffer.

use aya_ebpf::{EbpfContext as _, helpers::bpf_ktime_get_boot_ns, programs::TcContext};
use egress_common::packet::Frame;

/// The frame that a program was called for.
pub struct Skb<'a>(pub &'a TcContext);

impl Skb<'_> {
    /// `skb->mark`.
    #[inline(always)]
    pub fn mark(&self) -> u32 {
        // SAFETY: the context pointer is valid while the program runs.
        unsafe { (*self.0.skb.skb).mark }
    }

    /// Index of the interface whose hook called.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).ifindex }
    }

    /// The context as helpers want it.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut core::ffi::c_void {
        self.0.as_ptr()
    }
}

impl Frame for Skb<'_> {
    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.len()
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.0.load::<[u8; N]>(offset as usize).ok()
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).vlan_present != 0 }
    }

    #[inline(always)]
    fn is_aggregate(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).gso_size != 0 }
    }
}

/// Nanoseconds of `CLOCK_BOOTTIME`.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_ktime_get_boot_ns() }
}
