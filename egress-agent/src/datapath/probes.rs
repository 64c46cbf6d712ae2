//! The counters of probe frames that reached the programs.

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData, MapError};
use egress_common::{ids::IfIndex, records::Probes};

use super::policies::ignore_missing;

/// Handle on the `probes` map.
pub struct ProbeMap(HashMap<MapData, IfIndex, Probes>);

impl ProbeMap {
    pub(super) fn new(map: HashMap<MapData, IfIndex, Probes>) -> Self {
        Self(map)
    }

    /// How many probes have reached `from_pod` on an interface. The first call starts the counter.
    ///
    /// # Errors
    ///
    /// When the map cannot be read or written.
    pub fn count(&mut self, ifindex: IfIndex) -> Result<Probes> {
        match self.0.get(&ifindex, 0) {
            Ok(count) => Ok(count),
            Err(MapError::KeyNotFound) => {
                let none = Probes::default();
                self.0
                    .insert(ifindex, none, 0)
                    .context("cannot write the map `probes`")?;
                Ok(none)
            }
            Err(error) => Err(error).context("cannot read the map `probes`"),
        }
    }

    /// Removes the counters of all interfaces except those to keep.
    ///
    /// # Errors
    ///
    /// When the map cannot be read or written.
    pub fn retain(&mut self, is_kept: impl Fn(IfIndex) -> bool) -> Result<()> {
        let known: Vec<IfIndex> = self
            .0
            .keys()
            .collect::<Result<_, _>>()
            .context("cannot read the map `probes`")?;
        for ifindex in known.into_iter().filter(|ifindex| !is_kept(*ifindex)) {
            ignore_missing(self.0.remove(&ifindex)).context("cannot write the map `probes`")?;
        }
        Ok(())
    }
}
