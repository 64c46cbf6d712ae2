//! The table of a pod's resolutions: which names resolved to which addresses, and for how long.
//!
//! The table mirrors the pod's allow map, which only the gate writes, and adds the names. The allow map's
//! capacity bounds it. The table also remembers resolutions of names that no entry allows, so that an entry
//! added later works at once for names that the pod has resolved before.

use std::{
    collections::HashMap,
    sync::Arc,
    task::{Poll, ready},
};

use egress_common::{address::Address, records::AllowEntry};
use lru::LruCache;

use super::{
    Enforcement,
    addresses::{Addresses, Place},
    eviction::{Chosen, Room},
    insertion::Insertion,
    learned_address::Learned,
    names_kept::NamesLost,
    tally::Tally,
};
use crate::datapath::{AllowError, Kept, NamesError, OpenFlows};
use egress_dns::Name;
use egress_policy::{Grant, NameRules};

/// How long no room is searched after there was none, for addresses that do not wait.
const FULL_NS: u64 = 100_000_000;

/// Most names without an entry that are remembered for one pod, and most addresses of each of them.
const UNLISTED_NAMES: usize = 256;
const UNLISTED_ADDRESSES: usize = 16;
/// Most protected addresses whose names are remembered for one pod.
const PROTECTED_ADDRESSES: usize = 64;

/// The maps that the table writes to: a pod's allow map and its map of names.
pub(super) trait Entries {
    /// See [`AllowMap::capacity`].
    fn capacity(&self) -> usize;
    /// See [`AllowMap::insert`].
    fn insert(&mut self, address: Address, entry: AllowEntry) -> Result<(), AllowError>;
    /// See [`AllowMap::remove`].
    fn remove(&mut self, address: Address) -> Result<(), AllowError>;
    /// See [`crate::datapath::FlowMap::read_open`].
    fn read_open(&self, open: &mut OpenFlows, now_ns: u64) -> Poll<Result<(), AllowError>>;
    /// See [`crate::datapath::NameMap::keep`].
    fn keep_name(&mut self, name: &Name, answered: &AnswerAddress) -> Result<(), NamesError>;
    /// See [`crate::datapath::NameMap::forget`].
    fn forget_name(&mut self, address: Address, name: &Name) -> Result<(), NamesError>;
    /// See [`Enforcement::learned_until`].
    fn learned_until(&mut self, address: Address) -> Option<(u64, u64)>;
}

impl Entries for Enforcement {
    fn capacity(&self) -> usize {
        self.allow.capacity()
    }

    fn insert(&mut self, address: Address, entry: AllowEntry) -> Result<(), AllowError> {
        self.allow.insert(address, entry)
    }

    fn remove(&mut self, address: Address) -> Result<(), AllowError> {
        self.allow.remove(address)
    }

    fn read_open(&self, open: &mut OpenFlows, now_ns: u64) -> Poll<Result<(), AllowError>> {
        self.flows.read_open(open, now_ns)
    }

    fn keep_name(&mut self, name: &Name, answered: &AnswerAddress) -> Result<(), NamesError> {
        let AnswerAddress {
            address,
            by_stranger,
            expires_ns,
        } = *answered;
        self.names.keep(address, name, by_stranger, expires_ns)
    }

    fn forget_name(&mut self, address: Address, name: &Name) -> Result<(), NamesError> {
        self.names.forget(address, name)
    }

    fn learned_until(&mut self, address: Address) -> Option<(u64, u64)> {
        Self::learned_until(self, address)
    }
}

/// One address of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AnswerAddress {
    pub(super) address: Address,
    /// Whether a stranger's name is in the chain of aliases; see [`NameRules::is_strangers`].
    pub(super) by_stranger: bool,
    pub(super) expires_ns: u64,
}

/// The resolutions of one pod.
pub(super) struct Table {
    pub(super) addresses: Addresses,
    pub(super) unlisted: LruCache<Arc<Name>, Vec<AnswerAddress>>,
    /// Protected addresses in responses, with the queried name. Only denials use it.
    pub(super) protected: LruCache<Address, Name>,
    /// No entry changes before this time unless a response comes.
    next_change_ns: u64,
    /// When the lifetimes were last compared with the clock.
    expired_ns: u64,
    /// Addresses from this place on may be in responses that have not been sent yet.
    pub(super) unsent: Place,
    /// Whether such responses are in the queue of the frame sender.
    pub(super) has_queued: bool,
    /// The place behind the addresses when the decision on the present message began.
    pub(super) message_from: Place,
    /// Until when no room is searched for addresses that do not wait: there was none.
    full_until_ns: u64,
    /// Addresses that were chosen to be evicted, and are still there.
    pub(super) chosen: Chosen,
    /// The response whose addresses are being inserted.
    pub(super) insertion: Option<Box<Insertion>>,
    /// How many addresses the last sweep kept although they had expired more than five minutes before.
    pub(super) expired_kept: usize,
    pub(super) failures: Failures,
    pub(super) names_lost: NamesLost,
}

/// Failed writes to the allow map, except for a full map, and the kernel's last error.
#[derive(Default)]
pub(super) struct Failures {
    times: Tally,
    last: Option<AllowError>,
}

impl Failures {
    pub(super) fn add(&mut self, error: AllowError) {
        self.times.add(1);
        self.last = Some(error);
    }

    /// The failures to log now, if a line is due.
    pub(super) fn due(&mut self, now_ns: u64) -> Option<(u64, Option<AllowError>)> {
        let times = self.times.due(now_ns)?;
        Some((times, self.last.take()))
    }
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            addresses: Addresses::new(),
            // Unbounded, because the bounded caches allocate all of their memory at once. The code that adds
            // entries keeps the bounds.
            unlisted: LruCache::unbounded(),
            protected: LruCache::unbounded(),
            next_change_ns: u64::MAX,
            expired_ns: 0,
            unsent: Place::LAST,
            has_queued: false,
            message_from: Place::default(),
            full_until_ns: 0,
            chosen: Chosen::default(),
            insertion: None,
            expired_kept: 0,
            failures: Failures::default(),
            names_lost: NamesLost::default(),
        }
    }

    /// The entries of an allow map that an earlier agent left, with the names that it `kept`. `rules` are the
    /// rules by which the map was filled; `None` if they are not known.
    pub(super) fn taken_over(
        mut entries: Vec<(Address, AllowEntry)>,
        kept: &[Kept],
        rules: Option<&NameRules>,
    ) -> Self {
        // The order of use is not known.
        entries.sort_by_key(|(_, entry)| entry.expires_ns);
        let mut shared: HashMap<&Name, Arc<Name>> = HashMap::new();
        let mut names: HashMap<Address, Vec<(Arc<Name>, bool, u64)>> = HashMap::new();
        for kept in kept {
            let name = shared
                .entry(&kept.name)
                .or_insert_with(|| Arc::new(kept.name.clone()));
            names.entry(kept.address).or_default().push((
                Arc::clone(name),
                kept.by_stranger,
                kept.expires_ns,
            ));
        }
        let mut table = Self::new();
        for (address, entry) in entries {
            // The names are not removed: two versions may have had the address, and the entry that lives
            // longer counts.
            let names = names.get(&address).cloned().unwrap_or_default();
            table.keep(address, Learned::taken_over(entry, names, rules), 0);
        }
        table
    }

    /// Whether this name resolved to the address and an entry allows it.
    pub(super) fn has(&self, address: &Address, name: &Name) -> bool {
        let learned = self.addresses.peek(address);
        learned.is_some_and(|learned| learned.source(name).is_some())
    }

    /// Stores an address as the most recently used one.
    pub(super) fn keep(&mut self, address: Address, learned: Learned, now_ns: u64) {
        self.next_change_ns = self.next_change_ns.min(learned.changes_ns(now_ns));
        self.addresses.put(address, learned);
    }

    /// Inserts the addresses of a response for `name`. `grant` is what the rules give to the name's
    /// addresses. After this returns without an error, each address is in the allow map.
    ///
    /// # Errors
    ///
    /// [`AllowError::Full`] when they do not fit, even after an eviction of expired and least recently used
    /// addresses without open flows. Then it is not tried again for 100 ms, because the search takes as long as a hundred
    /// messages. Otherwise the kernel's error.
    pub(super) fn learn(
        &mut self,
        allow: &mut impl Entries,
        name: &Name,
        grant: Grant,
        answered: &[AnswerAddress],
        now_ns: u64,
    ) -> Result<(), AllowError> {
        if answered.is_empty() {
            return Ok(());
        }
        if grant.classes.is_empty() {
            self.remember_unlisted(name, answered);
            return Ok(());
        }
        if now_ns < self.full_until_ns && self.wanted_for(answered, allow.capacity()) > 0 {
            return Err(AllowError::Full);
        }
        let mut name = Arc::new(name.clone());
        let mut room = Room::at_once();
        let inserted = loop {
            let all = (answered, &mut room);
            let inserted = self.insert(allow, &mut name, grant, answered, all, now_ns);
            if let Poll::Ready(result) = inserted {
                break result;
            }
        };
        if let Err(AllowError::Full) = inserted {
            self.full_until_ns = now_ns.saturating_add(FULL_NS);
        }
        inserted
    }

    /// Inserts a `part` of the addresses of a response, like [`Self::learn`]. `all` are all of them, none of which is
    /// evicted, with the room that has to be made for them. `name` becomes the copy of the name that the table has already.
    /// Pending, with nothing inserted, while addresses are searched that can be evicted.
    pub(super) fn insert(
        &mut self,
        allow: &mut impl Entries,
        name: &mut Arc<Name>,
        grant: Grant,
        part: &[AnswerAddress],
        all: (&[AnswerAddress], &mut Room),
        now_ns: u64,
    ) -> Poll<Result<(), AllowError>> {
        ready!(self.make_room(allow, part, all, now_ns))?;
        self.share_name(name, part);
        for answered in part {
            let address = answered.address;
            let known = self.addresses.peek(&address);
            let mut learned = known.cloned().unwrap_or_default();
            let is_new = learned.source(name).is_none();
            let forgotten = learned.add(name, grant, answered);
            // The name is kept before the entry is written, so that no address is open without its name.
            self.keep_name(allow, name, &learned, answered);
            // Always writes the entry, even if the table believes that the map has it: a response waits for
            // it.
            learned.written = None;
            if let Err(error) = learned.write(address, allow, now_ns) {
                if is_new {
                    self.forget_name(allow, address, name);
                }
                return Poll::Ready(Err(error));
            }
            if let Some(forgotten) = forgotten {
                self.forget_name(allow, address, &forgotten);
            }
            self.keep(address, learned, now_ns);
        }
        Poll::Ready(Ok(()))
    }

    /// Keeps for the next agent that the name resolved to the address. If that fails, the response is
    /// delivered anyway: the name is missed only if the agent restarts and the policy changes.
    fn keep_name(
        &mut self,
        allow: &mut impl Entries,
        name: &Name,
        learned: &Learned,
        answered: &AnswerAddress,
    ) {
        let Some(source) = learned.source(name) else {
            return;
        };
        let answered = AnswerAddress {
            expires_ns: source.expires_ns,
            ..*answered
        };
        if let Err(error) = allow.keep_name(name, &answered) {
            self.names_lost.add(error);
        }
    }

    fn forget_name(&mut self, allow: &mut impl Entries, address: Address, name: &Name) {
        if let Err(error) = allow.forget_name(address, name) {
            self.names_lost.add(error);
        }
    }

    /// Removes an address and its names.
    pub(super) fn remove(
        &mut self,
        allow: &mut impl Entries,
        address: Address,
    ) -> Result<(), AllowError> {
        allow.remove(address)?;
        let removed = self.addresses.pop(&address);
        self.note_removed(&address);
        for source in removed.iter().flat_map(|learned| &learned.sources) {
            self.forget_name(allow, address, &source.name);
        }
        Ok(())
    }

    /// Updates the entries of the allow map whose lifetimes have ended.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub(super) fn expire(
        &mut self,
        allow: &mut impl Entries,
        now_ns: u64,
    ) -> Result<(), AllowError> {
        if now_ns < self.next_change_ns {
            return Ok(());
        }
        let expired_ns = std::mem::replace(&mut self.expired_ns, now_ns);
        let mut next_change_ns = u64::MAX;
        let mut result = Ok(());
        self.addresses.change_all(|address, learned| {
            if learned.ended_between(expired_ns, now_ns)
                && let Some(until) = allow.learned_until(address)
            {
                learned.extend(until);
            }
            // A failed write does not delay the expiry of the other entries. It is retried at the next call.
            if let Err(error) = learned.write(address, allow, now_ns) {
                next_change_ns = now_ns;
                result = Err(error);
            }
            next_change_ns = next_change_ns.min(learned.changes_ns(now_ns));
        });
        self.next_change_ns = next_change_ns;
        result
    }

    /// Extends lifetimes to those that the programs have learned.
    pub(super) fn refresh(&mut self, learned: impl IntoIterator<Item = (Address, (u64, u64))>) {
        for (address, until) in learned {
            self.addresses.extend(&address, until);
        }
    }

    /// The names that resolved to the address.
    pub(super) fn names_of(&self, address: &Address) -> Vec<String> {
        let mut names: Vec<String> = self
            .addresses
            .peek(address)
            .into_iter()
            .flat_map(|learned| &learned.sources)
            .map(|source| source.name.to_string())
            .chain(
                self.unlisted
                    .iter()
                    .filter(|(_, answered)| {
                        answered.iter().any(|answered| answered.address == *address)
                    })
                    .map(|(name, _)| name.to_string()),
            )
            .chain(self.protected.peek(address).map(Name::to_string))
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Remembers that a response for the name had a protected address, which stays closed.
    pub(super) fn remember_protected(&mut self, address: Address, name: &Name) {
        if self.protected.len() >= PROTECTED_ADDRESSES && !self.protected.contains(&address) {
            self.protected.pop_lru();
        }
        self.protected.put(address, name.clone());
    }

    pub(super) fn remember_unlisted(&mut self, name: &Name, answered: &[AnswerAddress]) {
        if let Some(known) = self.unlisted.get_mut(name) {
            known.retain(|known| {
                !answered
                    .iter()
                    .any(|answered| answered.address == known.address)
            });
            known.extend(answered);
            let excess = known.len().saturating_sub(UNLISTED_ADDRESSES);
            known.drain(..excess);
            return;
        }
        if self.unlisted.len() >= UNLISTED_NAMES {
            self.unlisted.pop_lru();
        }
        let answered = answered
            .iter()
            .rev()
            .take(UNLISTED_ADDRESSES)
            .copied()
            .collect();
        self.unlisted.put(Arc::new(name.clone()), answered);
    }

    /// Replaces the name by the copy that one of the addresses has already.
    fn share_name(&self, name: &mut Arc<Name>, answered: &[AnswerAddress]) {
        let known = answered
            .iter()
            .filter_map(|answered| self.addresses.peek(&answered.address))
            .flat_map(|learned| &learned.sources)
            .find(|source| source.name == *name);
        if let Some(known) = known {
            *name = Arc::clone(&known.name);
        }
    }
}

#[cfg(test)]
#[path = "learned_fake.rs"]
mod fake;
#[cfg(test)]
#[path = "learned_tests.rs"]
mod tests;
