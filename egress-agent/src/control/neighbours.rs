//! Keeping the link-local addresses of the node and its gateways from pods.

use std::collections::{BTreeSet, HashSet};

use anyhow::{Context as _, Result};

use super::reconcile::Reconciler;
use crate::{host, policy::prefix::to_mapped};

impl Reconciler {
    /// Looks which link-local addresses are the node's and its gateways' now. Returns what is wrong.
    pub(super) fn settle_neighbours(&mut self) -> Option<String> {
        let settled = self.try_settle_neighbours();
        settled.err().map(|error| {
            format!("pods could take link-local addresses that are not theirs: {error:#}")
        })
    }

    fn try_settle_neighbours(&mut self) -> Result<()> {
        let node = host::taken_link_locals().context("cannot read the node's addresses")?;
        let node: BTreeSet<_> = node
            .into_iter()
            .map(|address| to_mapped(address.into()))
            .collect();
        let entries = self.datapath.interfaces()?.entries()?;
        let enforced: HashSet<u32> = entries.into_iter().map(|(ifindex, _)| ifindex).collect();
        self.datapath.link_owners()?.settle(&node, &enforced)
    }
}
