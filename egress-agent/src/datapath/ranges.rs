//! Which ranges and tunnels are in force, and what must happen before others are.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use anyhow::{Context as _, Result, bail};
use aya::maps::lpm_trie::Key;
use egress_common::{
    address::{self, Address},
    ids::PolicyId,
    limits::{DNS_PORTS, RANGE_ENTRIES},
    records::{
        DnsPorts, Policy, RANGE_INTERNAL, RANGE_NODE, RANGE_RESOLVER, RANGE_SERVICES, Range,
        Tunnel, TunnelKey,
    },
};
use egress_policy::{Prefix, prefix::from_mapped};

use super::{Datapath, View, boottime_ns, object::open, policies::ignore_missing};

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

    /// Checks that these tunnels and ranges can be put in force. Changes nothing.
    ///
    /// # Errors
    ///
    /// When there are too many of them, or a map cannot be read.
    pub fn check_room(&self, tunnels: &[TunnelKey], ranges: &[RangeEntry]) -> Result<()> {
        dns_ports_of(ranges)?;
        let most = RANGE_ENTRIES as usize;
        if ranges.len() > most {
            bail!(
                "the configuration and the cluster have {} prefixes of all kinds; the limit is {most}: merge \
                 prefixes in `ranges`, or set cluster.nodes to own",
                ranges.len()
            );
        }
        let known = self.ranges()?;
        let known = known.iter().map(|(network, length, _)| (network, length));
        let next = ranges.iter().map(|(network, length, _)| (network, length));
        let both: HashSet<_> = known.chain(next).collect();
        self.check_size("ranges", both.len())?;
        let known = self.known_tunnels()?;
        let both: HashSet<_> = known.iter().chain(tunnels).collect();
        self.check_size("tunnels", both.len())
    }

    fn check_size(&self, map: &str, needed: usize) -> Result<()> {
        let size = open(&self.layout, map)?
            .info()
            .with_context(|| format!("cannot read the size of the map `{map}`"))?
            .max_entries() as usize;
        if needed > size {
            bail!(
                "the map `{map}` has room for {size} entries, and the change needs {needed}, those of before \
                 included: make the change in smaller steps"
            );
        }
        Ok(())
    }

    /// Puts these tunnels and ranges in force. If verdicts change with them, the records of the policies concerned lose
    /// their fingerprint first. So an agent that starts after this one was killed does not adopt flows that were judged
    /// under other ranges.
    ///
    /// Writes new ranges before it removes old ones, and opens tunnels last.
    ///
    /// # Errors
    ///
    /// As [`Self::check_room`], and when a map cannot be written. Some of them may be in force then.
    pub fn put_in_force(&mut self, tunnels: &[TunnelKey], ranges: &[RangeEntry]) -> Result<()> {
        self.check_room(tunnels, ranges)?;
        let known = self.ranges()?;
        if self.changes_verdicts(&known, tunnels, ranges)? {
            self.forget_fingerprints(|_, _| Ok(true))?;
        } else {
            let changed = changed_resolvers(&known, ranges);
            if !changed.is_empty() {
                let view = self.view()?;
                self.forget_fingerprints(|id, record| view.is_concerned((id, record), &changed))?;
            }
        }
        self.add_tunnels(tunnels)?;
        self.set_ranges(ranges)?;
        self.remove_tunnels(tunnels)
    }

    fn changes_verdicts(
        &self,
        known: &[RangeEntry],
        tunnels: &[TunnelKey],
        ranges: &[RangeEntry],
    ) -> Result<bool> {
        if kinds(known) != kinds(ranges) {
            return Ok(true);
        }
        let mut known = self.known_tunnels()?;
        let mut next = tunnels.to_vec();
        for keys in [&mut known, &mut next] {
            keys.sort_unstable();
            keys.dedup();
        }
        Ok(known != next)
    }

    fn forget_fingerprints(
        &mut self,
        is_concerned: impl Fn(PolicyId, &Policy) -> Result<bool>,
    ) -> Result<()> {
        for id in self.policy_ids()? {
            let Some(record) = self.policy(id)? else {
                continue;
            };
            // A policy that cannot be looked at is made anew too.
            if !is_concerned(id, &record).unwrap_or(true) {
                continue;
            }
            let ranges = SEVERAL_RANGES;
            self.policies
                .insert(id, Policy { ranges, ..record }, 0)
                .context("cannot write the map `policies`")?;
        }
        Ok(())
    }

    /// Replaces the kinds of addresses. New prefixes are written before old ones are removed, so that no address is
    /// unprotected in between.
    fn set_ranges(&mut self, ranges: &[RangeEntry]) -> Result<()> {
        let next = dns_ports_of(ranges)?;
        // The map's value is not replaced atomically, so only one half of it changes at a time.
        let before = self.dns_ports.get(&0, 0).unwrap_or_default().ports[0];
        self.set_dns_ports([before, next])?;
        self.set_prefixes(ranges)?;
        self.set_dns_ports([next, next])?;
        self.set_dns_ports([next, [0; DNS_PORTS]])
    }

    fn known_tunnels(&self) -> Result<Vec<TunnelKey>> {
        let known: Result<_, _> = self.tunnels.keys().collect();
        known.context("cannot read the map `tunnels`")
    }

    /// Closes these tunnels.
    fn add_tunnels(&mut self, tunnels: &[TunnelKey]) -> Result<()> {
        for key in tunnels {
            self.tunnels
                .insert(key, Tunnel { closed: 1 }, 0)
                .context("cannot write the map `tunnels`")?;
        }
        Ok(())
    }

    /// Opens all tunnels but these.
    fn remove_tunnels(&mut self, tunnels: &[TunnelKey]) -> Result<()> {
        let known = self.known_tunnels()?;
        for key in known.iter().filter(|key| !tunnels.contains(key)) {
            ignore_missing(self.tunnels.remove(key)).context("cannot write the map `tunnels`")?;
        }
        Ok(())
    }

    fn set_dns_ports(&mut self, ports: [[u16; DNS_PORTS]; 2]) -> Result<()> {
        self.dns_ports
            .set(0, DnsPorts { ports }, 0)
            .context("cannot write the map `dns_ports`")
    }

    fn set_prefixes(&mut self, ranges: &[RangeEntry]) -> Result<()> {
        for &(network, prefix_len, range) in ranges {
            self.ranges
                .insert(&Key::new(prefix_len, network), range, 0)
                .context("cannot write the map `ranges`")?;
        }
        let next: HashSet<(Address, u32)> = ranges
            .iter()
            .map(|&(network, prefix_len, _)| (network, prefix_len))
            .collect();
        for (network, prefix_len, _) in self.ranges()? {
            if !next.contains(&(network, prefix_len)) {
                let key = Key::new(prefix_len, network);
                ignore_missing(self.ranges.remove(&key))
                    .context("cannot write the map `ranges`")?;
            }
        }
        Ok(())
    }
}

impl View {
    /// Whether a policy judges otherwise because these IPv4 addresses are resolvers' now, or are no more.
    ///
    /// An entry or range for an IPv4 address also counts for its translation (NAT64), unless the address is a
    /// resolver's: see [`egress_common::verdict::Destination::add_translated`]. Only a pod with an IPv6 address
    /// sends there.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn is_concerned(
        &self,
        policy: (PolicyId, &Policy),
        changed: &BTreeSet<Address>,
    ) -> Result<bool> {
        let (_, record) = policy;
        let mut own = record.own.iter().take(record.own_len as usize);
        if own.all(address::is_v4) {
            return Ok(false);
        }
        for address in changed {
            let (destination, _) = self.destination(policy, address, boottime_ns())?;
            let is_allowed = !destination.cidr.without(record.deny).is_empty();
            if is_allowed || destination.ranges & (RANGE_INTERNAL | RANGE_NODE) != 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The ports at which the resolvers of these ranges are asked.
fn dns_ports_of(ranges: &[RangeEntry]) -> Result<[u16; DNS_PORTS]> {
    let ports = ranges.iter().flat_map(|(_, _, range)| range.resolver_ports);
    let mut next = [0; DNS_PORTS];
    for port in ports.filter(|port| *port != 0) {
        if !next.contains(&port) {
            let free = next.iter_mut().find(|slot| **slot == 0);
            *free.context("the resolvers have too many different ports")? = port;
        }
    }
    Ok(next)
}

/// The IPv4 addresses that are a resolver's before or after a change, and not both.
fn changed_resolvers(before: &[RangeEntry], after: &[RangeEntry]) -> BTreeSet<Address> {
    let resolvers = |ranges: &[RangeEntry]| -> BTreeSet<Address> {
        let resolvers = ranges
            .iter()
            .filter(|(_, length, range)| *length == 128 && range.kinds & RANGE_RESOLVER != 0);
        resolvers
            .map(|&(address, ..)| address)
            .filter(address::is_v4)
            .collect()
    };
    &resolvers(before) ^ &resolvers(after)
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
    use egress_common::records::RANGE_PROTECTED;

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
