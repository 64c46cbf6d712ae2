//! One direction of a connection: the stream's bytes in order, and the messages in them.

use std::collections::BTreeMap;

use super::memory;

/// Most pieces that are kept behind gaps. 64 KiB of data has fewer segments.
const PIECES: usize = 128;
/// The memory that a piece takes besides its bytes.
const PIECE_BYTES: usize = 64;

/// The length of a message's prefix (RFC 7766, section 8).
pub(super) const PREFIX: usize = 2;

/// Why a piece of the stream was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It has other bytes than an earlier piece had at the same position.
    Differs,
    /// There is no room for it, or it is far from the end of the stream. The sender repeats it.
    Beyond,
}

/// One direction of a connection. Positions are offsets in the stream: 0 is the byte after the SYN. They do
/// not wrap.
///
/// ```text
///   base ≤ acked ≤ sent ≤ allowed ≤ next      base ≤ parsed ≤ next
/// ```
#[derive(Debug)]
pub(super) struct StreamBuffer {
    /// The sequence number of position 0.
    first: u32,
    /// Most bytes that are kept.
    limit: usize,
    /// The position of the first byte that is kept.
    base: u64,
    /// The bytes from `base` to `next`.
    bytes: Vec<u8>,
    /// Pieces behind a gap, by position.
    ahead: BTreeMap<u64, Vec<u8>>,
    ahead_bytes: usize,
    /// The position of the first message that has not been taken.
    parsed: u64,
    /// The position up to which the stream may be put back.
    pub(super) allowed: u64,
    /// The position up to which it has been put back.
    pub(super) sent: u64,
    /// The position up to which the receiver has acknowledged it.
    pub(super) acked: u64,
    /// The position at which the sender ended the stream.
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
            allowed: 0,
            sent: 0,
            acked: 0,
            fin: None,
            fin_sent: false,
            fin_acked: false,
        }
    }

    /// The sequence number of position 0.
    pub(super) fn first(&self) -> u32 {
        self.first
    }

    /// The position up to which all bytes are known.
    pub(super) fn next(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// Bytes that are kept.
    pub(super) fn kept(&self) -> usize {
        self.bytes.len() + self.ahead_bytes
    }

    /// The memory that they take.
    pub(super) fn allocated(&self) -> usize {
        self.bytes.capacity() + self.ahead_bytes + self.ahead.len() * PIECE_BYTES
    }

    /// The free room behind `next` in bytes.
    pub(super) fn room(&self) -> usize {
        self.limit.saturating_sub(self.bytes.len())
    }

    /// The position of a sequence number: the one nearest to the end of the stream (RFC 9293, section 3.4).
    /// Negative before the first byte.
    pub(super) fn position(&self, seq: u32) -> i64 {
        let next = self.next();
        let from_next = seq.wrapping_sub(self.seq(next)).cast_signed();
        next.cast_signed().saturating_add(i64::from(from_next))
    }

    /// The sequence number of a position.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "sequence numbers are positions modulo 2^32"
    )]
    pub(super) fn seq(&self, position: u64) -> u32 {
        self.first.wrapping_add(position as u32)
    }

    /// The kept bytes between two positions.
    pub(super) fn slice(&self, from: u64, to: u64) -> &[u8] {
        let at = |position: u64| usize::try_from(position.saturating_sub(self.base)).ok();
        at(from)
            .zip(at(to))
            .and_then(|(from, to)| self.bytes.get(from..to))
            .unwrap_or_default()
    }

    /// Adds a piece of the stream.
    pub(super) fn insert(&mut self, position: i64, mut data: &[u8]) -> Result<(), Refused> {
        let base = self.base.cast_signed();
        let mut position = position;
        if position < base {
            // Acknowledged bytes are neither kept nor put back again.
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

    /// Adds a piece that is not behind a gap.
    fn append(&mut self, position: u64, data: &[u8]) -> Result<(), Refused> {
        let known = self.slice(position, self.next());
        let common = known.len().min(data.len());
        let (again, new) = data.split_at(common);
        if known.get(..common) != Some(again) {
            return Err(Refused::Differs);
        }
        while self.kept() + new.len() > self.limit {
            // Bytes in order displace pieces behind a gap: those may overlap, and fill all the room. The
            // sender repeats them.
            let (_, piece) = self.ahead.pop_last().ok_or(Refused::Beyond)?;
            self.ahead_bytes -= piece.len();
        }
        memory::append(&mut self.bytes, new);
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

    /// Records the end of the stream; returns whether it agrees with the known bytes.
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

    /// Whether the stream has ended, and all its bytes are here.
    pub(super) fn is_ended(&self) -> bool {
        self.fin == Some(self.next())
    }

    /// Whether the stream ended in the middle of a message.
    pub(super) fn is_cut(&self) -> bool {
        self.is_ended() && self.parsed < self.next()
    }

    /// The length of the next message, once its prefix is here.
    pub(super) fn announced(&self) -> Option<usize> {
        match self.slice(self.parsed, self.parsed + PREFIX as u64) {
            &[a, b] => Some(usize::from(u16::from_be_bytes([a, b]))),
            _ => None,
        }
    }

    /// Whether the next message is longer than the longest query.
    pub(super) fn is_too_long(&self) -> bool {
        self.announced()
            .is_some_and(|len| len > super::QUESTION_MAX)
    }

    /// The next message, once it is complete.
    pub(super) fn message(&self) -> Option<&[u8]> {
        let len = self.announced()? as u64;
        let start = self.parsed + PREFIX as u64;
        (start + len <= self.next()).then(|| self.slice(start, start + len))
    }

    /// The bytes of the next message that are here.
    pub(super) fn beginning(&self) -> &[u8] {
        let start = self.parsed + PREFIX as u64;
        self.slice(start.min(self.next()), self.next())
    }

    /// Takes the next message.
    pub(super) fn take_message(&mut self) {
        if let Some(message) = self.message() {
            self.parsed += (PREFIX + message.len()) as u64;
        }
    }

    /// The position of the next message.
    pub(super) fn parsed(&self) -> u64 {
        self.parsed
    }

    /// Records an acknowledgment; returns whether it is only for bytes that were put back.
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

    /// Drops bytes that are acknowledged and do not belong to the next message.
    pub(super) fn trim(&mut self) {
        let keep = self.acked.min(self.parsed);
        let known = usize::try_from(keep.saturating_sub(self.base)).unwrap_or(0);
        if known == 0 {
            return;
        }
        memory::remove_front(&mut self.bytes, known);
        self.base = keep;
    }

    /// Marks all bytes so far as put back and acknowledged: a split connection forwards them itself.
    pub(super) fn forward_all(&mut self) {
        let next = self.next();
        (self.allowed, self.sent, self.acked) = (next, next, next);
        self.trim();
    }

    /// The acknowledgment that a receiver of all bytes so far would send.
    pub(super) fn ack(&self) -> u32 {
        self.seq(self.next() + u64::from(self.is_ended()))
    }

    /// The sequence number of the next byte to put back.
    pub(super) fn sent_seq(&self) -> u32 {
        self.seq(self.sent + u64::from(self.fin_sent))
    }

    /// Whether the end of the stream has been acknowledged, and so all its bytes.
    pub(super) fn is_over(&self) -> bool {
        self.fin_acked
    }
}

#[cfg(test)]
#[path = "buffer_tests.rs"]
mod tests;
