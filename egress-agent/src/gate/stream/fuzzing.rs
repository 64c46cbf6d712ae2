//! Runs a connection whose two ends send according to a recipe, for the fuzz target `stream`, and checks what
//! each end would read.

use std::{collections::VecDeque, task::Poll};

use egress_common::{
    ids::IfIndex,
    packet::{Packet, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, Walked, walk},
};

use super::{
    super::{
        checksum::Checksum,
        pending::{Exchange, Pending},
    },
    Answered, Asked, Budget, Decide, FLOWS, Key, LIMITS, Out, QUESTION_MAX, Segment, Step, Streams,
    To,
    segment::URG,
};
use egress_dns::{Answer, Question, Refusal, read_answer, read_beginning, read_question, refuse};

#[path = "fuzzing_frames.rs"]
mod frames;

use frames::{Reaction, exchange, frame, framed};

/// Most steps of a recipe: more steps cost time and show nothing new.
const STEPS: usize = 150;
/// The maximum segment size that both ends announce.
const MSS: u16 = 300;
/// Most repetitions of honest ends at the end of a recipe.
const ROUNDS: usize = 100;
/// The first sequence numbers: both streams wrap around.
const POD_FIRST: u32 = u32::MAX - 40;
const RESOLVER_FIRST: u32 = u32::MAX - 10;
/// The option of multipath TCP (RFC 8684).
const MULTIPATH: u8 = 30;
/// More than the gate may keep for one connection, including its 512 open queries.
const KEPT: usize = 512 << 10;

/// The decisions so far, and the messages that the ends may read as their result.
#[derive(Default)]
struct Decisions {
    now_ns: u64,
    /// The last message that was decided.
    question: Vec<u8>,
    /// The allowed queries, as in a stream.
    asked: Vec<u8>,
    /// The deliverable responses.
    answers: VecDeque<Vec<u8>>,
    refusals: VecDeque<Vec<u8>>,
    /// The beginning of a deliverable response.
    begun: Vec<u8>,
    lost: usize,
    /// How often the decision on a response was asked for.
    turns: u64,
}

impl Decisions {
    fn exchange(packet: &Packet, id: u16, to: To) -> Exchange {
        let (pod_addr, pod_port) = match to {
            To::Resolver => (packet.src, packet.src_port),
            To::Pod => (packet.dst, packet.dst_port),
        };
        let (resolver, resolver_port) = match to {
            To::Resolver => (packet.dst, packet.dst_port),
            To::Pod => (packet.src, packet.src_port),
        };
        Exchange {
            pod_addr,
            resolver,
            resolver_port,
            pod_port,
            id,
        }
    }

    fn answered(packet: &Packet, answer: &Answer) -> Exchange {
        Self::exchange(packet, answer.id, To::Pod)
    }
}

impl Decide for Decisions {
    fn question(&mut self, message: &[u8], _: &Packet) -> Asked {
        assert!(message.len() <= QUESTION_MAX);
        self.question = message.to_vec();
        match read_question(message) {
            Err(_) => Asked::Unreadable,
            Ok(question) if question.name_as_sent.get(1) == Some(&b'n') => {
                let refusal = refuse(&question, Refusal::NxDomain);
                self.refusals.push_back(refusal.clone());
                Asked::Refused(refusal)
            }
            Ok(question) => Asked::Allowed(question),
        }
    }

    fn ask(&mut self, question: &Question, packet: &Packet, pending: &mut Pending) {
        assert_eq!(read_question(&self.question).as_ref(), Ok(question));
        self.asked.extend(framed(&self.question));
        let exchange = Self::exchange(packet, question.id, To::Resolver);
        pending.ask(exchange, question, self.now_ns);
    }

    fn answer(&mut self, message: &[u8], packet: &Packet, pending: &mut Pending) -> Poll<Answered> {
        self.turns += 1;
        if !self.turns.is_multiple_of(3) {
            return Poll::Pending;
        }
        let delivered = read_answer(message).is_ok_and(|answer| {
            pending.answer(Self::answered(packet, &answer), &answer, self.now_ns)
        });
        if delivered {
            self.answers.push_back(message.to_vec());
            return Poll::Ready(Answered::Delivered);
        }
        Poll::Ready(Answered::Withheld)
    }

    fn may_begin(&mut self, message: &[u8], packet: &Packet, pending: &Pending) -> bool {
        assert!(
            self.refusals.is_empty(),
            "an undecided beginning passes after a refusal"
        );
        let delivered = read_beginning(message).is_ok_and(|answer| {
            answer.is_none_or(|answer| {
                pending.expects(&Self::answered(packet, &answer), &answer, self.now_ns)
            })
        });
        self.begun = message.to_vec();
        delivered
    }

    fn is_resolver(&self, _: &Packet) -> bool {
        true
    }

    fn lost(&mut self, _: &Packet, _: &'static str) {
        self.lost += 1;
    }
}

/// The bytes that one end reads, by position.
#[derive(Default)]
struct Reader {
    /// The sequence number of the first byte, once the SYN has been put back.
    first: Option<u32>,
    bytes: Vec<u8>,
    has_ended: bool,
}

impl Reader {
    fn take(&mut self, seq: u32, payload: &[u8], fin: bool) {
        if payload.is_empty() && !fin {
            return;
        }
        let first = self.first.expect("no data before the SYN");
        let at = seq.wrapping_sub(first) as usize;
        assert!(at <= self.bytes.len(), "a gap, or before the first byte");
        let (again, new) = payload.split_at(payload.len().min(self.bytes.len() - at));
        assert_eq!(&self.bytes[at..at + again.len()], again, "read twice");
        assert!(new.is_empty() || !self.has_ended, "data after the end");
        self.bytes.extend_from_slice(new);
        if fin {
            assert_eq!(at + payload.len(), self.bytes.len(), "an early end");
            self.has_ended = true;
        }
    }
}

/// Both ends of the connection.
#[derive(Default)]
struct Line {
    pod: Reader,
    resolver: Reader,
    has_reset: bool,
}

impl Out for Line {
    fn put(&mut self, to: To, frame: &[u8]) {
        let mut packet = Packet::EMPTY;
        assert_eq!(walk(&frame, &mut packet), Walked::Ip);
        let segment = Segment::read(frame, &packet).expect("a whole segment");
        assert_eq!(segment.checksum, Checksum::Whole);
        assert!(segment.payload.len() <= usize::from(MSS));
        let options = &segment.headers[packet.l4_offset as usize + 20..];
        assert!(!options.contains(&MULTIPATH), "a multipath option");
        let port = match to {
            To::Resolver => packet.dst_port,
            To::Pod => packet.src_port,
        };
        assert_eq!(port, 53);
        if segment.has(TCP_RST) {
            assert!(segment.payload.is_empty());
            self.has_reset = true;
            return;
        }
        assert!(!segment.has(URG));
        let reader = match to {
            To::Resolver => &mut self.resolver,
            To::Pod => &mut self.pod,
        };
        if segment.has(TCP_SYN) {
            assert!(segment.payload.is_empty());
            let first = segment.seq.wrapping_add(1);
            assert!(
                reader.first.is_none_or(|known| known == first),
                "the first byte moved"
            );
            reader.first = Some(first);
            return;
        }
        reader.take(segment.seq, segment.payload, segment.has(TCP_FIN));
    }

    fn interface(&self) -> IfIndex {
        IfIndex::NONE
    }

    fn select_interface(&mut self, _: IfIndex) {}
}

struct Scene {
    streams: Streams,
    budget: Budget,
    decisions: Decisions,
    line: Line,
    /// The streams of both ends if they follow the protocol.
    questions: Vec<u8>,
    answers: Vec<u8>,
    /// The queries that the resolver would read.
    allowed: Vec<u8>,
    /// The bytes of refusals that the pod would read.
    refused: usize,
    /// For each query: the position of its end in the resolver's stream, and the position up to which the
    /// responses answer it.
    answered: Vec<(usize, usize)>,
    /// Whether both ends have followed the protocol so far.
    is_honest: bool,
}

impl Scene {
    fn segment(&mut self, to: To, flags: u8, seq: u32, ack: u32, payload: &[u8]) {
        self.segment_with(&[], to, flags, seq, ack, payload);
    }

    /// Sends a segment with additional options.
    fn segment_with(
        &mut self,
        options: &[u8],
        to: To,
        flags: u8,
        seq: u32,
        ack: u32,
        payload: &[u8],
    ) {
        let frame = frame(options, to, flags, seq, ack, payload);
        let mut packet = Packet::EMPTY;
        if walk(&frame.as_slice(), &mut packet) != Walked::Ip {
            return;
        }
        if to == To::Resolver && flags & (TCP_SYN | TCP_ACK | TCP_RST) == TCP_SYN {
            let key = Key {
                pod_addr: packet.src,
                resolver: packet.dst,
                resolver_port: packet.dst_port,
                pod_port: packet.src_port,
            };
            let segment = Segment::read(&frame, &packet).expect("a whole segment");
            let known = self.streams.flows.peek(&key);
            if !known.is_some_and(|flow| flow.is_opened_by(&segment)) {
                self.line = Line::default();
                self.decisions = Decisions {
                    now_ns: self.decisions.now_ns,
                    ..Decisions::default()
                };
            }
        }
        let now_ns = self.decisions.now_ns;
        while self
            .streams
            .segment(
                &frame,
                &packet,
                to,
                &mut Step::new(&mut self.decisions, &mut self.line, now_ns),
                &mut self.budget,
            )
            .is_pending()
        {}
        self.check_invariants();
    }

    fn tick(&mut self, ns: u64) {
        self.decisions.now_ns += ns;
        let now_ns = self.decisions.now_ns;
        let mut step = Step::new(&mut self.decisions, &mut self.line, now_ns);
        self.streams.tick(&step, &mut self.budget);
        while self.streams.has_due() {
            self.streams.repeat_next(&mut step, &mut self.budget);
        }
        self.check_invariants();
    }

    /// Checks the invariants after a step.
    fn check_invariants(&self) {
        let asked = &self.line.resolver.bytes;
        assert!(
            self.decisions.asked.starts_with(asked),
            "the resolver reads what was not decided"
        );
        assert_eq!(
            self.messages_of_pod(),
            Ok(()),
            "the pod reads what was not decided"
        );
        let kept: usize = self
            .streams
            .flows
            .iter()
            .map(|(_, flow)| flow.allocated())
            .sum();
        assert_eq!(self.streams.kept.amount(), kept);
        assert!(kept <= KEPT && self.streams.flows.len() <= FLOWS);
    }

    /// Checks that the pod reads only deliverable responses and refusals, each kind in its order. Returns the
    /// first other message.
    fn messages_of_pod(&self) -> Result<(), Vec<u8>> {
        let Decisions {
            answers,
            refusals,
            begun,
            ..
        } = &self.decisions;
        let (mut answers, mut refusals) = (answers.iter().peekable(), refusals.iter().peekable());
        let mut rest = self.line.pod.bytes.as_slice();
        while let Some((len, behind)) = rest.split_first_chunk() {
            let len = usize::from(u16::from_be_bytes(*len));
            let Some((message, behind)) = behind.split_at_checked(len) else {
                // The next segments have more of a decided message.
                let is_next = |next: Option<&&Vec<u8>>| {
                    next.is_some_and(|next| next.len() == len && next.starts_with(behind))
                };
                let may_begin = behind.is_empty()
                    || is_next(answers.peek())
                    || is_next(refusals.peek())
                    || begun.starts_with(behind);
                return may_begin.then_some(()).ok_or_else(|| behind.to_vec());
            };
            let of = |next: &&Vec<u8>| next.as_slice() == message;
            if answers.next_if(of).is_none() && refusals.next_if(of).is_none() {
                return Err(message.to_vec());
            }
            rest = behind;
        }
        Ok(())
    }

    fn open(&mut self) {
        let (pod, resolver) = (POD_FIRST, RESOLVER_FIRST);
        let (asked, answered) = (pod.wrapping_add(1), resolver.wrapping_add(1));
        self.segment(To::Resolver, TCP_SYN, pod, 0, b"");
        self.segment(To::Pod, TCP_SYN | TCP_ACK, resolver, asked, b"");
        self.segment(To::Resolver, TCP_ACK, asked, answered, b"");
    }

    /// The length of the responses to the queries that have gone out.
    fn answerable(&self) -> usize {
        let asked = self.line.resolver.bytes.len();
        let known = self.answered.iter().rev();
        known
            .clone()
            .find(|(question, _)| *question <= asked)
            .map_or(0, |(_, answers)| *answers)
    }

    /// Runs a step of six bytes.
    fn follow(&mut self, [what, high, low, len, flags, ack]: [u8; 6]) {
        if what >> 5 == 7 {
            self.is_honest = false;
            return self.tick(u64::from(len) * 100_000_000);
        }
        let to = if what & 1 == 0 { To::Resolver } else { To::Pod };
        let (source, first, other) = match to {
            To::Resolver => (self.questions.as_slice(), POD_FIRST, RESOLVER_FIRST),
            To::Pod if what & 16 == 0 => (
                self.answers.get(..self.answerable()).unwrap_or_default(),
                RESOLVER_FIRST,
                POD_FIRST,
            ),
            To::Pod => {
                self.is_honest = false;
                (self.answers.as_slice(), RESOLVER_FIRST, POD_FIRST)
            }
        };
        let is_large = what & 2 != 0;
        let at = usize::from(u16::from_be_bytes([high, low])) << if is_large { 2 } else { 0 };
        let at = at % (source.len() + 1);
        let len = usize::from(len) << if is_large { 6 } else { 0 };
        let mut payload = source[at..(at + len).min(source.len())].to_vec();
        let mut seq = first.wrapping_add(1).wrapping_add(at as u32);
        if what & 4 != 0 {
            self.is_honest = false;
            if let Some(byte) = payload.last_mut() {
                *byte ^= 1;
            }
        }
        if what & 8 != 0 {
            // Before the first byte, or behind the last.
            self.is_honest = false;
            seq = seq.wrapping_add_signed(i32::from(ack.cast_signed()));
        }
        let mut has = TCP_ACK;
        if flags & 0x80 != 0 {
            self.is_honest = false;
            has ^= flags & (TCP_ACK | TCP_SYN | TCP_RST | TCP_FIN | URG);
        }
        let read = match to {
            To::Resolver => self.line.pod.bytes.len(),
            To::Pod => self.line.resolver.bytes.len(),
        };
        let acknowledged = other
            .wrapping_add(1)
            .wrapping_add(read as u32)
            .wrapping_add_signed(i32::from(ack.cast_signed()));
        let multipath = [MULTIPATH, 8, 0x20, 4, low, len as u8, flags, ack];
        let options = if flags & 0x40 == 0 {
            &[][..]
        } else {
            &multipath
        };
        self.segment_with(options, to, has, seq, acknowledged, &payload);
    }

    /// Checks that ends that follow the protocol get everything across, whatever was lost or repeated.
    fn check_delivery(&mut self) {
        let (questions, answers) = (self.questions.clone(), self.answers.clone());
        let read = answers.len() + self.refused;
        for _ in 0..ROUNDS {
            for (i, chunk) in questions.chunks(500).enumerate() {
                self.send(To::Resolver, i * 500, chunk);
            }
            let answerable = answers.get(..self.answerable()).unwrap_or_default();
            for (i, chunk) in answerable.chunks(500).enumerate() {
                self.send(To::Pod, i * 500, chunk);
            }
            if self.line.pod.bytes.len() == read {
                break;
            }
        }
        assert!(self.line.resolver.bytes == self.allowed, "queries are lost");
        assert_eq!(self.line.pod.bytes.len(), read, "responses are lost");
        assert_eq!(self.messages_of_pod(), Ok(()));
        assert_eq!((self.decisions.lost, self.line.has_reset), (0, false));
        assert_eq!(self.budget.common(), 0);
    }

    /// One end sends bytes at this position of its stream; then both acknowledge everything that they have
    /// read.
    fn send(&mut self, to: To, at: usize, bytes: &[u8]) {
        let place = |first: u32, at: usize| first.wrapping_add(1).wrapping_add(at as u32);
        let ends = [
            (To::Resolver, self.questions.len()),
            (To::Pod, self.answerable()),
        ];
        let own = (to, at, bytes);
        let empty: &[u8] = &[];
        for (to, at, bytes) in [own]
            .into_iter()
            .chain(ends.map(|(to, end)| (to, end, empty)))
        {
            let (first, other, read) = match to {
                To::Resolver => (POD_FIRST, RESOLVER_FIRST, self.line.pod.bytes.len()),
                To::Pod => (RESOLVER_FIRST, POD_FIRST, self.line.resolver.bytes.len()),
            };
            self.segment(to, TCP_ACK, place(first, at), place(other, read), bytes);
        }
    }
}

/// Follows a recipe: a byte with the number of queries, a byte for each query, and six bytes for each segment
/// or pause.
///
/// # Panics
///
/// When an end would read what was not decided, when the gate keeps more than it may, or when two ends that
/// follow the protocol do not get everything across.
pub(in super::super) fn follow(recipe: &[u8]) {
    let Some((&count, rest)) = recipe.split_first() else {
        return;
    };
    let Some((questions, rest)) = rest.split_at_checked(usize::from(count % 16)) else {
        return;
    };
    let mut scene = Scene {
        streams: Streams::new(),
        budget: Budget::new(LIMITS),
        decisions: Decisions {
            now_ns: 1,
            ..Decisions::default()
        },
        line: Line::default(),
        questions: Vec::new(),
        answers: Vec::new(),
        allowed: Vec::new(),
        refused: 0,
        answered: Vec::new(),
        is_honest: true,
    };
    for (id, &kind) in (0..).zip(questions) {
        let (question, reaction) = exchange(id, kind);
        scene.questions.extend(&question);
        match reaction {
            Reaction::Answer(answer) => {
                scene.allowed.extend(question);
                scene.answers.extend(answer);
            }
            Reaction::Refusal(refusal) => scene.refused += refusal.len(),
            Reaction::Reset => scene.is_honest = false,
        }
        let ends = (scene.allowed.len(), scene.answers.len());
        scene.answered.push(ends);
    }
    if count & 0x80 == 0 {
        scene.open();
    } else {
        scene.is_honest = false;
    }
    let (steps, _) = rest.as_chunks();
    for &step in steps.iter().take(STEPS) {
        scene.follow(step);
    }
    if scene.is_honest {
        scene.check_delivery();
    }
}
