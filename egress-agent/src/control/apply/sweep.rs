//! Removing idle flows and expired addresses.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use anyhow::Result;
use egress_common::ids::PodId;

use super::Applier;
use crate::datapath::{CounterMap, boottime_ns};

/// How long a pod that lacks room waits at least for its next sweep out of turn.
const CROWDED_EVERY: Duration = Duration::from_secs(1);

/// Pods whose maps had no room for a flow or a destination. Their connections wait for a sweep, so it comes out of
/// turn.
///
/// A sweep reads all of a pod's flows, and a pod can lack room all the time. So one pod at a time is swept out of
/// turn, and each pod at most once in [`CROWDED_EVERY`].
pub(in crate::control) struct Crowded {
    counters: CounterMap,
    /// How often there was no room, over all pods.
    total: u64,
    pods: HashMap<PodId, Wants>,
}

/// The sweeps of one pod.
#[derive(Clone, Copy, Default)]
struct Wants {
    /// How often it had found no room when it was last swept out of turn.
    found_full: u64,
    /// When that was.
    swept: Option<Instant>,
}

impl Crowded {
    pub(super) fn new(counters: CounterMap) -> Self {
        Self {
            counters,
            total: 0,
            pods: HashMap::new(),
        }
    }

    /// The pod to be swept out of turn, if any: of those that have lacked room since their last sweep, the one that
    /// has waited longest.
    fn next(&mut self, pods: impl Iterator<Item = PodId>) -> Result<Option<PodId>> {
        let total = self.counters.counters()?.flows_full;
        if total == self.total {
            return Ok(None);
        }
        let mut known = HashMap::new();
        let mut next: Option<(PodId, Wants)> = None;
        for pod in pods {
            let before = self.pods.get(&pod).copied().unwrap_or_default();
            known.insert(pod, before);
            let now = Wants {
                found_full: self.counters.meter(pod).flows_full,
                ..before
            };
            let waits_longer = next.is_none_or(|(_, next)| now.swept < next.swept);
            if now.found_full != before.found_full && waits_longer {
                next = Some((pod, now));
            }
        }
        self.pods = known;
        let Some((pod, wants)) = next else {
            self.total = total;
            return Ok(None);
        };
        if wants.swept.is_some_and(|at| at.elapsed() < CROWDED_EVERY) {
            return Ok(None);
        }
        let swept = Some(Instant::now());
        self.pods.insert(pod, Wants { swept, ..wants });
        Ok(Some(pod))
    }
}

impl Applier {
    /// Removes idle flows and expired addresses of the pods whose turn it is.
    pub(in crate::control) fn sweep(&mut self, round: Duration, every: Duration) {
        let turns = (round.as_millis() / every.as_millis()).max(1) as usize;
        let pods = self.enforced.len();
        let count = pods.div_ceil(turns);
        let now_ns = boottime_ns();
        let turn = |i: usize| (i + pods - self.next_swept % pods.max(1)) % pods.max(1) < count;
        let ids = self.enforced.values().map(|enforced| enforced.pod);
        let crowded = self.crowded.next(ids).unwrap_or_else(|error| {
            tracing::error!(error = %format!("{error:#}"), "cannot read which pods lack room for flows");
            None
        });
        for (i, enforced) in self.enforced.values_mut().enumerate() {
            if !turn(i) && crowded != Some(enforced.pod) {
                continue;
            }
            let mut open = HashSet::new();
            let swept = enforced.flows.sweep(now_ns, |address| {
                open.insert(address);
            });
            match swept {
                Ok(swept) => {
                    self.published.set_flows(enforced.pod, swept.alive);
                    self.published.destinations_evicted.add(swept.called as u64);
                    if swept.evicted > 0 {
                        self.published.flows_evicted.add(swept.evicted as u64);
                        tracing::warn!(
                            pod = %enforced.identity.subject(),
                            connections = swept.evicted,
                            "the pod's other flows have evicted the inbound connections that were \
                             silent for longest: raise limits.flowsPerPod"
                        );
                    }
                }
                Err(error) => {
                    tracing::error!(error = %format!("{error:#}"), "cannot sweep a pod's flows");
                    continue;
                }
            }
            self.gate.sweep(enforced.pod, open);
        }
        self.next_swept = self.next_swept.wrapping_add(count);
    }
}
