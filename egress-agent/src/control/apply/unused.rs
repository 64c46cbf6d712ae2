//! Removing the maps that nobody uses any more.

use anyhow::Result;

use super::Applier;
use crate::datapath::Unused;

/// Most versions of policies that are removed while control goes on. The map `policies` has them until then.
const LATER: usize = 64;

impl Applier {
    /// Removes all maps that nobody uses any more, together. Maps that cannot be removed are tried again in the next
    /// reconcile.
    ///
    /// The kernel takes as long to remove an earlier version as to create one. The next edit does not wait for that:
    /// a thread removes a few versions, and a later reconcile sees the result.
    ///
    /// # Errors
    ///
    /// When some cannot be removed.
    pub(super) fn remove_unused(&mut self) -> Result<()> {
        let mut failure = Ok(());
        if let Some(removal) = self.removal.take_if(|removal| removal.is_finished()) {
            for (unused, dropped) in self.datapath.end_removal(removal) {
                if dropped.is_err() {
                    self.unused.push(unused);
                    failure = dropped;
                }
            }
        }
        let is_policy = |unused: &Unused| matches!(unused, Unused::Policy(_));
        if failure.is_ok() && self.unused.len() <= LATER && self.unused.iter().all(is_policy) {
            if self.removal.is_none() && !self.unused.is_empty() {
                self.removal = Some(self.datapath.begin_removal(&self.unused)?);
                self.unused.clear();
            }
            return Ok(());
        }
        self.remove_unused_now().and(failure)
    }

    /// Removes them all, and waits for it.
    ///
    /// # Errors
    ///
    /// When some cannot be removed.
    pub(super) fn remove_unused_now(&mut self) -> Result<()> {
        let unused = std::mem::take(&mut self.unused);
        let mut failure = Ok(());
        for (&each, dropped) in unused.iter().zip(self.datapath.remove_unused(&unused)) {
            if dropped.is_err() {
                self.unused.push(each);
                failure = dropped;
            }
        }
        failure
    }
}
