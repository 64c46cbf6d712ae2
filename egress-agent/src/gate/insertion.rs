//! The addresses of one response on their way into the pod's maps.
//!
//! A response may have thousands of addresses, and the insertion of each takes microseconds. So they are inserted in parts,
//! one part in each of the pod's turns. Other pods' messages are decided in between. The response waits until all of its
//! addresses are there.

use std::{
    sync::Arc,
    task::{Poll, ready},
};

use egress_common::address::Address;

use super::{
    eviction::{Positions, Room, positions},
    learned::{AnswerAddress, Entries, Table},
    pending::Exchange,
};
use crate::datapath::AllowError;
use egress_dns::{Answer, Name};
use egress_policy::Grant;

/// Most addresses that are inserted in one turn: that takes some 50 µs.
pub(super) const PART: usize = 8;

/// The time after which an insertion is given up: the stub resolver asks again after five seconds.
const PATIENCE_NS: u64 = 3_000_000_000;
/// The time between two turns after which an insertion begins again, with new lifetimes: over TCP a response may wait until
/// the pod has room for it.
const PAUSE_NS: u64 = 1_000_000_000;

/// The insertion of one response's addresses.
pub(super) struct Insertion {
    pub(super) exchange: Exchange,
    /// The response without its addresses.
    pub(super) answer: Answer,
    addresses: Vec<AnswerAddress>,
    /// The names that the addresses get, with what the rules give to each.
    names: Vec<(Arc<Name>, Grant)>,
    /// How many of the names have all addresses, and how many addresses the next name has.
    done: (usize, usize),
    began_ns: u64,
    /// When the last turn was.
    last_ns: u64,
    /// The generation of the settings by which it was decided.
    generation: u32,
    /// The response, to recognise it in the next turn. Empty while nothing has been left for another turn.
    message: Box<[u8]>,
    room: Room,
}

impl Insertion {
    /// The insertion of these addresses for each of the names.
    pub(super) fn new(
        exchange: Exchange,
        mut answer: Answer,
        addresses: Vec<AnswerAddress>,
        names: Vec<(Arc<Name>, Grant)>,
        (began_ns, generation): (u64, u32),
    ) -> Self {
        answer.addresses = Vec::new();
        Self {
            exchange,
            answer,
            addresses,
            names,
            done: (0, 0),
            began_ns,
            last_ns: began_ns,
            generation,
            message: Box::default(),
            room: Room::default(),
        }
    }

    /// Whether it has taken so long that the pod no longer waits.
    pub(super) fn is_overdue(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.began_ns) > PATIENCE_NS
    }

    /// Its addresses.
    pub(super) fn positions(&mut self) -> &Positions {
        let kept = &mut self.room.kept;
        kept.get_or_insert_with(|| positions(&self.addresses))
    }

    /// Whether the address has been inserted for one of the names.
    fn has_inserted(&mut self, address: &Address) -> bool {
        let (names, addresses) = self.done;
        let position = self.positions().get(address);
        position.is_some_and(|&position| names > 0 || position < addresses)
    }
}

impl Table {
    /// Inserts the next part, or searches for addresses that can be evicted for it. Ready when all addresses are in the allow
    /// map.
    ///
    /// # Errors
    ///
    /// See [`Self::learn`].
    pub(super) fn proceed(
        &mut self,
        allow: &mut impl Entries,
        insertion: &mut Insertion,
        now_ns: u64,
    ) -> Poll<Result<(), AllowError>> {
        let most = allow.capacity();
        if insertion.addresses.len() > PART.max(most) && insertion.positions().len() > most {
            return Poll::Ready(Err(AllowError::Full));
        }
        let mut room = PART;
        while let Some((name, grant)) = insertion.names.get_mut(insertion.done.0) {
            let all = &insertion.addresses;
            if grant.classes.is_empty() {
                self.remember_unlisted(name, all);
                insertion.done = (insertion.done.0 + 1, 0);
                continue;
            }
            if room == 0 {
                return Poll::Pending;
            }
            let rest = &all[insertion.done.1..];
            let part = &rest[..rest.len().min(room)];
            let all = (all.as_slice(), &mut insertion.room);
            ready!(self.insert(allow, name, *grant, part, all, now_ns))?;
            room -= part.len();
            insertion.done.1 += part.len();
            if insertion.done.1 == insertion.addresses.len() {
                insertion.done = (insertion.done.0 + 1, 0);
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Keeps an insertion for the pod's next turn.
    pub(super) fn continue_later(
        &mut self,
        mut insertion: Box<Insertion>,
        message: &[u8],
        now_ns: u64,
    ) {
        if insertion.message.is_empty() {
            insertion.message = message.into();
        }
        insertion.last_ns = now_ns;
        self.insertion = Some(insertion);
    }

    /// The insertion that an earlier turn has begun for this response, under the same settings.
    pub(super) fn begun(
        &mut self,
        exchange: &Exchange,
        message: &[u8],
        (now_ns, generation): (u64, u32),
    ) -> Option<Box<Insertion>> {
        self.insertion.take().filter(|begun| {
            begun.exchange == *exchange
                && begun.generation == generation
                && now_ns.saturating_sub(begun.last_ns) <= PAUSE_NS
                && *begun.message == *message
        })
    }

    /// Notes that an address has been removed. An insertion that has inserted it already begins again: its response must not
    /// be delivered without the address.
    pub(super) fn note_removed(&mut self, address: &Address) {
        if let Some(insertion) = &mut self.insertion
            && insertion.has_inserted(address)
        {
            insertion.done = (0, 0);
        }
    }
}
