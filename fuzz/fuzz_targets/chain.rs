//! Chains of every shape are followed to where a plain reading follows them.
//!
//! The input is not a message but how to make one: three bytes a record, so that every input is an
//! answer that can be read, and a change of a byte is another chain.
#![no_main]

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr},
};

use egress_dns::read_answer;
use egress_fuzz::reachable;
use hickory_proto::op::Message;
use libfuzzer_sys::fuzz_target;

/// How many names there are; fewer than the aliases that are followed.
const NAMES: u8 = 12;

fuzz_target!(|recipe: &[u8]| {
    let message = answer(recipe);
    let learned: BTreeSet<IpAddr> = read_answer(&message)
        .expect("a well-formed answer")
        .addresses
        .iter()
        .map(|learned| Ipv6Addr::from(learned.address).to_canonical())
        .collect();
    let theirs = Message::from_vec(&message).expect("a well-formed answer");
    let expected = reachable(theirs.queries[0].name(), &theirs.answers);
    assert_eq!(learned, expected, "{theirs:?}");
});

/// An answer to a question for the first name.
fn answer(recipe: &[u8]) -> Vec<u8> {
    let records: Vec<Vec<u8>> = recipe.chunks_exact(3).take(200).map(record).collect();
    let mut message = vec![0, 1, 0x81, 0x80, 0, 1, 0, records.len() as u8, 0, 0, 0, 0];
    message.extend(name(0));
    message.extend([0, 65, 0, 1]);
    message.extend(records.concat());
    message
}

/// A name, in upper or lower case.
fn name(choice: u8) -> Vec<u8> {
    let letter = if choice & 0x80 == 0 { b'a' } else { b'A' };
    vec![
        1,
        letter + (choice & 0x7f) % NAMES,
        4,
        b't',
        b'e',
        b's',
        b't',
        0,
    ]
}

/// A record of a name: which kind, and the target or address.
fn record(recipe: &[u8]) -> Vec<u8> {
    let &[owner, kind, what] = recipe else {
        return Vec::new();
    };
    let v4 = [203, 0, 113, what];
    let (record_type, data): (u8, Vec<u8>) = match kind % 7 {
        0 => (1, v4.to_vec()),
        1 => (28, [&[0x20, 1, 0xd, 0xb8][..], &[0; 11], &[what]].concat()),
        2 => (5, name(what)),
        // Alias mode: priority 0.
        3 => (
            64 + (kind & 0x80 != 0) as u8,
            [vec![0, 0], name(what)].concat(),
        ),
        // Service mode with a hint.
        4 => (65, [&[0, 1, 0, 0, 4, 0, 4][..], &v4].concat()),
        5 => (16, vec![1, what]),
        // An alias in the clothes of another type.
        _ => (39, name(what)),
    };
    let mut record = name(owner);
    record.extend([0, record_type, 0, 1, 0, 0, 1, 44, 0, data.len() as u8]);
    record.extend(data);
    record
}
