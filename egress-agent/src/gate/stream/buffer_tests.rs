use proptest::prelude::*;

use super::*;

const LIMIT: usize = 128 << 10;

fn framed(message: &[u8]) -> Vec<u8> {
    let len = u16::try_from(message.len()).unwrap();
    [&len.to_be_bytes(), message].concat()
}

fn taken(buffer: &mut StreamBuffer) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    while let Some(message) = buffer.message() {
        messages.push(message.to_vec());
        buffer.take_message();
    }
    messages
}

/// The pieces: where each begins, and how long it is.
fn pieces() -> impl Strategy<Value = Vec<(prop::sample::Index, usize)>> {
    prop::collection::vec((any::<prop::sample::Index>(), 1usize..2000), 0..40)
}

proptest! {
    #[test]
    fn messages_are_read_in_order_however_they_are_segmented(
        first in any::<u32>(),
        messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 0..8),
        pieces in pieces(),
        acknowledged in any::<prop::sample::Index>(),
    ) {
        let stream: Vec<u8> = messages.iter().flat_map(|m| framed(m)).collect();
        let mut buffer = StreamBuffer::new(first, LIMIT);
        let mut out = Vec::new();
        let mut put_back = Vec::new();
        let mut send = |buffer: &mut StreamBuffer, from: usize, to: usize| {
            let seq = first.wrapping_add(from as u32);
            let position = buffer.position(seq);
            assert_eq!(position, i64::try_from(from).unwrap());
            buffer.insert(position, &stream[from..to]).unwrap();
            out.extend(taken(buffer));
            buffer.allowed = buffer.parsed();
            put_back.extend_from_slice(buffer.slice(buffer.sent, buffer.allowed));
            buffer.sent = buffer.allowed;
            let ack = acknowledged.index(buffer.sent as usize + 1);
            assert!(buffer.acknowledge(first.wrapping_add(ack as u32)));
        };
        // Any pieces, in any order and any number …
        for (at, len) in &pieces {
            if stream.is_empty() {
                break;
            }
            let from = at.index(stream.len());
            send(&mut buffer, from, (from + len).min(stream.len()));
        }
        // … and at the end all of them in order.
        for from in (0..stream.len()).step_by(1000) {
            send(&mut buffer, from, (from + 1000).min(stream.len()));
        }
        prop_assert_eq!(out, messages);
        prop_assert_eq!(put_back, stream);
        prop_assert!(buffer.ahead.is_empty() && buffer.ahead_bytes == 0);
    }

    #[test]
    fn a_changed_byte_is_refused(
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
        let mut buffer = StreamBuffer::new(first, LIMIT);
        // In two parts, the second of which may come first.
        let mut parts = [(0, &stream[..cut]), (i64::try_from(cut).unwrap(), &stream[cut..])];
        if backwards {
            parts.reverse();
        }
        for (position, part) in parts {
            prop_assert_eq!(buffer.insert(position, part), Ok(()));
        }
        prop_assert_eq!(buffer.insert(0, &other), Err(Refused::Differs));
        prop_assert_eq!(buffer.slice(0, stream.len() as u64), stream.as_slice());
    }

    #[test]
    fn a_buffer_never_exceeds_its_limit(
        seqs in prop::collection::vec((any::<u32>(), 0usize..5000), 0..200),
    ) {
        let mut buffer = StreamBuffer::new(7, 10_000);
        for (seq, len) in seqs {
            let position = buffer.position(seq % 20_000);
            let _ = buffer.insert(position, &vec![0x5a; len]);
            prop_assert!(buffer.kept() <= 10_000, "{}", buffer.kept());
            prop_assert!(buffer.ahead.len() <= PIECES);
        }
    }
}

#[test]
fn different_bytes_behind_a_gap_are_refused_when_the_gap_closes() {
    let mut buffer = StreamBuffer::new(0, LIMIT);
    buffer.insert(5, b"fgh").unwrap();
    buffer.insert(4, b"eXgh").unwrap();
    assert_eq!(buffer.insert(0, b"abcd"), Err(Refused::Differs));
}

#[test]
fn an_acknowledgment_of_unsent_bytes_is_refused() {
    let mut buffer = StreamBuffer::new(100, LIMIT);
    buffer.insert(0, b"\0\x01a\0\x01b").unwrap();
    buffer.allowed = 3;
    buffer.sent = 3;
    assert!(!buffer.acknowledge(104));
    assert!(buffer.acknowledge(103));
    assert!(buffer.acknowledge(90), "an old acknowledgment");
    assert_eq!(
        (buffer.acked, buffer.kept()),
        (3, 6),
        "the next message stays"
    );
    buffer.take_message();
    buffer.trim();
    assert_eq!(buffer.kept(), 3);
}

#[test]
fn the_end_of_a_stream_does_not_move() {
    let mut buffer = StreamBuffer::new(0, LIMIT);
    buffer.insert(0, b"\0\x02ab").unwrap();
    assert!(!buffer.end_at(3), "before the known bytes end");
    assert!(buffer.end_at(4));
    assert!(buffer.is_ended() && buffer.is_cut());
    assert_eq!(buffer.insert(4, b"more"), Err(Refused::Differs));
    buffer.take_message();
    assert!(!buffer.is_cut());
    assert_eq!(buffer.ack(), 5);
}

#[test]
fn out_of_order_data_is_dropped_for_data_in_order() {
    let mut buffer = StreamBuffer::new(0, 1000);
    buffer.insert(500, &[1; 450]).unwrap();
    buffer.insert(501, &[1; 450]).unwrap();
    buffer.insert(0, &[1; 500]).unwrap();
    assert_eq!((buffer.next(), buffer.kept()), (950, 950));
}

#[test]
fn an_acknowledged_byte_keeps_no_memory() {
    let mut buffer = StreamBuffer::new(0, LIMIT);
    for part in 0..60 {
        buffer.insert(part * 1000, &[0; 1000]).unwrap();
    }
    assert!(buffer.allocated() >= 60_000);
    while buffer.message().is_some() {
        buffer.take_message();
    }
    (buffer.allowed, buffer.sent) = (buffer.next(), buffer.next());
    assert!(buffer.acknowledge(59_999));
    assert_eq!(buffer.kept(), 1);
    assert!(buffer.bytes.capacity() < 8 << 10);
}
