//! The ring buffers: held DNS messages, and denials.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::{Ordering, fence},
};

use anyhow::{Context as _, Result};
use aya::maps::{Array, MapData, RingBuf};
use egress_common::records::{Denial, Held, LearnedNote};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The ring of held DNS messages.
///
/// A message wakes the thread that waits for the ring only while wake-ups are enabled.
pub struct HeldRing {
    ring: RingBuf<MapData>,
    awake: Array<MapData, u32>,
}

/// One message from the ring.
#[derive(Clone, Copy, Debug)]
pub struct HeldFrame<'a> {
    /// Its origin.
    pub head: Held,
    /// The frame from its Ethernet header on.
    pub frame: &'a [u8],
}

impl HeldRing {
    pub(super) fn new(ring: RingBuf<MapData>, awake: Array<MapData, u32>) -> Result<Self> {
        let mut new = Self { ring, awake };
        // An earlier agent may have been killed while wake-ups were disabled.
        new.enable_wakeups()?;
        Ok(new)
    }

    /// Disables wake-ups, for a thread that polls the ring.
    ///
    /// # Errors
    ///
    /// When the map cannot be written; then messages still wake the thread.
    pub fn disable_wakeups(&mut self) -> Result<()> {
        self.set_awake(1)
    }

    /// Enables wake-ups. Messages from before do not wake the thread, so read the ring once more before
    /// waiting.
    ///
    /// # Errors
    ///
    /// When the map cannot be written; then messages do not wake the thread.
    pub fn enable_wakeups(&mut self) -> Result<()> {
        self.set_awake(0)
    }

    fn set_awake(&mut self, awake: u32) -> Result<()> {
        self.awake
            .set(0, awake, 0)
            .context("cannot write the map `gate_awake`")?;
        // The programs must see the write before this thread reads the ring.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Passes the next message to `take`; returns whether there was one.
    pub fn next(&mut self, take: impl FnOnce(HeldFrame<'_>)) -> bool {
        let Some(item) = self.ring.next() else {
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
        self.ring.as_fd()
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

/// The ring of addresses that the programs have learned and that the agent does not know yet.
pub struct NoteRing(RingBuf<MapData>);

impl NoteRing {
    pub(super) fn new(ring: RingBuf<MapData>) -> Self {
        Self(ring)
    }

    /// The next note. `None` also while a program on another CPU writes the next one, even if there are complete notes
    /// behind it; see [`Self::has_unread`].
    pub fn take(&mut self) -> Option<LearnedNote> {
        let item = self.0.next()?;
        read::<LearnedNote>(&item).map(|(note, _)| note)
    }

    /// Whether the ring has notes that have not been taken, also those that programs are about to write.
    ///
    /// The kernel reports a ring as readable from the moment when a place in it is reserved (`ringbuf_map_poll`,
    /// kernel/bpf/ringbuf.c).
    ///
    /// # Errors
    ///
    /// When the kernel cannot tell.
    pub fn has_unread(&self) -> Result<bool> {
        let mut ring = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let readable = poll(&mut ring, PollTimeout::ZERO);
        Ok(readable.context("cannot poll the map `learned_notes`")? > 0)
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
#[expect(unsafe_code, reason = "see `Plain`")]
// SAFETY: all fields are integers or arrays of integers.
unsafe impl Plain for LearnedNote {}

/// Splits a record off the front of `bytes`.
#[expect(unsafe_code, reason = "the kernel writes records as bytes")]
fn read<T: Plain>(bytes: &[u8]) -> Option<(T, &[u8])> {
    let (head, rest) = bytes.split_at_checked(size_of::<T>())?;
    // SAFETY: `head` is as long as `T`, the read needs no alignment, and every bit pattern is a
    // valid `T`.
    Some((unsafe { head.as_ptr().cast::<T>().read_unaligned() }, rest))
}
