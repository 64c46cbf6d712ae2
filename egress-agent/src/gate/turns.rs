//! Chooses the next pod among those whose backlogs wait.

use std::{cmp::Reverse, collections::HashMap, time::Instant};

use egress_common::ids::PodId;

use super::pod::Pod;

/// The pods whose backlogs wait, and the clock by which time is accounted.
///
/// The clock is read once after each message: the time between two readings was spent on that message.
pub(super) struct Turns {
    began: Instant,
    now_ns: u64,
    /// The pod that was served longest ago comes first.
    pods: Vec<PodId>,
}

impl Turns {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            now_ns: 0,
            pods: Vec::new(),
        }
    }

    /// The last reading of the clock.
    pub(super) fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Reads the clock. No pod is charged for the time since the last reading.
    pub(super) fn begin(&mut self) {
        self.spent_ns();
    }

    /// Reads the clock; returns the time since the last reading.
    pub(super) fn spent_ns(&mut self) -> u64 {
        let before = self.now_ns;
        self.now_ns = self.began.elapsed().as_nanos() as u64;
        self.now_ns.saturating_sub(before)
    }

    /// Whether no pod waits.
    pub(super) fn is_empty(&self) -> bool {
        self.pods.is_empty()
    }

    /// Whether several pods wait.
    pub(super) fn has_others(&self) -> bool {
        self.pods.len() > 1
    }

    /// Adds a pod whose backlog, or whose repetitions, wait now.
    pub(super) fn add(&mut self, pod: PodId) {
        if !self.pods.contains(&pod) {
            self.pods.push(pod);
        }
    }

    /// The pod whose turn it is: the one with the highest balance; among equals the one that was served
    /// longest ago. [`Self::end`] ends its turn.
    pub(super) fn next<'a>(&mut self, pods: &'a mut HashMap<PodId, Pod>) -> Option<&'a mut Pod> {
        let now_ns = self.now_ns;
        let balance = |id: &PodId| pods.get(id).map(|pod| pod.balance(now_ns));
        // Of equal elements `min_by_key` returns the first.
        let (at, _) = self
            .pods
            .iter()
            .enumerate()
            .min_by_key(|(_, id)| Reverse(balance(id)))?;
        let id = self.pods.remove(at);
        self.pods.push(id);
        pods.get_mut(&id)
    }

    /// Ends the turn; `is_last` means that the pod's backlog is empty.
    pub(super) fn end(&mut self, is_last: bool) {
        if is_last {
            self.pods.pop();
        }
    }

    /// Removes a pod.
    pub(super) fn forget(&mut self, pod: PodId) {
        self.pods.retain(|id| *id != pod);
    }
}
