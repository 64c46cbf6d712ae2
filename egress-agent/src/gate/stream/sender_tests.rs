use proptest::prelude::*;

use super::*;

const SIZE: usize = 300;
const WINDOW: usize = 1000;

/// Everything that may be sent now: the sequence number, the bytes, and whether the stream ends there.
fn parts(sender: &mut Sender, now_ns: u64) -> Vec<(u32, Vec<u8>, bool)> {
    let mut parts = Vec::new();
    while let Some(part) = sender.next(SIZE, now_ns) {
        parts.push((part.seq, part.payload.to_vec(), part.fin));
    }
    parts
}

#[test]
fn no_more_is_sent_than_the_receiver_takes() {
    let mut sender = Sender::new(100, vec![7; 2000], 0, 500);
    let sent = parts(&mut sender, 0);
    assert_eq!(
        sent,
        [(100, vec![7; 300], false), (400, vec![7; 200], false)]
    );
    assert!(sender.acknowledge(400, 500));
    assert_eq!(parts(&mut sender, 0), [(600, vec![7; 300], false)]);
    assert!(!sender.acknowledge(901, 500), "it was not sent");
    assert!(sender.acknowledge(300, 0), "an old one changes nothing");
    assert!(sender.acknowledge(900, 0));
    assert!(parts(&mut sender, 0).is_empty());
}

#[test]
fn a_closed_window_is_probed_as_long_as_the_receiver_answers() {
    let mut sender = Sender::new(100, vec![7; 10], 0, 0);
    assert!(parts(&mut sender, 0).is_empty());
    let mut now_ns = 0;
    for _ in 0..100 {
        now_ns += 100 * RESEND_NS;
        assert_eq!(sender.tick(now_ns), Due::Resend);
        assert!(parts(&mut sender, now_ns).is_empty());
        assert_eq!(sender.probe(), 99);
        assert!(sender.acknowledge(100, 0));
    }
    assert!(sender.acknowledge(100, 5));
    assert_eq!(parts(&mut sender, now_ns), [(100, vec![7; 5], false)]);
}

#[test]
fn a_sender_gives_up_a_receiver_that_does_not_answer() {
    let mut sender = Sender::new(100, vec![7; 10], 0, WINDOW);
    let mut now_ns = 0;
    assert_eq!(parts(&mut sender, now_ns).len(), 1);
    assert_eq!(sender.tick(RESEND_NS - 1), Due::Nothing);
    for _ in 0..RESENDS {
        now_ns += RESEND_NS << RESENDS;
        assert_eq!(sender.tick(now_ns), Due::Resend);
        assert_eq!(parts(&mut sender, now_ns).len(), 1);
    }
    assert_eq!(sender.tick(now_ns + (RESEND_NS << RESENDS)), Due::GiveUp);
}

#[test]
fn the_end_of_a_stream_is_sent_and_acknowledged() {
    let mut sender = Sender::new(u32::MAX, Vec::new(), 0, 0);
    sender.close();
    sender.push(b"too late");
    assert_eq!(parts(&mut sender, 0), [(u32::MAX, Vec::new(), true)]);
    assert!(parts(&mut sender, 0).is_empty());
    assert_eq!(sender.next_seq(), 0);
    assert!(sender.acknowledge(u32::MAX, 0));
    assert!(!sender.is_over());
    assert!(sender.acknowledge(0, 0));
    assert!(sender.is_over());
    assert_eq!((sender.next_seq(), sender.kept()), (0, 0));
    assert_eq!(sender.tick(u64::MAX), Due::Nothing);
}

proptest! {
    #[test]
    fn everything_arrives_over_a_lossy_line(
        first in any::<u32>(),
        pushes in prop::collection::vec(0usize..3000, 1..10),
        // Few enough that the sender does not give up even if they are consecutive.
        losses in prop::collection::btree_set(0usize..60, 0..RESENDS as usize),
        windows in prop::collection::vec(0usize..2000, 0..60),
    ) {
        let bytes: Vec<u8> = (0..pushes.iter().sum()).map(|n: usize| n as u8).collect();
        let mut sender = Sender::new(first, Vec::new(), 0, WINDOW);
        let (mut got, mut ended, mut pushed) = (Vec::new(), false, 0);
        let (mut pushes, mut windows) = (pushes.into_iter(), windows.into_iter());
        let (mut now_ns, mut count) = (0, 0);
        for _ in 0..1000 {
            match pushes.next() {
                Some(count) => {
                    sender.push(&bytes[pushed..pushed + count]);
                    pushed += count;
                }
                None => sender.close(),
            }
            for (seq, payload, fin) in parts(&mut sender, now_ns) {
                let at = seq.wrapping_sub(first) as usize;
                count += 1;
                if losses.contains(&count) || at > got.len() {
                    continue;
                }
                if let Some(new) = payload.get(got.len() - at..) {
                    got.extend_from_slice(new);
                    ended |= fin;
                }
            }
            let ack = first.wrapping_add(got.len() as u32 + u32::from(ended));
            prop_assert!(sender.acknowledge(ack, windows.next().unwrap_or(WINDOW)));
            now_ns += RESEND_NS;
            prop_assert_ne!(sender.tick(now_ns), Due::GiveUp);
        }
        prop_assert_eq!(got, bytes);
        prop_assert!(ended && sender.is_over());
    }
}

#[test]
fn an_acknowledged_byte_keeps_no_memory() {
    let mut sender = Sender::new(100, vec![7; 60_000], 60_000, WINDOW);
    assert!(sender.acknowledge(100 + 59_999, 0));
    assert_eq!(sender.kept(), 1);
    assert!(sender.bytes.capacity() < 8 << 10);
}
