//! The backlog of a pod that is over its share of the gate's time.

use std::collections::VecDeque;

use egress_common::records::Held;

use super::budget::{Budget, Kept, Limits};
use crate::datapath::HeldFrame;

/// The bytes of all backlogs. One pod's backlog may have as many as the ring could hold of it.
pub(super) const LIMITS: Limits = Limits {
    own: 128 << 10,
    pod: 4 << 20,
    common: 32 << 20,
};

/// The least that a frame counts: the allocation and the queue entry cost memory, too. One pod's backlog thus
/// has at most 8,192 frames.
const FRAME_MIN: usize = 512;

/// The waiting messages of one pod, the oldest first: the segments of one connection stay in their order.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    frames: VecDeque<BacklogMessage>,
    kept: Kept,
}

/// A message in a backlog.
#[derive(Debug)]
pub(super) struct BacklogMessage {
    head: Held,
    frame: Box<[u8]>,
}

impl BacklogMessage {
    /// The message as it was in the ring.
    pub(super) fn held(&self) -> HeldFrame<'_> {
        HeldFrame {
            head: self.head,
            frame: &self.frame,
        }
    }

    fn cost(&self) -> usize {
        cost(&self.frame)
    }
}

fn cost(frame: &[u8]) -> usize {
    frame.len().max(FRAME_MIN)
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Adds a message; `false` when there is no room.
    pub(super) fn push(&mut self, held: &HeldFrame<'_>, budget: &mut Budget) -> bool {
        let cost = cost(held.frame);
        if !budget.has_room(&self.kept, cost) {
            return false;
        }
        budget.add(&mut self.kept, cost);
        self.frames.push_back(BacklogMessage {
            head: held.head,
            frame: held.frame.into(),
        });
        true
    }

    /// Adds a message before all others; `false` when there is no room.
    pub(super) fn push_first(&mut self, held: &HeldFrame<'_>, budget: &mut Budget) -> bool {
        if !self.push(held, budget) {
            return false;
        }
        self.frames.rotate_right(1);
        true
    }

    /// Puts the message back that was taken last.
    pub(super) fn put_back(&mut self, message: BacklogMessage, budget: &mut Budget) {
        budget.add(&mut self.kept, message.cost());
        self.frames.push_front(message);
    }

    /// Takes the oldest message.
    pub(super) fn pop(&mut self, budget: &mut Budget) -> Option<BacklogMessage> {
        let waiting = self.frames.pop_front()?;
        budget.take_back(&mut self.kept, waiting.cost());
        if self.frames.is_empty() {
            // Frees the memory after a flood.
            self.frames = VecDeque::new();
        }
        Some(waiting)
    }

    /// Drops all messages; returns how many there were.
    pub(super) fn clear(&mut self, budget: &mut Budget) -> u64 {
        let frames = self.frames.len() as u64;
        while self.pop(budget).is_some() {}
        frames
    }
}

#[cfg(test)]
mod tests {
    use egress_common::{
        ids::{IfIndex, PodId},
        records::HELD_QUESTION,
    };

    use super::*;

    fn held(frame: &[u8]) -> HeldFrame<'_> {
        HeldFrame {
            head: Held {
                time_ns: 1,
                ifindex: IfIndex::new(2),
                pod: PodId::new(3),
                len: frame.len() as u32,
                kind: HELD_QUESTION,
                taken: 1,
                l3_offset: 14,
                pad: 0,
            },
            frame,
        }
    }

    #[test]
    fn messages_wait_in_their_order_and_whole() {
        let mut budget = Budget::new(LIMITS);
        let mut backlog = Backlog::default();
        for frame in [&[1, 2][..], &[3], &[4, 5, 6]] {
            assert!(backlog.push(&held(frame), &mut budget));
        }
        let mut frames = Vec::new();
        while let Some(waiting) = backlog.pop(&mut budget) {
            assert_eq!(waiting.held().head.pod, PodId::new(3));
            frames.push(waiting.held().frame.to_vec());
        }
        assert_eq!(frames, [vec![1, 2], vec![3], vec![4, 5, 6]]);
        assert_eq!(backlog.kept.amount(), 0);
    }

    #[test]
    fn a_backlog_is_bounded_in_frames_and_in_bytes() {
        let mut budget = Budget::new(LIMITS);
        for (size, most) in [(60, LIMITS.pod / FRAME_MIN), (65_536, LIMITS.pod / 65_536)] {
            let mut backlog = Backlog::default();
            let frame = vec![0; size];
            let mut pushed = 0;
            while backlog.push(&held(&frame), &mut budget) {
                pushed += 1;
            }
            assert_eq!(pushed, most);
            assert_eq!(backlog.clear(&mut budget), most as u64);
            assert_eq!((backlog.kept.amount(), budget.common()), (0, 0));
        }
    }
}
