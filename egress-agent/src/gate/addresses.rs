//! A pod's addresses in the order of their use, with the number of addresses of each name.

use std::{
    collections::{HashMap, HashSet},
    ops::Deref,
    sync::Arc,
};

use egress_common::address::Address;
use lru::LruCache;

use super::learned_address::Learned;
use egress_dns::Name;

/// The addresses of one pod, the least recently used last.
///
/// It is read like the cache that it wraps. Changes go through its own functions, which count the names: to look at the
/// names of all addresses takes milliseconds, and a pod that resolves new names all the time needs the counts often.
pub(super) struct Addresses {
    // Unbounded, because the bounded caches allocate all of their memory at once. The table keeps the bounds.
    all: LruCache<Address, Learned>,
    /// How many addresses have the name.
    of_names: HashMap<Arc<Name>, usize>,
}

impl Deref for Addresses {
    type Target = LruCache<Address, Learned>;

    fn deref(&self) -> &Self::Target {
        &self.all
    }
}

impl Addresses {
    pub(super) fn new() -> Self {
        Self {
            all: LruCache::unbounded(),
            of_names: HashMap::new(),
        }
    }

    /// Stores an address as the most recently used one.
    pub(super) fn put(&mut self, address: Address, learned: Learned) {
        for source in &learned.sources {
            *self.of_names.entry(Arc::clone(&source.name)).or_default() += 1;
        }
        let replaced = self.all.put(address, learned);
        self.uncount(replaced.as_ref());
    }

    /// Removes an address.
    pub(super) fn pop(&mut self, address: &Address) -> Option<Learned> {
        let removed = self.all.pop(address);
        self.uncount(removed.as_ref());
        removed
    }

    /// Removes the least recently used address.
    pub(super) fn pop_lru(&mut self) -> Option<(Address, Learned)> {
        let removed = self.all.pop_lru();
        self.uncount(removed.as_ref().map(|(_, learned)| learned));
        removed
    }

    /// Makes an address the most recently used one.
    pub(super) fn promote(&mut self, address: &Address) {
        self.all.promote(address);
    }

    /// Extends a lifetime of an address, if it is there, without using it; see [`Learned::extend`].
    pub(super) fn extend(&mut self, address: &Address, until: (u64, u64)) {
        if let Some(learned) = self.all.peek_mut(address) {
            learned.extend(until);
        }
    }

    /// Changes all addresses without using them. `change` leaves their names as they are.
    pub(super) fn change_all(&mut self, mut change: impl FnMut(Address, &mut Learned)) {
        for (&address, learned) in &mut self.all {
            change(address, learned);
        }
    }

    /// The names that have more than this many addresses.
    pub(super) fn names_of_more_than(&self, most: usize) -> HashSet<&Name> {
        // Looking at all names costs more than the few addresses of most pods.
        if self.all.len() <= most {
            return HashSet::new();
        }
        let names = self.of_names.iter();
        names
            .filter(|&(_, &addresses)| addresses > most)
            .map(|(name, _)| &**name)
            .collect()
    }

    fn uncount(&mut self, removed: Option<&Learned>) {
        for source in removed.iter().flat_map(|learned| &learned.sources) {
            let Some(addresses) = self.of_names.get_mut(&source.name) else {
                continue;
            };
            *addresses -= 1;
            if *addresses == 0 {
                self.of_names.remove(&source.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use egress_common::{address::from_v4, classes::ClassSet};
    use proptest::prelude::*;

    use super::*;
    use crate::gate::learned::AnswerAddress;
    use egress_policy::{Grant, MayBeInternal};

    const NOTHING: Grant = Grant {
        classes: ClassSet::EMPTY,
        internal: MayBeInternal::No,
    };

    /// An address with some of eight names.
    fn learned(address: Address, names: u8) -> Learned {
        let mut learned = Learned::default();
        for number in (0..8).filter(|number| names & (1 << number) != 0) {
            let answered = AnswerAddress {
                address,
                by_stranger: false,
                expires_ns: 1,
            };
            let name = Name::from_labels([[b'a' + number].as_slice()]).expect("a name");
            learned.add(&Arc::new(name), NOTHING, &answered);
        }
        learned
    }

    proptest! {
        #[test]
        fn each_name_is_counted_once_for_each_of_its_addresses(
            steps in prop::collection::vec((0..6u8, any::<u8>(), 0..4u8), 0..60),
            most in 0..4usize,
        ) {
            let mut addresses = Addresses::new();
            for (number, names, step) in steps {
                let address = from_v4([10, 0, 0, number]);
                match step {
                    0 => drop(addresses.pop(&address)),
                    1 => drop(addresses.pop_lru()),
                    _ => addresses.put(address, learned(address, names)),
                }
            }
            let mut counts: HashMap<Name, usize> = HashMap::new();
            for source in addresses.iter().flat_map(|(_, learned)| &learned.sources) {
                *counts.entry(Name::clone(&source.name)).or_default() += 1;
            }
            let expected: HashSet<&Name> = counts
                .iter()
                .filter(|&(_, &count)| count > most)
                .map(|(name, _)| name)
                .collect();
            prop_assert_eq!(addresses.names_of_more_than(most), expected);
            prop_assert_eq!(addresses.of_names.len(), counts.len());
        }
    }
}
