//! Chooses the addresses that are evicted when a pod's allow map is full.

use std::collections::{HashSet, VecDeque};

use egress_common::address::Address;

use super::{addresses::Addresses, learned::Entries, learned_address::Learned};
use crate::datapath::AllowError;
use egress_dns::Name;

/// The part of the map that is evicted at once: one eviction reads all of the pod's flows, which costs as
/// much for one address as for many.
const BATCH_PART: usize = 16;

/// The part of the map that one name may fill before its addresses are evicted first: a name with ever new
/// addresses evicts only its own.
const NAME_PART: usize = 4;

/// The charge for reading a flow, and the debt that a pod may have; the debt shrinks as time passes. Reading
/// takes about a microsecond. So a pod that has the maximum of flows, and resolves new names as fast as it
/// can, takes a tenth of the gate's time and not all of it.
const COST_NS: u64 = 10_000;
const CREDIT_NS: u64 = 1_000_000_000;

/// Most addresses that are evicted in a turn, unless more places are wanted at once. The rest of a batch follows in the
/// pod's next turns, so that no other pod waits for the removal of all.
const AT_ONCE: usize = 32;

/// How long addresses stay chosen: a flow that the pod opens meanwhile is not seen.
const CHOSEN_NS: u64 = 5_000_000;

/// Addresses that were chosen, in the order in which they are evicted.
#[derive(Debug, Default)]
pub(super) struct Chosen {
    addresses: VecDeque<Address>,
    until_ns: u64,
}

impl Chosen {
    pub(super) fn new(addresses: Vec<Address>, now_ns: u64) -> Self {
        Self {
            addresses: addresses.into(),
            until_ns: now_ns + CHOSEN_NS,
        }
    }

    /// Whether at least `wanted` of these addresses are chosen, apart from those in `kept`, and not too long ago.
    pub(super) fn has(
        &mut self,
        wanted: usize,
        addresses: &Addresses,
        kept: &HashSet<Address>,
        now_ns: u64,
    ) -> bool {
        if now_ns >= self.until_ns {
            self.addresses.clear();
        }
        self.addresses
            .retain(|address| addresses.contains(address) && !kept.contains(address));
        self.addresses.len() >= wanted
    }

    /// Takes `wanted` addresses or a few more.
    pub(super) fn take(&mut self, wanted: usize) -> Vec<Address> {
        let taken = self.addresses.len().min(wanted.max(AT_ONCE));
        self.addresses.drain(..taken).collect()
    }

    /// Whether none is left, or they were chosen too long ago.
    pub(super) fn is_over(&self, now_ns: u64) -> bool {
        self.addresses.is_empty() || now_ns >= self.until_ns
    }

    /// Takes out an address that is used again.
    pub(super) fn spare(&mut self, address: &Address) {
        self.addresses.retain(|chosen| chosen != address);
    }
}

/// Chooses addresses to evict.
#[derive(Debug, Default)]
pub(super) struct Eviction {
    /// When the debt is paid back.
    free_of_debt_ns: u64,
}

impl Eviction {
    /// Chooses at least `wanted` addresses to remove: first the expired ones, then those of names that fill
    /// more than their part of the map, then the others; the least recently used first within each group.
    /// Never chooses an address in `kept`, or one with an open flow of the pod: at the next edit of the
    /// policy that flow is judged by the entry, and would be cut without it. (The next eviction sees a flow
    /// that begins during this one.)
    ///
    /// # Errors
    ///
    /// [`AllowError::Full`] when there are not enough addresses, or when the pod's debt is too large;
    /// otherwise the kernel's error.
    pub(super) fn choose(
        &mut self,
        addresses: &Addresses,
        kept: &HashSet<Address>,
        wanted: usize,
        allow: &impl Entries,
        now_ns: u64,
    ) -> Result<Vec<Address>, AllowError> {
        if self.free_of_debt_ns.saturating_sub(now_ns) > CREDIT_NS {
            return Err(AllowError::Full);
        }
        let open = allow.open(now_ns)?;
        self.free_of_debt_ns = self.free_of_debt_ns.max(now_ns) + open.flows as u64 * COST_NS;
        let crowding = Crowding::of(addresses, allow.capacity());
        let mut chosen: Vec<(Priority, Address)> = addresses
            .iter()
            .rev()
            .filter(|(address, _)| !kept.contains(*address) && !open.to.contains(*address))
            .map(|(&address, learned)| (crowding.priority(learned, now_ns), address))
            .collect();
        if chosen.len() < wanted {
            return Err(AllowError::Full);
        }
        // The sort is stable: within a group the order of use stays.
        chosen.sort_by_key(|&(priority, _)| priority);
        chosen.truncate(wanted.max(allow.capacity() / BATCH_PART));
        Ok(chosen.into_iter().map(|(_, address)| address).collect())
    }
}

/// The order in which addresses are evicted: the smallest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Priority {
    /// The address has expired.
    Expired,
    /// The address lives, and all its names fill more than their part of the map.
    Crowding,
    /// The address lives.
    Live,
}

/// The names that fill more than their part of the map.
struct Crowding<'a>(HashSet<&'a Name>);

impl<'a> Crowding<'a> {
    fn of(addresses: &'a Addresses, capacity: usize) -> Self {
        let part = (capacity / NAME_PART).max(1);
        Self(addresses.names_of_more_than(part))
    }

    fn priority(&self, learned: &Learned, now_ns: u64) -> Priority {
        if learned.expires_ns() <= now_ns {
            return Priority::Expired;
        }
        if self.0.is_empty() {
            return Priority::Live;
        }
        let has_other = learned
            .sources
            .iter()
            .any(|source| !self.0.contains(&*source.name));
        if has_other || learned.sources.is_empty() {
            Priority::Live
        } else {
            Priority::Crowding
        }
    }
}
