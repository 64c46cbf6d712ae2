//! Whose turn it is among the pods that are over their shares of the gate's time.

use std::{cmp::Reverse, collections::HashMap, time::Instant};

use super::pod::Pod;

/// The pods whose messages wait, and the clock by which time is accounted.
///
/// The clock is read once after each message: what lies between two looks at it was spent on that message.
pub(super) struct Turns {
    began: Instant,
    now_ns: u64,
    /// The pod that was served longest ago first.
    pods: Vec<u32>,
}

impl Turns {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            now_ns: 0,
            pods: Vec::new(),
        }
    }

    /// When the clock was last looked at.
    pub(super) fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Looks at the clock. What has passed since the last look is nobody's.
    pub(super) fn begin(&mut self) {
        self.spent_ns();
    }

    /// Looks at the clock; returns what has passed since the last look.
    pub(super) fn spent_ns(&mut self) -> u64 {
        let before = self.now_ns;
        self.now_ns = self.began.elapsed().as_nanos() as u64;
        self.now_ns.saturating_sub(before)
    }

    /// Messages of this pod wait now.
    pub(super) fn add(&mut self, pod: u32) {
        if !self.pods.contains(&pod) {
            self.pods.push(pod);
        }
    }

    /// The pod whose turn it is: who has most left, or owes least, and of equals who was served longest
    /// ago. [`Self::end`] ends its turn.
    pub(super) fn next<'a>(&mut self, pods: &'a mut HashMap<u32, Pod>) -> Option<&'a mut Pod> {
        let now_ns = self.now_ns;
        let balance = |id: &u32| pods.get(id).map(|pod| pod.balance(now_ns));
        // The first of equals is the minimum.
        let (at, _) = self
            .pods
            .iter()
            .enumerate()
            .min_by_key(|(_, id)| Reverse(balance(id)))?;
        let id = self.pods.remove(at);
        self.pods.push(id);
        pods.get_mut(&id)
    }

    /// The turn is over; `is_last` says that nothing of the pod waits any more.
    pub(super) fn end(&mut self, is_last: bool) {
        if is_last {
            self.pods.pop();
        }
    }

    /// A pod is gone.
    pub(super) fn forget(&mut self, pod: u32) {
        self.pods.retain(|id| *id != pod);
    }
}
