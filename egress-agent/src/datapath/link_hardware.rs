//! The source hardware addresses that ports of bridges may use.

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData};
use egress_common::{ids::IfIndex, records::LinkHardware};

use super::{Datapath, object::open, policies::ignore_missing};

/// Handle on the map `link_hardware`.
pub struct LinkHardwareMap(HashMap<MapData, IfIndex, LinkHardware>);

impl Datapath {
    /// A handle on the map of hardware addresses.
    ///
    /// # Errors
    ///
    /// When the pin cannot be opened.
    pub fn link_hardware(&self) -> Result<LinkHardwareMap> {
        let map = Map::HashMap(open(&self.layout, "link_hardware")?);
        Ok(LinkHardwareMap(map.try_into()?))
    }
}

impl LinkHardwareMap {
    /// Every entry, by the index of its interface.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn entries(&self) -> Result<Vec<(IfIndex, LinkHardware)>> {
        let entries: Result<_, _> = self.0.iter().collect();
        entries.context("cannot read the map `link_hardware`")
    }

    /// Restricts an interface to a hardware address.
    ///
    /// # Errors
    ///
    /// When the map is full or cannot be written.
    pub fn bind(&mut self, ifindex: IfIndex, hardware: LinkHardware) -> Result<()> {
        self.0
            .insert(ifindex, hardware, 0)
            .context("cannot write the map `link_hardware`")
    }

    /// Allows an interface to send from any hardware address again.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn unbind(&mut self, ifindex: IfIndex) -> Result<()> {
        ignore_missing(self.0.remove(&ifindex)).context("cannot write the map `link_hardware`")
    }
}
