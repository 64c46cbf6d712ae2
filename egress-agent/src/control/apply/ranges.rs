//! Putting other ranges and resolvers in force.

use std::{collections::BTreeSet, sync::Arc};

use anyhow::{Context as _, Result};
use egress_common::address::{self, Address};

use super::Applier;
use crate::{
    config::Config,
    control::{
        dns_settings,
        inherited_ranges::Inherited,
        plan::wanted::mapped,
        settings::{Claims, Settings},
    },
    pods::Facts,
};
use egress_policy::Resolver;

impl Applier {
    /// Puts another configuration's ranges and DNS settings in force.
    ///
    /// # Errors
    ///
    /// When they cannot be written. The earlier ones are put back then.
    pub(in crate::control) async fn put_in_force(
        &mut self,
        settings: &mut Settings,
        next: Config,
        claims: Claims,
    ) -> Result<()> {
        // The kernel begins to hold what comes from a new resolver before the gate is told that the
        // ranges are complete, and what came from an old one may still be in the ring.
        let before = dns_settings(&settings.config, &settings.claims);
        let after = dns_settings(&next, &claims);
        self.gate
            .configure(before.clone().with_resolvers_of(&after))
            .await?;
        let written = self.write_ranges(settings, &next);
        let settled = if written.is_ok() { after } else { before };
        self.gate.configure(settled).await?;
        written?;
        settings.places = Arc::new(next.places());
        settings.config = next;
        settings.claims = claims;
        Ok(())
    }

    fn write_ranges(&mut self, settings: &mut Settings, next: &Config) -> Result<()> {
        let now = &settings.config;
        let (tunnels, tunnels_before) = (next.tunnels(), now.tunnels());
        let (ranges, before) = (next.ranges(), now.ranges());
        if ranges == before && tunnels == tunnels_before {
            return Ok(());
        }
        // New entries are written before old ones are removed, so for a moment the maps need room for both.
        self.datapath.check_room(&tunnels, &ranges)?;
        if let Err(error) = self.datapath.put_in_force(&tunnels, &ranges) {
            // Flows that the new ranges admitted in the meantime are judged again under the earlier ones.
            settings.ranges.change(now);
            self.datapath
                .put_in_force(&tunnels_before, &before)
                .context("the earlier ranges cannot be put back")?;
            return Err(error);
        }
        let is_only_resolvers = tunnels == tunnels_before
            && next.ranges_without_resolvers() == now.ranges_without_resolvers();
        if is_only_resolvers {
            self.note_resolvers(now, next);
        } else {
            settings.ranges.change(next);
        }
        Ok(())
    }

    /// Handles a change of resolvers alone: only the pods whose verdicts it changes get a new version of their
    /// policies. DNS itself needs no new version, because `from_pod` handles DNS before it looks at flows.
    fn note_resolvers(&mut self, now: &Config, next: &Config) {
        let (before, after) = (&now.dns.resolvers, &next.dns.resolvers);
        let came = after.iter().filter(|resolver| !before.contains(resolver));
        let gone = before.iter().filter(|resolver| !after.contains(resolver));
        let changed: BTreeSet<Address> = came
            .chain(gone)
            .map(|resolver| mapped(resolver.address))
            .filter(address::is_v4)
            .collect();
        let view = self.datapath.view();
        for enforced in self.enforced.values_mut() {
            let is_concerned = view.as_ref().map_or(true, |view| {
                let policy = (enforced.policy, &enforced.wanted.record);
                // A pod that cannot be checked gets a new version too.
                view.is_concerned(policy, &changed).unwrap_or(true)
            });
            if is_concerned {
                Arc::make_mut(&mut enforced.wanted).judge_again();
            }
        }
    }
}

/// Resolvers for a log line.
pub(in crate::control) fn listed(resolvers: &[Resolver]) -> String {
    let texts: Vec<String> = resolvers.iter().map(Resolver::to_string).collect();
    format!("[{}]", texts.join(", "))
}

/// The configuration with the cluster's resolvers and internal prefixes, and with those that an earlier agent left in
/// force.
pub(in crate::control) fn with_facts(
    config: &Config,
    facts: &Facts,
    inherited: &Inherited,
) -> Config {
    let mut config = config.clone();
    let mut left_out = config.dns.add_resolvers(facts.resolvers.keys().copied());
    left_out.extend(
        config
            .dns
            .add_resolvers(inherited.resolvers.iter().copied()),
    );
    if !left_out.is_empty() {
        tracing::error!(
            left_out = %listed(&left_out),
            "the cluster's resolvers are asked on too many different ports: DNS to and from these is not \
             held, and nothing is learned from it"
        );
    }
    let ranges = &mut config.ranges;
    ranges.internal.extend(facts.internal.keys());
    ranges.internal.extend(&inherited.internal);
    ranges.internal.extend(&inherited.services);
    ranges.services.extend(&facts.services);
    ranges.services.extend(&inherited.services);
    for prefixes in [&mut ranges.internal, &mut ranges.services] {
        prefixes.sort_unstable();
        prefixes.dedup();
    }
    config
}
