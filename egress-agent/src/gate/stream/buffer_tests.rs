use proptest::prelude::*;

use super::*;

const LIMIT: usize = 128 << 10;

fn framed(message: &[u8]) -> Vec<u8> {
    let len = u16::try_from(message.len()).unwrap();
    [&len.to_be_bytes(), message].concat()
}

fn taken(half: &mut StreamBuffer) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    while let Some(message) = half.message() {
        messages.push(message.to_vec());
        half.take_message();
    }
    messages
}

/// What came with a segment: where it begins, how long it is, and how often it comes.
fn pieces() -> impl Strategy<Value = Vec<(prop::sample::Index, usize)>> {
    prop::collection::vec((any::<prop::sample::Index>(), 1usize..2000), 0..40)
}

proptest! {
    #[test]
    fn messages_come_out_as_they_went_in(
        first in any::<u32>(),
        messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 0..8),
        pieces in pieces(),
        acknowledged in any::<prop::sample::Index>(),
    ) {
        let stream: Vec<u8> = messages.iter().flat_map(|m| framed(m)).collect();
        let mut half = StreamBuffer::new(first, LIMIT);
        let mut out = Vec::new();
        let mut put_back = Vec::new();
        let mut send = |half: &mut StreamBuffer, from: usize, to: usize| {
            let seq = first.wrapping_add(from as u32);
            let position = half.position(seq);
            assert_eq!(position, i64::try_from(from).unwrap());
            half.insert(position, &stream[from..to]).unwrap();
            out.extend(taken(half));
            half.released = half.parsed();
            put_back.extend_from_slice(half.slice(half.sent, half.released));
            half.sent = half.released;
            let ack = acknowledged.index(half.sent as usize + 1);
            assert!(half.acknowledge(first.wrapping_add(ack as u32)));
        };
        // Whatever comes first, in whatever order and however often …
        for (at, len) in &pieces {
            if stream.is_empty() {
                break;
            }
            let from = at.index(stream.len());
            send(&mut half, from, (from + len).min(stream.len()));
        }
        // … all of it comes at last.
        for from in (0..stream.len()).step_by(1000) {
            send(&mut half, from, (from + 1000).min(stream.len()));
        }
        prop_assert_eq!(out, messages);
        prop_assert_eq!(put_back, stream);
        prop_assert!(half.ahead.is_empty() && half.ahead_bytes == 0);
    }

    #[test]
    fn a_byte_that_changes_is_noticed(
        first in any::<u32>(),
        stream in prop::collection::vec(any::<u8>(), 1..500),
        at in any::<prop::sample::Index>(),
        cut in any::<prop::sample::Index>(),
        backwards in any::<bool>(),
    ) {
        let at = at.index(stream.len());
        let cut = cut.index(stream.len());
        let mut other = stream.clone();
        other[at] ^= 1;
        let mut half = StreamBuffer::new(first, LIMIT);
        // In two parts, the second of which may come first.
        let mut parts = [(0, &stream[..cut]), (i64::try_from(cut).unwrap(), &stream[cut..])];
        if backwards {
            parts.reverse();
        }
        for (position, part) in parts {
            prop_assert_eq!(half.insert(position, part), Ok(()));
        }
        prop_assert_eq!(half.insert(0, &other), Err(Refused::Differs));
        prop_assert_eq!(half.slice(0, stream.len() as u64), stream.as_slice());
    }

    #[test]
    fn nothing_makes_it_keep_more_than_it_may(
        seqs in prop::collection::vec((any::<u32>(), 0usize..5000), 0..200),
    ) {
        let mut half = StreamBuffer::new(7, 10_000);
        for (seq, len) in seqs {
            let position = half.position(seq % 20_000);
            let _ = half.insert(position, &vec![0x5a; len]);
            prop_assert!(half.kept() <= 10_000, "{}", half.kept());
            prop_assert!(half.ahead.len() <= PIECES);
        }
    }
}

#[test]
fn what_differs_ahead_of_a_gap_is_noticed_when_the_gap_closes() {
    let mut half = StreamBuffer::new(0, LIMIT);
    half.insert(5, b"fgh").unwrap();
    half.insert(4, b"eXgh").unwrap();
    assert_eq!(half.insert(0, b"abcd"), Err(Refused::Differs));
}

#[test]
fn an_acknowledgment_of_what_was_not_put_back_is_refused() {
    let mut half = StreamBuffer::new(100, LIMIT);
    half.insert(0, b"\0\x01a\0\x01b").unwrap();
    half.released = 3;
    half.sent = 3;
    assert!(!half.acknowledge(104));
    assert!(half.acknowledge(103));
    assert!(half.acknowledge(90), "an old one");
    assert_eq!(
        (half.acked, half.kept()),
        (3, 6),
        "the message at hand stays"
    );
    half.take_message();
    half.trim();
    assert_eq!(half.kept(), 3);
}

#[test]
fn the_end_of_a_stream_is_where_it_was() {
    let mut half = StreamBuffer::new(0, LIMIT);
    half.insert(0, b"\0\x02ab").unwrap();
    assert!(!half.end_at(3), "before what is known");
    assert!(half.end_at(4));
    assert!(half.is_ended() && half.is_cut());
    assert_eq!(half.insert(4, b"more"), Err(Refused::Differs));
    half.take_message();
    assert!(!half.is_cut());
    assert_eq!(half.ack(), 5);
}

#[test]
fn what_came_ahead_gives_way_to_what_stands_before_it() {
    let mut half = StreamBuffer::new(0, 1000);
    half.insert(500, &[1; 450]).unwrap();
    half.insert(501, &[1; 450]).unwrap();
    half.insert(0, &[1; 500]).unwrap();
    assert_eq!((half.next(), half.kept()), (950, 950));
}
