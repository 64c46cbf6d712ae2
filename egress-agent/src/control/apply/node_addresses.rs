//! Keeping pods from using the link-local addresses of the node and its gateways, and from tunnelling to the node.

use std::collections::{BTreeSet, HashSet};

use anyhow::{Context as _, Result};
use egress_common::{address::V4_MAPPED_PREFIX_LEN, ids::IfIndex};

use crate::{
    control::observe::machine::Machine,
    datapath::{Datapath, NodeAddressMap},
    host,
};
use egress_policy::prefix::to_mapped;

/// Writes the addresses for which the node takes packets.
///
/// # Errors
///
/// When they cannot be read or written.
pub(super) fn protect(map: &mut NodeAddressMap, machine: &mut Machine) -> Result<()> {
    let routes = machine
        .host
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
    map.set(&prefixes.collect())
}

/// Takes back from pods the link-local addresses that belong to the node and its gateways.
///
/// # Errors
///
/// When they cannot be read or written.
pub(super) fn protect_link_locals(datapath: &Datapath) -> Result<()> {
    let node = host::taken_link_locals().context("cannot read the node's addresses")?;
    let node: BTreeSet<_> = node
        .into_iter()
        .map(|address| to_mapped(address.into()))
        .collect();
    let entries = datapath.interfaces()?.entries()?;
    let enforced: HashSet<IfIndex> = entries.into_iter().map(|(ifindex, _)| ifindex).collect();
    datapath.link_owners()?.settle(&node, &enforced)
}
