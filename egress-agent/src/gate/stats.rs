//! The gate's counters. Its thread writes them and other threads read them, without locks.

use crate::{
    datapath::boottime_ns,
    report::{Counter, Gauge, Histogram},
};

/// Bounds of the buckets of the time that messages are held, in nanoseconds: 25 µs to 1 s.
const HOLD_BOUNDS: [u64; 12] = [
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    100_000_000,
    1_000_000_000,
];

/// The transport of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Over UDP.
    Udp,
    /// Over TCP.
    Tcp,
}

/// The direction of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the pod to a resolver.
    Question,
    /// From a resolver to the pod.
    Answer,
}

/// The outcome of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was put back.
    Delivered,
    /// It was a query for a name that the rules do not allow, and got a refusal.
    Refused,
    /// It was dropped: unreadable, unsolicited, its addresses could not be inserted, or its pod was not known
    /// in time.
    Undeliverable,
}

impl Outcome {
    /// Whether the message was put back.
    pub fn is_delivered(self) -> bool {
        self == Self::Delivered
    }
}

/// Each direction with its possible outcomes.
const KINDS: [(Direction, Outcome); 5] = [
    (Direction::Question, Outcome::Delivered),
    (Direction::Question, Outcome::Refused),
    (Direction::Question, Outcome::Undeliverable),
    (Direction::Answer, Outcome::Delivered),
    (Direction::Answer, Outcome::Undeliverable),
];

/// The gate's counters and gauges.
#[derive(Debug)]
pub struct Stats {
    udp: [Counter; KINDS.len()],
    tcp: [Counter; KINDS.len()],
    /// The time between the moment when the kernel held a message and the moment when it was put back or
    /// answered.
    pub hold: Histogram<{ HOLD_BOUNDS.len() }>,
    /// Connections with a resolver that could not be followed and were reset.
    pub connections_lost: Counter,
    /// Segments of such connections that were dropped: unreadable, or with a wrong checksum.
    pub segments_damaged: Counter,
    /// Fragments from resolvers' addresses that came after the end of their datagram, or repeated its
    /// identification.
    pub fragments_late: Counter,
    /// Messages whose pods are not at the gate.
    pub unclaimed: Counter,
    /// Messages that were held while no agent ran, and dropped.
    pub stale: Counter,
    /// Frames that could not be put back.
    pub unsent: Counter,
    /// Messages that were dropped because the backlog of their pod was full.
    pub backlog_full: Counter,
    /// Names that could not be kept for the next agent.
    pub names_not_kept: Counter,
    /// Notes of the programs about addresses for which the allow map has no room.
    pub notes_without_room: Counter,
    /// 1 when the resolvers are known to walk search lists.
    pub walks_search_lists: Gauge,
    /// Addresses in all allow maps, at the last tick.
    pub addresses: Gauge,
    /// Addresses in use in the fullest allow map, at the last tick.
    pub fullest: Gauge,
    /// Pods that take frames slowly, so that other threads than the gate's send to them.
    pub slow_pods: Gauge,
    /// The time of the last tick, in nanoseconds of `CLOCK_BOOTTIME`.
    pub ticked_ns: Gauge,
}

impl Default for Stats {
    fn default() -> Self {
        let stats = Self {
            udp: std::array::from_fn(|_| Counter::default()),
            tcp: std::array::from_fn(|_| Counter::default()),
            hold: Histogram::new(&HOLD_BOUNDS),
            connections_lost: Counter::default(),
            segments_damaged: Counter::default(),
            fragments_late: Counter::default(),
            unclaimed: Counter::default(),
            stale: Counter::default(),
            unsent: Counter::default(),
            backlog_full: Counter::default(),
            names_not_kept: Counter::default(),
            notes_without_room: Counter::default(),
            walks_search_lists: Gauge::default(),
            addresses: Gauge::default(),
            fullest: Gauge::default(),
            slow_pods: Gauge::default(),
            ticked_ns: Gauge::default(),
        };
        stats.ticked_ns.set(boottime_ns());
        stats
    }
}

impl Stats {
    /// Counts a message.
    pub(crate) fn count(&self, transport: Transport, direction: Direction, outcome: Outcome) {
        let counters = match transport {
            Transport::Udp => &self.udp,
            Transport::Tcp => &self.tcp,
        };
        if let Some(at) = KINDS.iter().position(|&kind| kind == (direction, outcome)) {
            counters[at].add(1);
        }
    }

    /// The number of messages of each transport, direction and outcome.
    pub fn messages(&self) -> impl Iterator<Item = (Transport, Direction, Outcome, u64)> + '_ {
        [(Transport::Udp, &self.udp), (Transport::Tcp, &self.tcp)]
            .into_iter()
            .flat_map(|(transport, counters)| {
                KINDS
                    .iter()
                    .zip(counters)
                    .map(move |(&(direction, outcome), counter)| {
                        (transport, direction, outcome, counter.get())
                    })
            })
    }
}

/// When the messages were held that the next send puts back.
pub(super) struct PutBackTimes {
    taken_ns: [u64; Self::ROOM],
    len: usize,
}

impl PutBackTimes {
    /// More than the gate decides before it sends frames.
    const ROOM: usize = 128;

    pub(super) fn new() -> Self {
        Self {
            taken_ns: [0; Self::ROOM],
            len: 0,
        }
    }

    /// Notes that a message will be put back.
    pub(super) fn note(&mut self, taken_ns: u64) {
        if let Some(slot) = self.taken_ns.get_mut(self.len) {
            *slot = taken_ns;
            self.len += 1;
        }
    }

    /// Records the hold times of all messages: they have been put back.
    pub(super) fn sent(&mut self, stats: &Stats) {
        if self.len == 0 {
            return;
        }
        let now_ns = boottime_ns();
        for taken_ns in &self.taken_ns[..self.len] {
            stats.hold.record(now_ns.saturating_sub(*taken_ns));
        }
        self.len = 0;
    }
}
