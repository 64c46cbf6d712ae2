//! The number that `from_pod` puts on every frame.

use anyhow::{Context as _, Result};
use aya::maps::{Array, Map, MapData};

use super::{
    object::{open, random},
    pins::Layout,
};

/// Name of the map that keeps it.
const MAP: &str = "stamp";

/// Bits of `skb->priority` that a stamp may have. The four that qdiscs choose a band or a queue by
/// (`TC_PRIO_MAX`, `TC_BITMASK`) stay zero: a stamped frame has the same one as any other.
const BITS: u32 = !0xf;
/// Of these some must be set: a priority whose upper half is zero is a band (`prio_classify`,
/// `net/sched/sch_prio.c`).
const MAJOR: u32 = 0xffff_0000;

/// A priority that nobody else on the node uses by chance; the same as long as the pins are there, so that
/// an agent and the next one agree on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp(pub(super) u32);

impl Stamp {
    /// The stamp of an earlier agent, or a new one.
    pub(super) fn kept_or_new(layout: &Layout) -> Result<Self> {
        if layout.map(MAP).exists() {
            let map = Array::try_from(Map::Array(open(layout, MAP)?))?;
            let kept: u32 = map.get(&0, 0).context("cannot read the map `stamp`")?;
            // Zero when the agent was killed before it could keep one: then no program has it.
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

    /// Keeps it for the next agent.
    pub(super) fn keep(self, map: Map) -> Result<()> {
        let mut map: Array<MapData, u32> = map.try_into()?;
        map.set(0, self.0, 0)
            .context("cannot write the map `stamp`")
    }
}
