//! One address that a pod's resolvers returned: its names, classes and lifetimes.

use std::sync::Arc;

use egress_common::{address::Address, classes::ClassSet, records::AllowEntry};

use super::{
    learned::{AnswerAddress, Entries},
    pod::learning::id_of,
};
use crate::datapath::AllowError;
use egress_dns::Name;
use egress_policy::{Grant, MayBeInternal, NameRules};

/// Most names that are remembered for one address. More are kept only if each gives the address a class that
/// no other name gives; there are at most twice as many of those as a policy has classes.
pub(super) const NAMES_PER_ADDRESS: usize = 16;

/// A name that resolved to an address.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) name: Arc<Name>,
    gives: Classes,
    /// Whether a stranger's name is in the chain of aliases; see [`egress_policy::NameRules::is_strangers`].
    pub(super) by_stranger: bool,
    pub(super) expires_ns: u64,
}

/// The classes of an address, and the subset of them that applies even if the address is internal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Classes {
    all: ClassSet,
    internal: ClassSet,
}

/// The classes that a name gives to an address, and the subset of them that applies if it is internal.
pub(super) fn given(grant: Grant, by_stranger: bool) -> (ClassSet, ClassSet) {
    let Classes { all, internal } = Classes::given(grant, by_stranger);
    (all, internal)
}

impl Classes {
    /// The classes that a name gives to an address.
    pub(super) fn given(grant: Grant, by_stranger: bool) -> Self {
        let may = match grant.internal {
            MayBeInternal::Yes => true,
            MayBeInternal::WithoutStrangers => !by_stranger,
            MayBeInternal::No => false,
        };
        Self {
            all: grant.classes,
            internal: if may { grant.classes } else { ClassSet::EMPTY },
        }
    }

    const fn of(entry: &AllowEntry) -> Self {
        Self {
            all: entry.classes,
            internal: entry.internal_classes,
        }
    }

    /// The intersection with other classes.
    const fn within(self, other: Self) -> Self {
        Self {
            all: self.all.and(other.all),
            internal: self.internal.and(other.internal),
        }
    }

    /// The classes that are not among the others.
    const fn without(self, other: Self) -> Self {
        Self {
            all: self.all.without(other.all),
            internal: self.internal.without(other.internal),
        }
    }

    const fn and(self, other: Self) -> Self {
        Self {
            all: self.all.or(other.all),
            internal: self.internal.or(other.internal),
        }
    }
}

/// An address in the allow map.
#[derive(Clone, Debug, Default)]
pub(super) struct Learned {
    pub(super) sources: Vec<Source>,
    /// The part of an earlier agent's entry that none of the names accounts for.
    pub(super) adopted: Option<AllowEntry>,
    /// The entry that is in the allow map.
    pub(super) written: Option<AllowEntry>,
}

impl Learned {
    /// An earlier agent's entry with the names that it had kept; `rules` say which classes each name gives.
    /// `None` for `rules` if the entry was made by other rules.
    ///
    /// A name gives no more than the entry: it may have been kept for a response that was not delivered.
    pub(super) fn taken_over(
        entry: AllowEntry,
        names: impl IntoIterator<Item = (Arc<Name>, bool, u64)>,
        rules: Option<&NameRules>,
    ) -> Self {
        let of_entry = Classes::of(&entry);
        let mut accounted = Classes::default();
        let mut sources = Vec::new();
        for (name, by_stranger, expires_ns) in names {
            let gives = rules.map_or_else(Classes::default, |rules| {
                Classes::given(rules.grant(&name), by_stranger).within(of_entry)
            });
            accounted = accounted.and(gives);
            sources.push(Source {
                name,
                gives,
                by_stranger,
                expires_ns: expires_ns.min(entry.expires_ns),
            });
        }
        let rest = of_entry.without(accounted);
        let adopted = (rules.is_some() && rest != Classes::default()).then_some(AllowEntry {
            classes: rest.all,
            internal_classes: rest.internal,
            ..entry
        });
        Self {
            sources,
            adopted,
            written: rules.map(|_| entry),
        }
    }

    /// Whether the names that allowed the address are not all known.
    pub(super) fn is_nameless(&self) -> bool {
        self.adopted.is_some() || self.sources.is_empty()
    }

    /// Records that a name resolved to the address. Returns a name that is forgotten in exchange.
    pub(super) fn add(
        &mut self,
        name: &Arc<Name>,
        grant: Grant,
        answered: &AnswerAddress,
    ) -> Option<Arc<Name>> {
        let AnswerAddress {
            by_stranger,
            expires_ns,
            ..
        } = *answered;
        let gives = Classes::given(grant, by_stranger);
        if let Some(source) = self.sources.iter_mut().find(|source| source.name == *name) {
            source.gives = gives;
            source.by_stranger = by_stranger;
            source.expires_ns = source.expires_ns.max(expires_ns);
            return None;
        }
        self.sources.push(Source {
            name: Arc::clone(name),
            gives,
            by_stranger,
            expires_ns,
        });
        if self.sources.len() > NAMES_PER_ADDRESS {
            return drop_redundant(&mut self.sources);
        }
        None
    }

    /// Extends the lifetime of the name with this id to the one that the programs have learned.
    pub(super) fn extend(&mut self, (expires_ns, id): (u64, u64)) {
        for source in &mut self.sources {
            if source.expires_ns < expires_ns && id_of(&source.name) == id {
                source.expires_ns = expires_ns;
            }
        }
    }

    /// The entry of the name, if it resolved to the address.
    pub(super) fn source(&self, name: &Name) -> Option<&Source> {
        self.sources.iter().find(|source| *source.name == *name)
    }

    /// The classes and their ends of lifetime.
    fn parts(&self) -> impl Iterator<Item = (Classes, u64)> + '_ {
        let adopted = self.adopted.as_ref();
        self.sources
            .iter()
            .map(|source| (source.gives, source.expires_ns))
            .chain(adopted.map(|entry| (Classes::of(entry), entry.expires_ns)))
    }

    /// Whether the lifetime of a name ended after one time and not after another.
    pub(super) fn ended_between(&self, after_ns: u64, until_ns: u64) -> bool {
        let mut sources = self.sources.iter();
        sources.any(|source| (after_ns + 1..=until_ns).contains(&source.expires_ns))
    }

    /// The end of the last lifetime.
    pub(super) fn expires_ns(&self) -> u64 {
        self.parts()
            .map(|(_, expires_ns)| expires_ns)
            .max()
            .unwrap_or(0)
    }

    /// The entry for the allow map: the classes of the names that have not expired. If all have expired, the
    /// entry has all their classes, expired.
    fn entry(&self, now_ns: u64) -> AllowEntry {
        let any = |classes: Classes, (more, _)| classes.and(more);
        let alive = self
            .parts()
            .filter(|&(_, expires_ns)| expires_ns > now_ns)
            .fold(Classes::default(), any);
        let classes = if alive.all.is_empty() {
            self.parts().fold(Classes::default(), any)
        } else {
            alive
        };
        AllowEntry {
            classes: classes.all,
            internal_classes: classes.internal,
            expires_ns: self.expires_ns(),
        }
    }

    /// When the entry next changes without a new response: the earliest end of a lifetime in the future.
    pub(super) fn changes_ns(&self, now_ns: u64) -> u64 {
        self.parts()
            .map(|(_, expires_ns)| expires_ns)
            .filter(|&expires_ns| expires_ns > now_ns)
            .min()
            .unwrap_or(u64::MAX)
    }

    /// Writes the entry to the allow map if it has changed.
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

/// Forgets a name that is redundant: other names give its classes for at least as long. There is one whenever
/// there are more than twice as many names as classes.
fn drop_redundant(sources: &mut Vec<Source>) -> Option<Arc<Name>> {
    let is_redundant = |i: usize, source: &Source| {
        let others = sources
            .iter()
            .enumerate()
            .filter(|&(j, other)| j != i && other.expires_ns >= source.expires_ns);
        let carried = others.fold(Classes::default(), |carried, (_, other)| {
            carried.and(other.gives)
        });
        carried.and(source.gives) == carried
    };
    let first = sources
        .iter()
        .enumerate()
        .filter(|&(i, source)| is_redundant(i, source))
        .min_by_key(|(_, source)| source.expires_ns)
        .map(|(i, _)| i);
    first.map(|i| sources.swap_remove(i).name)
}
