//! Fragments from a resolver's address, over IPv4 (RFC 791, section 3.2) and IPv6 (RFC 8200, section
//! 4.5).
//!
//! Only the first fragment of a datagram says which port it is from, and it may come last. So every
//! fragment waits here until its datagram is whole. An answer is then decided as one that came whole
//! is, and what may pass is put back fragment by fragment, each as it came.
//!
//! ```text
//!  fragment ─▶ its datagram ─▶ whole? ─no──▶ waits
//!                 │              │ yes
//!                 │            from a resolver? ─no──▶ all put back
//!                 │              │ yes
//!                 ▼              └─▶ decided as an answer ─yes─▶ all put back
//!              contradiction: none is put back, nor any that follows
//! ```
//!
//! What the gate has judged must be what the pod's kernel reads. It puts together what comes with the
//! same addresses and number, keeps what it could not use for up to a minute, and takes the first of two
//! fragments for the same place. So nothing is put back that does not belong to a whole datagram, no
//! fragment twice, and no second datagram with the same number within a minute.

mod datagram;
#[cfg(any(test, fuzzing))]
pub(super) mod made;
mod piece;

use egress_common::{address::Address, packet::Packet};
use lru::LruCache;

use datagram::Datagram;
pub(super) use datagram::Whole;
pub(super) use piece::Held;
use piece::Piece;

use super::budget::{Budget, Kept, Limits};
#[cfg(any(test, fuzzing))]
use super::checksum;

/// How long a datagram may take. Its fragments leave the resolver within a millisecond; a stub resolver
/// asks again after 5 seconds.
const PATIENCE_NS: u64 = 2_000_000_000;

/// How long a number is not used again: a receiver keeps fragments for 30 seconds (Linux,
/// `net.ipv4.ipfrag_time`) or 60 (RFC 8200, section 4.5).
const ENDED_NS: u64 = 60_000_000_000;

/// Datagrams of one pod that may wait at once; beyond it the one that began first is lost.
const DATAGRAMS: usize = 256;

/// What the fragments of pods take. A pod's own part is room for one of the longest datagrams.
pub(super) const LIMITS: Limits = Limits {
    own: 128 << 10,
    pod: 512 << 10,
    common: 8 << 20,
};

/// Numbers of one pod that are remembered as used; beyond it the one used longest ago is forgotten.
const ENDED: usize = 1024;

/// What a receiver tells datagrams apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    src: Address,
    dst: Address,
    id: u32,
    /// Zero over IPv6, where it does not count.
    protocol: u8,
}

impl Key {
    fn of(packet: &Packet) -> Self {
        Self {
            src: packet.src,
            dst: packet.dst,
            id: packet.fragment_id,
            protocol: if packet.version == 4 {
                packet.protocol
            } else {
                0
            },
        }
    }
}

/// The fragments of one pod.
pub(super) struct Fragments {
    /// In the order in which they began.
    datagrams: LruCache<Key, Datagram>,
    /// Datagrams that were whole, or can not be put together, and when that was; in that order.
    ended: LruCache<Key, u64>,
    kept: Kept,
    /// Fragments of ended datagrams, since [`Fragments::take_late`].
    late: u64,
}

impl Fragments {
    pub(super) fn new() -> Self {
        Self {
            // Unbounded because the bounded one allots all of its memory at once.
            datagrams: LruCache::unbounded(),
            ended: LruCache::unbounded(),
            kept: Kept::default(),
            late: 0,
        }
    }

    /// Adds a fragment; returns its datagram if that is whole now. What is lost is told to `lost`, with a
    /// packet that describes it, and why.
    pub(super) fn add(
        &mut self,
        held: &Held<'_>,
        now_ns: u64,
        budget: &mut Budget,
        mut lost: impl FnMut(&Packet, &'static str),
    ) -> Option<Whole> {
        let key = Key::of(held.packet);
        if let Some(&ended_ns) = self.ended.peek(&key) {
            if now_ns.saturating_sub(ended_ns) <= ENDED_NS {
                self.late += 1;
                return None;
            }
            self.ended.pop(&key);
        }
        let added = match Piece::read(held) {
            Ok(piece) => {
                if !self.make_room(&key, held, piece.kept(), budget, &mut lost) {
                    return None;
                }
                self.add_piece(key, piece, now_ns, budget)
            }
            Err(why) => Err(why),
        };
        match added {
            Ok(true) => {
                let datagram = self.forget(&key, budget);
                self.end(key, now_ns);
                datagram?.whole()
            }
            Ok(false) => None,
            Err(why) => {
                let datagram = self.forget(&key, budget);
                let known = datagram.as_ref().and_then(Datagram::packet);
                lost(known.unwrap_or(held.packet), why);
                self.end(key, now_ns);
                None
            }
        }
    }

    /// Whether the datagram is whole with this.
    fn add_piece(
        &mut self,
        key: Key,
        piece: Piece,
        now_ns: u64,
        budget: &mut Budget,
    ) -> Result<bool, &'static str> {
        if !self.datagrams.contains(&key) {
            self.datagrams.put(key, Datagram::new(now_ns));
        }
        // Looked at without a change of the order.
        let Some(datagram) = self.datagrams.peek_mut(&key) else {
            return Ok(false);
        };
        let before = datagram.kept;
        datagram.add(piece)?;
        let more = datagram.kept - before;
        budget.add(&mut self.kept, more);
        Ok(datagram.is_whole())
    }

    /// Makes room for so many bytes more of a datagram; false if the datagram itself is lost for it.
    fn make_room(
        &mut self,
        key: &Key,
        held: &Held<'_>,
        bytes: usize,
        budget: &mut Budget,
        lost: &mut impl FnMut(&Packet, &'static str),
    ) -> bool {
        const WHY: &str = "no room is left for fragments";
        let is_new = !self.datagrams.contains(key);
        while (is_new && self.datagrams.len() >= DATAGRAMS) || !budget.has_room(&self.kept, bytes) {
            let Some((&oldest, _)) = self.datagrams.peek_lru() else {
                lost(held.packet, WHY);
                return false;
            };
            if let Some(datagram) = self.forget(&oldest, budget) {
                lost(datagram.packet().unwrap_or(held.packet), WHY);
            }
            if oldest == *key {
                return false;
            }
        }
        true
    }

    fn forget(&mut self, key: &Key, budget: &mut Budget) -> Option<Datagram> {
        let datagram = self.datagrams.pop(key)?;
        budget.take_back(&mut self.kept, datagram.kept);
        Some(datagram)
    }

    fn end(&mut self, key: Key, now_ns: u64) {
        if self.ended.len() >= ENDED {
            self.ended.pop_lru();
        }
        self.ended.put(key, now_ns);
    }

    /// What has to be done from time to time.
    pub(super) fn tick(
        &mut self,
        now_ns: u64,
        budget: &mut Budget,
        mut lost: impl FnMut(&Packet, &'static str),
    ) {
        while let Some((&oldest, datagram)) = self.datagrams.peek_lru()
            && now_ns.saturating_sub(datagram.since_ns) > PATIENCE_NS
        {
            if let Some(packet) = self
                .forget(&oldest, budget)
                .as_ref()
                .and_then(Datagram::packet)
            {
                lost(packet, "a fragment is missing");
            }
        }
        while let Some((_, &ended_ns)) = self.ended.peek_lru()
            && now_ns.saturating_sub(ended_ns) > ENDED_NS
        {
            self.ended.pop_lru();
        }
    }

    /// Fragments that were dropped since the last call, because their datagram, or an earlier one with
    /// its number, had ended.
    pub(super) fn take_late(&mut self) -> u64 {
        std::mem::take(&mut self.late)
    }

    /// Forgets all that waits.
    pub(super) fn clear(&mut self, budget: &mut Budget) {
        let kept = self.kept.amount();
        budget.take_back(&mut self.kept, kept);
        self.datagrams.clear();
    }
}

#[cfg(test)]
mod tests;
