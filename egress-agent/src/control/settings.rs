//! The settings of the operator and of the cluster, and both combined.

use std::sync::Arc;

use super::{apply::ranges, inherited_ranges::Inherited, plan::wanted::RangesVersion};
use crate::{config::Config, pods::Facts};
use egress_policy::services::Places;

/// The settings that are in force.
pub(super) struct Settings {
    /// The operator's configuration.
    pub(super) configured: Config,
    /// The facts that the cluster reported last.
    pub(super) facts: Facts,
    /// Entries that an earlier agent left in force, until the cluster has reported everything.
    pub(super) inherited: Inherited,
    /// All combined, as the kernel and the gate have them.
    pub(super) config: Config,
    /// The ranges that are in force.
    pub(super) ranges: RangesVersion,
    /// The kinds of addresses that `config` has.
    pub(super) places: Arc<Places>,
}

impl Settings {
    /// The settings that the agent starts with.
    pub(super) fn new(configured: Config, facts: Facts, inherited: Inherited) -> Self {
        let config = ranges::together(&configured, &facts, &inherited);
        Self {
            ranges: RangesVersion::first(&config),
            places: Arc::new(config.places()),
            configured,
            facts,
            inherited,
            config,
        }
    }
}
