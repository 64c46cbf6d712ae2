//! An allow map without a kernel, for the tests of the table of learned addresses.

use std::collections::BTreeMap;

use super::*;

/// An allow map whose writes can be made to fail.
#[derive(Default)]
pub(super) struct Fake {
    pub(super) capacity: usize,
    pub(super) entries: BTreeMap<Address, AllowEntry>,
    pub(super) refused: Vec<Address>,
    pub(super) writes: usize,
    /// Addresses with open flows.
    pub(super) open: Vec<Address>,
    /// How many of them are read in one part; all if zero.
    pub(super) open_part: usize,
    /// What the programs have learned.
    pub(super) learned: BTreeMap<Address, (u64, u64)>,
    /// The names that are kept for the next agent, and the most that it accepts.
    pub(super) names: BTreeMap<(Address, Name), AnswerAddress>,
    pub(super) most_names: Option<usize>,
}

impl Entries for Fake {
    fn capacity(&self) -> usize {
        self.capacity
    }

    fn insert(&mut self, address: Address, entry: AllowEntry) -> Result<(), AllowError> {
        let is_new = !self.entries.contains_key(&address);
        if self.refused.contains(&address) || (is_new && self.entries.len() >= self.capacity) {
            return Err(AllowError::Full);
        }
        self.entries.insert(address, entry);
        self.writes += 1;
        Ok(())
    }

    fn remove(&mut self, address: Address) -> Result<(), AllowError> {
        self.entries.remove(&address);
        Ok(())
    }

    fn read_open(&self, open: &mut OpenFlows, _now_ns: u64) -> Poll<Result<(), AllowError>> {
        let from = open.at.bucket.unwrap_or(0) as usize;
        let rest = self.open.get(from..).unwrap_or_default();
        let part = match self.open_part {
            0 => rest,
            most => &rest[..rest.len().min(most)],
        };
        open.to.extend(part);
        if part.len() == rest.len() {
            return Poll::Ready(Ok(()));
        }
        open.at.bucket = Some((from + part.len()) as u32);
        Poll::Pending
    }

    fn keep_name(&mut self, name: &Name, answered: &AnswerAddress) -> Result<(), NamesError> {
        let key = (answered.address, name.clone());
        let is_full = self.most_names.is_some_and(|most| self.names.len() >= most);
        if is_full && !self.names.contains_key(&key) {
            return Err(NamesError::Full);
        }
        self.names.insert(key, *answered);
        Ok(())
    }

    fn forget_name(&mut self, address: Address, name: &Name) -> Result<(), NamesError> {
        self.names.remove(&(address, name.clone()));
        Ok(())
    }

    fn learned_until(&mut self, address: Address) -> Option<(u64, u64)> {
        self.learned.get(&address).copied()
    }
}
