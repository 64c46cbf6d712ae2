//! Carries the addresses that a pod has learned over to a new version of its policy, a part at a time: a pod may have
//! learned very many addresses, and the gate has other pods to serve meanwhile.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use egress_common::address::Address;

use super::{
    addresses::Place,
    learned::{AnswerAddress, Entries, Table},
    learned_address::Learned,
    names_kept::NamesStay,
};
use crate::datapath::{AllowError, OpenFlows};
use egress_dns::Name;
use egress_policy::{Grant, NameRules};

/// The table and the allow map of a new version, while they are filled.
pub(super) struct CarryOver {
    /// The table of the new version.
    next: Table,
    grants: Grants,
    /// Whether the rules give the same to each name as the earlier ones.
    alike: bool,
    /// The addresses that fit into the map, if not all do.
    fitting: Option<HashSet<Address>>,
    /// The names without an entry that are still to be carried over; the next one is the last.
    unlisted: Vec<(Arc<Name>, Vec<AnswerAddress>)>,
    /// The place of the address that is carried over next.
    next_place: Place,
    /// How many were not, because the names that allowed them are not known.
    nameless: usize,
}

/// The classes that the rules of a policy give to names, each name looked up once: many addresses may have the same
/// names.
#[derive(Default)]
struct Grants(HashMap<Arc<Name>, Grant>);

impl Grants {
    fn grant(&mut self, name: &Arc<Name>, rules: &NameRules) -> Grant {
        if let Some(grant) = self.0.get(name) {
            return *grant;
        }
        let grant = rules.grant(name);
        self.0.insert(Arc::clone(name), grant);
        grant
    }

    fn opens(&mut self, name: &Arc<Name>, rules: &NameRules) -> bool {
        !self.grant(name, rules).classes.is_empty()
    }
}

impl Table {
    /// Carries everything over at once; see [`CarryOver`].
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub(super) fn carry_over(
        &self,
        rules: &NameRules,
        alike: bool,
        allow: &mut impl Entries,
        now_ns: u64,
    ) -> Result<Self, AllowError> {
        let mut carry = CarryOver::begin(self, rules, alike, allow, now_ns)?;
        while !carry.carry_part(self, rules, allow, now_ns, usize::MAX)? {}
        Ok(carry.next)
    }
}

impl CarryOver {
    /// Begins to carry the contents of the table `before` over to a version with these rules. The table must not
    /// change until the end.
    ///
    /// `alike` means that the rules give the same to each name as the earlier ones. Entries of an earlier agent whose
    /// names were not kept are then carried over, too.
    ///
    /// # Errors
    ///
    /// When the pod's flows cannot be read.
    pub(super) fn begin(
        before: &Table,
        rules: &NameRules,
        alike: bool,
        allow: &impl Entries,
        now_ns: u64,
    ) -> Result<Self, AllowError> {
        let mut next = Table::new();
        next.has_queued = before.has_queued;
        if before.unsent != Place::LAST {
            next.unsent = Place::default();
        }
        for (&address, name) in before.protected.iter().rev() {
            next.remember_protected(address, name);
        }
        let mut grants = Grants::default();
        let fitting = fitting(before, &mut grants, rules, alike, allow, now_ns)?;
        let unlisted = before.unlisted.iter();
        Ok(Self {
            next,
            grants,
            alike,
            fitting,
            unlisted: unlisted
                .map(|(name, answered)| (Arc::clone(name), answered.clone()))
                .collect(),
            next_place: Place::default(),
            nameless: 0,
        })
    }

    /// Writes into the allow map of the new version what the rules allow, as far as it fits, and keeps the names of
    /// that for the next agent. Ends after about `most` names of addresses. Returns whether everything is carried over.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub(super) fn carry_part(
        &mut self,
        before: &Table,
        rules: &NameRules,
        allow: &mut impl Entries,
        now_ns: u64,
        most: usize,
    ) -> Result<bool, AllowError> {
        let mut done = 0;
        while done < most {
            if let Some((name, answered)) = self.unlisted.pop() {
                done += answered.len();
                self.carry_unlisted(before, &name, &answered, rules, allow, now_ns)?;
                // No message that is being decided has inserted them, so they may be evicted for it.
                self.next.message_from = self.next.addresses.end();
                continue;
            }
            // Begins with the least recently used address, so that the order of use stays.
            let Some((place, address, learned)) = before.addresses.from(self.next_place).next()
            else {
                return Ok(true);
            };
            done += 1 + learned.sources.len();
            self.carry(before, address, learned, rules, allow, now_ns)?;
            self.next_place = place.next();
            // The addresses of responses that wait to be sent are still not evicted for others.
            let end = self.next.addresses.end();
            if place < before.message_from {
                self.next.message_from = end;
            }
            if before.unsent != Place::LAST && place < before.unsent {
                self.next.unsent = end;
            }
        }
        Ok(false)
    }

    /// The number of addresses that are not carried over because the names that allowed them are not known.
    pub(super) fn nameless(&self) -> usize {
        self.nameless
    }

    /// The table of the new version.
    pub(super) fn into_table(self) -> Table {
        self.next
    }

    fn carry_unlisted(
        &mut self,
        before: &Table,
        name: &Arc<Name>,
        answered: &[AnswerAddress],
        rules: &NameRules,
        allow: &mut impl Entries,
        now_ns: u64,
    ) -> Result<(), AllowError> {
        let grant = self.grants.grant(name, rules);
        let live: Vec<AnswerAddress> = answered
            .iter()
            .filter(|answered| answered.expires_ns > now_ns)
            .filter(|answered| grant.classes.is_empty() || self.fits(&answered.address))
            .copied()
            .collect();
        self.next
            .learn(&mut NamesStay(allow), name, grant, &live, now_ns)?;
        for answered in live {
            self.next
                .keep_names_missing_in(before, answered.address, allow);
        }
        Ok(())
    }

    fn carry(
        &mut self,
        before: &Table,
        address: Address,
        learned: &Learned,
        rules: &NameRules,
        allow: &mut impl Entries,
        now_ns: u64,
    ) -> Result<(), AllowError> {
        if !self.alike && learned.is_nameless() {
            self.nameless += 1;
        }
        let fits = self.fits(&address);
        let known = self.next.addresses.peek(&address);
        let mut carried = known.cloned().unwrap_or_default();
        let mut is_carried = false;
        for source in &learned.sources {
            let grant = self.grants.grant(&source.name, rules);
            let answered = AnswerAddress {
                address,
                by_stranger: source.by_stranger,
                expires_ns: source.expires_ns,
            };
            if grant.classes.is_empty() {
                self.next.remember_unlisted(&source.name, &[answered]);
            } else if fits {
                carried.add(&source.name, grant, &answered);
                is_carried = true;
            }
        }
        if self.alike && fits && learned.adopted.is_some() {
            carried.adopted = learned.adopted;
            is_carried = true;
        }
        if is_carried {
            carried.write(address, allow, now_ns)?;
            self.next.keep(address, carried, now_ns);
            self.next.keep_names_missing_in(before, address, allow);
        }
        Ok(())
    }

    fn fits(&self, address: &Address) -> bool {
        let fitting = self.fitting.as_ref();
        fitting.is_none_or(|fitting| fitting.contains(address))
    }
}

/// The addresses that the new rules allow and that fit into the map: first those with open flows, then those that have
/// not expired; the most recently used first within each group. `None` when all fit. They always do, unless an edit
/// allows names that were resolved without an entry, or the map is smaller than that of an earlier agent.
fn fitting(
    before: &Table,
    grants: &mut Grants,
    rules: &NameRules,
    alike: bool,
    allow: &impl Entries,
    now_ns: u64,
) -> Result<Option<HashSet<Address>>, AllowError> {
    let unlisted: Vec<Address> = before
        .unlisted
        .iter()
        .filter(|(name, _)| grants.opens(name, rules))
        .flat_map(|(_, answered)| answered)
        .filter(|answered| answered.expires_ns > now_ns)
        .map(|answered| answered.address)
        .collect();
    // All other cases require a check of each address.
    if before.addresses.len() + unlisted.len() <= allow.capacity() {
        return Ok(None);
    }
    let known = before.addresses.iter().filter(|(_, learned)| {
        let mut sources = learned.sources.iter();
        sources.any(|source| grants.opens(&source.name, rules))
            || (alike && learned.adopted.is_some())
    });
    let has_expired = |address: &Address| {
        let learned = before.addresses.peek(address);
        learned.is_some_and(|learned| learned.expires_ns() <= now_ns)
    };
    let mut seen = HashSet::new();
    let mut all: Vec<Address> = known
        .map(|(&address, _)| address)
        .chain(unlisted)
        .filter(|address| seen.insert(*address))
        .collect();
    if all.len() <= allow.capacity() {
        return Ok(None);
    }
    let mut open = OpenFlows::default();
    while allow.read_open(&mut open, now_ns)?.is_pending() {}
    all.sort_by_key(|address| (!open.to.contains(address), has_expired(address)));
    all.truncate(allow.capacity());
    Ok(Some(all.into_iter().collect()))
}
