//! Addresses whose lifetime has ended, and how long they are remembered.
//!
//! A program that is silent for longer than its flow is remembered, and then goes on with an address that it
//! resolved before, is denied. The denial says `expired`, and by which name, for as long as the address is here.

use std::{cmp::Reverse, collections::HashSet};

use egress_common::address::Address;

use super::learned::{Entries, Table};
use crate::datapath::AllowError;

const SECOND_NS: u64 = 1_000_000_000;

/// How long an address without an open flow is kept after its lifetime, as far as the map has room.
const EXPIRED_NS: u64 = 300 * SECOND_NS;

/// How long at most those are kept that expired last.
const PAST_NS: u64 = 24 * 3600 * SECOND_NS;

/// The part of the map that they may take.
const SHARE_OF_PAST: usize = 4;

impl Table {
    /// Forgets addresses whose lifetime ended a while ago, but for those in `open` and those that expired last.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub(super) fn sweep(
        &mut self,
        allow: &mut impl Entries,
        open: &HashSet<Address>,
        now_ns: u64,
    ) -> Result<(), AllowError> {
        let mut past: Vec<(u64, Address)> = self
            .addresses
            .iter()
            .map(|(&address, learned)| (learned.expires_ns(), address))
            .filter(|&(expires_ns, address)| {
                expires_ns.saturating_add(EXPIRED_NS) <= now_ns && !open.contains(&address)
            })
            .collect();
        past.sort_unstable_by_key(|&(expires_ns, _)| Reverse(expires_ns));
        let recent =
            past.partition_point(|&(expires_ns, _)| expires_ns.saturating_add(PAST_NS) > now_ns);
        self.past = recent.min(allow.capacity() / SHARE_OF_PAST);
        for &(_, address) in &past[self.past..] {
            self.remove(allow, address)?;
        }
        Ok(())
    }

    /// Addresses in the allow map, without those that had expired a while before the last sweep: they give
    /// way whenever others need room.
    pub(super) fn in_use(&self) -> usize {
        self.addresses.len().saturating_sub(self.past)
    }
}
