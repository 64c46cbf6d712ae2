//! Reading the configuration again while the agent runs.

use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::control::{
    apply::ranges::{listed, together},
    reconcile::Reconciler,
};
use crate::{config::Config, pods::Facts};

impl Reconciler {
    /// Reads the configuration file again. What it says holds from the next reconcile on; if it
    /// cannot be read, or cannot be taken on, everything stays as it was.
    pub(in crate::control) async fn reload(&mut self, file: &Path) {
        match self.try_reload(file).await {
            Ok(()) => tracing::info!(
                resolvers = %listed(&self.config.dns.resolvers),
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
        if self.facts == Facts::default() {
            configured
                .check_resolvers()
                .with_context(|| file.display().to_string())?;
        }
        if let Some(key) = fixed_key(&self.configured, &configured) {
            bail!(
                "{}: {key} cannot change while the agent runs; start it again",
                file.display()
            );
        }
        let next = together(&configured, &self.facts);
        self.take_ranges(&next).await?;
        self.readings.change(next.policy_settings());
        self.configured = configured;
        self.config = next;
        Ok(())
    }
}

/// A key that differs and that only a new start takes on.
fn fixed_key(now: &Config, next: &Config) -> Option<&'static str> {
    [
        ("node", now.node == next.node),
        (
            "existingConnections",
            now.existing_connections == next.existing_connections,
        ),
        ("stateDir", now.state_dir == next.state_dir),
        ("bpffs", now.bpffs == next.bpffs),
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

    #[test]
    fn what_only_a_new_start_takes_on_is_named() {
        let read = |text: &str| {
            Config::from_yaml(&format!("dns: {{resolvers: [10.0.0.53]}}\nnode: a\n{text}"))
                .expect("a configuration")
        };
        let now = read("");
        assert_eq!(fixed_key(&now, &read("onDeny: reject")), None);
        assert_eq!(fixed_key(&now, &read("bpffs: /elsewhere")), Some("bpffs"));
        let trust = read("existingConnections: trust");
        assert_eq!(fixed_key(&now, &trust), Some("existingConnections"));
        let limits = read("limits: {addressesPerPod: 7}");
        assert_eq!(fixed_key(&now, &limits), Some("limits"));
        let limits = read("limits: {flowsPerPod: 1024}");
        assert_eq!(fixed_key(&now, &limits), Some("limits"));
    }
}
