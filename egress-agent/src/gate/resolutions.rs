//! A pod's resolutions for people to read. One call reads a bounded number of addresses, whatever the table's
//! size.

use std::{collections::HashMap, sync::Arc};

use egress_common::address::Address;

use super::{learned::Table, learned_address::Learned};
use egress_dns::Name;

/// Which of a pod's resolutions are wanted.
#[derive(Clone, Debug)]
pub enum About {
    /// Everything.
    All,
    /// The names that resolved to one address.
    Address(Address),
    /// The addresses to which one name resolved.
    Name(Name),
}

/// A name and the addresses to which it resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The name; `None` for addresses of an earlier agent whose names it could not keep.
    pub name: Option<Arc<Name>>,
    /// Whether an entry allows its addresses.
    pub listed: bool,
    /// Each address and when its lifetime ends, in nanoseconds of `CLOCK_BOOTTIME`.
    pub addresses: Vec<(Address, u64)>,
}

/// The resolutions of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolutions {
    /// The names, in no particular order.
    pub names: Vec<Resolved>,
    /// Addresses in the allow map.
    pub addresses: usize,
    /// Addresses that were left out because there are too many to read in one call.
    pub left_out: usize,
}

/// A name, if it is known, and whether an entry allows its addresses.
type Kind = (Option<Arc<Name>>, bool);

impl Table {
    /// Reads at most `most` addresses, the most recently used first.
    pub(super) fn resolutions(&self, about: &About, most: usize) -> Resolutions {
        let mut names: HashMap<Kind, Vec<(Address, u64)>> = HashMap::new();
        let wanted = |name: &Name| match about {
            About::Name(wanted) => wanted == name,
            About::All | About::Address(_) => true,
        };
        let mut add = |name: Option<&Arc<Name>>, listed, address, expires_ns| {
            if name.map_or(!matches!(about, About::Name(_)), |name| wanted(name)) {
                let resolved = names.entry((name.cloned(), listed)).or_default();
                resolved.push((address, expires_ns));
            }
        };
        let mut add_learned = |address, learned: &Learned| {
            for source in &learned.sources {
                add(Some(&source.name), true, address, source.expires_ns);
            }
            if let Some(adopted) = learned.adopted {
                add(None, true, address, adopted.expires_ns);
            }
        };
        let mut left_out = 0;
        if let About::Address(address) = about {
            if let Some(learned) = self.addresses.peek(address) {
                add_learned(*address, learned);
            }
        } else {
            left_out = self.addresses.len().saturating_sub(most);
            for (address, learned) in self.addresses.iter().take(most) {
                add_learned(*address, learned);
            }
        }
        for (name, answered) in &self.unlisted {
            for answered in answered {
                if !matches!(about, About::Address(only) if *only != answered.address) {
                    add(Some(name), false, answered.address, answered.expires_ns);
                }
            }
        }
        Resolutions {
            names: names
                .into_iter()
                .map(|((name, listed), addresses)| Resolved {
                    name,
                    listed,
                    addresses,
                })
                .collect(),
            addresses: self.addresses.len(),
            left_out,
        }
    }
}
