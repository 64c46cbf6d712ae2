//! A pod's addresses in the order of their use, with the number of addresses of each name.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use egress_common::address::Address;

use super::learned_address::Learned;
use egress_dns::Name;

/// The addresses of one pod, in the order of their use.
///
/// It counts the names: to look at the names of all addresses takes milliseconds, and a pod that resolves new names all the
/// time needs the counts often.
pub(super) struct Addresses {
    all: HashMap<Address, Placed>,
    by_use: BTreeMap<Place, Address>,
    /// The place of the next address that is used.
    next: Place,
    /// How many addresses have the name.
    of_names: HashMap<Arc<Name>, usize>,
    /// How many names have this many addresses, by the number of addresses. The last one is not 0.
    names_with: Vec<usize>,
}

struct Placed {
    place: Place,
    learned: Learned,
}

/// The place of an address in the order of use. Whenever an address is used, it gets a place behind all others. So one that
/// has its place still has not been used since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place(u64);

impl Place {
    /// A place behind all that addresses ever have.
    pub(super) const LAST: Self = Self(u64::MAX);

    /// The place behind this one.
    pub(super) const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Addresses {
    pub(super) fn new() -> Self {
        Self {
            all: HashMap::new(),
            by_use: BTreeMap::new(),
            next: Place::default(),
            of_names: HashMap::new(),
            names_with: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub(super) fn contains(&self, address: &Address) -> bool {
        self.all.contains_key(address)
    }

    pub(super) fn peek(&self, address: &Address) -> Option<&Learned> {
        self.all.get(address).map(|placed| &placed.learned)
    }

    /// The place of an address.
    pub(super) fn place(&self, address: &Address) -> Option<Place> {
        self.all.get(address).map(|placed| placed.place)
    }

    /// The place behind all addresses.
    pub(super) fn end(&self) -> Place {
        self.next
    }

    /// The addresses from this place on, the least recently used first.
    pub(super) fn from(&self, place: Place) -> impl Iterator<Item = (Place, Address, &Learned)> {
        self.by_use.range(place..).filter_map(|(&place, address)| {
            let placed = self.all.get(address)?;
            Some((place, *address, &placed.learned))
        })
    }

    /// The addresses, the most recently used first.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Address, &Learned)> {
        self.by_use
            .values()
            .rev()
            .filter_map(|address| Some((address, self.peek(address)?)))
    }

    /// Stores an address as the most recently used one.
    pub(super) fn put(&mut self, address: Address, learned: Learned) {
        for source in &learned.sources {
            let addresses = self.of_names.entry(Arc::clone(&source.name)).or_default();
            *addresses += 1;
            let now = *addresses;
            self.recount(now - 1, now);
        }
        let place = self.next;
        self.next = place.next();
        self.by_use.insert(place, address);
        let replaced = self.all.insert(address, Placed { place, learned });
        self.forget(replaced);
    }

    /// Removes an address.
    pub(super) fn pop(&mut self, address: &Address) -> Option<Learned> {
        let removed = self.all.remove(address);
        self.forget(removed)
    }

    /// Removes the least recently used address.
    pub(super) fn pop_lru(&mut self) -> Option<(Address, Learned)> {
        let (_, &address) = self.by_use.first_key_value()?;
        Some((address, self.pop(&address)?))
    }

    /// Extends a lifetime of an address, if it is there, without using it; see [`Learned::extend`].
    pub(super) fn extend(&mut self, address: &Address, until: (u64, u64)) {
        if let Some(placed) = self.all.get_mut(address) {
            placed.learned.extend(until);
        }
    }

    /// Changes all addresses without using them. `change` leaves their names as they are.
    pub(super) fn change_all(&mut self, mut change: impl FnMut(Address, &mut Learned)) {
        for (&address, placed) in &mut self.all {
            change(address, &mut placed.learned);
        }
    }

    /// How many addresses have the name.
    pub(super) fn count_of(&self, name: &Name) -> usize {
        self.of_names.get(name).copied().unwrap_or(0)
    }

    /// The most addresses that one name has.
    pub(super) fn most_of_a_name(&self) -> usize {
        self.names_with.len().saturating_sub(1)
    }

    /// Removes an address, which `all` has no more, from the order of use and from the counts.
    fn forget(&mut self, removed: Option<Placed>) -> Option<Learned> {
        let Placed { place, learned } = removed?;
        self.by_use.remove(&place);
        self.uncount(&learned);
        Some(learned)
    }

    fn uncount(&mut self, removed: &Learned) {
        for source in &removed.sources {
            let Some(addresses) = self.of_names.get_mut(&source.name) else {
                continue;
            };
            *addresses -= 1;
            let now = *addresses;
            if now == 0 {
                self.of_names.remove(&source.name);
            }
            self.recount(now + 1, now);
        }
    }

    /// Notes that a name has another number of addresses.
    fn recount(&mut self, before: usize, now: usize) {
        if self.names_with.len() <= now {
            self.names_with.resize(now + 1, 0);
        }
        if before > 0 {
            self.names_with[before] -= 1;
        }
        if now > 0 {
            self.names_with[now] += 1;
        }
        while self.names_with.last() == Some(&0) {
            self.names_with.pop();
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
        fn addresses_stay_in_the_order_of_use_and_each_name_is_counted_once_for_each(
            steps in prop::collection::vec((0..6u8, any::<u8>(), 0..4u8), 0..60),
        ) {
            let mut addresses = Addresses::new();
            // The least recently used first.
            let mut order: Vec<Address> = Vec::new();
            for (number, names, step) in steps {
                let address = from_v4([10, 0, 0, number]);
                let place = addresses.place(&address);
                match step {
                    0 => {
                        addresses.pop(&address);
                        order.retain(|other| *other != address);
                    }
                    1 => {
                        let removed = addresses.pop_lru().map(|(address, _)| address);
                        prop_assert_eq!(removed, order.first().copied());
                        order = order.into_iter().skip(1).collect();
                    }
                    _ => {
                        addresses.put(address, learned(address, names));
                        order.retain(|other| *other != address);
                        order.push(address);
                        prop_assert_ne!(addresses.place(&address), place);
                    }
                }
            }
            let from = |place| addresses.from(place).map(|(_, address, _)| address);
            prop_assert_eq!(from(Place::default()).collect::<Vec<_>>(), order.clone());
            for (number, address) in order.iter().enumerate() {
                let place = addresses.place(address).expect("its place");
                prop_assert!(from(place).eq(order[number..].iter().copied()));
            }
            prop_assert!(addresses.iter().map(|(address, _)| address).eq(order.iter().rev()));
            prop_assert_eq!((addresses.len(), addresses.by_use.len()), (order.len(), order.len()));
            let mut counts: HashMap<Name, usize> = HashMap::new();
            for source in addresses.iter().flat_map(|(_, learned)| &learned.sources) {
                *counts.entry(Name::clone(&source.name)).or_default() += 1;
            }
            for (name, &count) in &counts {
                prop_assert_eq!(addresses.count_of(name), count);
            }
            prop_assert_eq!(addresses.of_names.len(), counts.len());
            let most = counts.values().copied().max().unwrap_or(0);
            prop_assert_eq!(addresses.most_of_a_name(), most);
        }
    }
}
