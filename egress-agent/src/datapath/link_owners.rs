//! The owners of link-local addresses.

use std::collections::{BTreeSet, HashSet};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData};
use egress_common::{
    address::Address,
    ids::IfIndex,
    records::{LinkAddress, LinkOwner},
};

use super::{Datapath, object::open, policies::ignore_missing};

/// Handle on the maps of link-local addresses: the owner of each address, and the address that each pod's
/// interface has chosen.
pub struct LinkOwners {
    owners: HashMap<MapData, LinkAddress, LinkOwner>,
    chosen: HashMap<MapData, IfIndex, LinkAddress>,
}

impl Datapath {
    /// A handle on the maps of link-local addresses.
    ///
    /// # Errors
    ///
    /// When a pin cannot be opened.
    pub fn link_owners(&self) -> Result<LinkOwners> {
        Ok(LinkOwners {
            owners: Map::HashMap(open(&self.layout, "link_owners")?).try_into()?,
            chosen: Map::HashMap(open(&self.layout, "link_locals")?).try_into()?,
        })
    }
}

impl LinkOwners {
    /// Makes the node the owner of these addresses, which are its own or a gateway's, and removes those of
    /// interfaces that are not enforced any more.
    ///
    /// # Errors
    ///
    /// When a map is full, or cannot be read or written.
    pub fn settle(&mut self, node: &BTreeSet<Address>, enforced: &HashSet<IfIndex>) -> Result<()> {
        let known: Vec<(LinkAddress, LinkOwner)> = self
            .owners
            .iter()
            .collect::<Result<_, _>>()
            .context("cannot read the map `link_owners`")?;
        for addr in node {
            let key = LinkAddress { addr: *addr };
            if !known.contains(&(key, LinkOwner::NODE)) {
                self.owners
                    .insert(key, LinkOwner::NODE, 0)
                    .context("cannot write the map `link_owners`")?;
            }
        }
        for (key, owner) in known {
            let stays = node.contains(&key.addr) || enforced.contains(&owner.ifindex());
            if !stays {
                ignore_missing(self.owners.remove(&key))
                    .context("cannot write the map `link_owners`")?;
            }
        }
        let chosen: Vec<IfIndex> = self
            .chosen
            .keys()
            .collect::<Result<_, _>>()
            .context("cannot read the map `link_locals`")?;
        for ifindex in chosen.iter().filter(|ifindex| !enforced.contains(ifindex)) {
            ignore_missing(self.chosen.remove(ifindex))
                .context("cannot write the map `link_locals`")?;
        }
        Ok(())
    }
}
