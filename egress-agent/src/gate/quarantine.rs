//! Questions of pods that nobody knows yet.
//!
//! They wait here until their pod is known, and are then sent once more as the pod sent them: so they
//! are judged from the beginning, under the policy that is the pod's. A program that was quicker than
//! the cluster does not lose the seconds that its library would wait before it asks again.

use std::collections::{HashMap, VecDeque};

use egress_common::{
    packet::{Packet, Walked, walk},
    records::Held,
};

use super::{
    budget::{Budget, Kept, Limits},
    checksum::complete_udp,
};

/// How long a question waits. By then the resolver's library has asked again (resolv.conf(5),
/// `timeout`), and a second answer would find nobody.
const WAITS_FOR_NS: u64 = 5_000_000_000;

/// How many questions wait. A program that starts asks for few names at once, and those of eight have room
/// whatever others ask. With [`LONGEST`], the common part is three MiB.
const LIMITS: Limits = Limits {
    own: 8,
    pod: 32,
    common: 2048,
};

/// Longest frame that waits: what an ordinary link carries.
const LONGEST: usize = 1514;

/// All that wait, the oldest first.
pub(super) struct Quarantine {
    waiting: VecDeque<QuarantinedQuery>,
    budget: Budget,
    /// How many wait on each interface.
    kept: HashMap<u32, Kept>,
}

/// A question that waits.
pub(super) struct QuarantinedQuery {
    /// The pod at the gate that it waits under.
    pub(super) pod: u32,
    ifindex: u32,
    taken_ns: u64,
    /// As the pod sent it, with a whole checksum.
    pub(super) frame: Vec<u8>,
}

/// A frame as it would have left the pod, were it not for the offload: with a whole checksum.
pub(super) fn as_sent(frame: &[u8]) -> Vec<u8> {
    let mut packet = Packet::EMPTY;
    let mut sent = frame.to_vec();
    if walk(&frame, &mut packet) == Walked::Ip {
        complete_udp(&mut sent, &packet);
    }
    sent
}

impl Quarantine {
    pub(super) fn new() -> Self {
        Self {
            waiting: VecDeque::new(),
            budget: Budget::new(LIMITS),
            kept: HashMap::new(),
        }
    }

    /// Lets a question wait; `false` when there is no room for it.
    pub(super) fn keep(&mut self, head: &Held, frame: Vec<u8>) -> bool {
        if frame.len() > LONGEST {
            return false;
        }
        let kept = self.kept.entry(head.ifindex).or_default();
        if !self.budget.has_room(kept, 1) {
            return false;
        }
        self.budget.add(kept, 1);
        self.waiting.push_back(QuarantinedQuery {
            pod: head.pod,
            ifindex: head.ifindex,
            taken_ns: head.time_ns,
            frame,
        });
        true
    }

    /// The interface is another pod's at the gate, and that is not known either.
    pub(super) fn pass_on(&mut self, ifindex: u32, pod: u32) {
        for waiting in &mut self.waiting {
            if waiting.ifindex == ifindex {
                waiting.pod = pod;
            }
        }
    }

    /// Ends the wait of what an interface's pod has asked, in the order of asking.
    pub(super) fn end(&mut self, ifindex: u32) -> Vec<QuarantinedQuery> {
        self.take(|waiting| waiting.ifindex == ifindex)
    }

    /// What waits under a pod that is gone.
    pub(super) fn of_pod(&mut self, pod: u32) -> Vec<QuarantinedQuery> {
        self.take(|waiting| waiting.pod == pod)
    }

    /// What has waited too long.
    pub(super) fn overdue(&mut self, now_ns: u64) -> Vec<QuarantinedQuery> {
        self.take(|waiting| waiting.taken_ns + WAITS_FOR_NS <= now_ns)
    }

    fn take(&mut self, mut which: impl FnMut(&QuarantinedQuery) -> bool) -> Vec<QuarantinedQuery> {
        if self.waiting.is_empty() {
            return Vec::new();
        }
        let (taken, left): (VecDeque<QuarantinedQuery>, _) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(&mut which);
        self.waiting = left;
        for waiting in &taken {
            if let Some(kept) = self.kept.get_mut(&waiting.ifindex) {
                self.budget.take_back(kept, 1);
            }
        }
        self.kept.retain(|_, kept| kept.amount() > 0);
        taken.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(ifindex: u32, time_ns: u64) -> Held {
        Held {
            time_ns,
            ifindex,
            pod: ifindex + 100,
            len: 1,
            kind: egress_common::records::HELD_QUESTION,
            taken: 1,
            l3_offset: 14,
            pad: 0,
        }
    }

    fn frames(waiting: &[QuarantinedQuery]) -> Vec<u8> {
        waiting.iter().map(|waiting| waiting.frame[0]).collect()
    }

    #[test]
    fn questions_wait_in_their_order_until_their_pod_is_known() {
        let mut quarantine = Quarantine::new();
        for (ifindex, frame) in [(1, 10), (2, 20), (1, 11)] {
            assert!(quarantine.keep(&asked(ifindex, 0), vec![frame]));
        }
        assert_eq!(frames(&quarantine.end(1)), [10, 11]);
        assert!(quarantine.end(1).is_empty());
        quarantine.pass_on(2, 7);
        assert!(quarantine.of_pod(102).is_empty());
        assert_eq!(frames(&quarantine.of_pod(7)), [20]);
    }

    #[test]
    fn questions_do_not_wait_longer_than_those_who_ask() {
        let mut quarantine = Quarantine::new();
        assert!(quarantine.keep(&asked(1, 10), vec![1]));
        assert!(quarantine.keep(&asked(1, 20), vec![2]));
        assert!(quarantine.overdue(9 + WAITS_FOR_NS).is_empty());
        assert_eq!(frames(&quarantine.overdue(10 + WAITS_FOR_NS)), [1]);
        assert_eq!(frames(&quarantine.end(1)), [2]);
    }

    #[test]
    fn one_pods_questions_leave_room_for_another_pods() {
        let mut quarantine = Quarantine::new();
        for _ in 0..LIMITS.pod {
            assert!(quarantine.keep(&asked(1, 0), vec![1]));
        }
        assert!(!quarantine.keep(&asked(1, 0), vec![1]));
        assert!(quarantine.keep(&asked(2, 0), vec![2]));
        assert!(!quarantine.keep(&asked(3, 0), vec![3; LONGEST + 1]));
        // However many interfaces ask however much, the next has its own part.
        for ifindex in 3..1000 {
            for _ in 0..LIMITS.own {
                assert!(quarantine.keep(&asked(ifindex, 0), vec![3]));
            }
            while quarantine.keep(&asked(ifindex, 0), vec![3]) {}
        }
        assert_eq!(quarantine.budget.common(), LIMITS.common);
        assert!(!quarantine.overdue(u64::MAX).is_empty());
        assert_eq!(quarantine.budget.common(), 0);
        assert!(quarantine.kept.is_empty());
    }
}
