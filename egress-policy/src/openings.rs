//! What resolving a name could open, under ordered rules.

use std::collections::BTreeSet;

use egress_common::{
    classes::ClassSet,
    protocol::bits,
    records::{POLICY_OPEN, POLICY_SELECTED, Policy},
    verdict::deciding_class,
};

/// Tells whether an address with certain classes could be reached by any packet. A name may be queried only if its
/// addresses could: otherwise the response would be useless, and the query could only carry data out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Openings {
    record: Box<Policy>,
    /// The different sets of classes that match some packet.
    matching: Vec<ClassSet>,
}

impl Openings {
    /// For the policy of this record.
    pub(super) fn new(record: &Policy) -> Self {
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
        }
    }

    /// Whether some packet to an external address with these classes passes.
    pub(super) fn opens(&self, classes: ClassSet) -> bool {
        let record = &self.record;
        let known = classes.or(record.any);
        let skips_baseline = record.flags & POLICY_SELECTED != 0;
        self.matching.iter().any(|matching| {
            let decides = deciding_class(record, known.and(*matching), skips_baseline);
            if decides.is_empty() {
                record.flags & POLICY_OPEN != 0
            } else {
                !decides.meets(record.deny)
            }
        })
    }
}
