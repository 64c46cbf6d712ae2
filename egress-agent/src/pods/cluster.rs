//! A cluster as a source of pods.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Result, bail};
use tokio::sync::watch;

use super::Snapshot;
use crate::config;

/// Which cluster, and which of its nodes.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// How to reach it.
    pub kubeconfig: Option<PathBuf>,
    /// The node's name.
    pub node: String,
    /// Where its facts are.
    pub cluster: config::Cluster,
}

/// A cluster.
#[derive(Debug)]
pub struct Cluster;

/// A cluster that is followed.
#[derive(Debug)]
pub struct ClusterWatch;

impl Cluster {
    /// Begins to follow it.
    ///
    /// # Errors
    ///
    /// Always, for now.
    #[expect(clippy::unused_async, reason = "it will wait")]
    pub async fn watch(
        options: ClusterOptions,
    ) -> Result<(watch::Receiver<Arc<Snapshot>>, ClusterWatch)> {
        bail!("node {} cannot be followed yet: give --pods-dir", options.node);
    }
}

impl ClusterWatch {
    /// Ends it.
    pub fn close(self) {}
}
