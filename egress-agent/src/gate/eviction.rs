//! Chooses the addresses that are evicted when a pod's allow map is full.
//!
//! The choice looks at all of the pod's flows and addresses, which takes milliseconds if there are many. So it is made in
//! parts, one in each of the pod's turns. Other messages change the addresses between two parts. Whether an address may be
//! evicted is therefore checked when it was found, and again before it is evicted.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    task::{Poll, ready},
};

use egress_common::address::Address;

use super::{
    addresses::{Addresses, Place},
    learned::{AnswerAddress, Entries, Table},
    learned_address::Learned,
};
use crate::datapath::{AllowError, OpenFlows, boottime_ns};

/// The part of the map that is evicted at once: one search reads all of the pod's flows and addresses, which costs as
/// much for one address as for many.
const BATCH_PART: usize = 16;

/// The part of the map that one name may fill before its addresses are evicted first: a name with ever new
/// addresses evicts only its own.
const NAME_PART: usize = 4;

/// Most addresses and names that are looked at in one part of a search: that takes some 40 µs.
const SEARCH_PART: usize = 128;

/// Most addresses and names that are removed in a turn, unless more places are wanted at once: each costs the kernel some
/// microseconds. The rest of a batch follows in the pod's next turns, so that no other pod waits for the removal of all.
pub(super) const AT_ONCE: usize = 8;

/// How long addresses stay chosen: a flow that the pod opens meanwhile is not seen.
const CHOSEN_NS: u64 = 5_000_000;

/// The addresses of a response, each with its first position there.
pub(super) type Positions = HashMap<Address, usize>;

/// The positions of the addresses of a response.
pub(super) fn positions(all: &[AnswerAddress]) -> Positions {
    let mut positions = Positions::with_capacity(all.len());
    for (position, one) in all.iter().enumerate() {
        positions.entry(one.address).or_insert(position);
    }
    positions
}

/// The addresses that are not evicted: those of the response for which room is made, and those of one that is being
/// inserted in parts.
#[derive(Clone, Copy)]
struct Spared<'a>([Option<&'a Positions>; 2]);

impl Spared<'_> {
    fn contains(self, address: &Address) -> bool {
        let mut responses = self.0.into_iter().flatten();
        responses.any(|response| response.contains_key(address))
    }
}

/// The room that is made for the addresses of one response.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// The addresses of the response, which are not evicted for it; `None` until they are needed.
    pub(super) kept: Option<Positions>,
    search: Option<Box<Search>>,
    /// Whether it must be made at once, and not in turns.
    at_once: bool,
}

impl Room {
    /// Room for a response that does not wait.
    pub(super) fn at_once() -> Self {
        Self {
            at_once: true,
            ..Self::default()
        }
    }
}

/// An address that may be evicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Candidate {
    place: Place,
    address: Address,
    priority: Priority,
}

impl Candidate {
    /// Whether nothing has happened to the address that makes it worth keeping: no response has had it since, and no program
    /// has extended its lifetime.
    fn is_still_one(
        &self,
        addresses: &mut Addresses,
        allow: &mut impl Entries,
        now_ns: u64,
    ) -> bool {
        if addresses.place(&self.address) != Some(self.place) {
            return false;
        }
        if self.priority != Priority::Expired {
            return true;
        }
        if let Some(until) = allow.learned_until(self.address) {
            addresses.extend(&self.address, until);
        }
        let learned = addresses.peek(&self.address);
        learned.is_some_and(|learned| learned.expires_ns() <= now_ns)
    }
}

/// Addresses that were chosen, in the order in which they are evicted.
#[derive(Debug, Default)]
pub(super) struct Chosen {
    candidates: VecDeque<Candidate>,
    until_ns: u64,
}

impl Chosen {
    /// The number of addresses.
    fn len(&self) -> usize {
        self.candidates.len()
    }

    /// Takes `wanted` addresses, or a few more if they are fewer than [`AT_ONCE`], as long as there are any that may still be evicted.
    fn take(
        &mut self,
        wanted: usize,
        addresses: &mut Addresses,
        spared: Spared<'_>,
        allow: &mut impl Entries,
        now_ns: u64,
    ) -> Vec<Address> {
        if self.is_over(now_ns) {
            self.candidates.clear();
        }
        let (mut taken, mut removals) = (Vec::new(), 0);
        while (taken.len() < wanted || removals < AT_ONCE)
            && let Some(candidate) = self.candidates.pop_front()
        {
            if !spared.contains(&candidate.address)
                && candidate.is_still_one(addresses, allow, now_ns)
            {
                let learned = addresses.peek(&candidate.address);
                removals += 1 + learned.map_or(0, |learned| learned.sources.len());
                taken.push(candidate.address);
            }
        }
        taken
    }

    /// Whether none is left, or they were chosen too long ago.
    fn is_over(&self, now_ns: u64) -> bool {
        self.candidates.is_empty() || now_ns >= self.until_ns
    }
}

/// A search for addresses to evict: first the expired ones, then those of names that fill more than their part of the map,
/// then the others; the least recently used first within each group.
///
/// Never finds an address with an open flow of the pod: at the next edit of the policy that flow is judged by the entry, and
/// would be cut without it. A flow that begins during the search is not seen.
#[derive(Debug)]
struct Search {
    open: OpenFlows,
    has_open: bool,
    /// The place of the address that is looked at next, and of the first that is not: it has been used since the search
    /// began, or its response may not have been sent yet.
    next: Place,
    end: Place,
    /// Most addresses of each priority that are of use.
    most: usize,
    /// By priority.
    found: [Vec<Candidate>; 3],
}

impl Search {
    /// Begins a search for at least `wanted` addresses.
    fn begin(addresses: &Addresses, unsent: Place, wanted: usize, capacity: usize) -> Self {
        Self {
            open: OpenFlows::default(),
            has_open: false,
            next: Place::default(),
            end: addresses.end().min(unsent),
            most: wanted.max(capacity / BATCH_PART),
            found: [const { Vec::new() }; 3],
        }
    }

    /// Searches for some 0.1 ms. Ready when the search is over.
    ///
    /// # Errors
    ///
    /// When the pod's flows cannot be read.
    fn proceed(
        &mut self,
        addresses: &Addresses,
        spared: Spared<'_>,
        allow: &impl Entries,
        now_ns: u64,
    ) -> Poll<Result<(), AllowError>> {
        if !self.has_open {
            ready!(allow.read_open(&mut self.open, now_ns))?;
            self.has_open = true;
        }
        let crowd = Crowd::of(addresses, allow.capacity());
        let mut looked_at = 0;
        for (place, address, learned) in addresses.from(self.next) {
            if place >= self.end || self.has_enough() {
                return Poll::Ready(Ok(()));
            }
            if looked_at >= SEARCH_PART {
                return Poll::Pending;
            }
            looked_at += 1 + crowd.names_to_look_at(learned);
            self.next = place.next();
            if spared.contains(&address) || self.open.to.contains(&address) {
                continue;
            }
            let priority = crowd.priority(learned, now_ns);
            let found = &mut self.found[priority as usize];
            if found.len() < self.most {
                found.push(Candidate {
                    place,
                    address,
                    priority,
                });
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Whether further addresses cannot come before those that were found.
    fn has_enough(&self) -> bool {
        self.found[Priority::Expired as usize].len() >= self.most
    }

    /// What the search has found, and whether that is all there is.
    fn end(self, now_ns: u64) -> (Chosen, bool) {
        let mut candidates: VecDeque<Candidate> = self.found.into_iter().flatten().collect();
        let is_all = candidates.len() < self.most;
        candidates.truncate(self.most);
        let chosen = Chosen {
            candidates,
            until_ns: now_ns + CHOSEN_NS,
        };
        (chosen, is_all)
    }
}

impl Table {
    /// Evicts addresses if those of a `part` of a response do not fit. `all` are those of the whole response. Pending while
    /// it is searched for addresses that may be evicted; see [`Search`].
    ///
    /// # Errors
    ///
    /// [`AllowError::Full`] when there are not enough of them; otherwise the kernel's error.
    pub(super) fn make_room(
        &mut self,
        allow: &mut impl Entries,
        part: &[AnswerAddress],
        (all, room): (&[AnswerAddress], &mut Room),
        now_ns: u64,
    ) -> Poll<Result<(), AllowError>> {
        let wanted = self.wanted_for(part, allow.capacity());
        if wanted == 0 {
            return Poll::Ready(Ok(()));
        }
        let kept = &*room.kept.get_or_insert_with(|| positions(all));
        let waiting = self.insertion.as_mut().map(|waiting| waiting.positions());
        let spared = Spared([Some(kept), waiting]);
        let addresses = &mut self.addresses;
        let mut evicted = self.chosen.take(wanted, addresses, spared, allow, now_ns);
        if evicted.len() < wanted {
            let mut search = room.search.take().unwrap_or_else(|| {
                Box::new(Search::begin(
                    addresses,
                    self.unsent,
                    wanted,
                    allow.capacity(),
                ))
            });
            if search
                .proceed(addresses, spared, allow, now_ns)?
                .is_pending()
            {
                room.search = Some(search);
                return Poll::Pending;
            }
            let waits_for_send = self.has_queued && !room.at_once;
            let (chosen, is_all) = search.end(now_ns);
            let found = chosen.len();
            self.chosen = chosen;
            evicted = self.chosen.take(wanted, addresses, spared, allow, now_ns);
            if evicted.len() < wanted {
                return if is_all && evicted.len() == found && !waits_for_send {
                    Poll::Ready(Err(AllowError::Full))
                } else {
                    // Some have been used again, or wait for the next send. Another search may find others.
                    Poll::Pending
                };
            }
        }
        for address in evicted {
            self.remove(allow, address)?;
        }
        Poll::Ready(Ok(()))
    }

    /// Begins a decision, or goes on with that on the present message. Addresses of responses that have not been sent yet are
    /// not evicted for it: those in the queue of the frame sender, if it has any of the pod, and those of earlier responses
    /// in the same message, which is a segment of DNS over TCP then.
    pub(super) fn begin_decision(&mut self, goes_on: bool, has_queued: bool) {
        if !goes_on {
            self.message_from = self.addresses.end();
        }
        if !has_queued {
            self.unsent = self.message_from;
        }
        self.has_queued = has_queued;
    }

    /// How many addresses must be evicted for those of a response.
    pub(super) fn wanted_for(&self, part: &[AnswerAddress], capacity: usize) -> usize {
        if self.addresses.len() + part.len() <= capacity {
            return 0;
        }
        let all: HashSet<&Address> = part.iter().map(|one| &one.address).collect();
        let new = all
            .into_iter()
            .filter(|address| !self.addresses.contains(address));
        (self.addresses.len() + new.count()).saturating_sub(capacity)
    }

    /// Whether addresses are still to be evicted that were chosen for it.
    pub(super) fn is_evicting(&self) -> bool {
        !self.chosen.is_over(boottime_ns())
    }

    /// Evicts a part of the addresses that were chosen.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub(super) fn evict_more(
        &mut self,
        allow: &mut impl Entries,
        now_ns: u64,
    ) -> Result<(), AllowError> {
        if self.chosen.is_over(now_ns) {
            return Ok(());
        }
        let waiting = self.insertion.as_mut().map(|waiting| waiting.positions());
        let addresses = &mut self.addresses;
        let evicted = self
            .chosen
            .take(1, addresses, Spared([waiting, None]), allow, now_ns);
        for address in evicted {
            self.remove(allow, address)?;
        }
        Ok(())
    }
}

/// The order in which addresses are evicted: the smallest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Priority {
    /// The address has expired.
    Expired,
    /// The address lives, and all its names fill more than their part of the map.
    Crowding,
    /// The address lives.
    Live,
}

/// Tells which names fill more than their part of the map.
struct Crowd<'a> {
    addresses: &'a Addresses,
    /// How many addresses a name may have.
    part: usize,
}

impl<'a> Crowd<'a> {
    fn of(addresses: &'a Addresses, capacity: usize) -> Self {
        let part = (capacity / NAME_PART).max(1);
        Self { addresses, part }
    }

    /// How many names must be looked at to tell whether an address is crowding: none if no name has so many addresses.
    fn names_to_look_at(&self, learned: &Learned) -> usize {
        if self.addresses.most_of_a_name() <= self.part {
            return 0;
        }
        learned.sources.len()
    }

    fn priority(&self, learned: &Learned, now_ns: u64) -> Priority {
        if learned.expires_ns() <= now_ns {
            return Priority::Expired;
        }
        if self.names_to_look_at(learned) == 0 {
            return Priority::Live;
        }
        let is_crowding = |name| self.addresses.count_of(name) > self.part;
        if learned
            .sources
            .iter()
            .all(|source| is_crowding(&source.name))
        {
            Priority::Crowding
        } else {
            Priority::Live
        }
    }
}
