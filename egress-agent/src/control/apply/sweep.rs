//! Removing idle flows and expired addresses.

use std::{collections::HashSet, time::Duration};

use super::Applier;
use crate::datapath::boottime_ns;

impl Applier {
    /// Removes idle flows and expired addresses of the pods whose turn it is.
    pub(in crate::control) fn sweep(&mut self, round: Duration, every: Duration) {
        let turns = (round.as_millis() / every.as_millis()).max(1) as usize;
        let pods = self.enforced.len();
        let count = pods.div_ceil(turns);
        let now_ns = boottime_ns();
        let turn = |i: usize| (i + pods - self.next_swept % pods.max(1)) % pods.max(1) < count;
        for (i, enforced) in self.enforced.values_mut().enumerate() {
            if !turn(i) {
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
                            "inbound connections that were silent for longest gave way to others \
                             of the pod: raise limits.flowsPerPod"
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
