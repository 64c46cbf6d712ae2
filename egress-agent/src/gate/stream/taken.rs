//! A connection on which the agent answers in the resolver's place, because a question on it was
//! refused: what follows in the resolver's stream is the agent's own, and the resolver could not go
//! on with it.

use egress_common::packet::{Packet, TCP_ACK, TCP_FIN};

use super::{
    decide::{Asked, Decide, Next, Step},
    flow::Flow,
    frames::{Out, Own, To},
    half::{PREFIX, Refused},
    segment::{PSH, Segment},
};

/// Most bytes of refusals that wait for the pod to acknowledge them.
const LIMIT: usize = 16 << 10;
/// A connection that was silent this long is reset.
const IDLE_NS: u64 = 10_000_000_000;
/// How long the agent waits before it repeats itself, and how often it does, each time after twice
/// as long.
const RESEND_NS: u64 = 300_000_000;
const RESENDS: u32 = 5;

/// The agent's stream towards the pod.
#[derive(Default)]
pub(super) struct Taken {
    /// Sequence number of the first byte that the pod has not acknowledged.
    unacknowledged: u32,
    out: Vec<u8>,
    /// The stream ends behind `out`.
    is_closing: bool,
    is_end_acknowledged: bool,
    resends: u32,
    resend_at_ns: u64,
}

impl Taken {
    /// Goes on at this sequence number with a refusal.
    pub(super) fn new(seq: u32, refusal: &[u8]) -> Self {
        let mut taken = Self {
            unacknowledged: seq,
            ..Self::default()
        };
        taken.push(refusal);
        taken
    }

    pub(super) fn kept(&self) -> usize {
        self.out.len()
    }

    /// Where its stream stands.
    pub(super) fn next_seq(&self) -> u32 {
        let end = u32::from(self.is_closing && !self.is_end_acknowledged);
        self.unacknowledged
            .wrapping_add(self.out.len() as u32)
            .wrapping_add(end)
    }

    fn push(&mut self, message: &[u8]) {
        let Ok(len) = u16::try_from(message.len()) else {
            return;
        };
        self.out.extend_from_slice(&len.to_be_bytes());
        self.out.extend_from_slice(message);
    }

    /// A segment from the pod.
    pub(super) fn pod_sent<D: Decide, O: Out>(
        &mut self,
        flow: &mut Flow,
        segment: &Segment<'_>,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        self.acknowledge(segment.ack);
        let position = flow.asked.position(segment.seq);
        match flow.asked.insert(position, segment.payload) {
            Ok(()) => {}
            Err(Refused::Beyond) => return Next::Keep,
            Err(Refused::Differs) => return self.reset(flow, step),
        }
        if segment.has(TCP_FIN) {
            flow.asked.end_at(segment.end(position));
        }
        let next = self.serve(flow, segment.packet, step);
        if next == Next::Forget {
            return next;
        }
        if flow.asked.is_ended() && self.is_end_acknowledged {
            if segment.has(TCP_FIN) {
                self.send(flow, step);
            }
            return Next::Forget;
        }
        // A repeated question, or a probe, comes with data or from before where the stream stands.
        if !segment.payload.is_empty() || segment.has(TCP_FIN) || segment.seq != flow.asked.ack() {
            self.send(flow, step);
        }
        Next::Keep
    }

    fn acknowledge(&mut self, ack: u32) {
        let acknowledged = ack.wrapping_sub(self.unacknowledged) as usize;
        let end = usize::from(self.is_closing && !self.is_end_acknowledged);
        if acknowledged > self.out.len() + end {
            return;
        }
        if acknowledged > 0 {
            self.resends = 0;
        }
        self.is_end_acknowledged |= acknowledged > self.out.len();
        self.out.drain(..acknowledged.min(self.out.len()));
        self.unacknowledged = ack;
    }

    /// Answers the questions that are complete.
    pub(super) fn serve<D: Decide, O: Out>(
        &mut self,
        flow: &mut Flow,
        packet: &Packet,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        while !self.is_closing {
            if flow.asked.is_too_long() {
                step.decide.lost(packet, "a question is too long");
                return self.reset(flow, step);
            }
            let Some(message) = flow.asked.message() else {
                break;
            };
            match step.decide.question(message, packet) {
                Asked::Refused(refusal) if self.out.len() + refusal.len() <= LIMIT => {
                    self.push(&refusal);
                    flow.asked.take_message();
                }
                // There is no resolver any more to ask: the pod asks again on a new connection (RFC
                // 7766, section 6.2.4).
                Asked::Allowed(_) => self.is_closing = true,
                Asked::Refused(_) | Asked::Unreadable => return self.reset(flow, step),
            }
        }
        self.is_closing |= flow.asked.is_ended();
        flow.asked.take_in();
        Next::Keep
    }

    /// Sends everything that the pod has not acknowledged, or only an acknowledgment.
    pub(super) fn send<D, O: Out>(&mut self, flow: &Flow, step: &mut Step<'_, D, O>) {
        self.resend_at_ns = step.now_ns + (RESEND_NS << self.resends);
        let size = flow.own_size();
        let mut seq = self.unacknowledged;
        let mut rest = self.out.as_slice();
        loop {
            let (chunk, behind) = rest.split_at_checked(size).unwrap_or((rest, &[]));
            rest = behind;
            let mut flags = TCP_ACK;
            if rest.is_empty() {
                flags |= PSH;
                if self.is_closing && !self.is_end_acknowledged {
                    flags |= TCP_FIN;
                }
            }
            let own = Own {
                seq,
                flags,
                payload: chunk,
                ..flow.own_to_pod()
            };
            flow.ends.put_own(To::Pod, &own, step.out);
            seq = seq.wrapping_add(chunk.len() as u32);
            if rest.is_empty() {
                return;
            }
        }
    }

    /// What has to be done from time to time.
    pub(super) fn tick<D: Decide, O: Out>(
        &mut self,
        flow: &mut Flow,
        used_ns: u64,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        if step.now_ns.saturating_sub(used_ns) > IDLE_NS {
            return self.reset(flow, step);
        }
        let is_owed = !self.out.is_empty() || (self.is_closing && !self.is_end_acknowledged);
        if is_owed && step.now_ns >= self.resend_at_ns {
            if self.resends == RESENDS {
                return self.reset(flow, step);
            }
            self.resends += 1;
            self.send(flow, step);
        }
        Next::Keep
    }

    fn reset<D, O: Out>(&self, flow: &Flow, step: &mut Step<'_, D, O>) -> Next {
        let ack = Some(flow.asked.ack());
        flow.ends.put_reset(To::Pod, self.next_seq(), ack, step.out);
        Next::Forget
    }
}

// A prefix and a message of QUESTION_MAX bytes fit in what is kept of the pod's stream.
const _: () = assert!(PREFIX + super::QUESTION_MAX < LIMIT);
