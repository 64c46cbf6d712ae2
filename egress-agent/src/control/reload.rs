//! Changing settings while the agent runs: the cluster's, and those of the configuration file.

use std::{path::Path, sync::Arc, time::Instant};

use anyhow::{Context as _, Result, bail};

use super::{apply::ranges::listed, reconcile::Reconciler};
use crate::{
    config::Config,
    pods::{Facts, Snapshot},
};

impl Reconciler {
    /// Applies the facts that the cluster reports. Facts that cannot be applied are logged, and tried again when the
    /// cluster reports others.
    pub(super) async fn learn_facts(&mut self, source: &Snapshot) {
        let (settings, facts) = (&mut self.settings, &source.facts);
        let mut inherited = settings.inherited.clone();
        inherited.retain_unknown(&source.knowledge);
        let is_same = *facts == settings.facts && inherited == settings.inherited;
        if is_same
            && Arc::ptr_eq(settings.losses.present(), &source.services)
            && !settings.has_ended_claims()
            && !settings.are_claims_late
        {
            return;
        }
        // Noted even if that fails, so that the same facts are not tried again.
        settings.facts.clone_from(facts);
        settings.inherited = inherited;
        let now = Instant::now();
        settings.take_services(&source.services, now);
        let next = settings.with(&settings.configured);
        let claims = settings.claims_on(&next, now);
        let is_claimed_alike = claims == settings.claims;
        settings.are_claims_late = false;
        if is_same && is_claimed_alike {
            return;
        }
        match self.applier.put_in_force(settings, next, claims).await {
            Ok(()) => tracing::info!(
                resolvers = %listed(&settings.config.dns.resolvers),
                internal = settings.config.ranges.internal.len(),
                "the cluster's addresses are known"
            ),
            Err(error) => {
                // A resolver must not stay trusted: the next reconcile tries again.
                settings.are_claims_late = !is_claimed_alike;
                tracing::error!(
                    error = %format!("{error:#}"),
                    "cannot apply the cluster's addresses; the earlier ones stay"
                );
            }
        }
    }

    /// Reads the configuration file again, for the next reconcile. If it cannot be read or put in force, everything
    /// stays as it was.
    pub(super) async fn reload(&mut self, file: &Path) {
        match self.try_reload(file).await {
            Ok(()) => tracing::info!(
                resolvers = %listed(&self.settings.config.dns.resolvers),
                "configuration read again"
            ),
            Err(error) => tracing::error!(
                error = %format!("{error:#}"),
                "the configuration stays as it was"
            ),
        }
    }

    async fn try_reload(&mut self, file: &Path) -> Result<()> {
        let configured = Config::from_file(file)?;
        let settings = &mut self.settings;
        if settings.facts == Facts::default() {
            configured
                .check_resolvers()
                .with_context(|| file.display().to_string())?;
        }
        if let Some(key) = fixed_key(&settings.configured, &configured) {
            bail!(
                "{}: {key} cannot change while the agent runs; start it again",
                file.display()
            );
        }
        let next = settings.with(&configured);
        let claims = settings.claims_on(&next, Instant::now());
        let policies = next.policy_settings();
        self.applier.put_in_force(settings, next, claims).await?;
        self.observer.policies.change(policies);
        settings.configured = configured;
        Ok(())
    }
}

/// The first key that differs and that cannot change while the agent runs.
fn fixed_key(now: &Config, next: &Config) -> Option<&'static str> {
    [
        ("node", now.node == next.node),
        (
            "existingConnections",
            now.existing_connections == next.existing_connections,
        ),
        ("stateDir", now.state_dir == next.state_dir),
        ("bpffs", now.bpffs == next.bpffs),
        ("dns.learn", now.dns.learn == next.dns.learn),
        ("limits", now.limits == next.limits),
        ("cluster", now.cluster == next.cluster),
        ("quarantine", now.quarantine == next.quarantine),
        ("http", now.serve.http == next.serve.http),
        ("socket", now.serve.socket == next.serve.socket),
    ]
    .into_iter()
    .find_map(|(key, same)| (!same).then_some(key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Learn;

    #[test]
    fn keys_that_need_a_restart_are_named() {
        let read = |text: &str| {
            Config::from_yaml(&format!("dns: {{resolvers: [10.0.0.53]}}\nnode: a\n{text}"))
                .expect("a configuration")
        };
        let now = read("");
        assert_eq!(fixed_key(&now, &read("onDeny: reject")), None);
        assert_eq!(fixed_key(&now, &read("bpffs: /elsewhere")), Some("bpffs"));
        let mut learn = now.clone();
        learn.dns.learn = Learn::Agent;
        assert_eq!(fixed_key(&now, &learn), Some("dns.learn"));
        let down = read("whenAgentDown: {resolveFor: 1h}");
        assert_eq!(fixed_key(&now, &down), None);
        let trust = read("existingConnections: trust");
        assert_eq!(fixed_key(&now, &trust), Some("existingConnections"));
        let limits = read("limits: {addressesPerPod: 7}");
        assert_eq!(fixed_key(&now, &limits), Some("limits"));
        let limits = read("limits: {flowsPerPod: 1024}");
        assert_eq!(fixed_key(&now, &limits), Some("limits"));
    }
}
