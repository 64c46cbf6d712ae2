//! A connection on which a question was refused. The refusal stands in the pod's stream and not in the
//! resolver's, and the refused question the other way round. So from the first refusal on the two are
//! different streams, and the agent is the other end of each.
//!
//! ```text
//!          questions          allowed              judged          answers
//!   pod ──────────────▶ asked ────────▶ to_resolver ────▶ resolver ────────▶ answered
//!    ▲                    │ refused                                              │ may be delivered
//!    └───────── to_pod ◀──┴──────────────────────────────────────────────────────┘
//! ```
//!
//! Only whole messages that have been decided get from one side to the other. Each side's acknowledgments,
//! windows and retransmissions are between it and the agent.

use egress_common::packet::{TCP_ACK, TCP_FIN, TCP_SYN};

use super::{
    buffer::{PREFIX, Refused},
    decide::{Asked, Decide, Next, Step},
    flow::{ANSWERED_LIMIT, ASKED_LIMIT, Flow},
    frames::{Out, Own, To},
    segment::{PSH, Segment},
    sender::{Due, Sender},
};

/// No question is taken while so much waits for the pod to acknowledge it: a refusal would come on top.
const UNREAD_LIMIT: usize = 64 << 10;

/// Which sides are owed an acknowledgment.
#[derive(Clone, Copy, Default)]
struct Owed {
    pod: bool,
    resolver: bool,
}

#[derive(Default)]
pub(super) struct Split {
    to_pod: Sender,
    to_resolver: Sender,
    /// How much the pod got of the resolver's message at hand before the connection was split.
    begun: usize,
    /// Refusals that come behind that message.
    waiting: Vec<u8>,
    /// The room that each side was told of last.
    told_pod: usize,
    told_resolver: usize,
}

impl Split {
    /// Takes over what has been sent on and is not acknowledged, in both directions. What is not decided yet
    /// stays where it is.
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
                asked.slice(asked.acked, asked.released).to_vec(),
                sent(asked.acked, asked.sent),
                flow.resolver.takes,
            ),
            begun: sent(answered.parsed(), answered.sent),
            ..Self::default()
        };
        flow.asked.take_in();
        flow.answered.take_in();
        split
    }

    pub(super) fn kept(&self) -> usize {
        self.to_pod.kept() + self.to_resolver.kept() + self.waiting.len()
    }

    /// Where the stream to one side stands.
    pub(super) fn next_seq(&self, to: To) -> u32 {
        match to {
            To::Pod => self.to_pod.next_seq(),
            To::Resolver => self.to_resolver.next_seq(),
        }
    }

    /// Refuses the first question.
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
        self.go_on(flow, owed, step)
    }

    fn refuse(&mut self, refusal: &[u8]) {
        let Ok(len) = u16::try_from(refusal.len()) else {
            return;
        };
        for bytes in [&len.to_be_bytes(), refusal] {
            if self.begun == 0 {
                self.to_pod.push(bytes);
            } else {
                self.waiting.extend_from_slice(bytes);
            }
        }
    }

    /// A segment from the pod, other than a reset.
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
            // What there is no room for is repeated.
            Ok(()) | Err(Refused::Beyond) => {}
            Err(Refused::Differs) => {
                return self.lose(flow, To::Resolver, "repeated with other bytes", step);
            }
        }
        let owed = Owed {
            pod: wants_answer(segment, flow.asked.ack()),
            resolver: false,
        };
        self.go_on(flow, owed, step)
    }

    /// A segment from the resolver, other than a reset.
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
            owed.resolver = wants_answer(segment, flow.answered.ack());
        }
        self.go_on(flow, owed, step)
    }

    /// What has to be done from time to time.
    pub(super) fn tick<D: Decide, O: Out>(
        &mut self,
        flow: &mut Flow,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        if !step.decide.is_resolver(&flow.ends.packet(To::Resolver)) {
            // The programs do not hold its segments any more, and the two sides would not understand each
            // other.
            return self.fail(flow, step.out);
        }
        for (to, why) in [
            (To::Pod, "the pod does not acknowledge"),
            (To::Resolver, "the resolver does not acknowledge"),
        ] {
            let sender = self.sender(to);
            match sender.tick(step.now_ns) {
                Due::Nothing => {}
                Due::GivenUp => return self.lose(flow, To::Resolver, why, step),
                Due::Again => {
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

    /// Decides what is complete, and sends what may be sent.
    fn go_on<D: Decide, O: Out>(
        &mut self,
        flow: &mut Flow,
        mut owed: Owed,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        if self.take_answers(flow, step) == Next::Forget
            || self.take_questions(flow, step) == Next::Forget
        {
            return Next::Forget;
        }
        flow.asked.take_in();
        flow.answered.take_in();
        // A window that was nearly closed and is open again is told.
        owed.pod |= is_reopened(self.told_pod, room(flow, To::Pod), ASKED_LIMIT);
        owed.resolver |= is_reopened(self.told_resolver, room(flow, To::Resolver), ANSWERED_LIMIT);
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

    /// Decides the answers that are complete, as long as the pod takes them. One that had to wait for the pod
    /// could come when the addresses in it have expired.
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
            let is_delivered = step.decide.answer(message, &packet, &mut flow.pending);
            if is_delivered {
                let from = flow.answered.parsed();
                let message = flow.answered.slice(from, from + len as u64);
                self.to_pod
                    .push(message.get(self.begun..).unwrap_or_default());
            } else if self.begun > 0 {
                // The rest of it would have to come next.
                return self.fail(flow, step.out);
            }
            flow.answered.take_message();
            self.end_begun();
        }
        if flow.answered.is_ended() {
            if self.begun > 0 {
                return self.fail(flow, step.out);
            }
            // What is left of a message that is cut is not delivered.
            self.to_pod.close();
        }
        Next::Keep
    }

    /// The message that had begun before the connection was split is over.
    fn end_begun(&mut self) {
        self.begun = 0;
        self.to_pod.push(&std::mem::take(&mut self.waiting));
    }

    /// Decides the questions that are complete, as long as there is room for what follows from them.
    fn take_questions<D: Decide, O: Out>(
        &mut self,
        flow: &mut Flow,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        let packet = flow.ends.packet(To::Resolver);
        loop {
            if flow.asked.is_too_long() {
                return self.lose(flow, To::Resolver, "a question is too long", step);
            }
            let Some(message) = flow.asked.message() else {
                break;
            };
            if self.to_resolver.kept() + PREFIX + message.len() > ASKED_LIMIT
                || self.to_pod.kept() >= UNREAD_LIMIT
                || self.waiting.len() >= ASKED_LIMIT
            {
                return Next::Keep;
            }
            match step.decide.question(message, &packet) {
                Asked::Allowed(question) => {
                    step.decide.ask(&question, &packet, &mut flow.pending);
                    let from = flow.asked.parsed();
                    let until = from + (PREFIX + message.len()) as u64;
                    self.to_resolver.push(flow.asked.slice(from, until));
                }
                Asked::Refused(_) if self.to_pod.is_closing() => {
                    // The resolver has ended the stream, and nothing can be said behind its end.
                    return self.fail(flow, step.out);
                }
                Asked::Refused(refusal) => self.refuse(&refusal),
                Asked::Unreadable => return self.fail(flow, step.out),
            }
            flow.asked.take_message();
        }
        if flow.asked.is_cut() {
            return self.lose(flow, To::Resolver, "ended within a question", step);
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

    /// Sends to one side what it takes; whether that is anything.
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

    /// An acknowledgment of all that one side has sent, and how much more there is room for.
    fn own(&mut self, flow: &Flow, to: To) -> Own<'static> {
        let room = room(flow, to);
        let (half, from, towards) = match to {
            To::Pod => {
                self.told_pod = room;
                (&flow.asked, &flow.resolver, &flow.pod)
            }
            To::Resolver => {
                self.told_resolver = room;
                (&flow.answered, &flow.pod, &flow.resolver)
            }
        };
        Own {
            seq: self.next_seq(to),
            ack: Some(half.ack()),
            window: flow.window_of(from, room),
            // The values are the last ones of the side in whose name the segment goes. So they never go back
            // (RFC 7323, section 5.3).
            timestamps: from.timestamp.zip(towards.timestamp),
            ..Own::default()
        }
    }

    /// Resets both sides.
    fn fail(&self, flow: &Flow, out: &mut impl Out) -> Next {
        for (to, half) in [(To::Resolver, &flow.answered), (To::Pod, &flow.asked)] {
            flow.ends
                .put_reset(to, self.next_seq(to), Some(half.ack()), out);
        }
        Next::Forget
    }

    /// Resets both sides and reports it.
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

/// How much more the gate takes of what one side sends.
fn room(flow: &Flow, from: To) -> usize {
    match from {
        To::Pod => flow.asked.room(),
        To::Resolver => flow.answered.room(),
    }
}

/// Whether a side that waits for room should hear that there is some.
fn is_reopened(told: usize, room: usize, limit: usize) -> bool {
    told < limit / 2 && room >= limit / 2
}

/// Whether a segment is to be acknowledged: one that carries something, or that is not where the stream stands,
/// as a probe is.
fn wants_answer(segment: &Segment<'_>, expected: u32) -> bool {
    !segment.payload.is_empty() || segment.has(TCP_FIN) || segment.seq != expected
}

// A message of either side fits in what is kept of its stream, so it is complete before there is no room.
const _: () = assert!(PREFIX + super::QUESTION_MAX < ASKED_LIMIT);
const _: () = assert!(PREFIX + u16::MAX as usize <= ANSWERED_LIMIT);
