//! What is known of one address that a pod's resolvers gave it.

use std::sync::Arc;

use egress_common::{address::Address, records::AllowEntry};

use super::learned::Entries;
use crate::{datapath::AllowError, dns::Name};

/// Most names that are remembered for one address, unless each of more gives it something that no
/// other does; there are at most as many of those as a policy has classes.
pub(super) const NAMES_PER_ADDRESS: usize = 16;

/// A name that led to an address.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) name: Arc<Name>,
    classes: u64,
    pub(super) expires_ns: u64,
}

/// An address in the allow map.
#[derive(Clone, Debug, Default)]
pub(super) struct Learned {
    pub(super) sources: Vec<Source>,
    /// What an earlier agent had written, whose names are not known any more.
    pub(super) adopted: Option<AllowEntry>,
    /// What stands in the allow map.
    pub(super) written: Option<AllowEntry>,
}

impl Learned {
    /// Notes that a name led here.
    pub(super) fn add(&mut self, name: &Arc<Name>, classes: u64, expires_ns: u64) {
        if let Some(source) = self.sources.iter_mut().find(|source| source.name == *name) {
            source.classes = classes;
            source.expires_ns = source.expires_ns.max(expires_ns);
            return;
        }
        self.sources.push(Source {
            name: Arc::clone(name),
            classes,
            expires_ns,
        });
        if self.sources.len() > NAMES_PER_ADDRESS {
            drop_redundant(&mut self.sources);
        }
    }

    /// Classes and ends of lifetimes.
    fn parts(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.sources
            .iter()
            .map(|source| (source.classes, source.expires_ns))
            .chain(self.adopted.map(|entry| (entry.classes, entry.expires_ns)))
    }

    /// When the last lifetime ends.
    pub(super) fn expires_ns(&self) -> u64 {
        self.parts()
            .map(|(_, expires_ns)| expires_ns)
            .max()
            .unwrap_or(0)
    }

    /// The allow map's entry: classes of the names whose lifetime has not ended. When none is left,
    /// the entry says what it last was, expired.
    fn entry(&self, now_ns: u64) -> AllowEntry {
        let any = |classes, (more, _)| classes | more;
        let alive = self
            .parts()
            .filter(|&(_, expires_ns)| expires_ns > now_ns)
            .fold(0, any);
        AllowEntry {
            classes: if alive == 0 {
                self.parts().fold(0, any)
            } else {
                alive
            },
            expires_ns: self.expires_ns(),
        }
    }

    /// When the entry next changes by itself: the earliest end of a lifetime that is to come.
    pub(super) fn changes_ns(&self, now_ns: u64) -> u64 {
        self.parts()
            .map(|(_, expires_ns)| expires_ns)
            .filter(|&expires_ns| expires_ns > now_ns)
            .min()
            .unwrap_or(u64::MAX)
    }

    /// Brings the allow map's entry up to date.
    pub(super) fn write(
        &mut self,
        address: Address,
        allow: &mut impl Entries,
        now_ns: u64,
    ) -> Result<(), AllowError> {
        let entry = self.entry(now_ns);
        if self.written != Some(entry) {
            allow.insert(address, entry)?;
            self.written = Some(entry);
        }
        Ok(())
    }
}

/// Forgets a name that gives the address nothing: others carry its classes for at least as long.
/// There is one whenever there are more names than classes.
fn drop_redundant(sources: &mut Vec<Source>) {
    let is_redundant = |i: usize, source: &Source| {
        let others = sources
            .iter()
            .enumerate()
            .filter(|&(j, other)| j != i && other.expires_ns >= source.expires_ns);
        let carried = others.fold(0, |classes, (_, other)| classes | other.classes);
        source.classes & !carried == 0
    };
    let first = sources
        .iter()
        .enumerate()
        .filter(|&(i, source)| is_redundant(i, source))
        .min_by_key(|(_, source)| source.expires_ns)
        .map(|(i, _)| i);
    if let Some(i) = first {
        sources.swap_remove(i);
    }
}
