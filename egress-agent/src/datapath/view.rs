//! Reads the maps that the kernel would read for a packet of a pod, without changing them.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, LpmTrie, Map, MapData, MapError, lpm_trie::Key};
use egress_common::{
    address::Address,
    classes::ClassSet,
    ids::PolicyId,
    records::{AllowKey, AllowValue, NodeAddress, Policy, RANGE_NODE, Range, Tunnel, TunnelKey},
    translation::embedded_v4,
    verdict::{Destination, Translated},
};

use super::{
    Datapath,
    links::Attach,
    object::open,
    outer::{Outer, OuterMaps},
    policies::trie_of,
};

/// A handle for reading the inputs of a verdict.
pub struct View {
    policies: HashMap<MapData, PolicyId, Policy>,
    ranges: LpmTrie<MapData, Address, Range>,
    tunnels: HashMap<MapData, TunnelKey, Tunnel>,
    node_addresses: LpmTrie<MapData, Address, NodeAddress>,
    outer: Arc<OuterMaps>,
}

impl Datapath {
    /// A handle for reading the inputs of a verdict.
    ///
    /// # Errors
    ///
    /// When a pin cannot be opened.
    pub fn view(&self) -> Result<View> {
        Ok(View {
            policies: Map::HashMap(open(&self.layout, "policies")?).try_into()?,
            ranges: Map::LpmTrie(open(&self.layout, "ranges")?).try_into()?,
            tunnels: Map::HashMap(open(&self.layout, "tunnels")?).try_into()?,
            node_addresses: Map::LpmTrie(open(&self.layout, "node_addresses")?).try_into()?,
            outer: Arc::clone(&self.outer),
        })
    }

    /// Whether attaching to an interface occupies the one qdisc to which filters can be attached.
    pub fn needs_qdisc(&self) -> bool {
        self.attach == Attach::Clsact
    }

    /// The way in which programs are attached, as one word.
    pub fn hook(&self) -> &'static str {
        match self.attach {
            Attach::Clsact => "clsact",
            Attach::Auto | Attach::Tcx => "tcx",
        }
    }
}

impl View {
    /// The record of a policy; `None` if it was removed.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn policy(&self, policy: PolicyId) -> Result<Option<Policy>> {
        found(self.policies.get(&policy, 0)).context("cannot read the map `policies`")
    }

    /// The tunnels, whose internal addresses need an address entry.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn tunnels(&self) -> Result<Vec<TunnelKey>> {
        let tunnels: Result<_, _> = self.tunnels.keys().collect();
        tunnels.context("cannot read the map `tunnels`")
    }

    /// The kinds of an address on this node.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn range(&self, address: &Address) -> Result<Range> {
        self.range_of(address, 128)
    }

    /// The kinds that all addresses of this prefix have. Its length is in bits of the 128-bit form.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn range_of(&self, network: &Address, prefix_len: u32) -> Result<Range> {
        let range = found(self.ranges.get(&Key::new(prefix_len, *network), 0))
            .context("cannot read the map `ranges`")?;
        Ok(range.unwrap_or_default())
    }

    /// The kinds of an address, including whether the node itself receives its packets.
    fn kinds(&self, address: &Address) -> Result<u64> {
        let is_node = found(self.node_addresses.get(&Key::new(128, *address), 0))
            .context("cannot read the map `node_addresses`")?
            .is_some();
        let node = if is_node { RANGE_NODE } else { 0 };
        Ok(self.range(address)?.kinds | node)
    }

    /// The destination in the maps under a policy, and when it expires if it was learned. `from_pod` looks up
    /// the same for a packet, and additionally whether the packet is a tunnel's ([`Self::tunnels`]).
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn destination(
        &self,
        (id, policy): (PolicyId, &Policy),
        address: &Address,
        now_ns: u64,
    ) -> Result<(Destination, Option<u64>)> {
        let mut destination = Destination {
            ranges: self.kinds(address)?,
            ..Destination::default()
        };
        let mut expires_ns = None;
        if let Some(allow) = self.outer.get(Outer::Allow(id))? {
            let allow: HashMap<MapData, AllowKey, AllowValue> = Map::HashMap(allow).try_into()?;
            let entry = found(allow.get(&AllowKey { addr: *address }, 0))
                .context("cannot read an allow map")?;
            if let Some(entry) = entry {
                destination.learned = entry.classes;
                destination.learned_internal = entry.internal_classes;
                destination.expired = u64::from(entry.expires_ns <= now_ns);
                expires_ns = Some(entry.expires_ns);
            }
        }
        let cidrs = self.outer.get(Outer::Cidrs(id))?.map(trie_of).transpose()?;
        let classes = |address: Address| -> Result<ClassSet> {
            let Some(cidrs) = &cidrs else {
                return Ok(ClassSet::EMPTY);
            };
            let entry = found(cidrs.get(&Key::new(128, address), 0))
                .context("cannot read a policy's CIDR trie")?;
            Ok(entry.map_or(ClassSet::EMPTY, |entry| entry.classes))
        };
        destination.cidr = classes(*address)?;
        if let Some(v4) = embedded_v4(address, destination.ranges) {
            let translated = Translated {
                cidr: classes(v4)?,
                ranges: self.kinds(&v4)?,
            };
            destination.add_translated(policy, translated);
        }
        Ok((destination, expires_ns))
    }
}

fn found<T>(looked_up: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match looked_up {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}
