//! Which ranges and tunnels are in force, and what must happen before others are.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use egress_common::{
    address::Address,
    records::{Policy, RANGE_RESOLVER, RANGE_SERVICES, Range, TunnelKey},
};
use egress_policy::{Prefix, prefix::from_mapped};

use super::Datapath;

/// An entry of the map `ranges`: network, prefix length in bits of the 128-bit form, value.
pub type RangeEntry = (Address, u32, Range);

/// Value of [`Policy::ranges`] for flows that were judged under more than one set of ranges.
const SEVERAL_RANGES: u64 = 0;

impl Datapath {
    /// The entries of the map `ranges`.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn ranges(&self) -> Result<Vec<RangeEntry>> {
        let entries = self.ranges.iter().map(|entry| {
            let (key, range) = entry.context("cannot read the map `ranges`")?;
            Ok((key.data(), key.prefix_len(), range))
        });
        entries.collect()
    }

    /// Puts these tunnels and ranges in force. If verdicts change with them, the records of all policies lose their
    /// fingerprint first. So an agent that starts after this one was killed does not adopt flows that were judged
    /// under other ranges.
    ///
    /// Tunnels are closed before an address becomes internal. A list that is written in part closes too much, never
    /// too little.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub fn put_in_force(&mut self, tunnels: &[TunnelKey], ranges: &[RangeEntry]) -> Result<()> {
        if self.changes_verdicts(tunnels, ranges)? {
            self.forget_fingerprints()?;
        }
        self.set_tunnels(tunnels)?;
        self.set_ranges(ranges)
    }

    fn changes_verdicts(&self, tunnels: &[TunnelKey], ranges: &[RangeEntry]) -> Result<bool> {
        if kinds(&self.ranges()?) != kinds(ranges) {
            return Ok(true);
        }
        let known: Result<Vec<TunnelKey>, _> = self.tunnels.keys().collect();
        let mut known = known.context("cannot read the map `tunnels`")?;
        let mut next = tunnels.to_vec();
        for keys in [&mut known, &mut next] {
            keys.sort_unstable();
            keys.dedup();
        }
        Ok(known != next)
    }

    fn forget_fingerprints(&mut self) -> Result<()> {
        for id in self.policy_ids()? {
            let Some(record) = self.policy(id)? else {
                continue;
            };
            let ranges = SEVERAL_RANGES;
            self.policies
                .insert(id, Policy { ranges, ..record }, 0)
                .context("cannot write the map `policies`")?;
        }
        Ok(())
    }
}

/// The kinds of all addresses except that of a resolver: entries that say nothing else than the next wider one are
/// left out. DNS is held before flows are looked at, so flows need not be judged again because of resolvers.
fn kinds(ranges: &[RangeEntry]) -> BTreeMap<(Address, u32), u64> {
    let mut sorted: Vec<(Address, u32, u64)> = ranges
        .iter()
        .map(|&(network, prefix_len, range)| {
            let kinds = range.kinds & !(RANGE_RESOLVER | RANGE_SERVICES);
            (network, prefix_len, kinds)
        })
        .collect();
    // In this order each entry comes after all that contain it, so those form a stack.
    sorted.sort_unstable();
    let mut above: Vec<(Address, u32, u64)> = Vec::new();
    let mut kinds = BTreeMap::new();
    for entry @ (network, prefix_len, own) in sorted {
        while above
            .last()
            .is_some_and(|&(outer, length, _)| !contains(&outer, length, &network))
        {
            above.pop();
        }
        if above.last().map_or(0, |&(_, _, wider)| wider) != own {
            kinds.insert((network, prefix_len), own);
        }
        above.push(entry);
    }
    kinds
}

fn contains(network: &Address, prefix_len: u32, address: &Address) -> bool {
    let differing = u128::from_be_bytes(*network) ^ u128::from_be_bytes(*address);
    differing.leading_zeros() >= prefix_len
}

/// The prefix of an entry; `None` if no configuration can name it.
pub fn prefix_of(network: &Address, prefix_len: u32) -> Option<Prefix> {
    let address = from_mapped(network);
    let family = if address.is_ipv4() { 96 } else { 0 };
    let length = prefix_len.checked_sub(family)?;
    Some(Prefix::containing(address, length))
}

#[cfg(test)]
mod tests {
    use egress_common::records::{RANGE_INTERNAL, RANGE_PROTECTED};

    use super::*;

    fn of(entries: &[(&str, u64)]) -> BTreeMap<(Address, u32), u64> {
        let entries = entries.iter().map(|&(prefix, kinds)| {
            let prefix = Prefix::parse(prefix).expect("a prefix");
            let range = Range {
                kinds,
                ..Range::default()
            };
            (prefix.network(), prefix.prefix_len(), range)
        });
        kinds(&entries.collect::<Vec<_>>())
    }

    #[test]
    fn a_resolver_does_not_change_verdicts() {
        let without = of(&[("10.0.0.0/8", RANGE_INTERNAL)]);
        let with = of(&[
            ("10.0.0.0/8", RANGE_INTERNAL),
            ("10.0.0.53", RANGE_INTERNAL | RANGE_RESOLVER),
            ("192.0.2.53", RANGE_RESOLVER),
        ]);
        assert_eq!(without, with);
    }

    #[test]
    fn every_other_kind_of_an_address_changes_verdicts() {
        let all = [
            of(&[]),
            of(&[("10.0.0.0/8", RANGE_INTERNAL)]),
            of(&[("10.0.0.0/9", RANGE_INTERNAL)]),
            of(&[("10.0.0.0/8", RANGE_PROTECTED)]),
            of(&[
                ("10.0.0.0/8", RANGE_INTERNAL),
                ("10.0.0.9", RANGE_INTERNAL | RANGE_PROTECTED),
            ]),
            of(&[("10.0.0.0/8", RANGE_INTERNAL), ("10.0.0.9", 0)]),
        ];
        for (i, kinds) in all.iter().enumerate() {
            assert!(!all[..i].contains(kinds), "{i}");
        }
    }
}
