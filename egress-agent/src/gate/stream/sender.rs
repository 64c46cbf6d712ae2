//! A stream that the gate sends itself. It keeps the bytes that the receiver has not acknowledged, and
//! resends them after a timeout.

use super::memory;

/// Most bytes in flight, whatever the receiver's window.
const BURST: usize = 64 << 10;
/// Most bytes that are resent at once after a timeout. The limit grows with their acknowledgments (RFC 5681,
/// section 3.1).
const FIRST_BURST: usize = 4 << 10;
/// The first timeout. It doubles with each further timeout without an acknowledgment in between.
const RESEND_NS: u64 = 500_000_000;
/// Consecutive timeouts after which the sender gives up.
const RESENDS: u32 = 6;

/// A part of the stream to send now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part<'a> {
    pub(super) seq: u32,
    pub(super) payload: &'a [u8],
    /// Whether nothing remains to be sent after it.
    pub(super) is_last: bool,
    /// Whether the stream ends after it.
    pub(super) fin: bool,
}

/// The task of a sender at a tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Nothing,
    /// Resend everything, or probe the window.
    Resend,
    /// Give up: the receiver does not answer.
    GiveUp,
}

/// The counts below are relative to `first`. The end of the stream takes one sequence number after the bytes.
///
/// ```text
///   sent ≤ most_sent ≤ owed
/// ```
#[derive(Debug, Default)]
pub(super) struct Sender {
    /// The first unacknowledged sequence number.
    first: u32,
    bytes: Vec<u8>,
    /// The number that was sent since the last timeout.
    sent: usize,
    /// The number that was ever sent. No valid acknowledgment goes beyond it.
    most_sent: usize,
    /// Whether the stream ends after `bytes`.
    is_closing: bool,
    /// Whether the end of the stream has been acknowledged.
    is_over: bool,
    /// The receiver's window.
    window: usize,
    burst: usize,
    resends: u32,
    /// The end of the current timeout. `None` if the next part starts a new one.
    resend_at_ns: Option<u64>,
}

impl Sender {
    /// A stream that continues at this sequence number with these bytes, of which `sent` were sent before.
    pub(super) fn new(first: u32, bytes: Vec<u8>, sent: usize, window: usize) -> Self {
        let sent = sent.min(bytes.len());
        Self {
            first,
            bytes,
            sent,
            most_sent: sent,
            window,
            burst: BURST,
            ..Self::default()
        }
    }

    /// The number of bytes that are kept.
    pub(super) fn kept(&self) -> usize {
        self.bytes.len()
    }

    /// The memory that the bytes take.
    pub(super) fn allocated(&self) -> usize {
        self.bytes.capacity()
    }

    /// The sequence number after the last one that was sent.
    pub(super) fn next_seq(&self) -> u32 {
        self.seq(self.most_sent)
    }

    /// Whether bytes or the end of the stream wait for room in the receiver's window.
    pub(super) fn has_unsent(&self) -> bool {
        self.sent < self.owed()
    }

    /// Whether the stream accepts no more bytes.
    pub(super) fn is_closing(&self) -> bool {
        self.is_closing
    }

    /// Whether the end of the stream has been acknowledged, and so all its bytes.
    pub(super) fn is_over(&self) -> bool {
        self.is_over
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "sequence numbers are positions modulo 2^32"
    )]
    fn seq(&self, at: usize) -> u32 {
        self.first.wrapping_add(at as u32)
    }

    fn owed(&self) -> usize {
        self.bytes.len() + usize::from(self.is_closing && !self.is_over)
    }

    /// Adds bytes, unless the stream is closing.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if !self.is_closing {
            memory::append(&mut self.bytes, bytes);
        }
    }

    /// Ends the stream after the bytes that were added.
    pub(super) fn close(&mut self) {
        self.is_closing = true;
    }

    /// Records an acknowledgment and the receiver's window. Returns false if the acknowledgment is for bytes
    /// that were never sent.
    pub(super) fn acknowledge(&mut self, ack: u32, window: usize) -> bool {
        let distance = ack.wrapping_sub(self.first).cast_signed();
        let Ok(count) = usize::try_from(distance) else {
            return true;
        };
        if count > self.most_sent {
            return false;
        }
        self.window = window;
        if count == 0 {
            if self.sent == 0 {
                // The receiver answers, but its window is closed.
                self.resends = 0;
            }
            return true;
        }
        self.is_over |= count > self.bytes.len();
        memory::remove_front(&mut self.bytes, count);
        self.first = ack;
        self.sent = self.sent.saturating_sub(count);
        self.most_sent -= count;
        self.burst = (self.burst + count).min(BURST);
        self.resends = 0;
        self.resend_at_ns = None;
        true
    }

    /// The next part that may be sent now, with a payload of at most `size`.
    pub(super) fn next(&mut self, size: usize, now_ns: u64) -> Option<Part<'_>> {
        if self.owed() == 0 {
            self.resend_at_ns = None;
            return None;
        }
        self.resend_at_ns.get_or_insert(now_ns + RESEND_NS);
        let from = self.sent;
        let until = (from + size)
            .min(self.window.min(self.burst))
            .clamp(from, self.bytes.len().max(from));
        let is_last = until >= self.bytes.len();
        // The end of the stream needs no room in the window.
        let fin = is_last && from < self.owed() && self.owed() > self.bytes.len();
        if until == from && !fin {
            return None;
        }
        self.sent = until + usize::from(fin);
        self.most_sent = self.most_sent.max(self.sent);
        Some(Part {
            seq: self.seq(from),
            payload: self.bytes.get(from..until).unwrap_or_default(),
            is_last,
            fin,
        })
    }

    /// The sequence number of a window probe. It is acknowledged already, so the receiver repeats its
    /// acknowledgment (RFC 9293, section 3.10.7.4).
    pub(super) fn probe(&self) -> u32 {
        self.first.wrapping_sub(1)
    }

    /// Whether [`Self::tick`] has something to do.
    pub(super) fn is_due(&self, now_ns: u64) -> bool {
        self.owed() > 0 && self.resend_at_ns.is_none_or(|at| now_ns >= at)
    }

    /// The periodic work.
    pub(super) fn tick(&mut self, now_ns: u64) -> Due {
        if !self.is_due(now_ns) {
            return Due::Nothing;
        }
        if self.resends == RESENDS {
            return Due::GiveUp;
        }
        self.resends += 1;
        self.resend_at_ns = Some(now_ns + (RESEND_NS << self.resends));
        self.sent = 0;
        self.burst = FIRST_BURST;
        Due::Resend
    }
}

#[cfg(test)]
#[path = "sender_tests.rs"]
mod tests;
