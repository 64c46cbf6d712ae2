use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{
        RecordType,
        rdata::{
            A, AAAA, CNAME, HTTPS,
            svcb::{IpHint, SvcParamKey},
        },
    },
};
use proptest::prelude::*;

use super::*;
use crate::packets::{Packet, record, wire_name};

const ASKED: &[u8] = b"\xc0\x0c";

fn a(name: &[u8], ttl: u32, last: u8) -> Vec<u8> {
    record(name, TYPE_A, CLASS_IN, ttl, &[192, 0, 2, last])
}

fn cname(name: &[u8], ttl: u32, target: &[u8]) -> Vec<u8> {
    record(name, TYPE_CNAME, CLASS_IN, ttl, target)
}

fn v4(last: u8) -> Address {
    address::from_v4([192, 0, 2, last])
}

fn learned(packet: &Packet) -> Vec<(Address, u32)> {
    let answer = read_answer(&packet.bytes()).unwrap();
    answer
        .addresses
        .iter()
        .map(|learned| (learned.address, learned.ttl))
        .collect()
}

fn response() -> Packet {
    Packet::response("www.example.com", TYPE_A)
}

fn error(packet: &Packet) -> AnswerError {
    read_answer(&packet.bytes()).unwrap_err()
}

mod collects {
    use super::*;

    #[test]
    fn an_address_of_the_queried_name() {
        let packet = response().answer(&a(ASKED, 300, 1));
        let answer = read_answer(&packet.bytes()).unwrap();
        assert_eq!(answer.id, Packet::ID);
        assert_eq!(answer.name.to_string(), "www.example.com");
        assert_eq!(&*answer.name_as_sent, wire_name("www.example.com"));
        assert_eq!((answer.qtype, answer.qclass), (1, 1));
        assert_eq!((answer.truncated, answer.response_code), (false, 0));
        assert_eq!(
            answer.addresses,
            [Learned {
                address: v4(1),
                at: None,
                ttl: 300
            }]
        );
    }

    #[test]
    fn the_case_of_names_does_not_matter_but_is_kept() {
        let packet = Packet::response("wWw.eXample.com", TYPE_A).answer(&a(
            &wire_name("WWW.example.COM"),
            300,
            1,
        ));
        let answer = read_answer(&packet.bytes()).unwrap();
        assert_eq!(&*answer.name_as_sent, wire_name("wWw.eXample.com"));
        assert_eq!(answer.addresses.len(), 1);
    }

    #[test]
    fn an_ipv6_address_whatever_type_was_queried() {
        let address: Ipv6Addr = "2001:db8::7".parse().unwrap();
        let packet = response().answer(&record(ASKED, TYPE_AAAA, CLASS_IN, 60, &address.octets()));
        assert_eq!(learned(&packet), [(address.octets(), 60)]);
    }

    #[test]
    fn an_address_behind_one_alias_with_the_lowest_ttl() {
        let edge = wire_name("edge.example.net");
        let packet = response()
            .answer(&cname(ASKED, 30, &edge))
            .answer(&a(&edge, 300, 1));
        assert_eq!(learned(&packet), [(v4(1), 30)]);
    }

    #[test]
    fn an_address_behind_three_aliases_in_any_order() {
        let names = ["one.test", "two.test", "three.test"].map(wire_name);
        let records = [
            a(&names[2], 400, 9),
            cname(&names[1], 20, &names[2]),
            cname(ASKED, 300, &names[0]),
            cname(&names[0], 60, &names[1]),
        ];
        for turn in 0..records.len() {
            let mut packet = response();
            for i in 0..records.len() {
                packet = packet.answer(&records[(turn + i) % records.len()]);
            }
            assert_eq!(learned(&packet), [(v4(9), 20)], "turn {turn}");
        }
    }

    #[test]
    fn all_of_120_addresses() {
        let mut packet = response();
        for last in 0..120 {
            packet = packet.answer(&a(ASKED, 60, last));
        }
        let expected: Vec<_> = (0..120).map(|last| (v4(last), 60)).collect();
        assert_eq!(learned(&packet), expected);
    }

    #[test]
    fn ttls_unchanged_except_that_a_negative_one_is_zero() {
        for (sent, read) in [
            (0, 0),
            (65_535, 65_535),
            (0x7fff_ffff, 0x7fff_ffff),
            (0x8000_0001, 0),
            (u32::MAX, 0),
        ] {
            let packet = response().answer(&a(ASKED, sent, 1));
            assert_eq!(learned(&packet), [(v4(1), read)]);
        }
    }

    #[test]
    fn the_lowest_ttl_of_repeated_aliases() {
        let edge = wire_name("edge.test");
        let packet = response()
            .answer(&cname(ASKED, 300, &edge))
            .answer(&cname(ASKED, 5, &edge))
            .answer(&a(&edge, 60, 1));
        assert_eq!(learned(&packet), [(v4(1), 5)]);
    }

    #[test]
    fn the_addresses_of_both_branches_of_a_forked_alias() {
        let (left, right) = (wire_name("left.test"), wire_name("right.test"));
        let packet = response()
            .answer(&cname(ASKED, 60, &left))
            .answer(&cname(ASKED, 60, &right))
            .answer(&a(&left, 60, 1))
            .answer(&a(&right, 60, 2));
        assert_eq!(learned(&packet), [(v4(1), 60), (v4(2), 60)]);
    }

    #[test]
    fn the_hints_of_service_bindings() {
        let v6: Ipv6Addr = "2001:db8::8".parse().unwrap();
        let hints = [
            &[0, 1, 0][..],
            &[0, 4, 0, 4, 192, 0, 2, 8],
            &[0, 6, 0, 16],
            &v6.octets(),
        ];
        for record_type in [TYPE_SVCB, TYPE_HTTPS] {
            let packet =
                response().answer(&record(ASKED, record_type, CLASS_IN, 77, &hints.concat()));
            assert_eq!(learned(&packet), [(v4(8), 77), (v6.octets(), 77)]);
        }
    }

    #[test]
    fn the_addresses_behind_a_service_binding_in_alias_mode() {
        let pool = wire_name("pool.test");
        let packet = Packet::response("www.example.com", TYPE_HTTPS)
            .answer(&record(
                ASKED,
                TYPE_HTTPS,
                CLASS_IN,
                40,
                &[&[0, 0][..], &pool].concat(),
            ))
            .answer(&a(&pool, 60, 3));
        assert_eq!(learned(&packet), [(v4(3), 40)]);
    }

    #[test]
    fn the_synthesized_alias_beside_a_dname() {
        const DNAME: u16 = 39;
        let target = wire_name("www.example.net");
        let packet = response()
            .answer(&record(
                &wire_name("example.com"),
                DNAME,
                CLASS_IN,
                60,
                &wire_name("example.net"),
            ))
            .answer(&cname(ASKED, 60, &target))
            .answer(&a(&target, 60, 4));
        assert_eq!(learned(&packet), [(v4(4), 60)]);
    }

    #[test]
    fn the_records_before_the_cut_of_a_truncated_response() {
        let packet = response()
            .flags(0x8380)
            .answer(&a(ASKED, 60, 1))
            .answer(&a(ASKED, 60, 2));
        let bytes = packet.bytes();
        let answer = read_answer(&bytes[..bytes.len() - 3]).unwrap();
        assert!(answer.truncated);
        assert_eq!(
            answer.addresses,
            [Learned {
                address: v4(1),
                at: None,
                ttl: 60
            }]
        );
    }
}

mod ignores {
    use super::*;

    #[test]
    fn unrelated_names() {
        let packet = response()
            .answer(&a(&wire_name("example.com"), 60, 1))
            .answer(&a(&wire_name("www.example.com.evil.test"), 60, 2))
            .answer(&a(&wire_name("xwww.example.com"), 60, 3));
        assert_eq!(learned(&packet), []);
    }

    #[test]
    fn addresses_behind_a_broken_chain() {
        let (one, two, three) = (
            wire_name("one.test"),
            wire_name("two.test"),
            wire_name("three.test"),
        );
        let packet = response()
            .answer(&cname(ASKED, 60, &one))
            .answer(&cname(&two, 60, &three))
            .answer(&a(&three, 60, 1));
        assert_eq!(learned(&packet), []);
    }

    #[test]
    fn an_alias_that_points_at_the_asked_name() {
        let evil = wire_name("evil.test");
        let packet = response()
            .answer(&cname(&evil, 60, ASKED))
            .answer(&a(&evil, 60, 1));
        assert_eq!(learned(&packet), []);
    }

    #[test]
    fn a_label_with_a_dot_in_it() {
        let packet = response().answer(&a(b"\x0bwww.example\x03com\0", 60, 1));
        assert_eq!(learned(&packet), []);
    }

    #[test]
    fn the_other_sections() {
        let packet = response()
            .authority(&a(ASKED, 60, 1))
            .additional(&a(ASKED, 60, 2));
        assert_eq!(learned(&packet), []);
    }

    #[test]
    fn other_classes() {
        const CHAOS: u16 = 3;
        let packet = response().answer(&record(ASKED, TYPE_A, CHAOS, 60, &[192, 0, 2, 1]));
        assert_eq!(learned(&packet), []);
    }

    #[test]
    fn other_response_codes() {
        for code in 1..16 {
            let packet = response().flags(0x8180 | code).answer(&a(ASKED, 60, 1));
            let answer = read_answer(&packet.bytes()).unwrap();
            assert_eq!(u16::from(answer.response_code), code);
            assert_eq!(answer.addresses, []);
        }
    }

    #[test]
    fn the_data_of_types_without_addresses() {
        const TXT: u16 = 16;
        let packet = response()
            .answer(&record(ASKED, TXT, CLASS_IN, 60, b"\xffno"))
            .answer(&a(ASKED, 60, 1));
        assert_eq!(learned(&packet), [(v4(1), 60)]);
    }
}

mod hostile {
    use super::*;

    #[test]
    fn alias_loops_end() {
        let (one, two) = (wire_name("one.test"), wire_name("two.test"));
        let packet = response()
            .answer(&cname(ASKED, 60, &one))
            .answer(&cname(&one, 60, &two))
            .answer(&cname(&two, 60, ASKED))
            .answer(&cname(&two, 60, &two))
            .answer(&a(&two, 60, 1));
        assert_eq!(learned(&packet), [(v4(1), 60)]);
        assert_eq!(learned(&response().answer(&cname(ASKED, 60, ASKED))), []);
    }

    #[test]
    fn a_chain_is_followed_up_to_the_limit_and_no_further() {
        let chain = |links: usize| {
            let name = |i: usize| wire_name(&format!("n{i}.test"));
            let mut packet = response().answer(&cname(ASKED, 60, &name(1)));
            for i in 1..links {
                packet = packet.answer(&cname(&name(i), 60, &name(i + 1)));
            }
            packet.answer(&a(&name(links), 60, 1))
        };
        assert_eq!(learned(&chain(ALIASES_MAX)), [(v4(1), 60)]);
        assert!(matches!(
            error(&chain(ALIASES_MAX + 1)),
            AnswerError::Aliases
        ));
    }

    #[test]
    fn compression_loops_are_errors() {
        let at = u8::try_from(response().bytes().len()).unwrap();
        // A pointer to itself, to the next pointer, and past the end.
        for pointer in [[0xc0, at], [0xc0, at + 2], [0xff, 0xff]] {
            let packet = response().answer(&a(&pointer, 60, 1));
            assert!(
                matches!(error(&packet), AnswerError::Record { .. }),
                "{pointer:?}"
            );
        }
        // Two names that point to each other.
        let packet = response()
            .answer(&cname(ASKED, 60, &[1, b'x', 0xc0, at + 12]))
            .answer(&a(&[0xc0, at + 12], 60, 1));
        assert!(matches!(error(&packet), AnswerError::Record { .. }));
        // A name that grows with each pass through the loop.
        let packet = response().answer(&a(&[1, b'x', 0xc0, at], 60, 1));
        assert!(matches!(error(&packet), AnswerError::Record { .. }));
    }

    #[test]
    fn a_compressed_question_is_an_error() {
        let packet = Packet::query_of_wire(&[0xc0, 0x0c], TYPE_A).flags(0x8180);
        assert!(matches!(
            error(&packet),
            AnswerError::Name(PlainNameError::Compressed)
        ));
    }

    #[test]
    fn any_number_of_questions_but_one_is_an_error() {
        for count in [0, 2, 65_535] {
            let packet = response().questions(count);
            assert!(matches!(error(&packet), AnswerError::Questions(read) if read == count));
        }
    }

    #[test]
    fn more_announced_records_than_the_message_has_room_for_are_an_error() {
        let packet = response().answer(&a(ASKED, 60, 1)).answers(65_535);
        assert!(matches!(error(&packet), AnswerError::Counts(65_535)));
        // The length has room for it, but the second record is not there.
        let packet = response()
            .answer(&record(ASKED, 16, CLASS_IN, 60, &[0; 40]))
            .answers(2);
        assert!(matches!(error(&packet), AnswerError::TooShort));
        // A record beyond the announced count adds no address.
        let packet = response().answer(&a(ASKED, 60, 1)).answers(0);
        assert_eq!(read_answer(&packet.bytes()).unwrap().addresses, []);
    }

    #[test]
    fn data_of_the_wrong_length_is_an_error() {
        for data in [&[192, 0, 2][..], &[192, 0, 2, 1, 1], &[]] {
            let packet = response().answer(&record(ASKED, TYPE_A, CLASS_IN, 60, data));
            assert!(
                matches!(error(&packet), AnswerError::Record { .. }),
                "{data:?}"
            );
        }
        let packet = response().answer(&cname(ASKED, 60, b"\x03www"));
        assert!(matches!(error(&packet), AnswerError::Record { .. }));
        let packet = response().answer(&record(ASKED, TYPE_HTTPS, CLASS_IN, 60, &[0, 1, 0, 0, 4]));
        assert!(matches!(error(&packet), AnswerError::Record { .. }));
    }

    #[test]
    fn a_query_and_other_opcodes_are_errors() {
        assert!(matches!(
            error(&response().flags(0x0100)),
            AnswerError::Question
        ));
        assert!(matches!(
            error(&response().flags(0xa800)),
            AnswerError::Opcode(5)
        ));
    }

    #[test]
    fn a_cut_at_any_byte_is_an_error() {
        let edge = wire_name("edge.test");
        let bytes = response()
            .answer(&cname(ASKED, 60, &edge))
            .answer(&a(&edge, 60, 1))
            .additional(&record(b"\0", 41, 1232, 0, b""))
            .bytes();
        for len in 0..bytes.len() {
            assert!(read_answer(&bytes[..len]).is_err(), "cut at {len}");
        }
        assert!(read_answer(&bytes).is_ok());
    }

    #[test]
    fn bytes_after_the_last_record_are_accepted_up_to_the_longest_message() {
        let mut bytes = response().bytes();
        bytes.push(0);
        assert!(read_answer(&bytes).is_ok());
        bytes.resize(65_536, 0);
        assert!(matches!(read_answer(&bytes), Err(AnswerError::TooLong)));
    }

    #[test]
    fn the_longest_possible_name_is_read() {
        let label = "a".repeat(63);
        let name = format!("{label}.{label}.{label}.{}", "b".repeat(61));
        assert_eq!(wire_name(&name).len(), 255);
        let packet = Packet::response(&name, TYPE_A).answer(&a(ASKED, 60, 1));
        assert_eq!(learned(&packet), [(v4(1), 60)]);
    }
}

fn address_records() -> impl Strategy<Value = Vec<(bool, u32, u8)>> {
    prop::collection::vec((any::<bool>(), 0..0x8000_0000u32, any::<u8>()), 0..20)
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(message in prop::collection::vec(any::<u8>(), 0..600)) {
        _ = read_answer(&message);
    }

    #[test]
    fn arbitrary_records_never_panic(
        flags in prop_oneof![Just(0x8180), Just(0x8380)],
        answers in 0..8u16,
        rest in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let mut message = response().flags(flags).answers(answers).bytes();
        message.extend(rest);
        _ = read_answer(&message);
    }

    #[test]
    fn a_flipped_byte_never_panics(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let edge = wire_name("edge.test");
        let hints = [&[0, 1, 0][..], &[0, 4, 0, 4, 192, 0, 2, 8]].concat();
        let mut message = response()
            .answer(&cname(ASKED, 60, &edge))
            .answer(&record(&edge, TYPE_HTTPS, CLASS_IN, 60, &hints))
            .answer(&a(&edge, 60, 1))
            .bytes();
        let at = at.index(message.len());
        message[at] = byte;
        _ = read_answer(&message);
    }

    /// Reads back what hickory's encoder writes with its compression.
    #[test]
    fn an_encoded_message_is_read_back(records in address_records(), chain in 0..5usize, ttl in 0..1000u32) {
        let name = |i: usize| OwnerName::from_ascii(format!("n{i}.example.com.")).unwrap();
        let mut message = Message::new(7, MessageType::Response, OpCode::Query);
        message.add_query(Query::query(name(0), RecordType::A));
        for i in 0..chain {
            message.add_answer(Record::from_rdata(name(i), ttl, RData::CNAME(CNAME(name(i + 1)))));
        }
        let mut expected = Vec::new();
        let hint = SvcParamValue::Ipv4Hint(IpHint(vec![A::new(192, 0, 2, 200)]));
        let svcb = SVCB::new(1, OwnerName::root(), vec![(SvcParamKey::Ipv4Hint, hint)]);
        message.add_answer(Record::from_rdata(name(chain), 9, RData::HTTPS(HTTPS(svcb))));
        let lowest = |own: u32| if chain == 0 { own } else { own.min(ttl) };
        let at = chain.checked_sub(1);
        expected.push(Learned { address: v4(200), at, ttl: lowest(9) });
        for (six, own, last) in records {
            let (data, address) = if six {
                let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(last));
                (RData::AAAA(AAAA(v6)), v6.octets())
            } else {
                (RData::A(A::new(192, 0, 2, last)), v4(last))
            };
            message.add_answer(Record::from_rdata(name(chain), own, data));
            expected.push(Learned { address, at, ttl: lowest(own) });
        }
        let answer = read_answer(&message.to_vec().unwrap()).unwrap();
        prop_assert_eq!(answer.id, 7);
        let way: Vec<String> = answer.way_to(&expected[0]).map(ToString::to_string).collect();
        let names: Vec<String> = (0..=chain).rev().map(|i| format!("n{i}.example.com")).collect();
        prop_assert_eq!(way, names);
        prop_assert_eq!(answer.addresses, expected);
    }
}

#[test]
fn a_rejection_is_a_response_without_question_and_records() {
    let rejection = |flags: u16| {
        let message = Packet::query("a.test", 1).flags(flags).bytes();
        let mut header = message[..12].to_vec();
        header[5] = 0;
        header
    };
    let id = Some(Packet::ID);
    assert_eq!(read_rejection(&rejection(0x8181)), id, "FORMERR");
    assert_eq!(read_rejection(&rejection(0x8184)), id, "NOTIMP");
    assert_eq!(read_rejection(&rejection(0x8180)), None, "no error");
    assert_eq!(read_rejection(&rejection(0x0101)), None, "no response");
    for (section, name) in [(5, "question"), (7, "answer"), (9, "authority")] {
        let mut message = rejection(0x8181);
        message[section] = 1;
        assert_eq!(read_rejection(&message), None, "{name}");
    }
    assert_eq!(read_rejection(&rejection(0x8181)[..11]), None, "too short");
}
