//! Ranges and resolvers that an earlier agent left in force in a cluster.
//!
//! An agent that starts does not know the cluster's addresses until each of its watches has read a complete list.
//! Without the cluster's ranges, tunnels and internal addresses would be open; without its resolvers, responses would
//! Without the cluster's ranges, tunnels and internal addresses would be open; without its resolvers, responses would
//! pass unheld. So the entries of the kernel's map `ranges` stay at first: resolvers until every source of resolvers
//! is known, internal ranges until every source of internal ranges is. The configuration's own entries are added to
//! them.

use egress_common::records::{RANGE_INTERNAL, RANGE_RESOLVER, RANGE_SERVICES};

use super::apply::ranges::{listed, with_facts};
use crate::{
    config::Config,
    datapath::{RangeEntry, prefix_of},
    pods::{FactSource, Facts, Knowledge, Snapshot},
};
use egress_policy::{Prefix, Resolver, prefix::from_mapped};

/// The entries in the kernel that neither the configuration nor the known facts name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Inherited {
    pub(super) internal: Vec<Prefix>,
    /// Those of them that are ranges of Services. They stay as long as the API server does not name its ranges: it may
    /// refuse to, or not have them.
    pub(super) services: Vec<Prefix>,
    pub(super) resolvers: Vec<Resolver>,
}

impl Inherited {
    /// What stays in force at the start, besides what the configuration and `first` say.
    pub(super) fn at_start(configured: &Config, first: &Snapshot, in_force: &[RangeEntry]) -> Self {
        let mut inherited = Self::of(configured, &first.facts, in_force);
        inherited.retain_unknown(&first.knowledge);
        if !inherited.is_empty() {
            tracing::info!(
                internal = inherited.internal.len(),
                resolvers = %listed(&inherited.resolvers),
                "internal ranges and resolvers of an earlier agent stay in force until the API server has answered \
                 each list that they may come from"
            );
        }
        inherited
    }

    fn of(configured: &Config, facts: &Facts, in_force: &[RangeEntry]) -> Self {
        let known = with_facts(configured, facts, &Self::default());
        let mut inherited = Self::default();
        let mut in_force = in_force.to_vec();
        // Wider prefixes first: an entry has the kinds of all prefixes that contain it.
        in_force.sort_unstable_by_key(|&(_, prefix_len, _)| prefix_len);
        for (network, prefix_len, range) in in_force {
            let prefix = prefix_of(&network, prefix_len);
            let prefix = prefix.filter(|_| range.kinds & RANGE_INTERNAL != 0);
            if let Some(prefix) = prefix {
                let mut named = known.ranges.internal.iter().chain(&inherited.internal);
                if !named.any(|wider| wider.covers(&prefix)) {
                    inherited.internal.push(prefix);
                }
                let mut named = known.ranges.services.iter().chain(&inherited.services);
                if range.kinds & RANGE_SERVICES != 0 && !named.any(|wider| wider.covers(&prefix)) {
                    inherited.services.push(prefix);
                }
            }
            if range.kinds & RANGE_RESOLVER == 0 || prefix_len != 128 {
                continue;
            }
            let address = from_mapped(&network);
            let ports = range.resolver_ports.into_iter().filter(|port| *port != 0);
            let resolvers = ports.map(|port| Resolver { address, port });
            let unnamed = resolvers.filter(|resolver| !known.dns.resolvers.contains(resolver));
            inherited.resolvers.extend(unnamed);
        }
        inherited
    }

    /// Removes what the cluster would have named by now.
    pub(super) fn retain_unknown(&mut self, knowledge: &Knowledge) {
        if knowledge.has_resolvers() {
            self.resolvers.clear();
        }
        if knowledge.has_addresses() {
            self.internal.clear();
        }
        if knowledge.has(FactSource::ServiceRanges) {
            self.services.clear();
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.internal.is_empty() && self.services.is_empty() && self.resolvers.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(ranges: &str) -> Config {
        Config::from_yaml(&format!("node: a\nranges: {{{ranges}}}\n")).expect("a configuration")
    }

    fn facts(internal: &[&str], resolvers: &[&str]) -> Facts {
        let mut facts = Facts::default();
        for text in internal {
            let prefix = Prefix::parse(text).expect("a prefix");
            facts.internal.insert(prefix, "node a".into());
        }
        for text in resolvers {
            let resolver = text.parse().expect("a resolver");
            facts.resolvers.insert(resolver, "service".into());
        }
        facts
    }

    #[test]
    fn everything_internal_and_every_resolver_stays() {
        let earlier = facts(
            &["10.1.0.0/16", "10.1.2.0/24", "fd00::/64", "192.168.0.5"],
            &["10.1.0.10", "10.1.0.11:5353", "169.254.20.10"],
        );
        let none = Inherited::default();
        let configured = config("protected: [10.1.9.0/24]");
        let in_force = with_facts(&configured, &earlier, &none).ranges();
        let inherited = Inherited::of(&configured, &Facts::default(), &in_force);
        let all = with_facts(&configured, &Facts::default(), &inherited);
        for (network, prefix_len, range) in in_force {
            let found = all.ranges().into_iter().rfind(|&(other, length, _)| {
                let covers = |prefix: Prefix| {
                    prefix
                        .covers(&prefix_of(&network, prefix_len)?)
                        .then_some(())
                };
                prefix_of(&other, length).and_then(covers).is_some()
            });
            let (_, _, found) = found.expect("the range is in force");
            assert_eq!(found.kinds, range.kinds, "{network:?}/{prefix_len}");
            assert_eq!(found.resolver_ports, range.resolver_ports);
        }
    }

    #[test]
    fn what_configuration_and_facts_name_is_not_inherited() {
        let configured = config("internal: [10.1.0.0/16], protected: [203.0.113.9/32]");
        let known = facts(&["192.168.0.5"], &["10.1.0.10"]);
        let in_force = with_facts(&configured, &known, &Inherited::default()).ranges();
        assert!(Inherited::of(&configured, &known, &in_force).is_empty());
        let without = config("internal: [10.1.0.0/16]");
        assert!(
            Inherited::of(&without, &known, &in_force).is_empty(),
            "a protected range is the configuration's alone"
        );
    }

    #[test]
    fn what_is_inherited_stays_until_its_own_sources_are_known() {
        use FactSource as Of;
        let prefix = |text: &str| Prefix::parse(text).expect("a prefix");
        let all = Inherited {
            internal: vec![prefix("10.96.0.0/12"), prefix("192.168.0.5")],
            services: vec![prefix("10.96.0.0/12")],
            resolvers: vec!["10.1.0.10".parse().expect("a resolver")],
        };
        let left = |known: &[FactSource]| {
            let mut left = all.clone();
            left.retain_unknown(&known.iter().copied().collect());
            [
                left.internal.len(),
                left.services.len(),
                left.resolvers.len(),
            ]
        };
        let resolvers = [Of::DnsService, Of::DnsEndpoints, Of::Kubelet, Of::Pods];
        assert_eq!(left(&resolvers[..3]), [2, 1, 1]);
        assert_eq!(left(&resolvers), [2, 1, 0]);
        let addresses = [Of::Node, Of::DnsService, Of::ApiService, Of::ApiEndpoints];
        assert_eq!(left(&addresses[1..]), [2, 1, 1]);
        assert_eq!(left(&addresses), [0, 1, 1]);
        assert_eq!(left(&[Of::ServiceRanges]), [2, 0, 1]);
    }

    #[test]
    fn ranges_of_services_are_told_from_other_internal_ranges() {
        let mut earlier = facts(&["10.96.0.0/12", "10.1.0.0/16"], &["10.96.0.10"]);
        let services = Prefix::parse("10.96.0.0/12").expect("a prefix");
        earlier.services.insert(services);
        let configured = config("");
        let in_force = with_facts(&configured, &earlier, &Inherited::default()).ranges();
        let inherited = Inherited::of(&configured, &Facts::default(), &in_force);
        assert_eq!(inherited.services, [services]);
        assert_eq!(inherited.internal.len(), 2);
        assert!(Inherited::of(&configured, &earlier, &in_force).is_empty());
    }
}
