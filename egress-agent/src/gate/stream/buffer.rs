//! One direction of a connection: its bytes in order, and the messages among them.

use std::collections::BTreeMap;

/// Most pieces that wait for what comes before them. The segments of 64 KiB are fewer.
const PIECES: usize = 128;

/// Length of the prefix of a message (RFC 7766, section 8).
pub(super) const PREFIX: usize = 2;

/// Why a piece of the stream was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It says something else than what was sent in the same place before.
    Differs,
    /// There is no room for it, or it is far from where the stream stands. The sender repeats it.
    Beyond,
}

/// A direction. Positions are offsets in the stream: 0 is the byte after the SYN. They do not wrap.
///
/// ```text
///   base ≤ acked ≤ sent ≤ released ≤ next      base ≤ parsed ≤ next
/// ```
#[derive(Debug)]
pub(super) struct StreamBuffer {
    /// Sequence number of position 0.
    first: u32,
    /// Most bytes that are kept.
    limit: usize,
    /// Position of the first byte that is kept.
    base: u64,
    /// The bytes from `base` to `next`.
    bytes: Vec<u8>,
    /// What came ahead of a gap, by position.
    ahead: BTreeMap<u64, Vec<u8>>,
    ahead_bytes: usize,
    /// Where the message begins that has not been taken out yet.
    parsed: u64,
    /// Up to where the stream may be put back.
    pub(super) released: u64,
    /// Up to where it has been put back.
    pub(super) sent: u64,
    /// Up to where its receiver has acknowledged it.
    pub(super) acked: u64,
    /// Where the sender ended the stream.
    fin: Option<u64>,
    pub(super) fin_sent: bool,
    pub(super) fin_acked: bool,
}

impl StreamBuffer {
    /// A stream whose first byte has this sequence number.
    pub(super) fn new(first: u32, limit: usize) -> Self {
        Self {
            first,
            limit,
            base: 0,
            bytes: Vec::new(),
            ahead: BTreeMap::new(),
            ahead_bytes: 0,
            parsed: 0,
            released: 0,
            sent: 0,
            acked: 0,
            fin: None,
            fin_sent: false,
            fin_acked: false,
        }
    }

    /// Sequence number of position 0.
    pub(super) fn first(&self) -> u32 {
        self.first
    }

    /// Position up to which all bytes are known.
    pub(super) fn next(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// Bytes that are kept.
    pub(super) fn kept(&self) -> usize {
        self.bytes.len() + self.ahead_bytes
    }

    /// How many bytes there is room for behind `next`.
    pub(super) fn room(&self) -> usize {
        self.limit.saturating_sub(self.bytes.len())
    }

    /// The position that a sequence number means: the one nearest to where the stream stands (RFC
    /// 9293, section 3.4). Negative before the first byte.
    pub(super) fn position(&self, seq: u32) -> i64 {
        let next = self.next();
        let from_next = seq.wrapping_sub(self.seq(next)).cast_signed();
        next.cast_signed().saturating_add(i64::from(from_next))
    }

    /// Sequence number of a position.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "sequence numbers are positions modulo 2^32"
    )]
    pub(super) fn seq(&self, position: u64) -> u32 {
        self.first.wrapping_add(position as u32)
    }

    /// Bytes between two positions that are kept.
    pub(super) fn slice(&self, from: u64, to: u64) -> &[u8] {
        let at = |position: u64| usize::try_from(position.saturating_sub(self.base)).ok();
        at(from)
            .zip(at(to))
            .and_then(|(from, to)| self.bytes.get(from..to))
            .unwrap_or_default()
    }

    /// Takes a piece of the stream in.
    pub(super) fn insert(&mut self, position: i64, mut data: &[u8]) -> Result<(), Refused> {
        let base = self.base.cast_signed();
        let mut position = position;
        if position < base {
            // What its receiver has acknowledged is not kept any more, and not put back either.
            let known = usize::try_from(base.abs_diff(position)).unwrap_or(usize::MAX);
            data = data.get(known..).unwrap_or_default();
            position = base;
        }
        if data.is_empty() {
            return Ok(());
        }
        let position = position.unsigned_abs();
        let end = position + data.len() as u64;
        if self.fin.is_some_and(|fin| end > fin) {
            return Err(Refused::Differs);
        }
        if position > self.next() {
            return self.put_aside(position, data);
        }
        self.append(position, data)?;
        while let Some((&start, _)) = self.ahead.first_key_value() {
            if start > self.next() {
                break;
            }
            if let Some((start, piece)) = self.ahead.pop_first() {
                self.ahead_bytes -= piece.len();
                self.append(start, &piece)?;
            }
        }
        Ok(())
    }

    /// `position` is not behind a gap.
    fn append(&mut self, position: u64, data: &[u8]) -> Result<(), Refused> {
        let known = self.slice(position, self.next());
        let common = known.len().min(data.len());
        let (again, new) = data.split_at(common);
        if known.get(..common) != Some(again) {
            return Err(Refused::Differs);
        }
        while self.kept() + new.len() > self.limit {
            // What came ahead gives way to what stands before it: pieces of it may overlap, and fill all
            // the room there is. The sender repeats it.
            let (_, piece) = self.ahead.pop_last().ok_or(Refused::Beyond)?;
            self.ahead_bytes -= piece.len();
        }
        self.bytes.extend_from_slice(new);
        Ok(())
    }

    fn put_aside(&mut self, position: u64, data: &[u8]) -> Result<(), Refused> {
        if let Some(known) = self.ahead.get(&position) {
            let common = known.len().min(data.len());
            if known.get(..common) != data.get(..common) {
                return Err(Refused::Differs);
            }
            if known.len() >= data.len() {
                return Ok(());
            }
        }
        let end = position + data.len() as u64;
        if end - self.base > self.limit as u64
            || self.kept() + data.len() > self.limit
            || self.ahead.len() >= PIECES
        {
            return Err(Refused::Beyond);
        }
        self.ahead_bytes += data.len();
        if let Some(shorter) = self.ahead.insert(position, data.to_vec()) {
            self.ahead_bytes -= shorter.len();
        }
        Ok(())
    }

    /// Notes where the sender ended the stream; whether that agrees with what is known.
    pub(super) fn end_at(&mut self, position: i64) -> bool {
        let Ok(position) = u64::try_from(position) else {
            return false;
        };
        match self.fin {
            Some(fin) => fin == position,
            None if position < self.next() || !self.ahead.is_empty() => false,
            None => {
                self.fin = Some(position);
                true
            }
        }
    }

    /// Whether the stream has ended, and all of it is here.
    pub(super) fn is_ended(&self) -> bool {
        self.fin == Some(self.next())
    }

    /// Whether it ended in the middle of a message.
    pub(super) fn is_cut(&self) -> bool {
        self.is_ended() && self.parsed < self.next()
    }

    /// Length that the message at hand announces, once its prefix is here.
    pub(super) fn announced(&self) -> Option<usize> {
        match self.slice(self.parsed, self.parsed + PREFIX as u64) {
            &[a, b] => Some(usize::from(u16::from_be_bytes([a, b]))),
            _ => None,
        }
    }

    /// Whether the message at hand is longer than any question is.
    pub(super) fn is_too_long(&self) -> bool {
        self.announced()
            .is_some_and(|len| len > super::QUESTION_MAX)
    }

    /// The message at hand, once all of it is here.
    pub(super) fn message(&self) -> Option<&[u8]> {
        let len = self.announced()? as u64;
        let start = self.parsed + PREFIX as u64;
        (start + len <= self.next()).then(|| self.slice(start, start + len))
    }

    /// What is here of the message at hand.
    pub(super) fn beginning(&self) -> &[u8] {
        let start = self.parsed + PREFIX as u64;
        self.slice(start.min(self.next()), self.next())
    }

    /// Goes on to the next message.
    pub(super) fn take_message(&mut self) {
        if let Some(message) = self.message() {
            self.parsed += (PREFIX + message.len()) as u64;
        }
    }

    /// Where the message at hand begins.
    pub(super) fn parsed(&self) -> u64 {
        self.parsed
    }

    /// Notes what the receiver has acknowledged; whether that is something that was put back.
    pub(super) fn acknowledge(&mut self, ack: u32) -> bool {
        let position = self.position(ack);
        let end = self.sent + u64::from(self.fin_sent);
        let Ok(position) = u64::try_from(position) else {
            return true;
        };
        if position > end {
            return false;
        }
        if position > self.sent {
            self.fin_acked = true;
        }
        self.acked = self.acked.max(position.min(self.sent));
        self.trim();
        true
    }

    /// Forgets what was acknowledged and is no part of the message at hand.
    pub(super) fn trim(&mut self) {
        let keep = self.acked.min(self.parsed);
        let known = usize::try_from(keep.saturating_sub(self.base)).unwrap_or(0);
        if known == 0 {
            return;
        }
        self.bytes.drain(..known.min(self.bytes.len()));
        self.base = keep;
        if self.bytes.is_empty() {
            // An idle connection keeps nothing.
            self.bytes = Vec::new();
        }
    }

    /// All bytes so far have been taken in by the gate itself.
    pub(super) fn take_in(&mut self) {
        let next = self.next();
        (self.released, self.sent, self.acked) = (next, next, next);
        self.trim();
    }

    /// What the receiver of all bytes so far would acknowledge.
    pub(super) fn ack(&self) -> u32 {
        self.seq(self.next() + u64::from(self.is_ended()))
    }

    /// The sequence number of what is put back next.
    pub(super) fn sent_seq(&self) -> u32 {
        self.seq(self.sent + u64::from(self.fin_sent))
    }

    /// Whether both the stream and its end have been acknowledged.
    pub(super) fn is_over(&self) -> bool {
        self.fin_acked
    }
}

#[cfg(test)]
#[path = "buffer_tests.rs"]
mod tests;
