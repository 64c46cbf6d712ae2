//! What resolving a name could open, under ordered rules.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use egress_common::{
    classes::ClassSet,
    protocol::bits,
    records::{POLICY_OPEN, POLICY_SELECTED, Policy},
    verdict::deciding_class,
};

use super::{Cidr, Prefix};

/// Tells whether an address with certain classes could be reached by any packet. A name may be queried only if its
/// addresses could: otherwise the response would be useless, and the query could only carry data out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Openings {
    record: Box<Policy>,
    /// The different sets of classes that match some packet.
    matching: Vec<ClassSet>,
    /// The classes that every IPv4 address has, and those that every IPv6 address has.
    families: [ClassSet; 2],
}

impl Openings {
    /// For the policy of this record and its prefixes.
    pub(super) fn new(record: &Policy, cidrs: &[Cidr]) -> Self {
        let of_all = |family: IpAddr| {
            let all = Prefix::containing(family, 0);
            let mut whole = cidrs.iter();
            let whole = whole
                .find(|cidr| (cidr.network, cidr.prefix_len) == (all.network(), all.prefix_len()));
            whole
                .map_or(ClassSet::EMPTY, |cidr| cidr.classes)
                .or(record.any)
        };
        let families = [
            of_all(Ipv4Addr::UNSPECIFIED.into()),
            of_all(Ipv6Addr::UNSPECIFIED.into()),
        ];
        let classes = record.classes.iter();
        let used = classes.filter(|class| class.protocols != 0);
        let ports = used.flat_map(|class| [class.port_min, class.port_max.saturating_add(1)]);
        let ports: BTreeSet<u16> = ports.chain([0]).collect();
        let protocols = (0..u8::BITS).map(|bit| 1 << bit);
        let protocols = protocols.filter(|protocol| bits::ALL & protocol != 0);
        let matching: BTreeSet<ClassSet> = protocols
            .flat_map(|protocol| {
                let ports = ports.iter();
                ports.map(move |port| record.ports.matching(protocol, *port))
            })
            .collect();
        Self {
            record: Box::new(*record),
            matching: matching.into_iter().collect(),
            families,
        }
    }

    /// Whether some packet to an external address with these classes passes.
    pub(super) fn opens(&self, classes: ClassSet) -> bool {
        let of_family = |family: &ClassSet| self.opens_to(classes.or(*family));
        self.families.iter().any(of_family)
    }

    /// Whether some packet to an external address with these classes would pass if annotations and namespaced policies
    /// allowed everything. If not, they cannot permit the query either.
    pub(super) fn may_open(&self, classes: ClassSet) -> bool {
        let record = &self.record;
        self.families.iter().any(|family| {
            let first_tier = classes.or(*family).and(record.admin);
            let mut matching = self.matching.iter();
            matching.any(|matching| {
                let decides = first_tier.and(*matching).only_first();
                !decides.meets(record.deny)
            })
        })
    }

    /// Whether some packet passes to an external address of which these are all classes.
    fn opens_to(&self, known: ClassSet) -> bool {
        let record = &self.record;
        let skipped = if record.flags & POLICY_SELECTED == 0 {
            ClassSet::EMPTY
        } else {
            record.baseline
        };
        self.matching.iter().any(|matching| {
            let decides = deciding_class(record, known.without(skipped).and(*matching));
            if decides.is_empty() {
                record.flags & POLICY_OPEN != 0
            } else {
                !decides.meets(record.deny)
            }
        })
    }
}
