//! The ring buffers: DNS messages that were taken, and denials.

use std::os::fd::{AsFd, BorrowedFd};

use aya::maps::{MapData, RingBuf};
use egress_common::records::{Denial, Held};

/// The ring of DNS messages that wait for the agent.
pub struct HeldRing(RingBuf<MapData>);

/// One message from the ring.
#[derive(Clone, Copy, Debug)]
pub struct HeldFrame<'a> {
    /// Where it comes from.
    pub head: Held,
    /// The frame from its Ethernet header on.
    pub frame: &'a [u8],
}

impl HeldRing {
    pub(super) fn new(ring: RingBuf<MapData>) -> Self {
        Self(ring)
    }

    /// Gives the next message to `take`; returns whether there was one.
    pub fn next(&mut self, take: impl FnOnce(HeldFrame<'_>)) -> bool {
        let Some(item) = self.0.next() else {
            return false;
        };
        if let Some((head, rest)) = read::<Held>(&item)
            && let Some(frame) = rest.get(..head.len as usize)
        {
            take(HeldFrame { head, frame });
        }
        true
    }
}

impl AsFd for HeldRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The ring of denials.
pub struct DenialRing(RingBuf<MapData>);

impl DenialRing {
    pub(super) fn new(ring: RingBuf<MapData>) -> Self {
        Self(ring)
    }

    /// The next denial.
    pub fn take(&mut self) -> Option<Denial> {
        let item = self.0.next()?;
        read::<Denial>(&item).map(|(denial, _)| denial)
    }
}

impl AsFd for DenialRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A record of plain integers.
///
/// # Safety
///
/// Every bit pattern must be a valid value of the type.
#[expect(unsafe_code, reason = "the kernel writes records as bytes")]
unsafe trait Plain: Copy {}

#[expect(unsafe_code, reason = "see `Plain`")]
// SAFETY: all fields are integers or arrays of integers.
unsafe impl Plain for Held {}
#[expect(unsafe_code, reason = "see `Plain`")]
// SAFETY: all fields are integers or arrays of integers.
unsafe impl Plain for Denial {}

/// Splits a record off the front of `bytes`.
#[expect(unsafe_code, reason = "the kernel writes records as bytes")]
fn read<T: Plain>(bytes: &[u8]) -> Option<(T, &[u8])> {
    let (head, rest) = bytes.split_at_checked(size_of::<T>())?;
    // SAFETY: `head` is as long as `T`, the read needs no alignment, and every bit pattern is a
    // valid `T`.
    Some((unsafe { head.as_ptr().cast::<T>().read_unaligned() }, rest))
}
