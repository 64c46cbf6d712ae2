//! The stamp: the number that `from_pod` puts on every frame that it passes.

use anyhow::{Context as _, Result};
use aya::maps::{Array, Map, MapData};

use super::{
    object::{open, random},
    pins::Layout,
};

/// The map that keeps the stamp.
const MAP: &str = "stamp";

/// Bits of `skb->priority` that a stamp may have. The four bits by which qdiscs choose a band or a queue
/// (`TC_PRIO_MAX`, `TC_BITMASK`) stay zero, so that a stamped frame gets the same one as any other.
const BITS: u32 = !0xf;
/// At least one of these bits must be set, because a priority whose upper half is zero is a band
/// (`prio_classify`, `net/sched/sch_prio.c`).
const MAJOR: u32 = 0xffff_0000;

/// A random priority, so that no other software on the node uses it except by chance. It stays the same as
/// long as the pins exist, so that an agent and its successor use the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp(pub(super) u32);

impl Stamp {
    /// The stamp of an earlier agent, or a new one.
    pub(super) fn kept_or_new(layout: &Layout) -> Result<Self> {
        if layout.map(MAP).exists() {
            let map = Array::try_from(Map::Array(open(layout, MAP)?))?;
            let kept: u32 = map.get(&0, 0).context("cannot read the map `stamp`")?;
            // Zero if the agent was killed before it stored a stamp; then no program uses one.
            if kept != 0 {
                return Ok(Self(kept));
            }
        }
        loop {
            let number = random(BITS)?;
            if number & MAJOR != 0 {
                return Ok(Self(number));
            }
        }
    }

    /// Stores the stamp for the next agent.
    pub(super) fn keep(self, map: Map) -> Result<()> {
        let mut map: Array<MapData, u32> = map.try_into()?;
        map.set(0, self.0, 0)
            .context("cannot write the map `stamp`")
    }
}
