use super::{
    Direct, Message,
    message::{MESSAGE_MAX, START, bytes_before},
    query::{self, lower_case},
    response,
};
use crate::records::DecisionKey;

/// A message with these bytes in front of what another message left.
fn message(bytes: &[u8]) -> Box<Message> {
    let mut message = Box::new(Message::EMPTY);
    message.load(&[0xaa; MESSAGE_MAX as usize]);
    assert!(message.load(bytes));
    message
}

fn header(flags: u16, counts: [u16; 4]) -> Vec<u8> {
    let mut bytes = vec![0x12, 0x34];
    bytes.extend(flags.to_be_bytes());
    bytes.extend(counts.iter().flat_map(|count| count.to_be_bytes()));
    bytes
}

fn wire(name: &str) -> Vec<u8> {
    let mut wire = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        wire.push(label.len() as u8);
        wire.extend(label.as_bytes());
    }
    wire.push(0);
    wire
}

fn question(name: &str, record_type: u16) -> Vec<u8> {
    let mut bytes = wire(name);
    bytes.extend(record_type.to_be_bytes());
    bytes.extend(1_u16.to_be_bytes());
    bytes
}

fn query(name: &str) -> Vec<u8> {
    [header(0x0100, [1, 0, 0, 0]), question(name, 1)].concat()
}

fn record(owner: &[u8], record_type: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = owner.to_vec();
    bytes.extend(record_type.to_be_bytes());
    bytes.extend(1_u16.to_be_bytes());
    bytes.extend(ttl.to_be_bytes());
    bytes.extend((data.len() as u16).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The queried name, by a pointer.
const ASKED: &[u8] = &[0xc0, 12];

/// Reads a response to a query for `name`; `None` when it is declined.
fn answered(name: &str, flags: u16, records: &[Vec<u8>]) -> Option<Box<Message>> {
    let mut asked = message(&query(name));
    assert_eq!(query::read::<Direct>(&mut asked), 1);
    let bytes = [
        header(flags, [1, records.len() as u16, 0, 0]),
        question(name, 1),
        records.concat(),
    ]
    .concat();
    let mut answer = message(&bytes);
    if response::answers(&mut answer, &asked.query) == 0 {
        return None;
    }
    (response::read::<Direct>(&mut answer) == 1).then_some(answer)
}

/// The last byte of each address that was found, and its TTL.
fn found(message: &Message) -> Vec<(u8, u32)> {
    message
        .found()
        .map(|(address, ttl)| (address[15], ttl))
        .collect()
}

#[test]
fn the_name_of_a_query_is_found_in_lower_case() {
    for name in ["a.b", "github.com", "Api.GitHub.COM", "", "a[z`.Z@{"] {
        let mut read = message(&query(name));
        assert_eq!(query::read::<Direct>(&mut read), 1, "{name}");
        let lower = wire(&name.to_ascii_lowercase());
        let expected = DecisionKey::of_wire(&lower[..lower.len() - 1]).unwrap();
        assert_eq!(read.name, expected, "{name}");
        assert_eq!(read.query.len as usize, question(name, 1).len());
    }
}

#[test]
fn letters_of_every_byte_become_lower_case() {
    for byte in 0..=255_u8 {
        let word = u64::from_le_bytes([byte; 8]);
        let expected = u64::from_le_bytes([byte.to_ascii_lowercase(); 8]);
        assert_eq!(lower_case(word), expected, "{byte}");
    }
}

#[test]
fn only_plain_queries_are_read() {
    let plain = query("a.test");
    let opt = |options: &[u8]| {
        let mut bytes = vec![0, 0, 41, 4, 0xd0, 0, 0, 0, 0];
        bytes.extend((options.len() as u16).to_be_bytes());
        bytes.extend(options);
        bytes
    };
    let with = |counts, more: &[u8]| {
        [header(0x0100, counts), question("a.test", 1), more.to_vec()].concat()
    };
    let reads = |bytes: &[u8]| query::read::<Direct>(&mut message(bytes));
    assert_eq!(reads(&plain), 1);
    assert_eq!(reads(&with([1, 0, 0, 1], &opt(&[]))), 1);
    assert_eq!(reads(&with([1, 0, 0, 1], &opt(&[0, 10, 0, 2, 1, 2]))), 1);
    for (what, bytes) in [
        (
            "a response",
            [header(0x8100, [1, 0, 0, 0]), question("a.test", 1)].concat(),
        ),
        (
            "another opcode",
            [header(0x0900, [1, 0, 0, 0]), question("a.test", 1)].concat(),
        ),
        ("no question", with([0, 0, 0, 0], &[])),
        ("two questions", with([2, 0, 0, 0], &question("b.test", 1))),
        ("an answer", with([1, 1, 0, 0], &[])),
        ("an authority", with([1, 0, 1, 0], &[])),
        (
            "two additional records",
            with([1, 0, 0, 2], &[opt(&[]), opt(&[])].concat()),
        ),
        ("a byte behind the question", with([1, 0, 0, 0], &[0])),
        (
            "a byte behind OPT",
            with([1, 0, 0, 1], &[opt(&[]), vec![0]].concat()),
        ),
        (
            "an option beyond OPT",
            with([1, 0, 0, 1], &opt(&[0, 10, 0, 3, 1, 2])),
        ),
        ("half an option", with([1, 0, 0, 1], &opt(&[0, 10, 0]))),
        ("TSIG", with([1, 0, 0, 1], &record(&[0], 250, 0, &[]))),
        ("a missing OPT", with([1, 0, 0, 1], &[])),
        (
            "a pointer",
            [header(0x0100, [1, 0, 0, 0]), vec![0xc0, 12, 0, 1, 0, 1]].concat(),
        ),
        (
            "a long label",
            [
                header(0x0100, [1, 0, 0, 0]),
                vec![64; 65],
                vec![0, 0, 1, 0, 1],
            ]
            .concat(),
        ),
        ("a cut question", plain[..plain.len() - 1].to_vec()),
        ("a cut name", plain[..15].to_vec()),
    ] {
        assert_eq!(reads(&bytes), 0, "{what}");
    }
}

#[test]
fn the_longest_name_is_read_and_a_longer_one_is_not() {
    let longest = [
        ["a"; 63].concat(),
        ["b"; 63].concat(),
        ["c"; 63].concat(),
        ["d"; 61].concat(),
    ]
    .join(".");
    assert_eq!(query::read::<Direct>(&mut message(&query(&longest))), 1);
    let longer = format!("{longest}d");
    assert_eq!(query::read::<Direct>(&mut message(&query(&longer))), 0);
    let deepest = ["x"; 127].join(".");
    assert_eq!(query::read::<Direct>(&mut message(&query(&deepest))), 1);
}

#[test]
fn addresses_of_the_name_are_found() {
    let a = |last| record(ASKED, 1, 300, &[203, 0, 113, last]);
    let answer = answered("shop.test", 0x8180, &[a(1), a(2)]).unwrap();
    assert_eq!(found(&answer), [(1, 300), (2, 300)]);
    let full = record(
        &wire("SHOP.test"),
        28,
        60,
        &[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7],
    );
    assert_eq!(
        found(&answered("shop.test", 0x8180, &[full]).unwrap()),
        [(7, 60)]
    );
}

#[test]
fn aliases_are_followed_in_every_style_of_compression() {
    let name = "shop.test";
    let a = |owner: &[u8]| record(owner, 1, 300, &[203, 0, 113, 9]);
    // Uncompressed, as CoreDNS writes them.
    let plain = [
        record(&wire(name), 5, 20, &wire("cdn.test")),
        a(&wire("cdn.test")),
    ];
    assert_eq!(found(&answered(name, 0x8180, &plain).unwrap()), [(9, 20)]);
    // The target's data is at 12 + 15 + 12 = 39: a label, and a pointer to `test`.
    let target = [&[3, b'c', b'd', b'n'][..], &[0xc0, 17]].concat();
    let compressed = [record(ASKED, 5, 20, &target), a(&[0xc0, 39])];
    assert_eq!(
        found(&answered(name, 0x8180, &compressed).unwrap()),
        [(9, 20)]
    );
    let label_again = [record(ASKED, 5, 20, &target), a(&target)];
    assert_eq!(
        found(&answered(name, 0x8180, &label_again).unwrap()),
        [(9, 20)]
    );
}

#[test]
fn what_is_not_plain_is_declined() {
    let name = "shop.test";
    let a = record(ASKED, 1, 300, &[203, 0, 113, 9]);
    let declined: &[(&str, u16, Vec<Vec<u8>>)] = &[
        ("a query", 0x0180, vec![a.clone()]),
        ("truncated", 0x8380, vec![a.clone()]),
        (
            "another's address",
            0x8180,
            vec![record(&wire("x.test"), 1, 1, &[1, 2, 3, 4])],
        ),
        ("a hint", 0x8180, vec![record(ASKED, 65, 1, &[0, 1, 0])]),
        (
            "a short address",
            0x8180,
            vec![record(ASKED, 1, 1, &[1, 2, 3])],
        ),
        (
            "a pointer to itself",
            0x8180,
            vec![record(&[0xc0, 27], 1, 1, &[1, 2, 3, 4])],
        ),
        (
            "a pointer forward",
            0x8180,
            vec![record(&[0xc0, 60], 1, 1, &[1, 2, 3, 4])],
        ),
        (
            "a name that goes on behind its pointer",
            0x8180,
            // The pointer leads to the last byte of the TTL, a label of 44 bytes.
            vec![
                record(ASKED, 5, 44, &[0xc0, 36]),
                record(&[0xc0, 36], 1, 1, &[1, 2, 3, 4]),
                vec![0; 40],
            ],
        ),
        (
            "an alias with a byte too many",
            0x8180,
            vec![record(ASKED, 5, 1, &[wire("b.test"), vec![0]].concat())],
        ),
        (
            "an alias after its address",
            0x8180,
            vec![
                record(&wire("b.test"), 1, 1, &[1, 2, 3, 4]),
                record(ASKED, 5, 1, &wire("b.test")),
            ],
        ),
        ("too many", 0x8180, vec![a; 33]),
    ];
    for (what, flags, records) in declined {
        assert!(answered(name, *flags, records).is_none(), "{what}");
    }
}

#[test]
fn a_response_to_another_question_is_declined() {
    let mut asked = message(&query("shop.test"));
    assert_eq!(query::read::<Direct>(&mut asked), 1);
    for other in ["Shop.test", "shop.tess", "shop.test.x", "hop.test"] {
        let bytes = [header(0x8180, [1, 0, 0, 0]), question(other, 1)].concat();
        assert_eq!(
            response::answers(&mut message(&bytes), &asked.query),
            0,
            "{other}"
        );
    }
    let of_type = [header(0x8180, [1, 0, 0, 0]), question("shop.test", 28)].concat();
    assert_eq!(response::answers(&mut message(&of_type), &asked.query), 0);
}

#[test]
fn an_error_adds_no_addresses() {
    let a = record(ASKED, 1, 300, &[203, 0, 113, 9]);
    let answer = answered("shop.test", 0x8183, &[a]).unwrap();
    assert_eq!(found(&answer), []);
}

#[test]
fn the_message_begins_where_its_name_begins_with_a_word() {
    assert_eq!((START + 12) % 8, 0);
}

#[test]
fn the_bytes_before_an_offset_are_those_of_a_plain_count() {
    for end in 0..40 {
        for at in [0, 8, 16, 24, 32] {
            let expected = (0..8).fold(0, |mask, byte| {
                let is_before = at + byte < end;
                mask | (u64::from(is_before) * 0xff) << (byte * 8)
            });
            assert_eq!(bytes_before(end, at), expected, "{end} {at}");
        }
    }
}
