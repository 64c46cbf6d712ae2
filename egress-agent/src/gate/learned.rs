//! What a pod's resolvers taught: which names led to which addresses, and for how long.
//!
//! The table mirrors the pod's allow map, whose only writer the gate is, and knows more: the names.
//! It is bounded by the allow map; names that no entry allows are remembered beside it, so that an
//! entry added later works at once for what the pod has resolved before.

use std::{collections::HashSet, sync::Arc};

use egress_common::{address::Address, records::AllowEntry};
use lru::LruCache;

use crate::{
    datapath::{AllowError, AllowMap},
    dns::Name,
    policy::NameRules,
};

/// Most names without an entry that are remembered for one pod, and most addresses of each.
const UNLISTED_NAMES: usize = 256;
const UNLISTED_ADDRESSES: usize = 16;

/// Most names that are remembered for one address.
const NAMES_PER_ADDRESS: usize = 64;

/// How long an address without an open flow is kept after its lifetime, so that a denial can say
/// `expired`.
const EXPIRED_NS: u64 = 300 * 1_000_000_000;

/// A name that led to an address.
#[derive(Clone, Debug)]
struct Source {
    name: Arc<Name>,
    classes: u64,
    expires_ns: u64,
}

/// An address in the allow map.
#[derive(Clone, Debug, Default)]
struct Learned {
    sources: Vec<Source>,
    /// What an earlier agent had written, whose names are not known any more.
    adopted: Option<AllowEntry>,
}

impl Learned {
    /// The allow map's entry: classes of the names whose lifetime has not ended. When none is left,
    /// the entry says what it last was, expired.
    fn entry(&self, now_ns: u64) -> AllowEntry {
        let all = || {
            self.sources
                .iter()
                .map(|source| (source.classes, source.expires_ns))
                .chain(self.adopted.map(|entry| (entry.classes, entry.expires_ns)))
        };
        let alive = all().filter(|&(_, expires_ns)| expires_ns > now_ns);
        let classes = alive.clone().fold(0, |classes, (more, _)| classes | more);
        if classes != 0 {
            return AllowEntry {
                classes,
                expires_ns: alive.map(|(_, expires_ns)| expires_ns).max().unwrap_or(0),
            };
        }
        AllowEntry {
            classes: all().fold(0, |classes, (more, _)| classes | more),
            expires_ns: all().map(|(_, expires_ns)| expires_ns).max().unwrap_or(0),
        }
    }

    /// When the entry next changes by itself: the earliest end of a lifetime that is to come.
    fn changes_ns(&self, now_ns: u64) -> u64 {
        self.sources
            .iter()
            .map(|source| source.expires_ns)
            .filter(|&expires_ns| expires_ns > now_ns)
            .min()
            .unwrap_or(u64::MAX)
    }
}

/// One address of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taught {
    pub(super) address: Address,
    pub(super) expires_ns: u64,
}

/// What one pod has learned.
pub(super) struct Table {
    addresses: LruCache<Address, Learned>,
    unlisted: LruCache<Arc<Name>, Vec<Taught>>,
    /// No entry changes by itself before this.
    next_change_ns: u64,
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            // Unbounded because the bounded ones allot all of their memory at once; the bounds are
            // kept where entries are added.
            addresses: LruCache::unbounded(),
            unlisted: LruCache::unbounded(),
            next_change_ns: u64::MAX,
        }
    }

    /// Takes over what an earlier agent left in the allow map.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub(super) fn adopt(&mut self, allow: &AllowMap) -> Result<(), AllowError> {
        for (address, entry) in allow.entries()? {
            let learned = Learned {
                sources: Vec::new(),
                adopted: Some(entry),
            };
            self.addresses.put(address, learned);
        }
        Ok(())
    }

    /// Learns that `name`, whose addresses are in `classes`, led to these addresses. When this
    /// returns without an error, each of them is in the allow map.
    ///
    /// # Errors
    ///
    /// [`AllowError::Full`] when they do not fit, even after expired and least recently used
    /// addresses made room; or what the kernel said.
    pub(super) fn learn(
        &mut self,
        allow: &mut AllowMap,
        name: &Name,
        classes: u64,
        taught: &[Taught],
        now_ns: u64,
    ) -> Result<(), AllowError> {
        if taught.is_empty() {
            return Ok(());
        }
        if classes == 0 {
            self.remember_unlisted(name, taught);
            return Ok(());
        }
        self.make_room(allow, taught, now_ns)?;
        let name = self.shared_name(name, taught);
        for &Taught {
            address,
            expires_ns,
        } in taught
        {
            let mut learned = self.addresses.get(&address).cloned().unwrap_or_default();
            match learned
                .sources
                .iter_mut()
                .find(|source| source.name == name)
            {
                Some(source) => {
                    source.classes = classes;
                    source.expires_ns = source.expires_ns.max(expires_ns);
                }
                None => {
                    if learned.sources.len() >= NAMES_PER_ADDRESS {
                        drop_first_to_expire(&mut learned.sources);
                    }
                    learned.sources.push(Source {
                        name: Arc::clone(&name),
                        classes,
                        expires_ns,
                    });
                }
            }
            allow.insert(address, learned.entry(now_ns))?;
            self.next_change_ns = self.next_change_ns.min(learned.changes_ns(now_ns));
            self.addresses.put(address, learned);
        }
        Ok(())
    }

    /// Writes everything that the new rules allow into the allow map of a new version of the
    /// policy. Returns the table of that version, without the rest.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub(super) fn carry_over(
        &self,
        rules: &NameRules,
        allow: &mut AllowMap,
        now_ns: u64,
    ) -> Result<Self, AllowError> {
        let mut next = Self::new();
        for (name, taught) in self.unlisted.iter().rev() {
            let live: Vec<Taught> = taught
                .iter()
                .filter(|taught| taught.expires_ns > now_ns)
                .copied()
                .collect();
            next.learn(allow, name, rules.classes(name), &live, now_ns)?;
        }
        // From the least recently used on, so that the order of use stays.
        for (&address, learned) in self.addresses.iter().rev() {
            for source in &learned.sources {
                let taught = Taught {
                    address,
                    expires_ns: source.expires_ns,
                };
                next.learn(
                    allow,
                    &source.name,
                    rules.classes(&source.name),
                    &[taught],
                    now_ns,
                )?;
            }
        }
        Ok(next)
    }

    /// Brings the allow map up to date with ended lifetimes, where it is due.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub(super) fn expire(&mut self, allow: &mut AllowMap, now_ns: u64) -> Result<(), AllowError> {
        if now_ns < self.next_change_ns {
            return Ok(());
        }
        self.next_change_ns = u64::MAX;
        for (&address, learned) in &mut self.addresses {
            let ended = learned
                .sources
                .iter()
                .any(|source| source.expires_ns <= now_ns);
            if ended && learned.sources.len() > 1 {
                allow.insert(address, learned.entry(now_ns))?;
            }
            self.next_change_ns = self.next_change_ns.min(learned.changes_ns(now_ns));
        }
        Ok(())
    }

    /// Forgets addresses whose lifetime ended a while ago, but for those in `open`.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub(super) fn sweep(
        &mut self,
        allow: &mut AllowMap,
        open: &HashSet<Address>,
        now_ns: u64,
    ) -> Result<(), AllowError> {
        let gone: Vec<Address> = self
            .addresses
            .iter()
            .filter(|(address, learned)| {
                learned.entry(now_ns).expires_ns.saturating_add(EXPIRED_NS) <= now_ns
                    && !open.contains(*address)
            })
            .map(|(&address, _)| address)
            .collect();
        for address in gone {
            allow.remove(address)?;
            self.addresses.pop(&address);
        }
        Ok(())
    }

    /// Names that led to the address, as text.
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
                    .filter(|(_, taught)| taught.iter().any(|taught| taught.address == *address))
                    .map(|(name, _)| name.to_string()),
            )
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Makes room for the addresses that are not in the map yet: expired ones go first, then the
    /// least recently used; never one of `taught`.
    fn make_room(
        &mut self,
        allow: &mut AllowMap,
        taught: &[Taught],
        now_ns: u64,
    ) -> Result<(), AllowError> {
        let new = |addresses: &LruCache<Address, Learned>| {
            taught
                .iter()
                .filter(|taught| !addresses.contains(&taught.address))
                .count()
        };
        if self.addresses.len() + new(&self.addresses) <= allow.capacity() {
            return Ok(());
        }
        let kept: HashSet<Address> = taught.iter().map(|taught| taught.address).collect();
        if kept.len() > allow.capacity() {
            return Err(AllowError::Full);
        }
        let by_expiry = self
            .addresses
            .iter()
            .rev()
            .filter(|(address, _)| !kept.contains(*address));
        let (expired, alive): (Vec<_>, Vec<_>) = by_expiry
            .map(|(&address, learned)| (address, learned.entry(now_ns).expires_ns))
            .partition(|&(_, expires_ns)| expires_ns <= now_ns);
        let wanted = kept
            .iter()
            .filter(|address| !self.addresses.contains(*address))
            .count();
        for (address, _) in expired.into_iter().chain(alive) {
            if self.addresses.len() + wanted <= allow.capacity() {
                break;
            }
            allow.remove(address)?;
            self.addresses.pop(&address);
        }
        Ok(())
    }

    fn remember_unlisted(&mut self, name: &Name, taught: &[Taught]) {
        if let Some(known) = self.unlisted.get_mut(name) {
            known.retain(|known| !taught.iter().any(|taught| taught.address == known.address));
            known.extend(taught);
            let excess = known.len().saturating_sub(UNLISTED_ADDRESSES);
            known.drain(..excess);
            return;
        }
        if self.unlisted.len() >= UNLISTED_NAMES {
            self.unlisted.pop_lru();
        }
        let taught = taught
            .iter()
            .rev()
            .take(UNLISTED_ADDRESSES)
            .copied()
            .collect();
        self.unlisted.put(Arc::new(name.clone()), taught);
    }

    /// The name as one of the addresses already has it, or a new copy.
    fn shared_name(&self, name: &Name, taught: &[Taught]) -> Arc<Name> {
        taught
            .iter()
            .filter_map(|taught| self.addresses.peek(&taught.address))
            .flat_map(|learned| &learned.sources)
            .find(|source| *source.name == *name)
            .map_or_else(|| Arc::new(name.clone()), |source| Arc::clone(&source.name))
    }
}

fn drop_first_to_expire(sources: &mut Vec<Source>) {
    let first = sources
        .iter()
        .enumerate()
        .min_by_key(|(_, source)| source.expires_ns)
        .map(|(i, _)| i);
    if let Some(i) = first {
        sources.swap_remove(i);
    }
}
