//! The queues of slow pods, and the choice of the next frame.
//!
//! A pod controls how long the kernel takes to hand it a frame: its own rules and packet sockets run in the
//! sending thread. So a pod that has been slow has a lane: a queue from which other threads than the gate's
//! send, one frame at a time. Among the pods whose frames are still slow there, only one at a time is served,
//! so that they cannot keep all threads busy. After each slow frame there is a pause, so that all slow pods
//! together take at most a quarter of one CPU.

use std::{
    collections::{HashMap, VecDeque},
    io,
};

use egress_common::ids::{IfIndex, PodId};

use crate::gate::budget::{Budget, Kept, Limits};

/// The bytes in all lanes.
const LIMITS: Limits = Limits {
    own: 128 << 10,
    pod: 512 << 10,
    common: 8 << 20,
};

/// The least that a frame counts. One lane thus has at most 1,024 frames.
const FRAME_MIN: usize = 512;

/// A frame that takes longer is slow. An ordinary one takes a few microseconds.
pub(super) const SLOW_NS: u64 = 1_000_000;

/// The most that one frame counts in a lane's average, so that the average can come down again.
const COUNTED_NS: u64 = 64 * SLOW_NS;

/// The pause after a frame of a slow lane, as a multiple of the time that the frame took.
const PAUSE: u64 = 3;

/// The longest pause.
const PAUSE_MAX_NS: u64 = 10_000_000_000;

const NO_ROOM: &str = "the pod takes frames too slowly, and its queue is full";
const TOO_LATE: &str = "the pod takes frames too slowly, and they were queued for too long";

/// The lanes of all slow pods; `T` is the frame with its socket and mark.
pub(super) struct Lanes<T> {
    pods: HashMap<PodId, Lane<T>>,
    /// Pods that have queued frames and are served by no thread; the one that has waited longest comes first.
    ready: VecDeque<PodId>,
    budget: Budget,
    is_slow_served: bool,
    /// When the next frame of a slow lane may be sent.
    slow_from_ns: u64,
}

struct Lane<T> {
    frames: VecDeque<Queued<T>>,
    kept: Kept,
    is_served: bool,
    /// The pod is gone; the lane is removed when the serving thread is done.
    is_gone: bool,
    /// The moving average of the times that its frames took; the last one weighs an eighth.
    average_ns: u64,
    last_slow_ns: u64,
    lost: HashMap<IfIndex, Lost>,
}

struct Queued<T> {
    ifindex: IfIndex,
    /// It is not sent after this time.
    until_ns: u64,
    len: usize,
    frame: T,
}

/// Frames of one interface that were not sent.
#[derive(Debug, Default)]
pub(super) struct Lost {
    pub(super) frames: u64,
    /// The error of the last one; `None` when the interface no longer belonged to the pod.
    pub(super) error: Option<io::Error>,
}

impl Lost {
    /// One lost frame with its error.
    pub(super) fn one(error: io::Error) -> Self {
        Self {
            frames: 1,
            error: Some(error),
        }
    }
}

/// A frame to send, and its pod. The caller passes the job to [`Lanes::end`] afterwards.
#[derive(Debug)]
pub(super) struct Job<T> {
    pub(super) frame: T,
    pub(super) ifindex: IfIndex,
    pod: PodId,
    is_slow: bool,
}

/// The next step of a sending thread.
#[derive(Debug)]
pub(super) enum Next<T> {
    Send(Job<T>),
    /// Wait until this time, or until a frame is pushed.
    Wait(Option<u64>),
}

impl<T> Lane<T> {
    fn is_slow(&self) -> bool {
        self.average_ns >= SLOW_NS
    }

    fn lose(&mut self, ifindex: IfIndex, error: io::Error) {
        let lost = self.lost.entry(ifindex).or_default();
        lost.frames += 1;
        lost.error = Some(error);
    }
}

impl<T> Lanes<T> {
    pub(super) fn new() -> Self {
        Self {
            pods: HashMap::new(),
            ready: VecDeque::new(),
            budget: Budget::new(LIMITS),
            is_slow_served: false,
            slow_from_ns: 0,
        }
    }

    /// Opens a lane for a pod that has been slow.
    pub(super) fn open(&mut self, pod: PodId, now_ns: u64) {
        let lane = self.pods.entry(pod).or_insert_with(|| Lane {
            frames: VecDeque::new(),
            kept: Kept::default(),
            is_served: false,
            is_gone: false,
            average_ns: 0,
            last_slow_ns: now_ns,
            lost: HashMap::new(),
        });
        lane.is_gone = false;
    }

    /// Adds a frame for a pod with a lane. The frame is lost, and counted, if the lane has no room, or if it
    /// is not sent by `until_ns`.
    pub(super) fn push(
        &mut self,
        (pod, ifindex): (PodId, IfIndex),
        len: usize,
        frame: T,
        until_ns: u64,
    ) {
        let Some(lane) = self.pods.get_mut(&pod) else {
            return;
        };
        let len = len.max(FRAME_MIN);
        if !self.budget.has_room(&lane.kept, len) {
            lane.lose(ifindex, io::Error::other(NO_ROOM));
            return;
        }
        self.budget.add(&mut lane.kept, len);
        if lane.frames.is_empty() && !lane.is_served {
            self.ready.push_back(pod);
        }
        lane.frames.push_back(Queued {
            ifindex,
            until_ns,
            len,
            frame,
        });
    }

    /// Takes the next frame: from the quick lane that has waited longest; otherwise from the least slow of
    /// the slow lanes, if the pause is over. No other thread serves that lane until [`Self::end`].
    pub(super) fn next(&mut self, now_ns: u64) -> Next<T> {
        while let Some(at) = self.whose_turn(now_ns) {
            let Some((pod, lane)) = self
                .ready
                .remove(at)
                .and_then(|pod| Some((pod, self.pods.get_mut(&pod)?)))
            else {
                continue;
            };
            while let Some(queued) = lane.frames.pop_front() {
                self.budget.take_back(&mut lane.kept, queued.len);
                if queued.until_ns < now_ns {
                    lane.lose(queued.ifindex, io::Error::other(TOO_LATE));
                    continue;
                }
                lane.is_served = true;
                let is_slow = lane.is_slow();
                self.is_slow_served |= is_slow;
                return Next::Send(Job {
                    frame: queued.frame,
                    ifindex: queued.ifindex,
                    pod,
                    is_slow,
                });
            }
        }
        let is_due = !self.ready.is_empty() && !self.is_slow_served;
        Next::Wait(is_due.then_some(self.slow_from_ns))
    }

    /// The index in `ready` of the pod that is served next.
    fn whose_turn(&self, now_ns: u64) -> Option<usize> {
        let average = |pod: &PodId| self.pods.get(pod).map_or(0, |lane| lane.average_ns);
        let mut ready = self.ready.iter();
        ready.position(|pod| average(pod) < SLOW_NS).or_else(|| {
            let is_open = !self.is_slow_served && now_ns >= self.slow_from_ns;
            // Of equal elements `min_by_key` returns the first.
            let ready = self.ready.iter().enumerate();
            let (at, _) = ready.min_by_key(|(_, pod)| average(pod))?;
            is_open.then_some(at)
        })
    }

    /// Whether a lane that no thread serves has frames.
    pub(super) fn has_more(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Ends a job: the frame has been sent, or the sending failed.
    pub(super) fn end<U>(
        &mut self,
        job: &Job<U>,
        took_ns: u64,
        error: Option<io::Error>,
        now_ns: u64,
    ) {
        if job.is_slow {
            self.is_slow_served = false;
        }
        let Some(lane) = self.pods.get_mut(&job.pod) else {
            return;
        };
        lane.is_served = false;
        // An eighth of the old average is subtracted first, so that integer division lets the average reach
        // zero.
        lane.average_ns = lane.average_ns - lane.average_ns / 8 + took_ns.min(COUNTED_NS) / 8;
        if took_ns > SLOW_NS {
            lane.last_slow_ns = now_ns;
        }
        if job.is_slow || lane.is_slow() {
            let pause_ns = took_ns.saturating_mul(PAUSE).min(PAUSE_MAX_NS);
            self.slow_from_ns = self.slow_from_ns.max(now_ns.saturating_add(pause_ns));
        }
        if let Some(error) = error {
            lane.lose(job.ifindex, error);
        }
        if lane.is_gone {
            self.pods.remove(&job.pod);
        } else if !lane.frames.is_empty() {
            self.ready.push_back(job.pod);
        }
    }

    /// Drops and counts the frames of an interface that no longer belongs to the pod.
    pub(super) fn drop_frames_of(&mut self, pod: PodId, ifindex: IfIndex) {
        let Some(lane) = self.pods.get_mut(&pod) else {
            return;
        };
        let budget = &mut self.budget;
        let kept = &mut lane.kept;
        let mut dropped = 0;
        lane.frames.retain(|queued| {
            let stays = queued.ifindex != ifindex;
            if !stays {
                budget.take_back(kept, queued.len);
                dropped += 1;
            }
            stays
        });
        if dropped > 0 {
            lane.lost.entry(ifindex).or_default().frames += dropped;
        }
        if lane.frames.is_empty() {
            self.ready.retain(|id| *id != pod);
        }
    }

    /// Removes the lane of a pod that is gone. Its interfaces are no longer assigned to it.
    pub(super) fn forget(&mut self, pod: PodId) {
        match self.pods.get_mut(&pod) {
            Some(lane) if lane.is_served => lane.is_gone = true,
            _ => drop(self.pods.remove(&pod)),
        }
    }

    /// The lost frames of the pod since the last call, by interface.
    pub(super) fn take_lost(&mut self, pod: PodId) -> HashMap<IfIndex, Lost> {
        let lane = self.pods.get_mut(&pod);
        lane.map(|lane| std::mem::take(&mut lane.lost))
            .unwrap_or_default()
    }

    /// Closes the pod's lane if it is empty and no frame was slow for `quiet_ns`; returns whether it did.
    pub(super) fn close_if_quiet(&mut self, pod: PodId, quiet_ns: u64, now_ns: u64) -> bool {
        let is_open = self.pods.get(&pod).is_some_and(|lane| {
            lane.is_served
                || !lane.frames.is_empty()
                || now_ns.saturating_sub(lane.last_slow_ns) < quiet_ns
        });
        if !is_open {
            self.pods.remove(&pod);
        }
        !is_open
    }

    /// Drops all frames.
    pub(super) fn clear(&mut self) {
        self.pods.clear();
        self.ready.clear();
    }
}

#[cfg(test)]
#[path = "lanes_tests.rs"]
mod tests;
