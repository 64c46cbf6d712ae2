//! Queries of pods that are not known yet.
//!
//! They wait here until their pod is known. Then the gate sends them again as the pod sent them, and
//! `from_pod` judges them under the pod's own policy. A program that starts before the cluster has published
//! its pod does not lose the seconds that its stub resolver would wait before it repeats the query.

use std::collections::{HashMap, VecDeque};

use egress_common::{
    ids::{IfIndex, PodId},
    packet::{Packet, Walked, walk},
    records::Held,
};

use super::{
    budget::{Budget, Kept, Limits},
    checksum::complete_udp,
};

/// How long a query waits. By then the stub resolver has repeated it (resolv.conf(5), `timeout`), and no
/// client would take a second response.
const QUERY_TIMEOUT_NS: u64 = 5_000_000_000;

/// How many queries wait. A starting program sends few queries at once, and eight of an interface always have
/// room. With [`FRAME_MAX`], the common part is three MiB.
const LIMITS: Limits = Limits {
    own: 8,
    pod: 32,
    common: 2048,
};

/// The longest frame that waits: the longest one of an ordinary link.
const FRAME_MAX: usize = 1514;

/// All waiting queries, the oldest first.
pub(super) struct Quarantine {
    waiting: VecDeque<QuarantinedQuery>,
    budget: Budget,
    /// The number that waits on each interface.
    kept: HashMap<IfIndex, Kept>,
}

/// A waiting query.
pub(super) struct QuarantinedQuery {
    /// The pod at the gate to which it belongs at present.
    pub(super) pod: PodId,
    ifindex: IfIndex,
    taken_ns: u64,
    /// As the pod sent it, with a complete checksum.
    pub(super) frame: Vec<u8>,
}

/// The frame as the pod sent it, with a complete checksum: checksum offload may have left it incomplete.
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

    /// Adds a query; `false` when there is no room.
    pub(super) fn keep(&mut self, head: &Held, frame: Vec<u8>) -> bool {
        if frame.len() > FRAME_MAX {
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

    /// Assigns the interface's queries to another pod that is not known either.
    pub(super) fn reassign(&mut self, ifindex: IfIndex, pod: PodId) {
        for waiting in &mut self.waiting {
            if waiting.ifindex == ifindex {
                waiting.pod = pod;
            }
        }
    }

    /// Takes the queries of an interface, in the order in which they were sent.
    pub(super) fn end(&mut self, ifindex: IfIndex) -> Vec<QuarantinedQuery> {
        self.take(|waiting| waiting.ifindex == ifindex)
    }

    /// Takes the queries of a pod that is gone.
    pub(super) fn of_pod(&mut self, pod: PodId) -> Vec<QuarantinedQuery> {
        self.take(|waiting| waiting.pod == pod)
    }

    /// Takes the queries that have waited too long.
    pub(super) fn overdue(&mut self, now_ns: u64) -> Vec<QuarantinedQuery> {
        self.take(|waiting| waiting.taken_ns + QUERY_TIMEOUT_NS <= now_ns)
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
            ifindex: IfIndex::new(ifindex),
            pod: PodId::new(ifindex + 100),
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
    fn queries_wait_in_their_order_until_their_pod_is_known() {
        let mut quarantine = Quarantine::new();
        for (ifindex, frame) in [(1, 10), (2, 20), (1, 11)] {
            assert!(quarantine.keep(&asked(ifindex, 0), vec![frame]));
        }
        assert_eq!(frames(&quarantine.end(IfIndex::new(1))), [10, 11]);
        assert!(quarantine.end(IfIndex::new(1)).is_empty());
        quarantine.reassign(IfIndex::new(2), PodId::new(7));
        assert!(quarantine.of_pod(PodId::new(102)).is_empty());
        assert_eq!(frames(&quarantine.of_pod(PodId::new(7))), [20]);
    }

    #[test]
    fn a_query_is_dropped_after_five_seconds() {
        let mut quarantine = Quarantine::new();
        assert!(quarantine.keep(&asked(1, 10), vec![1]));
        assert!(quarantine.keep(&asked(1, 20), vec![2]));
        assert!(quarantine.overdue(9 + QUERY_TIMEOUT_NS).is_empty());
        assert_eq!(frames(&quarantine.overdue(10 + QUERY_TIMEOUT_NS)), [1]);
        assert_eq!(frames(&quarantine.end(IfIndex::new(1))), [2]);
    }

    #[test]
    fn one_pods_queries_leave_room_for_another_pods() {
        let mut quarantine = Quarantine::new();
        for _ in 0..LIMITS.pod {
            assert!(quarantine.keep(&asked(1, 0), vec![1]));
        }
        assert!(!quarantine.keep(&asked(1, 0), vec![1]));
        assert!(quarantine.keep(&asked(2, 0), vec![2]));
        assert!(!quarantine.keep(&asked(3, 0), vec![3; FRAME_MAX + 1]));
        // However many interfaces send however many queries, the next interface has its own part.
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
