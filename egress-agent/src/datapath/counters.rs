//! The node's counters and the pods' meters.

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData, PerCpuArray};
use egress_common::{
    ids::PodId,
    records::{Counters, Meter},
};

use super::policies::ignore_missing;

/// Handle for reading counters and meters.
pub struct CounterMap {
    counters: PerCpuArray<MapData, Counters>,
    meters: HashMap<MapData, PodId, Meter>,
}

macro_rules! add_fields {
    ($sum:ident, $other:ident: $($field:ident),+ $(,)?) => {
        // Destructuring the record makes a missing counter a compile error.
        let Counters { $($field),+ } = $other;
        $($sum.$field += $field;)+
    };
}

impl CounterMap {
    pub(super) fn new(
        counters: PerCpuArray<MapData, Counters>,
        meters: HashMap<MapData, PodId, Meter>,
    ) -> Self {
        Self { counters, meters }
    }

    /// The counters, summed over all CPUs.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn counters(&self) -> Result<Counters> {
        let per_cpu = self
            .counters
            .get(&0, 0)
            .context("cannot read the map `counters`")?;
        let mut sum = Counters::default();
        for &other in per_cpu.iter() {
            add_fields!(
                sum, other:
                passed_packets, passed_bytes, passed_by_flow, denied_packets, denied_bytes,
                audited_packets, held_questions, held_answers, held_lost, held_limited,
                held_too_long, rejects_lost, denials_limited, denials_lost, flows_full,
                openings_evicted, flows_evicted, no_policy, passed_questions, passed_answers,
                unread_questions, unread_answers,
            );
        }
        Ok(sum)
    }

    /// Removes the meter of a pod that is gone. The meter outlives the pod's other maps, so that losses that
    /// were not reported yet can still be reported.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn forget(&mut self, pod: PodId) -> Result<()> {
        ignore_missing(self.meters.remove(&pod)).context("cannot write the map `meters`")
    }

    /// The meter of one pod; empty when it has none.
    pub fn meter(&self, pod: PodId) -> Meter {
        self.meters.get(&pod, 0).unwrap_or_default()
    }
}
