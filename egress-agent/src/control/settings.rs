//! The settings of the operator and of the cluster, and both combined.

use std::{collections::BTreeMap, sync::Arc};

use super::{apply::ranges, inherited_ranges::Inherited, plan::wanted::RangesVersion};
use crate::{
    config::Config,
    pods::{Facts, Snapshot},
};
use egress_policy::{
    Resolver,
    services::{Claim, Places, ServiceName, Services},
};

/// The settings that are in force.
pub(super) struct Settings {
    /// The operator's configuration.
    pub(super) configured: Config,
    /// The facts that the cluster reported last.
    pub(super) facts: Facts,
    /// Entries that an earlier agent left in force, until the cluster has reported everything.
    pub(super) inherited: Inherited,
    /// The cluster's Services.
    pub(super) services: Arc<Services>,
    /// Resolvers that do not count, because a Service claims their address.
    pub(super) claims: Claims,
    /// All combined, as the kernel and the gate have them.
    pub(super) config: Config,
    /// The ranges that are in force.
    pub(super) ranges: RangesVersion,
    /// The kinds of addresses that `config` has.
    pub(super) places: Arc<Places>,
}

/// Claimed resolvers.
pub(super) type Claims = BTreeMap<Resolver, Claim>;

impl Settings {
    /// The settings that the agent starts with.
    pub(super) fn new(configured: Config, first: &Snapshot, inherited: Inherited) -> Self {
        let (facts, services) = (first.facts.clone(), Arc::clone(&first.services));
        let (config, claims) = combine(&configured, &facts, &inherited, &services);
        Self {
            ranges: RangesVersion::first(&config),
            places: Arc::new(config.places()),
            configured,
            facts,
            inherited,
            services,
            claims,
            config,
        }
    }

    /// The same with another configuration of the operator.
    pub(super) fn with(&self, configured: &Config) -> (Config, Claims) {
        combine(configured, &self.facts, &self.inherited, &self.services)
    }

    /// The Services that claim resolvers.
    pub(super) fn claiming(&self) -> impl Iterator<Item = &Arc<ServiceName>> {
        self.claims.values().map(|claim| &claim.service)
    }
}

fn combine(
    configured: &Config,
    facts: &Facts,
    inherited: &Inherited,
    services: &Services,
) -> (Config, Claims) {
    let mut config = ranges::with_facts(configured, facts, inherited);
    let claims = services.claims(&config.dns.resolvers);
    let resolvers = &mut config.dns.resolvers;
    resolvers.retain(|resolver| !claims.contains_key(resolver));
    (config, claims)
}
