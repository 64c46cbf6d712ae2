//! A connection on which a query was refused. The refusal is only in the stream to the pod, and the refused
//! query only in the stream from the pod. So after the first refusal the two ends see different streams, and
//! each has a connection with the agent.
//!
//! ```text
//!          queries            allowed              judged          responses
//!   pod ──────────────▶ asked ────────▶ to_resolver ────▶ resolver ────────▶ answered
//!    ▲                    │ refused                                              │ deliverable
//!    └───────── to_pod ◀──┴──────────────────────────────────────────────────────┘
//! ```
//!
//! Only complete messages that have been decided cross from one end to the other. Acknowledgments, windows
//! and retransmissions are between each end and the agent.

use std::task::Poll;

use egress_common::packet::{TCP_ACK, TCP_FIN, TCP_SYN};

use super::{
    buffer::{PREFIX, Refused},
    decide::{Answered, Asked, Decide, Next, Step},
    flow::{ANSWERED_LIMIT, ASKED_LIMIT, Flow},
    frames::{Out, Own, To},
    memory,
    segment::{PSH, Segment},
    sender::{Due, Sender},
};

/// The gate decides no query while this many bytes wait for the pod's acknowledgment: a refusal would add to
/// them.
const UNREAD_LIMIT: usize = 64 << 10;

/// The length of a DNS header (RFC 1035, section 4.1.1). A shorter message is none.
const HEADER: usize = 12;

/// The ends to which the gate owes an acknowledgment.
#[derive(Clone, Copy, Default)]
struct Owed {
    pod: bool,
    resolver: bool,
}

#[derive(Default)]
pub(super) struct Split {
    to_pod: Sender,
    to_resolver: Sender,
    /// The bytes of the resolver's current message that the pod got before the split.
    begun: usize,
    /// Refusals that must follow that message.
    deferred: Vec<u8>,
    /// The room that the gate last announced to each end.
    announced_to_pod: usize,
    announced_to_resolver: usize,
}

impl Split {
    /// Takes over the bytes of both directions that were allowed and are not acknowledged. Undecided bytes
    /// stay in the flow's buffers.
    pub(super) fn new(flow: &mut Flow) -> Self {
        let Flow {
            asked, answered, ..
        } = &*flow;
        let sent = |from: u64, to: u64| usize::try_from(to.saturating_sub(from)).unwrap_or(0);
        let split = Self {
            to_pod: Sender::new(
                answered.seq(answered.acked),
                answered.slice(answered.acked, answered.sent).to_vec(),
                sent(answered.acked, answered.sent),
                flow.pod.takes,
            ),
            to_resolver: Sender::new(
                asked.seq(asked.acked),
                asked.slice(asked.acked, asked.allowed).to_vec(),
                sent(asked.acked, asked.sent),
                flow.resolver.takes,
            ),
            begun: sent(answered.parsed(), answered.sent),
            ..Self::default()
        };
        flow.asked.forward_all();
        flow.answered.forward_all();
        split
    }

    /// The memory that the bytes of both streams take.
    pub(super) fn allocated(&self) -> usize {
        self.to_pod.allocated() + self.to_resolver.allocated() + self.deferred.capacity()
    }

    /// The next sequence number of the stream to one end.
    pub(super) fn next_seq(&self, to: To) -> u32 {
        match to {
            To::Pod => self.to_pod.next_seq(),
            To::Resolver => self.to_resolver.next_seq(),
        }
    }

    /// Handles the first refusal.
    pub(super) fn begin<D: Decide, O: Out>(
        &mut self,
        flow: &mut Flow,
        refusal: &[u8],
        step: &mut Step<'_, D, O>,
    ) -> Next {
        self.refuse(refusal);
        let owed = Owed {
            pod: true,
            resolver: false,
        };
        self.proceed(flow, owed, step)
    }

    fn refuse(&mut self, refusal: &[u8]) {
        let Ok(len) = u16::try_from(refusal.len()) else {
            return;
        };
        for bytes in [&len.to_be_bytes(), refusal] {
            if self.begun == 0 {
                self.to_pod.push(bytes);
            } else {
                memory::append(&mut self.deferred, bytes);
            }
        }
    }

    /// Handles a segment from the pod that is not a reset.
    pub(super) fn pod_sent<D: Decide, O: Out>(
        &mut self,
        flow: &mut Flow,
        segment: &Segment<'_>,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        if !self.to_pod.acknowledge(segment.ack, flow.pod.takes) {
            return Next::Keep;
        }
        let position = flow.asked.position(segment.seq);
        match flow.asked.insert(position, segment.payload) {
            Ok(()) if segment.has(TCP_FIN) => {
                flow.asked.end_at(segment.end(position));
            }
            // The pod repeats bytes for which there is no room.
            Ok(()) | Err(Refused::Beyond) => {}
            Err(Refused::Differs) => {
                return self.lose(flow, To::Resolver, "repeated with other bytes", step);
            }
        }
        let owed = Owed {
            pod: needs_acknowledgment(segment, flow.asked.ack()),
            resolver: false,
        };
        self.proceed(flow, owed, step)
    }

    /// Handles a segment from the resolver that is not a reset.
    pub(super) fn resolver_sent<D: Decide, O: Out>(
        &mut self,
        flow: &mut Flow,
        segment: &Segment<'_>,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        let mut owed = Owed {
            pod: false,
            resolver: true,
        };
        if !segment.has(TCP_SYN) {
            let window = flow.window_in(&flow.resolver, segment);
            if !self.to_resolver.acknowledge(segment.ack, window) {
                return Next::Keep;
            }
            flow.note_resolver(segment, step.now_ns);
            let position = flow.answered.position(segment.seq);
            match flow.answered.insert(position, segment.payload) {
                Ok(()) if segment.has(TCP_FIN) => {
                    flow.answered.end_at(segment.end(position));
                }
                Ok(()) | Err(Refused::Beyond) => {}
                Err(Refused::Differs) => {
                    return self.lose(flow, To::Pod, "repeated with other bytes", step);
                }
            }
            owed.resolver = needs_acknowledgment(segment, flow.answered.ack());
        }
        self.proceed(flow, owed, step)
    }

    /// Whether one of the streams must be repeated.
    pub(super) fn is_due(&self, now_ns: u64) -> bool {
        self.to_pod.is_due(now_ns) || self.to_resolver.is_due(now_ns)
    }

    /// Repeats bytes that are not acknowledged in time.
    pub(super) fn repeat<D: Decide, O: Out>(
        &mut self,
        flow: &mut Flow,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        if !step.decide.is_resolver(&flow.ends.packet(To::Resolver)) {
            // The programs no longer hold the segments, and the two ends would disagree about sequence
            // numbers.
            return self.fail(flow, step.out);
        }
        for (to, why) in [
            (To::Pod, "the pod does not acknowledge"),
            (To::Resolver, "the resolver does not acknowledge"),
        ] {
            let sender = self.sender(to);
            match sender.tick(step.now_ns) {
                Due::Nothing => {}
                Due::GiveUp => return self.lose(flow, To::Resolver, why, step),
                Due::Resend => {
                    let probe = sender.probe();
                    if !self.pump(flow, to, step) {
                        let own = Own {
                            seq: probe,
                            ..self.own(flow, to)
                        };
                        flow.ends.put_own(to, &own, step.out);
                    }
                }
            }
        }
        Next::Keep
    }

    /// Decides the complete messages, and sends the bytes that may be sent.
    fn proceed<D: Decide, O: Out>(
        &mut self,
        flow: &mut Flow,
        mut owed: Owed,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        let mut next = self.take_answers(flow, step);
        if next == Next::Keep {
            next = self.take_questions(flow, step);
        }
        if next == Next::Later {
            // No edit of the policy may come between the decisions and this.
            for to in [To::Resolver, To::Pod] {
                self.pump(flow, to, step);
            }
        }
        if next != Next::Keep {
            return next;
        }
        flow.asked.forward_all();
        flow.answered.forward_all();
        // A window that was nearly closed and is open again must be announced.
        owed.pod |= is_reopened(self.announced_to_pod, room(flow, To::Pod), ASKED_LIMIT);
        owed.resolver |= is_reopened(
            self.announced_to_resolver,
            room(flow, To::Resolver),
            ANSWERED_LIMIT,
        );
        for (to, is_owed) in [(To::Resolver, owed.resolver), (To::Pod, owed.pod)] {
            if !self.pump(flow, to, step) && is_owed {
                let own = self.own(flow, to);
                flow.ends.put_own(to, &own, step.out);
            }
        }
        if self.to_pod.is_over() && self.to_resolver.is_over() {
            return Next::Forget;
        }
        Next::Keep
    }

    /// Decides the complete responses while the pod accepts them. A response that waits for the pod could be
    /// delivered after its addresses have expired.
    fn take_answers<D: Decide, O: Out>(
        &mut self,
        flow: &mut Flow,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        let packet = flow.ends.packet(To::Pod);
        while let Some(message) = flow.answered.message() {
            self.pump(flow, To::Pod, step);
            let len = PREFIX + message.len();
            let is_full = self.to_pod.kept() > 0 && self.to_pod.kept() + len > ANSWERED_LIMIT;
            if is_full || self.to_pod.has_unsent() {
                return Next::Keep;
            }
            if !step.begin_message() {
                return Next::Later;
            }
            let Poll::Ready(answered) = step.decide.answer(message, &packet, &mut flow.pending)
            else {
                return Next::Later;
            };
            if answered == Answered::Delivered {
                let from = flow.answered.parsed();
                let message = flow.answered.slice(from, from + len as u64);
                self.to_pod
                    .push(message.get(self.begun..).unwrap_or_default());
            } else {
                // If the pod has its beginning, the rest of the response would have to come next.
                if self.begun > 0 || message.len() < HEADER {
                    return self.fail(flow, step.out);
                }
            }
            flow.answered.take_message();
            self.end_begun();
        }
        if flow.answered.is_ended() {
            if self.begun > 0 {
                return self.fail(flow, step.out);
            }
            // An incomplete message at the end is not delivered.
            self.to_pod.close();
        }
        Next::Keep
    }

    /// Ends the message that had begun before the split, and sends the refusals that waited for its end.
    fn end_begun(&mut self) {
        self.begun = 0;
        self.to_pod.push(&std::mem::take(&mut self.deferred));
    }

    /// Decides the complete queries while there is room for the refusals and for the queries to the resolver.
    fn take_questions<D: Decide, O: Out>(
        &mut self,
        flow: &mut Flow,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        let packet = flow.ends.packet(To::Resolver);
        loop {
            if flow.asked.is_too_long() {
                return self.lose(flow, To::Resolver, "a query is too long", step);
            }
            let Some(message) = flow.asked.message() else {
                break;
            };
            if self.to_resolver.kept() + PREFIX + message.len() > ASKED_LIMIT
                || self.to_pod.kept() >= UNREAD_LIMIT
                || self.deferred.len() >= ASKED_LIMIT
            {
                return Next::Keep;
            }
            if !step.begin_message() {
                return Next::Later;
            }
            match step.decide.question(message, &packet) {
                Asked::Allowed(question) => {
                    step.decide.ask(&question, &packet, &mut flow.pending);
                    let from = flow.asked.parsed();
                    let until = from + (PREFIX + message.len()) as u64;
                    self.to_resolver.push(flow.asked.slice(from, until));
                }
                Asked::Refused(_) if self.to_pod.is_closing() => {
                    // The resolver has ended its stream, and no refusal can follow the end.
                    return self.fail(flow, step.out);
                }
                Asked::Refused(refusal) => self.refuse(&refusal),
                Asked::Unreadable => return self.fail(flow, step.out),
            }
            flow.asked.take_message();
        }
        if flow.asked.is_cut() {
            return self.lose(flow, To::Resolver, "ended within a query", step);
        }
        if flow.asked.is_ended() {
            self.to_resolver.close();
        }
        Next::Keep
    }

    fn sender(&mut self, to: To) -> &mut Sender {
        match to {
            To::Pod => &mut self.to_pod,
            To::Resolver => &mut self.to_resolver,
        }
    }

    /// Sends to one end as much as its window allows; returns whether anything was sent.
    fn pump<D, O: Out>(&mut self, flow: &Flow, to: To, step: &mut Step<'_, D, O>) -> bool {
        let size = flow.own_size();
        let own = self.own(flow, to);
        let sender = self.sender(to);
        let mut has_sent = false;
        while let Some(part) = sender.next(size, step.now_ns) {
            let mut flags = TCP_ACK;
            if part.is_last {
                flags |= PSH;
            }
            if part.fin {
                flags |= TCP_FIN;
            }
            let own = Own {
                seq: part.seq,
                flags,
                payload: part.payload,
                ..own
            };
            flow.ends.put_own(to, &own, step.out);
            has_sent = true;
        }
        has_sent
    }

    /// An acknowledgment of everything that one end has sent, which announces the room for more.
    fn own(&mut self, flow: &Flow, to: To) -> Own<'static> {
        let room = room(flow, to);
        let (buffer, from, towards) = match to {
            To::Pod => {
                self.announced_to_pod = room;
                (&flow.asked, &flow.resolver, &flow.pod)
            }
            To::Resolver => {
                self.announced_to_resolver = room;
                (&flow.answered, &flow.pod, &flow.resolver)
            }
        };
        Own {
            seq: self.next_seq(to),
            ack: Some(buffer.ack()),
            window: flow.window_of(from, room),
            // The values are the last ones of the end in whose name the segment is sent. So they never go
            // back (RFC 7323, section 5.3).
            timestamps: from.timestamp.zip(towards.timestamp),
            ..Own::default()
        }
    }

    /// Resets both ends.
    fn fail(&self, flow: &Flow, out: &mut impl Out) -> Next {
        for (to, buffer) in [(To::Resolver, &flow.answered), (To::Pod, &flow.asked)] {
            flow.ends
                .put_reset(to, self.next_seq(to), Some(buffer.ack()), out);
        }
        Next::Forget
    }

    /// Resets both ends and reports the reason.
    fn lose<D: Decide, O: Out>(
        &self,
        flow: &Flow,
        was_going_to: To,
        why: &'static str,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        step.decide.lost(&flow.ends.packet(was_going_to), why);
        self.fail(flow, step.out)
    }
}

/// The free room in the buffer for the stream from one end.
fn room(flow: &Flow, from: To) -> usize {
    match from {
        To::Pod => flow.asked.room(),
        To::Resolver => flow.answered.room(),
    }
}

/// Whether an end that waits for room must be told that there is some.
fn is_reopened(announced: usize, room: usize, limit: usize) -> bool {
    announced < limit / 2 && room >= limit / 2
}

/// Whether a segment must be acknowledged: it has data or a FIN, or its sequence number is not the expected
/// one, as in a window probe.
fn needs_acknowledgment(segment: &Segment<'_>, expected: u32) -> bool {
    !segment.payload.is_empty() || segment.has(TCP_FIN) || segment.seq != expected
}

// A message of either end fits into the buffer of its stream, so it is complete before the buffer is full.
const _: () = assert!(PREFIX + super::QUESTION_MAX < ASKED_LIMIT);
const _: () = assert!(PREFIX + u16::MAX as usize <= ANSWERED_LIMIT);
