//! Logging when the agent is ready, and what it waits for until then.

use super::{apply::ranges::listed, reconcile::Reconciler};
use crate::pods::Snapshot;

/// How far the start has got, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Readiness {
    /// Nothing has been observed.
    Begun,
    /// The agent does not know yet which pods there are, and has logged that.
    Waiting,
    /// The agent has dealt with the pods that there are, and has logged that.
    Ready,
}

impl Readiness {
    /// The state after a reconcile with this snapshot.
    pub(super) fn next(self, reconciler: &Reconciler, snapshot: &Snapshot) -> Self {
        // A manifest in a directory may stay unreadable for ever.
        let is_known = !reconciler.publisher.has_cluster() || !snapshot.unreadable;
        match self {
            Self::Begun | Self::Waiting if is_known => {
                tracing::info!(
                    node = %reconciler.settings.config.node,
                    pods = reconciler.applier.enforced().len(),
                    resolvers = %listed(&reconciler.settings.config.dns.resolvers),
                    "ready"
                );
                Self::Ready
            }
            Self::Begun => {
                tracing::info!(
                    node = %reconciler.settings.config.node,
                    left = reconciler.applier.left().len(),
                    "waiting for the API server to say which pods there are; those that an earlier \
                     agent left stay enforced"
                );
                Self::Waiting
            }
            Self::Waiting | Self::Ready => self,
        }
    }
}
