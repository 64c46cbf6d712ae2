//! What the cluster says of itself, put together with what the operator says.

use anyhow::{Context as _, Result};

use super::reconcile::Reconciler;
use crate::{config::Config, pods::Facts};

impl Reconciler {
    /// Takes on what the cluster says. What cannot be taken on is said, and tried again when the
    /// cluster says something else.
    pub(super) fn learn_facts(&mut self, facts: &Facts) {
        if *facts == self.facts {
            return;
        }
        let next = together(&self.configured, facts);
        // Whatever comes of it: it is not tried again and again.
        self.facts.clone_from(facts);
        match self.take_ranges(&next) {
            Ok(()) => {
                self.config = next;
                tracing::info!(
                    resolvers = ?self.config.dns.resolvers,
                    internal = self.config.ranges.internal.len(),
                    "the cluster's addresses are known"
                );
            }
            Err(error) => tracing::error!(
                error = %format!("{error:#}"),
                "cannot take on the cluster's addresses; the earlier ones stay"
            ),
        }
    }

    /// Puts the ranges of another configuration in force.
    ///
    /// # Errors
    ///
    /// When they cannot be written; those that were in force are again.
    pub(super) fn take_ranges(&mut self, next: &Config) -> Result<()> {
        let (ranges, before) = (next.ranges(), self.config.ranges());
        if ranges == before {
            return Ok(());
        }
        // What is new stands in the map before what is old is removed, so for a moment both need
        // room.
        if let Err(error) = self.datapath.set_ranges(&ranges) {
            self.datapath
                .set_ranges(&before)
                .context("the earlier ranges cannot be put back")?;
            return Err(error);
        }
        self.ranges += 1;
        Ok(())
    }
}

/// The configuration with the cluster's resolvers and internal prefixes.
pub(super) fn together(config: &Config, facts: &Facts) -> Config {
    let mut config = config.clone();
    let resolvers = &mut config.dns.resolvers;
    resolvers.extend(facts.resolvers.keys());
    resolvers.sort_unstable();
    resolvers.dedup();
    let internal = &mut config.ranges.internal;
    internal.extend(facts.internal.keys());
    internal.sort_unstable();
    internal.dedup();
    config
}
