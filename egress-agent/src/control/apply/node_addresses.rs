//! Keeping what is the node's and its gateways' from pods: their link-local addresses, and tunnels to the
//! node.

use std::collections::{BTreeSet, HashSet};

use anyhow::{Context as _, Result};
use egress_common::address::V4_MAPPED_PREFIX_LEN;

use crate::control::reconcile::Reconciler;
use crate::host;
use egress_policy::prefix::to_mapped;

impl Reconciler {
    /// Looks which link-local addresses are the node's and its gateways' now. Returns what is wrong.
    pub(in crate::control) fn settle_neighbours(&mut self) -> Option<String> {
        let settled = self.try_settle_neighbours();
        settled.err().map(|error| {
            format!("pods could take link-local addresses that are not theirs: {error:#}")
        })
    }

    /// Looks which addresses the node takes packets for now. Returns what is wrong.
    pub(in crate::control) fn settle_node_addresses(&mut self) -> Option<String> {
        let settled = self.try_settle_node_addresses();
        settled.err().map(|error| {
            format!("tunnels to some of the node's own addresses may leave pods: {error:#}")
        })
    }

    fn try_settle_node_addresses(&mut self) -> Result<()> {
        let Some((host, _)) = self.places.on() else {
            return Ok(());
        };
        let routes = host
            .local_routes()
            .context("cannot read the table of local routes")?;
        let prefixes = routes.into_iter().map(|(address, length)| {
            let before = if address.is_ipv4() {
                V4_MAPPED_PREFIX_LEN
            } else {
                0
            };
            (to_mapped(address), before + u32::from(length))
        });
        self.node_addresses.set(&prefixes.collect())
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
