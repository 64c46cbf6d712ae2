//! Few prefixes for many addresses.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap},
};

use egress_common::address::Address;

use crate::prefix::{Prefix, mask, merge};

/// At most so many prefixes (but one) that contain these of one family. They contain few of the `others`, which are in
/// order, and then few addresses besides. Without need they contain no other address at all.
pub(super) fn cover(prefixes: &BTreeSet<Prefix>, most: usize, others: &[Address]) -> Vec<Prefix> {
    let exact = merge(&prefixes.iter().copied().collect::<Vec<_>>());
    let mut surplus = exact.len().saturating_sub(most.max(1));
    if surplus == 0 {
        return exact;
    }
    let mut tree = Tree::new(exact, others);
    while surplus > 0 && tree.join_cheapest() {
        surplus -= 1;
    }
    tree.nodes
        .into_iter()
        .flatten()
        .map(|node| node.prefix)
        .collect()
}

/// Prefixes in order, which are joined to the shortest that contains two neighbours, from the leaves of their tree on.
struct Tree<'a> {
    /// Those that were joined to the one before are missing.
    nodes: Vec<Option<Node>>,
    /// Pairs of neighbouring prefixes, the cheapest to join first. A pair is ignored if one of its prefixes has changed.
    pairs: BinaryHeap<Reverse<Pair>>,
    others: &'a [Address],
}

#[derive(Clone, Copy)]
struct Node {
    prefix: Prefix,
    before: Option<usize>,
    after: Option<usize>,
}

/// In the order of the costs.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    /// How many of the others come to be contained.
    others: usize,
    /// How many addresses do.
    addresses: u128,
    place: usize,
    of: [Prefix; 2],
}

impl<'a> Tree<'a> {
    fn new(prefixes: Vec<Prefix>, others: &'a [Address]) -> Self {
        let count = prefixes.len();
        let nodes = prefixes.into_iter().enumerate().map(|(place, prefix)| {
            Some(Node {
                prefix,
                before: place.checked_sub(1),
                after: Some(place + 1).filter(|after| *after < count),
            })
        });
        let mut tree = Self {
            nodes: nodes.collect(),
            pairs: BinaryHeap::new(),
            others,
        };
        for place in 0..count {
            tree.offer(place);
        }
        tree
    }

    fn node(&self, place: usize) -> Option<Node> {
        self.nodes.get(place).copied().flatten()
    }

    /// Adds the pair of this prefix and the next, if no neighbour is nearer to one of both.
    fn offer(&mut self, place: usize) {
        let Some(node) = self.node(place) else { return };
        let Some(next) = node.after.and_then(|after| self.node(after)) else {
            return;
        };
        let length = common(&node.prefix, &next.prefix);
        let before = node.before.and_then(|before| self.node(before));
        let after = next.after.and_then(|after| self.node(after));
        let is_nearer = |one: &Prefix, other: Option<Node>| {
            other.is_some_and(|other| common(one, &other.prefix) > length)
        };
        if is_nearer(&node.prefix, before) || is_nearer(&next.prefix, after) {
            return;
        }
        let joined = join(&node.prefix, &next.prefix);
        let added = |count: &dyn Fn(&Prefix) -> u128| {
            count(&joined).saturating_sub(count(&node.prefix) + count(&next.prefix))
        };
        let others = added(&|prefix| count_within(self.others, prefix) as u128);
        self.pairs.push(Reverse(Pair {
            others: others as usize,
            addresses: added(&size),
            place,
            of: [node.prefix, next.prefix],
        }));
    }

    /// Returns false if there is nothing to join.
    fn join_cheapest(&mut self) -> bool {
        while let Some(Reverse(Pair { place, of, .. })) = self.pairs.pop() {
            let Some(node) = self.node(place) else {
                continue;
            };
            let Some((next_place, next)) = node
                .after
                .and_then(|after| Some((after, self.node(after)?)))
            else {
                continue;
            };
            if [node.prefix, next.prefix] != of {
                continue;
            }
            self.nodes[next_place] = None;
            self.nodes[place] = Some(Node {
                prefix: join(&node.prefix, &next.prefix),
                after: next.after,
                ..node
            });
            if let Some(after) = next.after
                && let Some(after) = &mut self.nodes[after]
            {
                after.before = Some(place);
            }
            self.offer(place);
            if let Some(before) = node.before {
                self.offer(before);
            }
            return true;
        }
        false
    }
}

/// How many bits both begin with.
fn common(one: &Prefix, other: &Prefix) -> u32 {
    let [a, b] = [one, other].map(|prefix| u128::from_be_bytes(prefix.network()));
    let shorter = one.prefix_len().min(other.prefix_len());
    (a ^ b).leading_zeros().min(shorter)
}

/// The longest prefix that contains both.
fn join(one: &Prefix, other: &Prefix) -> Prefix {
    let length = common(one, other);
    Prefix::of_map(mask(one.network(), length), length)
}

fn size(prefix: &Prefix) -> u128 {
    let bits = u128::BITS - prefix.prefix_len();
    1_u128.checked_shl(bits).unwrap_or(u128::MAX)
}

/// How many of these addresses, which are in order, are in a prefix.
fn count_within(addresses: &[Address], prefix: &Prefix) -> usize {
    let first = addresses.partition_point(|address| *address < prefix.network());
    let rest = &addresses[first..];
    rest.partition_point(|address| prefix.spans(address))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;
    use crate::prefix::to_mapped;

    fn hosts(addresses: &BTreeSet<u16>) -> BTreeSet<Prefix> {
        let addresses = addresses.iter().copied();
        addresses.map(|n| Prefix::host(host(n).into())).collect()
    }

    fn host(number: u16) -> Ipv4Addr {
        Ipv4Addr::from(0x0a60_0000 | u32::from(number))
    }

    proptest! {
        #[test]
        fn a_cover_contains_all_and_not_more_prefixes_than_asked(
            own in proptest::collection::btree_set(any::<u16>(), 1..300),
            others in proptest::collection::btree_set(any::<u16>(), 0..300),
            most in 1_usize..300,
        ) {
            let others: Vec<Address> = others
                .difference(&own)
                .map(|number| to_mapped(host(*number).into()))
                .collect();
            let covers = cover(&hosts(&own), most, &others);
            prop_assert!(covers.len() <= most);
            for number in &own {
                let address = to_mapped(host(*number).into());
                let containing = covers.iter().filter(|prefix| prefix.contains(&address));
                prop_assert_eq!(containing.count(), 1);
            }
            if own.len() <= most {
                let size: u128 = covers.iter().map(size).sum();
                prop_assert_eq!(size, own.len() as u128);
            }
        }
    }

    #[test]
    fn unassigned_addresses_are_taken_before_those_of_others() {
        // The first pair is nearer, but another address is between.
        let own = hosts(&BTreeSet::from([0, 2, 16, 23]));
        let others = [to_mapped(host(1).into())];
        let texts = |most, others| -> Vec<String> {
            let covers = cover(&own, most, others);
            covers.iter().map(ToString::to_string).collect()
        };
        assert_eq!(
            texts(3, &others[..]),
            ["10.96.0.0", "10.96.0.2", "10.96.0.16/29"]
        );
        assert_eq!(texts(3, &[]), ["10.96.0.0/30", "10.96.0.16", "10.96.0.23"]);
    }
}
