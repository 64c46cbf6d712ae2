//! The names that are kept for the next agent, beside the allow map's entries.

use std::task::Poll;

use egress_common::{address::Address, records::AllowEntry};

use super::{
    learned::{AnswerAddress, Entries, Table},
    learned_address::Learned,
};
use crate::datapath::{AllowError, Kept, NamesError, OpenFlows};
use egress_dns::Name;

/// The number of names that could not be kept since the last count, and the last error.
#[derive(Debug, Default)]
pub(super) struct NamesLost {
    times: u64,
    last: Option<NamesError>,
}

impl NamesLost {
    pub(super) fn add(&mut self, error: NamesError) {
        self.times += 1;
        self.last = Some(error);
    }

    /// Takes over the failures that were not counted yet.
    pub(super) fn take_from(&mut self, other: &mut Self) {
        self.times += std::mem::take(&mut other.times);
        self.last = self.last.take().or_else(|| other.last.take());
    }

    /// The number and the kernel's last error.
    pub(super) fn take(&mut self) -> Option<(u64, NamesError)> {
        let last = self.last.take()?;
        Some((std::mem::take(&mut self.times), last))
    }
}

/// An allow map that is filled while the pod's map of names stays unchanged.
pub(super) struct NamesStay<'a, E>(pub(super) &'a mut E);

impl<E: Entries> Entries for NamesStay<'_, E> {
    fn capacity(&self) -> usize {
        self.0.capacity()
    }

    fn insert(&mut self, address: Address, entry: AllowEntry) -> Result<(), AllowError> {
        self.0.insert(address, entry)
    }

    fn remove(&mut self, address: Address) -> Result<(), AllowError> {
        self.0.remove(address)
    }

    fn read_open(&self, open: &mut OpenFlows, now_ns: u64) -> Poll<Result<(), AllowError>> {
        self.0.read_open(open, now_ns)
    }

    fn keep_name(&mut self, _: &Name, _: &AnswerAddress) -> Result<(), NamesError> {
        Ok(())
    }

    fn learned_until(&mut self, address: Address) -> Option<(u64, u64)> {
        self.0.learned_until(address)
    }

    fn forget_name(&mut self, _: Address, _: &Name) -> Result<(), NamesError> {
        Ok(())
    }
}

impl Table {
    /// The number of addresses that an earlier agent left and whose names it had not kept. They are not
    /// carried over at an edit after which names mean something else.
    pub(super) fn nameless(&self) -> usize {
        let all = self.addresses.iter();
        all.filter(|(_, learned)| learned.is_nameless()).count()
    }

    /// Keeps the names of an address of this table that the table `before` does not have.
    pub(super) fn keep_names_missing_in(
        &mut self,
        before: &Self,
        address: Address,
        names: &mut impl Entries,
    ) {
        let learned = self.addresses.peek(&address);
        for source in learned.iter().flat_map(|learned| &learned.sources) {
            if before.has(&address, &source.name) {
                continue;
            }
            let answered = AnswerAddress {
                address,
                by_stranger: source.by_stranger,
                expires_ns: source.expires_ns,
            };
            if let Err(error) = names.keep_name(&source.name, &answered) {
                self.names_lost.add(error);
            }
        }
    }

    /// Removes the kept names of an address that this table does not have.
    pub(super) fn forget_names_of(
        &mut self,
        address: Address,
        learned: &Learned,
        names: &mut impl Entries,
    ) {
        for source in &learned.sources {
            if !self.has(&address, &source.name)
                && let Err(error) = names.forget_name(address, &source.name)
            {
                self.names_lost.add(error);
            }
        }
    }

    /// Removes the kept names that this table does not have.
    pub(super) fn forget_names_not_in_table(&mut self, kept: &[Kept], names: &mut impl Entries) {
        for kept in kept {
            if !self.has(&kept.address, &kept.name)
                && let Err(error) = names.forget_name(kept.address, &kept.name)
            {
                self.names_lost.add(error);
            }
        }
    }
}
