//! DNS over TCP (RFC 7766): connections between pods and their resolvers.
//!
//! Every segment comes through the ring. The gate puts the bytes of each direction in order and decides the
//! messages in them as those over UDP. A segment is put back when every message that it completes may pass.
//! The connection remains one between the pod and the resolver: addresses, ports and sequence numbers stay
//! unchanged until a query is refused.
//!
//! ```text
//!  segment ─▶ its connection ─▶ bytes in order ─▶ whole messages ─▶ decided as over UDP
//!                 │ none: reset both ends             │                 │ no
//!                 │                                   ▼ not yet         ▼
//!                 │       from the pod: held, acknowledged      query: refused, see [`split`]
//!                 │       from the resolver: put back           response: reset both ends
//! ```
//!
//! The receiver must read exactly what the gate has judged. So a repeated byte must equal the first one until
//! the receiver has acknowledged it, and is not put back after that. No data is put back before the
//! receiver's SYN-ACK has confirmed the same first byte. Urgent data does not pass, nor does an option that
//! could change the position of a byte.

mod buffer;
mod decide;
mod flow;
mod frames;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
mod memory;
mod put_allowed;
mod segment;
mod sender;
mod side;
mod split;

use std::{
    collections::{HashSet, VecDeque},
    task::Poll,
};

use egress_common::{
    address::Address,
    ids::IfIndex,
    packet::{Packet, TCP_ACK, TCP_RST, TCP_SYN},
};
use lru::LruCache;

pub(super) use decide::{Answered, Asked, Decide, Step};
use decide::{Next, Timer};
use flow::Flow;
pub(super) use frames::{Out, To};
use frames::{put_bare, reset_unknown, with_known_options};
pub(super) use segment::Segment;

use super::{
    budget::{Budget, Kept, Limits},
    checksum::Checksum,
};

/// The longest query that is accepted. In a query only the options of the OPT record have no limit of their
/// own, and stub resolvers pad to 128 bytes (RFC 8467).
const QUESTION_MAX: usize = 4096;

/// Most connections of one pod that are followed. Beyond that the least recently used one is reset.
const FLOWS: usize = 256;

/// The bytes that the connections of all pods hold. A pod's own part has room for two of the longest
/// responses.
pub(super) const LIMITS: Limits = Limits {
    own: 128 << 10,
    pod: 4 << 20,
    common: 16 << 20,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    pod_addr: Address,
    resolver: Address,
    resolver_port: u16,
    pod_port: u16,
}

/// The connections of one pod.
pub(super) struct Streams {
    flows: LruCache<Key, Flow>,
    /// Connections that must repeat bytes. Repetitions are sent in the pod's turns, so that those of many connections
    /// do not keep the gate from other pods.
    due: VecDeque<Key>,
    kept: Kept,
    /// The number of segments that were dropped since the last [`Streams::take_damaged`].
    damaged: u64,
}

impl Streams {
    pub(super) fn new() -> Self {
        Self {
            // Unbounded, because the bounded cache allocates all of its memory at once.
            flows: LruCache::unbounded(),
            due: VecDeque::new(),
            kept: Kept::default(),
            damaged: 0,
        }
    }

    /// Decides a segment on its way to the end `to`. Pending while not all of its messages are decided: the same segment
    /// must then be decided again in a later turn.
    pub(super) fn segment<D: Decide, O: Out>(
        &mut self,
        frame: &[u8],
        packet: &Packet,
        to: To,
        step: &mut Step<'_, D, O>,
        budget: &mut Budget,
    ) -> Poll<()> {
        let read = Segment::read(frame, packet);
        let Some(segment) = read.filter(|segment| segment.checksum != Checksum::Wrong) else {
            self.damaged += 1;
            return Poll::Ready(());
        };
        let cleaned = with_known_options(&segment);
        let Some(segment) = cleaned
            .as_ref()
            .map_or(Some(segment), |frame| Segment::read(frame, packet))
        else {
            return Poll::Ready(());
        };
        let key = match to {
            To::Resolver => Key {
                pod_addr: packet.src,
                resolver: packet.dst,
                resolver_port: packet.dst_port,
                pod_port: packet.src_port,
            },
            To::Pod => Key {
                pod_addr: packet.dst,
                resolver: packet.src,
                resolver_port: packet.src_port,
                pod_port: packet.dst_port,
            },
        };
        if to == To::Resolver && segment.flags & (TCP_SYN | TCP_ACK | TCP_RST) == TCP_SYN {
            self.make_room(&segment, key, step, budget);
        }
        let Some(flow) = self.flows.get_mut(&key) else {
            reset_unknown_connection(&segment, to, step);
            return Poll::Ready(());
        };
        let before = flow.allocated();
        let mut next = match to {
            To::Resolver => flow.pod_sent(&segment, step),
            To::Pod => flow.resolver_sent(&segment, step),
        };
        let after = flow.allocated();
        budget.add(&mut self.kept, after);
        budget.take_back(&mut self.kept, before);
        if next != Next::Forget && after > before && budget.is_over(&self.kept) {
            next = flow.lose(packet, "no memory is left", step);
        }
        if next == Next::Forget {
            self.forget(&key, budget);
        }
        if next == Next::Later {
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    /// Starts a connection with a SYN, unless the SYN repeats that of a known connection.
    fn make_room<D: Decide, O: Out>(
        &mut self,
        segment: &Segment<'_>,
        key: Key,
        step: &mut Step<'_, D, O>,
        budget: &mut Budget,
    ) {
        if let Some(flow) = self.flows.peek(&key) {
            if flow.is_opened_by(segment) {
                return;
            }
            // The pod has abandoned the known connection. The resolver's SYN-ACK must fit the new SYN before
            // other segments pass, whether or not the resolver knows of the end of the old connection.
            flow.reset_resolver(step.out);
            self.forget(&key, budget);
        }
        if self.flows.len() >= FLOWS
            && let Some((&oldest, flow)) = self.flows.peek_lru()
        {
            flow.lose(segment.packet, "the pod has too many connections", step);
            self.forget(&oldest, budget);
        }
        if let Some(flow) = Flow::new(segment, step.out.interface(), step.now_ns) {
            budget.add(&mut self.kept, flow.allocated());
            self.flows.put(key, flow);
        }
    }

    /// The number of segments that were dropped since the last call because they cannot be read or have a
    /// wrong checksum.
    pub(super) fn take_damaged(&mut self) -> u64 {
        std::mem::take(&mut self.damaged)
    }

    fn forget(&mut self, key: &Key, budget: &mut Budget) {
        if let Some(flow) = self.flows.pop(key) {
            budget.take_back(&mut self.kept, flow.allocated());
        }
    }

    /// The periodic work. It finds the connections that must repeat bytes and sends nothing:
    /// [`Self::repeat_next`] does.
    pub(super) fn tick<D: Decide, O: Out>(&mut self, step: &Step<'_, D, O>, budget: &mut Budget) {
        let mut ended = Vec::new();
        // Those of an earlier tick come first.
        let is_behind = !self.due.is_empty();
        for (&key, flow) in &mut self.flows {
            let before = flow.allocated();
            match flow.tick(step) {
                Timer::Nothing => {}
                Timer::Repeat if is_behind => {}
                Timer::Repeat => self.due.push_back(key),
                Timer::Forget => ended.push(key),
            }
            budget.add(&mut self.kept, flow.allocated());
            budget.take_back(&mut self.kept, before);
        }
        for key in ended {
            self.forget(&key, budget);
        }
    }

    /// Whether connections must repeat bytes.
    pub(super) fn has_due(&self) -> bool {
        !self.due.is_empty()
    }

    /// Repeats the bytes of one connection.
    pub(super) fn repeat_next<D: Decide, O: Out>(
        &mut self,
        step: &mut Step<'_, D, O>,
        budget: &mut Budget,
    ) {
        let Some(key) = self.due.pop_front() else {
            return;
        };
        let Some(flow) = self.flows.peek_mut(&key) else {
            return;
        };
        let before = flow.allocated();
        let next = flow.repeat(step);
        budget.add(&mut self.kept, flow.allocated());
        budget.take_back(&mut self.kept, before);
        if next == Next::Forget {
            self.forget(&key, budget);
        }
    }

    /// Resets the split connections: without the agent in between, their ends disagree about sequence
    /// numbers.
    pub(super) fn end_split<D, O: Out>(&mut self, step: &mut Step<'_, D, O>, budget: &mut Budget) {
        let split = self.flows.iter().filter(|(_, flow)| flow.is_split());
        let keys: Vec<Key> = split.map(|(&key, _)| key).collect();
        for key in keys {
            if let Some(flow) = self.flows.peek(&key) {
                flow.end(step.out);
            }
            self.forget(&key, budget);
        }
    }

    /// Forgets the connections on other interfaces than these: the pod no longer has them. The next segment of each
    /// resets it.
    pub(super) fn keep_on(&mut self, interfaces: &[IfIndex], budget: &mut Budget) {
        let elsewhere = |flow: &Flow| !interfaces.contains(&flow.interface());
        let flows = self.flows.iter().filter(|(_, flow)| elsewhere(flow));
        let keys: Vec<Key> = flows.map(|(&key, _)| key).collect();
        for key in keys {
            self.forget(&key, budget);
        }
    }

    /// Forgets the connections with these resolvers. The next segment of each resets it.
    pub(super) fn forget_with(&mut self, resolvers: &HashSet<(Address, u16)>, budget: &mut Budget) {
        let flows = self.flows.iter();
        let keys = flows.map(|(&key, _)| key);
        let keys: Vec<Key> = keys
            .filter(|key| resolvers.contains(&(key.resolver, key.resolver_port)))
            .collect();
        for key in keys {
            self.forget(&key, budget);
        }
    }

    /// Forgets all connections. The next segment of each resets it.
    pub(super) fn clear(&mut self, budget: &mut Budget) {
        let kept: usize = self.flows.iter().map(|(_, flow)| flow.allocated()).sum();
        budget.take_back(&mut self.kept, kept);
        self.flows.clear();
        self.due.clear();
    }
}

/// Handles a segment of an unknown connection: one that an earlier agent followed, or a late segment.
fn reset_unknown_connection<D: Decide, O: Out>(
    segment: &Segment<'_>,
    to: To,
    step: &mut Step<'_, D, O>,
) {
    if segment.has(TCP_RST) {
        put_bare(segment, to, step.out);
        return;
    }
    let opens = segment.has(TCP_SYN);
    if !segment.payload.is_empty() || (opens && to == To::Pod && !segment.has(TCP_ACK)) {
        step.decide.lost(segment.packet, "an unknown connection");
    }
    reset_unknown(segment, to, step.out);
}

#[cfg(test)]
mod tests;
