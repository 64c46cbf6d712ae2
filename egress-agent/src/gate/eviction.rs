//! Which addresses give way when a pod's allow map is full.

use std::collections::{HashMap, HashSet};

use egress_common::address::Address;
use lru::LruCache;

use super::{learned::Entries, learned_address::Learned};
use crate::datapath::AllowError;
use egress_dns::Name;

/// The part of the map that gives way at once: flows are looked at one by one, which costs as much
/// for one address as for many.
const SHARE: usize = 16;

/// The part of the map that one name may fill while others want room: a name that leads elsewhere
/// every second crowds out itself and nobody else.
const SHARE_OF_A_NAME: usize = 4;

/// What looking at a flow costs a pod, and how much of that it may owe; it pays back as time passes.
/// Looking takes about a microsecond, so a pod that has all the flows it may have, and resolves new
/// names as fast as it can, takes a tenth of the gate's time and not all of it.
const COST_NS: u64 = 10_000;
const CREDIT_NS: u64 = 1_000_000_000;

/// Chooses who gives way.
#[derive(Debug, Default)]
pub(super) struct Eviction {
    /// When everything will have been paid back.
    free_of_debt_ns: u64,
}

impl Eviction {
    /// At least `wanted` addresses to be removed: those whose lifetime has ended first, then those
    /// of names that have more than their share, then the others; of each the least recently used
    /// first. Never one of `kept`, and never one that the pod has a flow open to: at
    /// the next edit of its policy the flow is judged by that entry, and would be cut without it.
    /// (A flow that begins while this looks is seen by the next look.)
    ///
    /// # Errors
    ///
    /// [`AllowError::Full`] when there are not as many, or the flows have been looked at too often;
    /// or what the kernel said.
    pub(super) fn choose(
        &mut self,
        addresses: &LruCache<Address, Learned>,
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
        let mut chosen: Vec<(Keeps, Address)> = addresses
            .iter()
            .rev()
            .filter(|(address, _)| !kept.contains(*address) && !open.to.contains(*address))
            .map(|(&address, learned)| (crowding.keeps(learned, now_ns), address))
            .collect();
        if chosen.len() < wanted {
            return Err(AllowError::Full);
        }
        // Stable: among equals the order of use stays.
        chosen.sort_by_key(|&(keeps, _)| keeps);
        chosen.truncate(wanted.max(allow.capacity() / SHARE));
        Ok(chosen.into_iter().map(|(_, address)| address).collect())
    }
}

/// Why an address should stay; who has less reason gives way first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Keeps {
    /// Its lifetime has ended.
    Nothing,
    /// It lives, and its names have more than their share.
    Life,
    /// It lives.
    Place,
}

/// The names that have more than their share of the map.
struct Crowding<'a>(HashSet<&'a Name>);

impl<'a> Crowding<'a> {
    fn of(addresses: &'a LruCache<Address, Learned>, capacity: usize) -> Self {
        let mut counts: HashMap<&Name, usize> = HashMap::new();
        for source in addresses.iter().flat_map(|(_, learned)| &learned.sources) {
            *counts.entry(&source.name).or_default() += 1;
        }
        let share = (capacity / SHARE_OF_A_NAME).max(1);
        counts.retain(|_, count| *count > share);
        Self(counts.into_keys().collect())
    }

    fn keeps(&self, learned: &Learned, now_ns: u64) -> Keeps {
        if learned.expires_ns() <= now_ns {
            return Keeps::Nothing;
        }
        let has_other = learned
            .sources
            .iter()
            .any(|source| !self.0.contains(&*source.name));
        if has_other || learned.sources.is_empty() {
            Keeps::Place
        } else {
            Keeps::Life
        }
    }
}
