//! The messages and frames that the two ends of a connection send, for the fuzz target `stream`.

use egress_common::packet::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};
use etherparse::PacketBuilder;

use super::{super::segment::URG, MSS, QUESTION_MAX, To};
use egress_dns::{Refusal, read_question, refuse};

/// The reaction to a query, as in a stream.
pub(super) enum Reaction {
    Answer(Vec<u8>),
    Refusal(Vec<u8>),
    /// The query is not readable.
    Reset,
}

/// A query as in a stream, and the reaction to it.
pub(super) fn exchange(id: u8, kind: u8) -> (Vec<u8>, Reaction) {
    let mut question = vec![0, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    let len = kind & 0x3f;
    // A name that begins with an n is refused.
    let letter = if kind >> 6 == 2 { b'n' } else { b'a' };
    question.push(len.max(1));
    question.resize(question.len() + usize::from(len.max(1)), letter);
    question.extend([0, 0, 16, 0, 1]);
    match (kind >> 6, len) {
        (2, _) => {
            let read = read_question(&question).expect("a question");
            let refusal = refuse(&read, Refusal::NxDomain);
            return (framed(&question), Reaction::Refusal(framed(&refusal)));
        }
        // No query; a query that is too long; only a prefix.
        (3, 0) => return (framed(b"no question"), Reaction::Reset),
        (3, 1) => return (framed(&vec![0; QUESTION_MAX + 1]), Reaction::Reset),
        (3, 2) => return (framed(b""), Reaction::Reset),
        _ => {}
    }
    let mut answer = question.clone();
    answer[2..8].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1]);
    // A TXT record of the queried name, whose length depends on the kind.
    let data = u16::from(len) << if kind >> 6 == 1 { 8 } else { 4 };
    answer.extend([0xc0, 12, 0, 16, 0, 1, 0, 0, 0, 60]);
    answer.extend(data.to_be_bytes());
    answer.resize(answer.len() + usize::from(data), kind);
    (framed(&question), Reaction::Answer(framed(&answer)))
}

pub(super) fn framed(message: &[u8]) -> Vec<u8> {
    let len = u16::try_from(message.len()).expect("a message has at most 65,535 bytes");
    [&len.to_be_bytes(), message].concat()
}

pub(super) fn frame(
    further: &[u8],
    to: To,
    flags: u8,
    seq: u32,
    ack: u32,
    payload: &[u8],
) -> Vec<u8> {
    let (pod, resolver) = (([10, 1, 0, 2], 4000), ([10, 99, 0, 53], 53));
    let ((src, from), (dst, port)) = match to {
        To::Resolver => (pod, resolver),
        To::Pod => (resolver, pod),
    };
    let mut step = PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv4(src, dst, 64)
        .tcp(from, port, seq, 500);
    let mut options = further.to_vec();
    if flags & TCP_SYN != 0 {
        let [high, low] = MSS.to_be_bytes();
        options.extend([2, 4, high, low]);
        step = step.syn();
    }
    step = step.options_raw(&options).expect("a few options");
    if flags & TCP_ACK != 0 {
        step = step.ack(ack);
    }
    if flags & TCP_FIN != 0 {
        step = step.fin();
    }
    if flags & TCP_RST != 0 {
        step = step.rst();
    }
    if flags & URG != 0 {
        step = step.urg(1);
    }
    let mut frame = Vec::new();
    step.write(&mut frame, payload).expect("a frame");
    frame
}
