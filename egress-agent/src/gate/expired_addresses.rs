//! How long expired addresses stay in the table.
//!
//! A program may be silent for longer than its flow is remembered, and then use an address that it resolved
//! before. It is denied. The denial has the reason `expired` and the name for as long as the table has the
//! address.

use std::{cmp::Reverse, collections::HashSet};

use egress_common::address::Address;

use super::learned::{Entries, Table};
use crate::datapath::AllowError;

const SECOND_NS: u64 = 1_000_000_000;

/// How long an address without an open flow stays after its lifetime, as long as the map has room.
const EXPIRED_NS: u64 = 300 * SECOND_NS;

/// The longest time that the most recently expired addresses stay.
const PAST_NS: u64 = 24 * 3600 * SECOND_NS;

/// The part of the map that they may use: one of this many.
const EXPIRED_PART: usize = 4;

impl Table {
    /// Removes addresses that expired a while ago, except those in `open` and the most recently expired ones.
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
        self.expired_kept = recent.min(allow.capacity() / EXPIRED_PART);
        for &(_, address) in &past[self.expired_kept..] {
            self.remove(allow, address)?;
        }
        Ok(())
    }

    /// The number of addresses in the allow map, without those that had expired a while before the last
    /// sweep: these are evicted whenever others need room.
    pub(super) fn in_use(&self) -> usize {
        self.addresses.len().saturating_sub(self.expired_kept)
    }
}
