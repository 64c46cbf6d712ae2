//! The addresses whose packets the node delivers to itself.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use aya::maps::{LpmTrie, Map, MapData, lpm_trie::Key};
use egress_common::{address::Address, limits::NODE_ADDRESSES, records::NodeAddress};

use super::{Datapath, object::open, policies::ignore_missing};

/// Handle on the map `node_addresses`, and its only writer.
pub struct NodeAddressMap {
    map: LpmTrie<MapData, Address, NodeAddress>,
    /// The entries of the map: networks, and their lengths in bits of the 128-bit form.
    written: BTreeSet<(Address, u32)>,
}

impl Datapath {
    /// A handle on the map of the node's addresses.
    ///
    /// # Errors
    ///
    /// When the pin cannot be opened, or the map cannot be read.
    pub fn node_addresses(&self) -> Result<NodeAddressMap> {
        let map = Map::LpmTrie(open(&self.layout, "node_addresses")?);
        let map: LpmTrie<_, _, NodeAddress> = map.try_into()?;
        let written = map
            .keys()
            .map(|key| key.map(|key| (key.data(), key.prefix_len())))
            .collect::<Result<_, _>>()
            .context("cannot read the map `node_addresses`")?;
        Ok(NodeAddressMap { map, written })
    }
}

impl NodeAddressMap {
    /// Replaces the prefixes. New ones are written before old ones are removed.
    ///
    /// # Errors
    ///
    /// When there are too many, or the map cannot be written.
    pub fn set(&mut self, prefixes: &BTreeSet<(Address, u32)>) -> Result<()> {
        for &(network, length) in prefixes {
            if self.written.contains(&(network, length)) {
                continue;
            }
            self.map
                .insert(&Key::new(length, network), NodeAddress { is_node: 1 }, 0)
                .with_context(|| {
                    format!(
                        "cannot write the map `node_addresses`: there are {} prefixes, and it has room \
                         for {NODE_ADDRESSES}",
                        prefixes.len()
                    )
                })?;
            self.written.insert((network, length));
        }
        let stale: Vec<_> = self.written.difference(prefixes).copied().collect();
        for (network, length) in stale {
            ignore_missing(self.map.remove(&Key::new(length, network)))
                .context("cannot write the map `node_addresses`")?;
            self.written.remove(&(network, length));
        }
        Ok(())
    }
}
