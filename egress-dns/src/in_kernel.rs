//! Compares how the programs read a message with how the agent does, for tests: the programs may decline a message that the
//! agent would accept, and otherwise find the same.

use egress_common::{
    dns::{Direct, Message, message, query, response},
    records::DecisionKey,
};

use crate::{read_answer, read_question};

/// Compares the readings of a query. Returns whether the programs accept it.
///
/// # Panics
///
/// When they accept it and the agent does not, or the agent finds another name.
pub fn compare_query(bytes: &[u8]) -> bool {
    let mut message = Message::EMPTY;
    if !message.load(bytes) || query::read::<Direct>(&mut message) == 0 {
        return false;
    }
    let question = read_question(bytes).expect("the agent accepts what the programs accept");
    let key = DecisionKey::of_wire(question.name.as_wire());
    assert_eq!(Some(message.name), key, "the name");
    true
}

/// Compares the readings of a response to the query that it repeats. Returns how many addresses the programs find in it;
/// `None` when they decline it.
///
/// # Panics
///
/// When they accept it and the agent does not, or the agent finds other addresses or lifetimes.
pub fn compare_response(bytes: &[u8]) -> Option<usize> {
    let mut asked = Message::EMPTY;
    let mut query = bytes.to_vec();
    query
        .get_mut(2..12)?
        .copy_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    if !asked.load(&query) {
        return None;
    }
    let end = message::walk_name(&mut asked, message::QUESTION);
    if end == 0 {
        return None;
    }
    query.truncate((end - message::START) as usize + 4);
    if !asked.load(&query) || query::read::<Direct>(&mut asked) == 0 {
        return None;
    }
    let mut message = Message::EMPTY;
    if !message.load(bytes)
        || response::answers(&mut message, &asked.query) == 0
        || response::read::<Direct>(&mut message) == 0
    {
        return None;
    }
    let answer = read_answer(bytes).expect("the agent accepts what the programs accept");
    assert!(!answer.truncated, "a truncated response");
    let found: Vec<_> = message.found().collect();
    let expected: Vec<_> = answer
        .addresses
        .iter()
        .map(|learned| (learned.address, learned.ttl))
        .collect();
    if answer.aliases.len() == message.aliases as usize {
        assert_eq!(found, expected);
    } else {
        // In a circle of aliases, the TTLs of all of them count for the programs.
        for ((address, ttl), (other, most)) in found.iter().zip(&expected) {
            assert!(address == other && ttl <= most, "{found:?} {expected:?}");
        }
        assert_eq!(found.len(), expected.len());
    }
    let by_alias = answer.addresses.iter().any(|learned| learned.at.is_some());
    assert!(!by_alias || message.aliases > 0, "an alias was not seen");
    Some(found.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packets::{Packet, record, wire_name};

    const NAMES: [&str; 4] = [
        "shop.example.test",
        "cdn.test",
        "example.test",
        "Shop.Example.TEST",
    ];

    /// Where a name of the message begins, or the name itself, or a label and a pointer.
    fn owner() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            4 => Just(vec![0xc0, 12]),
            2 => (0..100_u8).prop_map(|at| vec![0xc0, at]),
            2 => prop::sample::select(&NAMES[..]).prop_map(wire_name),
            1 => (0..100_u8).prop_map(|at| vec![3, b'c', b'd', b'n', 0xc0, at]),
        ]
    }

    fn a_record() -> impl Strategy<Value = Vec<u8>> {
        let data = prop_oneof![
            3 => any::<[u8; 4]>().prop_map(|data| (1, data.to_vec())),
            1 => any::<[u8; 16]>().prop_map(|data| (28, data.to_vec())),
            3 => owner().prop_map(|data| (5, data)),
            1 => (any::<u16>(), prop::collection::vec(any::<u8>(), 0..6)),
        ];
        let ttl = prop_oneof![Just(0), Just(300), Just(u32::MAX), any::<u32>()];
        let class = prop_oneof![9 => Just(1_u16), 1 => any::<u16>()];
        (owner(), data, ttl, class)
            .prop_map(|(owner, (kind, data), ttl, class)| record(&owner, kind, class, ttl, &data))
    }

    /// A chain of aliases as a resolver writes it, each name where its alias is.
    fn a_chain() -> impl Strategy<Value = Vec<u8>> {
        (0..6_usize, 1..5_usize, any::<bool>()).prop_map(|(aliases, addresses, plain)| {
            let name = "shop.example.test";
            let mut packet = Packet::response(name, 1);
            let mut len = packet.bytes().len();
            let mut owner = vec![0xc0, 12];
            for n in 0..aliases {
                let target = if plain {
                    wire_name(&format!("c{n}.cdn.test"))
                } else {
                    vec![2, b'c', b'0' + n as u8, 0xc0, 17]
                };
                let alias = record(&owner, 5, 1, 100 + n as u32, &target);
                len += owner.len() + 10;
                owner = if plain {
                    target.clone()
                } else {
                    vec![0xc0, len as u8]
                };
                len += target.len();
                packet = packet.answer(&alias);
            }
            for n in 0..addresses {
                packet = packet.answer(&record(&owner, 1, 1, 90 + n as u32, &[192, 0, 2, n as u8]));
            }
            packet.bytes()
        })
    }

    fn responses() -> impl Strategy<Value = Vec<u8>> {
        let records = || prop::collection::vec(a_record(), 0..5);
        let flags = prop_oneof![8 => Just(0x8180_u16), 1 => Just(0x8183), 1 => any::<u16>()];
        let of_records = (flags, records(), records()).prop_map(|(flags, answers, more)| {
            let packet = Packet::response("shop.example.test", 1).flags(flags);
            let packet = answers
                .iter()
                .fold(packet, |packet, record| packet.answer(record));
            more.iter()
                .fold(packet, |packet, record| packet.authority(record))
                .bytes()
        });
        prop_oneof![of_records, a_chain()]
    }

    #[test]
    fn the_programs_read_chains_as_resolvers_write_them() {
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let accepted = runner.run(&a_chain(), |bytes| {
            prop_assert!(compare_response(&bytes).is_some_and(|found| found > 0));
            Ok(())
        });
        accepted.expect("each chain is read");
    }

    proptest! {
        #![proptest_config(ProptestConfig::default())]

        #[test]
        fn the_programs_find_what_the_agent_finds(
            bytes in responses(),
            changes in prop::collection::vec((0..200_usize, any::<u8>()), 0..3),
            cut in prop::option::of(0..200_usize),
        ) {
            let mut bytes = bytes;
            for (at, byte) in changes {
                if let Some(place) = bytes.get_mut(at) {
                    *place = byte;
                }
            }
            bytes.truncate(cut.unwrap_or(bytes.len()));
            compare_response(&bytes);
            compare_query(&bytes);
        }

        #[test]
        fn the_programs_accept_no_query_that_the_agent_does_not(
            name in prop::sample::select(&NAMES[..]),
            options in prop::collection::vec(any::<u8>(), 0..20),
            has_opt in any::<bool>(),
            changes in prop::collection::vec((0..80_usize, any::<u8>()), 0..3),
        ) {
            let mut packet = Packet::query(name, 1);
            if has_opt {
                packet = packet.additional(&record(&[0], 41, 1232, 0, &options));
            }
            let mut bytes = packet.bytes();
            for (at, byte) in changes {
                if let Some(place) = bytes.get_mut(at) {
                    *place = byte;
                }
            }
            compare_query(&bytes);
        }
    }
}
