//! A stream that the gate sends itself. What the receiver has not acknowledged is kept, and sent again after
//! a time-out.

/// Most bytes that are on their way at once, whatever the receiver's window is.
const BURST: usize = 64 << 10;
/// Most bytes that are sent again at once after a time-out. It grows as they are acknowledged (RFC 5681,
/// section 3.1).
const FIRST_BURST: usize = 4 << 10;
/// The first time-out. Each further one without an acknowledgment in between is twice as long.
const RESEND_NS: u64 = 500_000_000;
/// Time-outs in a row until the sender gives up.
const RESENDS: u32 = 6;

/// A part of the stream that is to be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part<'a> {
    pub(super) seq: u32,
    pub(super) payload: &'a [u8],
    /// Whether nothing else is left to send.
    pub(super) is_last: bool,
    /// Whether the stream ends behind it.
    pub(super) fin: bool,
}

/// What a sender does because time has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Nothing,
    /// Everything is to be sent again, or the window is to be probed.
    Again,
    /// The receiver does not answer any more.
    GivenUp,
}

/// Counts below are of sequence numbers from `first` on. The end of the stream takes one behind the bytes.
///
/// ```text
///   sent ≤ most_sent ≤ owed
/// ```
#[derive(Debug, Default)]
pub(super) struct Sender {
    /// The first sequence number that the receiver has not acknowledged.
    first: u32,
    bytes: Vec<u8>,
    /// How many have been sent since the last time-out.
    sent: usize,
    /// How many have ever been sent. No acknowledgment can reach beyond.
    most_sent: usize,
    /// Whether the stream ends behind `bytes`.
    is_closing: bool,
    /// Whether its end has been acknowledged.
    is_over: bool,
    /// How many the receiver takes.
    window: usize,
    burst: usize,
    resends: u32,
    /// When the time-out ends. `None` when it has to begin anew.
    resend_at_ns: Option<u64>,
}

impl Sender {
    /// A stream that goes on at this sequence number with these bytes, some of which have been sent.
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

    /// Bytes that are kept.
    pub(super) fn kept(&self) -> usize {
        self.bytes.len()
    }

    /// The sequence number behind everything that has been sent.
    pub(super) fn next_seq(&self) -> u32 {
        self.seq(self.most_sent)
    }

    /// Whether something waits for room in the receiver's window.
    pub(super) fn has_unsent(&self) -> bool {
        self.sent < self.owed()
    }

    /// Whether nothing can be added any more.
    pub(super) fn is_closing(&self) -> bool {
        self.is_closing
    }

    /// Whether the stream has ended and all of it has been acknowledged.
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

    /// Adds bytes, unless the stream has ended.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if !self.is_closing {
            self.bytes.extend_from_slice(bytes);
        }
    }

    /// Ends the stream behind the bytes that are there.
    pub(super) fn close(&mut self) {
        self.is_closing = true;
    }

    /// Notes what the receiver acknowledges, and how much it takes beyond that. Returns whether it can have got
    /// so much.
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
                // It answers, but its window is closed.
                self.resends = 0;
            }
            return true;
        }
        self.is_over |= count > self.bytes.len();
        self.bytes.drain(..count.min(self.bytes.len()));
        if self.bytes.is_empty() {
            // An idle connection keeps nothing.
            self.bytes = Vec::new();
        }
        self.first = ack;
        self.sent = self.sent.saturating_sub(count);
        self.most_sent -= count;
        self.burst = (self.burst + count).min(BURST);
        self.resends = 0;
        self.resend_at_ns = None;
        true
    }

    /// The next part that may be sent now, with at most so much payload.
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
        // The end needs no room in the window.
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

    /// The sequence number of a segment that asks for the receiver's window: it has been acknowledged, so the
    /// receiver repeats its acknowledgment (RFC 9293, section 3.10.7.4).
    pub(super) fn probe(&self) -> u32 {
        self.first.wrapping_sub(1)
    }

    /// What has to be done from time to time.
    pub(super) fn tick(&mut self, now_ns: u64) -> Due {
        if self.owed() == 0 || self.resend_at_ns.is_some_and(|at| now_ns < at) {
            return Due::Nothing;
        }
        if self.resends == RESENDS {
            return Due::GivenUp;
        }
        self.resends += 1;
        self.resend_at_ns = Some(now_ns + (RESEND_NS << self.resends));
        self.sent = 0;
        self.burst = FIRST_BURST;
        Due::Again
    }
}

#[cfg(test)]
#[path = "sender_tests.rs"]
mod tests;
