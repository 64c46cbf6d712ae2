//! Fragments from a resolver's address, over IPv4 (RFC 791, section 3.2) and IPv6 (RFC 8200, section
//! 4.5).
//!
//! Only the first fragment of a datagram has the ports, and it may come last. So every fragment waits here
//! until its datagram is complete. The gate then decides a response as it decides an unfragmented one. If it
//! may pass, each fragment is put back as it came.
//!
//! ```text
//!  fragment ─▶ its datagram ─▶ complete? ─no──▶ waits
//!                 │              │ yes
//!                 │            from a resolver? ─no──▶ all put back
//!                 │              │ yes
//!                 ▼              └─▶ may the response pass? ─yes─▶ all put back
//!              contradiction: none is put back, nor any later fragment
//! ```
//!
//! The pod's kernel must read exactly what the gate has judged. The kernel reassembles fragments with the
//! same addresses and identification, keeps incomplete datagrams for up to a minute, and takes the first of
//! two fragments for the same offset. So the gate puts back only fragments of complete datagrams, no fragment
//! twice, and no second datagram with the same identification within a minute.

mod datagram;
mod piece;
#[cfg(any(test, fuzzing))]
pub(super) mod simulation;

use egress_common::{address::Address, packet::Packet};
use lru::LruCache;

use datagram::Datagram;
pub(super) use datagram::Whole;
pub(super) use piece::Held;
use piece::Piece;

use super::budget::{Budget, Kept, Limits};
#[cfg(any(test, fuzzing))]
use super::checksum;

/// How long a datagram may take. A resolver sends its fragments within a millisecond; a stub resolver repeats
/// its query after 5 seconds.
const REASSEMBLY_TIMEOUT_NS: u64 = 2_000_000_000;

/// How long an identification cannot be used again: a receiver keeps fragments for 30 seconds (Linux,
/// `net.ipv4.ipfrag_time`) or 60 (RFC 8200, section 4.5).
const ENDED_NS: u64 = 60_000_000_000;

/// Most incomplete datagrams of one pod. Beyond that the oldest is dropped.
const DATAGRAMS: usize = 256;

/// The bytes of all pods' fragments. A pod's own part has room for one of the longest datagrams.
pub(super) const LIMITS: Limits = Limits {
    own: 128 << 10,
    pod: 512 << 10,
    common: 8 << 20,
};

/// Most used identifications that are remembered for one pod. Beyond that the oldest is forgotten.
const ENDED: usize = 1024;

/// The fields by which a receiver distinguishes datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    src: Address,
    dst: Address,
    id: u32,
    /// Zero over IPv6, where the protocol is not part of the key.
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
    /// In the order of their first fragments.
    datagrams: LruCache<Key, Datagram>,
    /// Datagrams that were complete, or cannot be reassembled, with the time of their end; in the order of
    /// that time.
    ended: LruCache<Key, u64>,
    kept: Kept,
    /// The number of fragments of ended datagrams since the last [`Fragments::take_late`].
    late: u64,
}

impl Fragments {
    pub(super) fn new() -> Self {
        Self {
            // Unbounded, because the bounded cache allocates all of its memory at once.
            datagrams: LruCache::unbounded(),
            ended: LruCache::unbounded(),
            kept: Kept::default(),
            late: 0,
        }
    }

    /// Adds a fragment; returns its datagram if that is complete now. For each dropped datagram, `lost` gets
    /// a packet that describes it, and the reason.
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

    /// Adds a fragment to its datagram; returns whether the datagram is complete now.
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
        // `peek_mut` does not change the order.
        let Some(datagram) = self.datagrams.peek_mut(&key) else {
            return Ok(false);
        };
        let before = datagram.kept;
        datagram.add(piece)?;
        let more = datagram.kept - before;
        budget.add(&mut self.kept, more);
        Ok(datagram.is_whole())
    }

    /// Makes room for this many bytes of a datagram; false if the datagram itself had to be dropped.
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

    /// The periodic work.
    pub(super) fn tick(
        &mut self,
        now_ns: u64,
        budget: &mut Budget,
        mut lost: impl FnMut(&Packet, &'static str),
    ) {
        while let Some((&oldest, datagram)) = self.datagrams.peek_lru()
            && now_ns.saturating_sub(datagram.since_ns) > REASSEMBLY_TIMEOUT_NS
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

    /// The number of fragments that were dropped since the last call because their datagram, or an earlier
    /// one with its identification, had ended.
    pub(super) fn take_late(&mut self) -> u64 {
        std::mem::take(&mut self.late)
    }

    /// Drops all incomplete datagrams.
    pub(super) fn clear(&mut self, budget: &mut Budget) {
        let kept = self.kept.amount();
        budget.take_back(&mut self.kept, kept);
        self.datagrams.clear();
    }
}

#[cfg(test)]
mod tests;
