//! One connection between a pod and a resolver.
//!
//! ```text
//!  Opening ── SYN-ACK that fits the SYN ──▶ Open ── a query is refused ──▶ Split
//! ```
//!
//! In the state Open, the connection is one between the pod and the resolver. In the state Split, each of
//! them has a connection with the agent; see [`super::split`].

mod resets;
mod timers;
mod windows;

use std::task::{Poll, ready};

use egress_common::{
    ids::IfIndex,
    packet::{Packet, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
};

use super::{
    super::pending::Pending,
    buffer::{Refused, StreamBuffer},
    decide::{Answered, Asked, Decide, Next, Step},
    frames::{Ends, Out, Own, To, put_bare},
    put_allowed::{Put, put_allowed},
    segment::{Segment, URG},
    side::Side,
    split::Split,
};

/// Most bytes of queries that are kept for one connection. A query has at most [`super::QUESTION_MAX`] bytes.
/// The gate drops what exceeds the limit, and the sender repeats it.
pub(super) const ASKED_LIMIT: usize = 16 << 10;
/// Most bytes of responses that are kept for one connection: the longest message, and as much again for what
/// comes out of order behind it.
pub(super) const ANSWERED_LIMIT: usize = 128 << 10;

/// Most open queries of one connection.
const OPEN_QUESTIONS: usize = 512;
/// The memory that an open query counts.
const OPEN_QUESTION_BYTES: usize = 384;

enum State {
    Opening,
    Open,
    Split(Box<Split>),
}

/// The outcome for the complete queries.
enum Judged {
    Allowed,
    /// One was refused. The queries before it are allowed; those after it are not decided.
    Refused(Vec<u8>),
    /// One is not readable.
    Unreadable,
    /// The next one is decided in the pod's next turn.
    Later,
}

pub(super) struct Flow {
    pub(super) ends: Ends,
    /// The pod's interface that the connection uses.
    interface: IfIndex,
    state: State,
    /// The stream from the pod.
    pub(super) asked: StreamBuffer,
    /// The stream from the resolver.
    pub(super) answered: StreamBuffer,
    pub(super) pending: Pending,
    pub(super) pod: Side,
    pub(super) resolver: Side,
    /// The position up to which the gate has acknowledged queries itself. The pod will not repeat them.
    own_ack: u64,
    resends: u32,
    resend_at_ns: u64,
    used_ns: u64,
}

impl Flow {
    /// Starts a connection that the pod opens with this SYN.
    pub(super) fn new(segment: &Segment<'_>, interface: IfIndex, now_ns: u64) -> Option<Self> {
        let mut pod = Side::default();
        pod.note(segment, 0);
        Some(Self {
            ends: Ends::of(segment.frame, segment.packet, To::Resolver)?,
            interface,
            state: State::Opening,
            asked: StreamBuffer::new(segment.seq.wrapping_add(1), ASKED_LIMIT),
            answered: StreamBuffer::new(0, ANSWERED_LIMIT),
            pending: Pending::with_room(OPEN_QUESTIONS),
            pod,
            resolver: Side::default(),
            own_ack: 0,
            resends: 0,
            resend_at_ns: 0,
            used_ns: now_ns,
        })
    }

    /// The pod's interface that the connection uses.
    pub(super) fn interface(&self) -> IfIndex {
        self.interface
    }

    /// Whether each end has a connection with the agent.
    pub(super) fn is_split(&self) -> bool {
        matches!(self.state, State::Split(_))
    }

    /// Whether this SYN opened the connection.
    pub(super) fn is_opened_by(&self, segment: &Segment<'_>) -> bool {
        self.asked.first() == segment.seq.wrapping_add(1)
    }

    /// The memory of the connection that grows with its traffic.
    pub(super) fn allocated(&self) -> usize {
        let more = match &self.state {
            State::Split(split) => split.allocated(),
            State::Opening | State::Open => 0,
        };
        let open_questions = self.pending.len() * OPEN_QUESTION_BYTES;
        self.asked.allocated() + self.answered.allocated() + open_questions + more
    }

    /// Handles a segment from the pod.
    pub(super) fn pod_sent<D: Decide, O: Out>(
        &mut self,
        segment: &Segment<'_>,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        self.used_ns = step.now_ns;
        if segment.has(TCP_RST) {
            if self.is_split() {
                self.reset_resolver(step.out);
            } else {
                put_bare(segment, To::Resolver, step.out);
            }
            return Next::Forget;
        }
        if segment.has(URG) {
            // Receivers differ about which bytes are urgent data and whether they belong to the stream (RFC
            // 6093).
            return self.lose(segment.packet, "urgent data", step);
        }
        if segment.has(TCP_SYN) {
            // A SYN from the pod opens the connection, so it never acknowledges a SYN.
            if !segment.has(TCP_ACK) && !self.is_split() {
                // Data in a SYN (RFC 7413) is cut off: the pod sends it again.
                put_bare(segment, To::Resolver, step.out);
            }
            return Next::Keep;
        }
        if matches!(self.state, State::Opening) || !segment.has(TCP_ACK) {
            return Next::Keep;
        }
        self.pod.note(segment, self.scale(&self.pod));
        if let Some(next) = self.with_split(|split, flow| split.pod_sent(flow, segment, step)) {
            return next;
        }
        if !self.answered.acknowledge(segment.ack) {
            return Next::Keep;
        }
        let position = self.asked.position(segment.seq);
        match self.asked.insert(position, segment.payload) {
            Ok(()) => {}
            Err(Refused::Beyond) => return Next::Keep,
            Err(Refused::Differs) => {
                return self.lose(segment.packet, "repeated with other bytes", step);
            }
        }
        if segment.has(TCP_FIN) {
            self.asked.end_at(segment.end(position));
        }
        match self.judge_questions(segment.packet, step) {
            Judged::Allowed => {}
            Judged::Refused(refusal) => return self.split(&refusal, step),
            Judged::Unreadable => return self.fail(step.out),
            Judged::Later => {
                // No edit of the policy may come between the decision and this.
                if self.asked.allowed > self.asked.sent {
                    self.put_questions(segment, position, step.out);
                }
                return Next::Later;
            }
        }
        if self.asked.is_cut() {
            return self.lose(segment.packet, "ended within a query", step);
        }
        let put = self.put_questions(segment, position, step.out);
        if put != Put::Sent || self.asked.next() > self.asked.allowed {
            self.acknowledge_questions(step);
        }
        self.keep_or_forget()
    }

    /// Puts back the queries that are allowed.
    fn put_questions(&mut self, segment: &Segment<'_>, position: i64, out: &mut impl Out) -> Put {
        let (size, to) = (self.size_of(segment), To::Resolver);
        put_allowed(&mut self.asked, segment, position, size, to, out)
    }

    /// Decides the complete queries, up to the first one that is refused.
    fn judge_questions<D: Decide, O: Out>(
        &mut self,
        packet: &Packet,
        step: &mut Step<'_, D, O>,
    ) -> Judged {
        loop {
            if self.asked.is_too_long() {
                step.decide.lost(packet, "a query is too long");
                return Judged::Unreadable;
            }
            let Some(message) = self.asked.message() else {
                return Judged::Allowed;
            };
            if !step.begin_message() {
                return Judged::Later;
            }
            match step.decide.question(message, packet) {
                Asked::Allowed(question) => {
                    step.decide.ask(&question, packet, &mut self.pending);
                    self.asked.take_message();
                    self.asked.allowed = self.asked.parsed();
                }
                Asked::Refused(refusal) => {
                    self.asked.take_message();
                    return Judged::Refused(refusal);
                }
                Asked::Unreadable => return Judged::Unreadable,
            }
        }
    }

    /// Handles a segment from the resolver.
    pub(super) fn resolver_sent<D: Decide, O: Out>(
        &mut self,
        segment: &Segment<'_>,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        if segment.has(TCP_RST) {
            return self.reset_by_resolver(segment, step.out);
        }
        if segment.has(URG) {
            return self.lose(segment.packet, "urgent data", step);
        }
        if !segment.has(TCP_ACK) {
            return Next::Keep;
        }
        let next = self.with_split(|split, flow| split.resolver_sent(flow, segment, step));
        if let Some(next) = next {
            return next;
        }
        if segment.has(TCP_SYN) {
            self.open(segment, step);
            return Next::Keep;
        }
        if matches!(self.state, State::Opening) {
            // The resolver knows an earlier connection with these ports. The pod will reset it (RFC 9293,
            // section 3.5.1).
            put_bare(segment, To::Pod, step.out);
            return Next::Keep;
        }
        if !self.asked.acknowledge(segment.ack) {
            return Next::Keep;
        }
        self.note_resolver(segment, step.now_ns);
        let position = self.answered.position(segment.seq);
        match self.answered.insert(position, segment.payload) {
            Ok(()) => {}
            Err(Refused::Beyond) => return Next::Keep,
            Err(Refused::Differs) => {
                return self.lose(segment.packet, "repeated with other bytes", step);
            }
        }
        if segment.has(TCP_FIN) {
            self.answered.end_at(segment.end(position));
        }
        match self.judge_answers(segment, step) {
            Poll::Ready(Answered::Delivered) => {}
            Poll::Ready(Answered::Withheld) => return self.fail(step.out),
            Poll::Pending => {
                // Their addresses are in the allow map now, and may not be there for long.
                self.answered.allowed = self.answered.allowed.max(self.answered.parsed());
                if self.answered.allowed > self.answered.sent {
                    self.put_answers(segment, position, step.out);
                }
                return Next::Later;
            }
        }
        let beginning = self.answered.beginning();
        if !beginning.is_empty()
            && !step
                .decide
                .may_begin(beginning, segment.packet, &self.pending)
        {
            return self.fail(step.out);
        }
        self.answered.trim();
        // The beginning of a message is put back: a sender with a small window waits for its acknowledgment
        // before it sends the rest.
        self.answered.allowed = self.answered.next();
        let put = self.put_answers(segment, position, step.out);
        if put == Put::Old {
            let acknowledgment = Own {
                seq: self.asked.sent_seq(),
                ack: Some(self.answered.seq(self.answered.acked)),
                window: self.pod.window,
                timestamps: self.pod.timestamp.zip(self.resolver.timestamp),
                ..Own::default()
            };
            self.ends.put_own(To::Resolver, &acknowledgment, step.out);
        }
        self.keep_or_forget()
    }

    /// Decides the complete responses, up to the first one that must not be delivered.
    fn judge_answers<D: Decide, O: Out>(
        &mut self,
        segment: &Segment<'_>,
        step: &mut Step<'_, D, O>,
    ) -> Poll<Answered> {
        while let Some(message) = self.answered.message() {
            if !step.begin_message() {
                return Poll::Pending;
            }
            let pending = &mut self.pending;
            let answered = ready!(step.decide.answer(message, segment.packet, pending));
            if answered == Answered::Withheld {
                return Poll::Ready(answered);
            }
            self.answered.take_message();
        }
        Poll::Ready(Answered::Delivered)
    }

    /// Puts back the responses that are allowed.
    fn put_answers(&mut self, segment: &Segment<'_>, position: i64, out: &mut impl Out) -> Put {
        let (size, to) = (self.size_of(segment), To::Pod);
        put_allowed(&mut self.answered, segment, position, size, to, out)
    }

    fn open<D, O: Out>(&mut self, segment: &Segment<'_>, step: &mut Step<'_, D, O>) {
        // Otherwise the resolver and the gate would disagree about the first byte of the pod's stream.
        if segment.ack != self.asked.first() {
            return;
        }
        let first = segment.seq.wrapping_add(1);
        match self.state {
            State::Opening => {
                self.answered = StreamBuffer::new(first, ANSWERED_LIMIT);
                self.resolver.note(segment, 0);
                self.state = State::Open;
            }
            _ if self.answered.first() == first => {}
            _ => return,
        }
        self.used_ns = step.now_ns;
        put_bare(segment, To::Pod, step.out);
    }

    /// Ends a step without an error: forgets the connection if both streams have ended.
    fn keep_or_forget(&self) -> Next {
        if self.asked.is_over() && self.answered.is_over() {
            return Next::Forget;
        }
        Next::Keep
    }

    /// A segment to the pod in the resolver's name, at the current position of the resolver's stream.
    pub(super) fn own_to_pod(&self) -> Own<'static> {
        Own {
            seq: self.answered.sent_seq(),
            ack: Some(self.asked.ack()),
            window: self.resolver.window.max(1),
            // The echo is the pod's last value. The value is the resolver's last one, so it is no older than
            // any that the pod has seen (RFC 7323, section 5.3).
            timestamps: self.resolver.timestamp.zip(self.pod.timestamp),
            ..Own::default()
        }
    }

    /// Runs a step of a split connection. `None` if the connection is not split.
    fn with_split(&mut self, run: impl FnOnce(&mut Split, &mut Self) -> Next) -> Option<Next> {
        if !self.is_split() {
            return None;
        }
        let State::Split(mut split) = std::mem::replace(&mut self.state, State::Open) else {
            return None;
        };
        let next = run(&mut split, self);
        self.state = State::Split(split);
        Some(next)
    }

    /// Splits the connection: from now on each end has a connection with the agent.
    fn split<D: Decide, O: Out>(&mut self, refusal: &[u8], step: &mut Step<'_, D, O>) -> Next {
        if self.answered.fin_sent {
            // No refusal can follow the end of the stream.
            return self.fail(step.out);
        }
        let mut split = Box::new(Split::new(self));
        let next = split.begin(self, refusal, step);
        self.state = State::Split(split);
        next
    }
}
