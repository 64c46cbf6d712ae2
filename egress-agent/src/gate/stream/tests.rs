use egress_common::{
    ids::IfIndex,
    packet::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, Walked, walk},
};
use proptest::prelude::*;

use super::{super::pending::Pending, *};
use egress_dns::{Question, read_question};

#[path = "split_tests.rs"]
mod split;

const ISN: u32 = u32::MAX - 40;
const ISS: u32 = u32::MAX - 10;
const MSS: usize = 300;

/// A frame that was put back: the receiving end, the flags, the sequence number, the acknowledgment, the
/// payload.
type Seen = (To, u8, u32, u32, Vec<u8>);

#[derive(Default)]
struct Line(Vec<Seen>);

impl Out for Line {
    fn put(&mut self, to: To, frame: &[u8]) {
        let mut packet = Packet::EMPTY;
        assert_eq!(walk(&frame, &mut packet), Walked::Ip);
        let segment = Segment::read(frame, &packet).unwrap();
        assert_eq!(segment.checksum, Checksum::Whole);
        let payload = segment.payload.to_vec();
        self.0
            .push((to, segment.flags, segment.seq, segment.ack, payload));
    }

    fn interface(&self) -> IfIndex {
        IfIndex::NONE
    }

    fn select_interface(&mut self, _: IfIndex) {}
}

/// Refuses names that begin with an `n`, and does not deliver responses that begin with an `n`.
#[derive(Default)]
struct Rules {
    lost: usize,
    answers: Vec<Vec<u8>>,
    /// How many more turns the next response needs.
    turns_left: usize,
    /// The bytes of all messages that may pass: queries, refusals and responses.
    passing: usize,
}

impl Decide for Rules {
    fn question(&mut self, message: &[u8], _: &Packet) -> Asked {
        match read_question(message) {
            Err(_) => Asked::Unreadable,
            Ok(question) if question.name_as_sent.get(1) == Some(&b'n') => {
                self.passing += framed(b"refused").len();
                Asked::Refused(b"refused".to_vec())
            }
            Ok(question) => {
                self.passing += framed(message).len();
                Asked::Allowed(question)
            }
        }
    }

    fn ask(&mut self, _: &Question, _: &Packet, _: &mut Pending) {}

    fn answer(&mut self, message: &[u8], _: &Packet, _: &mut Pending) -> Poll<Answered> {
        if self.turns_left > 0 {
            self.turns_left -= 1;
            return Poll::Pending;
        }
        self.answers.push(message.to_vec());
        if message.starts_with(b"n") {
            return Poll::Ready(Answered::Withheld);
        }
        self.passing += framed(message).len();
        Poll::Ready(Answered::Delivered)
    }

    fn may_begin(&mut self, message: &[u8], _: &Packet, _: &Pending) -> bool {
        !message.starts_with(b"n")
    }

    fn is_resolver(&self, _: &Packet) -> bool {
        true
    }

    fn lost(&mut self, _: &Packet, _: &'static str) {
        self.lost += 1;
    }
}

struct Scene {
    streams: Streams,
    budget: Budget,
    rules: Rules,
    line: Line,
    now_ns: u64,
    /// The turns that all segments took.
    turns: usize,
}

fn frame(to: To, flags: u8, seq: u32, ack: u32, payload: &[u8]) -> Vec<u8> {
    let (pod, resolver) = (([10, 1, 0, 2], 4000), ([10, 99, 0, 53], 53));
    let ((src, sport), (dst, dport)) = match to {
        To::Resolver => (pod, resolver),
        To::Pod => (resolver, pod),
    };
    let mut step = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv4(src, dst, 64)
        .tcp(sport, dport, seq, 500);
    if flags & TCP_ACK != 0 {
        step = step.ack(ack);
    }
    if flags & TCP_SYN != 0 {
        let mss = etherparse::TcpOptionElement::MaximumSegmentSize(MSS as u16);
        step = step.syn().options(&[mss]).unwrap();
    }
    if flags & TCP_FIN != 0 {
        step = step.fin();
    }
    if flags & TCP_RST != 0 {
        step = step.rst();
    }
    let mut frame = Vec::new();
    step.write(&mut frame, payload).unwrap();
    frame
}

impl Scene {
    /// With an open connection.
    fn new() -> Self {
        let mut scene = Self {
            streams: Streams::new(),
            budget: Budget::new(LIMITS),
            rules: Rules::default(),
            line: Line::default(),
            now_ns: 1,
            turns: 0,
        };
        let opening = [
            (To::Resolver, TCP_SYN, ISN, 0),
            (To::Pod, TCP_SYN | TCP_ACK, ISS, ISN.wrapping_add(1)),
            (
                To::Resolver,
                TCP_ACK,
                ISN.wrapping_add(1),
                ISS.wrapping_add(1),
            ),
        ];
        for (to, flags, seq, ack) in opening {
            let seen = scene.step(to, flags, seq, ack, b"");
            assert_eq!(seen, [(to, flags, seq, ack, Vec::new())]);
        }
        scene
    }

    fn step(&mut self, to: To, flags: u8, seq: u32, ack: u32, payload: &[u8]) -> Vec<Seen> {
        let frame = frame(to, flags, seq, ack, payload);
        let mut packet = Packet::EMPTY;
        assert_eq!(walk(&frame.as_slice(), &mut packet), Walked::Ip);
        let before = self.rules.passing;
        loop {
            self.turns += 1;
            let mut step = Step::new(&mut self.rules, &mut self.line, self.now_ns);
            let decided = self
                .streams
                .segment(&frame, &packet, to, &mut step, &mut self.budget);
            if decided.is_ready() {
                return std::mem::take(&mut self.line.0);
            }
            let seen = self.line.0.iter();
            let passed: usize = seen.map(|(_, _, _, _, bytes)| bytes.len()).sum();
            let decided = self.rules.passing - before;
            assert_eq!(
                passed, decided,
                "bytes of decided messages, and no others, pass"
            );
        }
    }

    /// The pod sends bytes at this position of its stream.
    fn asks(&mut self, at: usize, bytes: &[u8]) -> Vec<Seen> {
        let ack = ISS.wrapping_add(1);
        self.step(To::Resolver, TCP_ACK, place(ISN, at), ack, bytes)
    }

    /// The resolver sends bytes at this position of its stream, and acknowledges the pod's stream up to
    /// another.
    fn answers(&mut self, at: usize, bytes: &[u8], acknowledged: usize) -> Vec<Seen> {
        let ack = place(ISN, acknowledged);
        self.step(To::Pod, TCP_ACK, place(ISS, at), ack, bytes)
    }

    fn ticks(&mut self, seconds: u64) -> Vec<Seen> {
        self.now_ns += seconds * 1_000_000_000;
        let mut step = Step::new(&mut self.rules, &mut self.line, self.now_ns);
        self.streams.tick(&step, &mut self.budget);
        assert!(step.out.0.is_empty(), "a tick sends nothing itself");
        while self.streams.has_due() {
            self.streams.repeat_next(&mut step, &mut self.budget);
        }
        std::mem::take(&mut self.line.0)
    }

    fn is_reset(&self, seen: &[Seen]) {
        let to: Vec<To> = seen
            .iter()
            .filter(|(_, flags, ..)| flags & TCP_RST != 0)
            .map(|(to, ..)| *to)
            .collect();
        assert_eq!(to, [To::Resolver, To::Pod], "{seen:?}");
        assert!(seen.iter().all(|(.., payload)| payload.is_empty()));
        assert!(self.streams.flows.is_empty());
        assert_eq!(self.streams.kept.amount(), 0);
        assert_eq!(self.budget.common(), 0);
    }
}

fn place(first: u32, at: usize) -> u32 {
    first.wrapping_add(1).wrapping_add(at as u32)
}

fn asking(name: &str) -> Vec<u8> {
    let mut message = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    message.push(name.len() as u8);
    message.extend(name.as_bytes());
    message.extend([0, 0, 1, 0, 1]);
    framed(&message)
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes(), message].concat()
}

/// The bytes that were put back to one end, in the order of their sequence numbers.
fn stream(seen: &[Seen], towards: To, first: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (_, _, seq, _, payload) in seen.iter().filter(|(to, ..)| *to == towards) {
        let at = seq.wrapping_sub(first.wrapping_add(1)) as usize;
        if payload.is_empty() {
            continue;
        }
        assert!(at <= bytes.len(), "a gap");
        for (i, byte) in payload.iter().enumerate() {
            match bytes.get(at + i) {
                Some(known) => assert_eq!(known, byte, "put back differently"),
                None => bytes.push(*byte),
            }
        }
    }
    bytes
}

#[test]
fn a_response_that_takes_several_turns_passes_after_the_last() {
    let mut scene = Scene::new();
    let question = asking("ask");
    scene.asks(0, &question);
    scene.rules.turns_left = 3;
    let answer = framed(b"an answer");
    let seen = scene.answers(0, &answer, question.len());
    assert_eq!(seen.len(), 1);
    assert_eq!(stream(&seen, To::Pod, ISS), answer);
    assert_eq!(scene.rules.answers, [b"an answer"]);
    assert_eq!(scene.streams.kept.amount(), answer.len());
}

#[test]
fn many_messages_in_one_segment_take_several_turns() {
    let mut scene = Scene::new();
    let questions = asking("ask").repeat(100);
    let before = scene.turns;
    let seen = scene.asks(0, &questions);
    assert_eq!(stream(&seen, To::Resolver, ISN), questions);
    assert_eq!(scene.turns - before, 13, "eight queries in each");

    let answers = framed(b"an answer").repeat(100);
    let before = scene.turns;
    let seen = scene.answers(0, &answers, questions.len());
    assert_eq!(stream(&seen, To::Pod, ISS), answers);
    assert_eq!(scene.rules.answers.len(), 100);
    assert_eq!(scene.turns - before, 13, "eight responses in each");
}

#[test]
fn a_whole_query_and_a_whole_response_pass_unchanged() {
    let mut scene = Scene::new();
    let question = asking("ask");
    let seen = scene.asks(0, &question);
    assert_eq!(stream(&seen, To::Resolver, ISN), question);
    assert_eq!(seen.len(), 1);
    let answer = framed(b"an answer");
    let seen = scene.answers(0, &answer, question.len());
    assert_eq!(stream(&seen, To::Pod, ISS), answer);
    assert_eq!(scene.rules.answers, [b"an answer"]);
    let kept = scene.streams.kept.amount();
    assert_eq!(kept, answer.len(), "until the pod acknowledges it");
}

#[test]
fn a_held_segment_is_acknowledged_and_resent_until_the_resolver_acknowledges_it() {
    let mut scene = Scene::new();
    let question = asking("ask");
    let seen = scene.asks(0, &question[..9]);
    let acknowledged = place(ISN, 9);
    assert_eq!(
        seen,
        [(To::Pod, TCP_ACK, place(ISS, 0), acknowledged, Vec::new())]
    );
    let seen = scene.asks(9, &question[9..]);
    assert_eq!(stream(&seen, To::Resolver, ISN), question);
    let seen = scene.ticks(1);
    assert_eq!(stream(&seen, To::Resolver, ISN), &question[..9]);
    assert_eq!(scene.answers(0, b"", question.len()).len(), 1);
    assert!(scene.ticks(9).is_empty());
}

#[test]
fn a_repetition_passes_until_it_is_acknowledged() {
    let mut scene = Scene::new();
    let question = asking("ask");
    assert_eq!(scene.asks(0, &question), scene.asks(0, &question));
    scene.answers(0, b"", question.len());
    let seen = scene.asks(0, &question);
    let end = place(ISN, question.len());
    assert_eq!(seen, [(To::Pod, TCP_ACK, place(ISS, 0), end, Vec::new())]);
    // The other direction likewise: the pod's acknowledgment was lost.
    let answer = framed(b"an answer");
    assert_eq!(
        scene.answers(0, &answer, question.len()),
        scene.answers(0, &answer, question.len())
    );
}

#[test]
fn a_repetition_with_other_bytes_resets_both_ends() {
    let mut scene = Scene::new();
    scene.asks(0, &asking("ask"));
    let seen = scene.asks(0, &asking("nsk"));
    scene.is_reset(&seen);
    let mut scene = Scene::new();
    scene.answers(0, &framed(b"an answer"), 0);
    let seen = scene.answers(0, &framed(b"no answer"), 0);
    scene.is_reset(&seen);
    assert_eq!(scene.rules.lost, 1);
}

#[test]
fn a_response_that_may_not_be_delivered_resets_both_ends() {
    let mut scene = Scene::new();
    let seen = scene.answers(0, &framed(b"no answer"), 0);
    scene.is_reset(&seen);
}

#[test]
fn the_beginning_of_a_response_passes_if_the_response_may() {
    let mut scene = Scene::new();
    let answer = framed(b"an answer");
    assert_eq!(
        stream(&scene.answers(0, &answer[..1], 0), To::Pod, ISS),
        &answer[..1]
    );
    assert_eq!(scene.answers(1, &answer[1..6], 0).len(), 1);
    assert_eq!(scene.answers(6, &answer[6..], 0).len(), 1);
    let seen = scene.answers(answer.len(), &framed(b"no answer")[..5], 0);
    scene.is_reset(&seen);
}

#[test]
fn a_connection_that_both_ended_is_forgotten() {
    let mut scene = Scene::new();
    let (pod, resolver) = (place(ISN, 0), place(ISS, 0));
    let fin = TCP_FIN | TCP_ACK;
    assert_eq!(scene.step(To::Resolver, fin, pod, resolver, b"").len(), 1);
    let pod = pod.wrapping_add(1);
    assert_eq!(scene.step(To::Pod, fin, resolver, pod, b"").len(), 1);
    let resolver = resolver.wrapping_add(1);
    assert_eq!(
        scene.step(To::Resolver, TCP_ACK, pod, resolver, b"").len(),
        1
    );
    assert!(scene.streams.flows.is_empty());
}

#[test]
fn a_connection_that_needs_more_memory_than_there_is_is_reset() {
    let mut scene = Scene::new();
    let mut others = Kept::default();
    scene.budget.add(&mut others, LIMITS.own + LIMITS.common);
    scene.budget.add(&mut scene.streams.kept, LIMITS.own);
    let seen = scene.asks(0, &asking("ask")[..9]);
    let resets = seen.iter().filter(|(_, flags, ..)| flags & TCP_RST != 0);
    assert_eq!(resets.count(), 2);
    assert!(scene.streams.flows.is_empty());
    assert_eq!(
        (scene.rules.lost, scene.budget.common()),
        (1, LIMITS.common)
    );
}

#[test]
fn beyond_the_limit_the_least_recently_used_connection_is_reset() {
    let mut scene = Scene::new();
    for port in 0..FLOWS as u16 {
        let mut frame = Vec::new();
        etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 1, 0, 2], [10, 99, 0, 53], 64)
            .tcp(5000 + port, 53, 7, 500)
            .syn()
            .write(&mut frame, b"data that is left out")
            .unwrap();
        let mut packet = Packet::EMPTY;
        assert_eq!(walk(&frame.as_slice(), &mut packet), Walked::Ip);
        let mut step = Step::new(&mut scene.rules, &mut scene.line, 2);
        let budget = &mut scene.budget;
        let decided = scene
            .streams
            .segment(&frame, &packet, To::Resolver, &mut step, budget);
        assert!(decided.is_ready());
    }
    assert_eq!(scene.streams.flows.len(), FLOWS);
    assert_eq!(scene.rules.lost, 1);
    let resets = scene
        .line
        .0
        .iter()
        .filter(|(_, flags, ..)| flags & TCP_RST != 0);
    assert_eq!(resets.count(), 2);
    assert!(scene.line.0.iter().all(|(.., payload)| payload.is_empty()));
}

#[test]
fn only_options_that_do_not_change_the_stream_are_kept() {
    let known = [2, 4, 1, 44, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7];
    // Multipath TCP (30) and fast open (34) among them, and one that is cut.
    let mut all = vec![30, 4, 0, 1];
    all.extend(known);
    all.extend([34, 2, 1, 1, 1, 1, 30, 12]);
    let write = |options: &[u8]| {
        let mut frame = Vec::new();
        etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 1, 0, 2], [10, 99, 0, 53], 64)
            .tcp(5000, 53, 7, 500)
            .ack(9)
            .options_raw(options)
            .unwrap()
            .write(&mut frame, b"data")
            .unwrap();
        frame
    };
    let frame = write(&all);
    let mut packet = Packet::EMPTY;
    assert_eq!(walk(&frame.as_slice(), &mut packet), Walked::Ip);
    let segment = Segment::read(&frame, &packet).unwrap();
    let put = frames::with_known_options(&segment).unwrap();
    let expected = [&[1; 4][..], &known, &[1; 8]].concat();
    assert_eq!(put, write(&expected));
    let put = Segment::read(&put, &packet).unwrap();
    assert_eq!((put.checksum, put.mss), (Checksum::Whole, Some(300)));
    assert_eq!(frames::with_known_options(&put), None);
}

proptest! {
    #[test]
    fn the_bytes_put_back_are_the_bytes_sent(
        questions in prop::collection::vec("[a-m]{1,60}", 1..12),
        answers in prop::collection::vec(prop::collection::vec(b'a'..=b'm', 0..2000), 0..6),
        pieces in prop::collection::vec((any::<prop::sample::Index>(), 1usize..1500, any::<bool>()), 0..60),
    ) {
        let asked: Vec<u8> = questions.iter().flat_map(|name| asking(name)).collect();
        let answered: Vec<u8> = answers.iter().flat_map(|message| framed(message)).collect();
        let mut scene = Scene::new();
        let mut seen = Vec::new();
        for (at, len, from_pod) in pieces {
            let all = if from_pod { &asked } else { &answered };
            if all.is_empty() {
                continue;
            }
            let at = at.index(all.len());
            let part = &all[at..(at + len).min(all.len())];
            seen.extend(if from_pod { scene.asks(at, part) } else { scene.answers(at, part, 0) });
        }
        for at in (0..asked.len()).step_by(500) {
            seen.extend(scene.asks(at, &asked[at..(at + 500).min(asked.len())]));
        }
        for at in (0..answered.len()).step_by(500) {
            seen.extend(scene.answers(at, &answered[at..(at + 500).min(answered.len())], 0));
        }
        prop_assert_eq!(stream(&seen, To::Resolver, ISN), asked);
        prop_assert_eq!(stream(&seen, To::Pod, ISS), answered);
        prop_assert_eq!(&scene.rules.answers, &answers);
        prop_assert!(seen.iter().all(|(.., payload)| payload.len() <= MSS));
        prop_assert_eq!(scene.rules.lost, 0);
    }

    #[test]
    fn no_segment_makes_it_panic_or_lets_a_refused_name_out(
        segments in prop::collection::vec(
            (any::<bool>(), any::<u8>(), -50i32..200, -5i32..50, any::<prop::sample::Index>(), 0usize..90),
            0..60,
        ),
    ) {
        let refused = asking("never");
        let allowed = asking("ask");
        let mut scene = Scene::new();
        for (from_pod, flags, seq, ack, at, len) in segments {
            // The walk never reports these combinations of flags.
            let flags = if flags & TCP_SYN != 0 { flags & !(TCP_FIN | TCP_RST) } else { flags };
            let source = [allowed.as_slice(), &refused, &framed(b"an answer")].concat();
            let at = at.index(source.len());
            let part = &source[at..(at + len).min(source.len())];
            let (to, first, other) = if from_pod { (To::Resolver, ISN, ISS) } else { (To::Pod, ISS, ISN) };
            let (seq, ack) = (
                first.wrapping_add_signed(seq),
                other.wrapping_add_signed(ack),
            );
            for (to, _, _, _, payload) in scene.step(to, flags, seq, ack, part) {
                let leaked = payload.windows(5).any(|w| w == b"never");
                prop_assert!(to == To::Pod || !leaked);
            }
        }
    }
}

#[test]
fn connections_on_an_interface_that_the_pod_has_lost_are_forgotten() {
    // The scene's connection is on interface 0.
    let mut scene = Scene::new();
    scene.asks(0, &asking("no"));
    scene
        .streams
        .keep_on(&[IfIndex::new(7), IfIndex::NONE], &mut scene.budget);
    assert_eq!(scene.streams.flows.len(), 1);
    scene.streams.keep_on(&[IfIndex::new(7)], &mut scene.budget);
    assert!(scene.streams.flows.is_empty());
    assert_eq!(scene.streams.kept.amount(), 0);
    assert!(scene.ticks(60).is_empty(), "nothing is repeated there");
}
