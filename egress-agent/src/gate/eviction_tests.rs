//! Evictions whose choice takes several turns.

use std::task::Poll;

use egress_common::address::from_v4;
use proptest::prelude::*;

use super::*;
use crate::gate::{
    addresses::Place,
    eviction::{AT_ONCE, Room},
    insertion::Insertion,
    pending::tests::{A, EXCHANGE, answer},
    pod::learning::id_of,
};

/// Takes several turns to look at.
const CAPACITY: usize = 2048;
const NOW: u64 = 100 * SECOND;
const LATE: u64 = 1000;
const LATER: u64 = 2000;

fn numbered(number: usize, expires_s: u64) -> AnswerAddress {
    let [high, low] = (number as u16).to_be_bytes();
    AnswerAddress {
        address: from_v4([10, 0, high, low]),
        by_stranger: false,
        expires_ns: expires_s * SECOND,
    }
}

/// A full map, every address with a name of its own. Every `each`-th one has expired.
fn full(each: usize) -> (Table, Fake) {
    let (mut table, mut allow) = (Table::new(), fake(CAPACITY));
    for number in 0..CAPACITY {
        let expires_s = if number.is_multiple_of(each) {
            50
        } else {
            LATE
        };
        use_again(&mut table, &mut allow, number, expires_s);
    }
    (table, allow)
}

fn use_again(table: &mut Table, allow: &mut Fake, number: usize, expires_s: u64) {
    let name = name(&format!("n{number}.test"));
    let all = [numbered(number, expires_s)];
    table.learn(allow, &name, grant(1), &all, NOW).unwrap();
}

/// One turn of an insertion. Whether it is over.
fn turn(table: &mut Table, allow: &mut Fake, all: &[AnswerAddress], room: &mut Room) -> bool {
    let mut name = Arc::new(name("new.test"));
    let inserted = table.insert(allow, &mut name, grant(1), all, (all, room), NOW);
    inserted.map(Result::unwrap).is_ready()
}

fn has(allow: &Fake, number: usize) -> bool {
    allow.entries.contains_key(&numbered(number, 0).address)
}

/// The table, the allow map and the names for the next agent have the same addresses.
fn assert_consistent(table: &Table, allow: &Fake) {
    assert!(allow.entries.len() <= CAPACITY);
    let of_table: Vec<(Address, Name)> = table
        .addresses
        .iter()
        .flat_map(|(address, learned)| {
            let names = learned.sources.iter();
            names.map(|source| (*address, Name::clone(&source.name)))
        })
        .collect();
    assert_eq!(table.addresses.len(), allow.entries.len());
    assert_eq!(of_table.len(), allow.names.len());
    for key in of_table {
        assert!(allow.entries.contains_key(&key.0));
        assert!(allow.names.contains_key(&key), "{key:?}");
        assert_eq!(table.names_of(&key.0), [key.1.to_string()]);
    }
}

#[test]
fn the_choice_takes_several_turns_and_evicts_nothing_before_its_end() {
    let (mut table, mut allow) = full(CAPACITY);
    allow.open = (0..100).map(|number| numbered(number, 0).address).collect();
    allow.open_part = 50;
    let (new, mut room) = ([numbered(5000, LATE)], Room::default());
    let mut turns = 1;
    while !turn(&mut table, &mut allow, &new, &mut room) {
        assert_eq!(allow.entries.len(), CAPACITY);
        turns += 1;
    }
    assert!(turns > 4, "{turns}");
    assert!((0..100).all(|number| has(&allow, number)), "open flows");
    // Each has one name.
    let evicted = AT_ONCE / 2;
    assert!(
        (100..100 + evicted).all(|number| !has(&allow, number)),
        "the oldest"
    );
    assert!(has(&allow, 100 + evicted) && has(&allow, 5000));
    assert_consistent(&table, &allow);
}

#[test]
fn an_address_that_is_used_again_between_choice_and_eviction_stays() {
    let (mut table, mut allow) = full(CAPACITY);
    let (new, mut room) = ([numbered(5000, LATE)], Room::default());
    assert!(!turn(&mut table, &mut allow, &new, &mut room));
    // It has been found already.
    use_again(&mut table, &mut allow, 1, LATE);
    while !turn(&mut table, &mut allow, &new, &mut room) {}
    assert!(has(&allow, 1) && !has(&allow, 2));
    // The next ones are chosen and not evicted yet.
    assert!(has(&allow, 40));
    use_again(&mut table, &mut allow, 40, LATE);
    for _ in 0..20 {
        table.evict_more(&mut allow, NOW).unwrap();
    }
    assert!(has(&allow, 40) && !has(&allow, 39) && !has(&allow, 41));
    assert_consistent(&table, &allow);
}

#[test]
fn an_expired_address_whose_lifetime_the_programs_have_extended_stays() {
    let (mut table, mut allow) = full(10);
    let extended = numbered(20, 0).address;
    let id = id_of(&name("n20.test"));
    allow.learned.insert(extended, (LATE * SECOND, id));
    let (new, mut room) = ([numbered(5000, LATE)], Room::default());
    while !turn(&mut table, &mut allow, &new, &mut room) {}
    assert!(!has(&allow, 10) && has(&allow, 20) && !has(&allow, 30));
    let learned = table.addresses.peek(&extended).unwrap();
    assert_eq!(learned.expires_ns(), LATE * SECOND);
    assert_consistent(&table, &allow);
}

#[test]
fn chosen_addresses_are_not_evicted_long_after_the_choice() {
    let (mut table, mut allow) = full(CAPACITY);
    let (new, mut room) = ([numbered(5000, LATE)], Room::default());
    while !turn(&mut table, &mut allow, &new, &mut room) {}
    let left = allow.entries.len();
    // The pod may have opened flows to them by now.
    table.evict_more(&mut allow, NOW + SECOND).unwrap();
    assert_eq!(allow.entries.len(), left);
}

#[test]
fn an_insertion_fails_when_all_addresses_have_open_flows() {
    let (mut table, mut allow) = full(CAPACITY);
    allow.open = allow.entries.keys().copied().collect();
    let (new, mut room) = ([numbered(5000, LATE)], Room::default());
    let mut name = Arc::new(name("new.test"));
    let result = loop {
        let all = (new.as_slice(), &mut room);
        let inserted = table.insert(&mut allow, &mut name, grant(1), &new, all, NOW);
        if let Poll::Ready(result) = inserted {
            break result;
        }
    };
    assert!(matches!(result, Err(AllowError::Full)));
    assert_eq!(allow.entries.len(), CAPACITY);
    assert_consistent(&table, &allow);
}

#[test]
fn an_address_stays_until_its_response_has_been_sent() {
    let (mut table, mut allow) = (Table::new(), fake(4));
    for number in 0..4 {
        // The first response has been sent when the second is decided. The others wait in the queue.
        table.begin_decision(false, number > 1);
        use_again(&mut table, &mut allow, number, LATE);
    }
    let (new, mut room) = (
        [numbered(5000, LATE), numbered(5001, LATE)],
        Room::default(),
    );
    table.begin_decision(false, true);
    for _ in 0..3 {
        assert!(!turn(&mut table, &mut allow, &new, &mut room));
        assert!((0..4).all(|number| has(&allow, number)));
        table.begin_decision(true, true);
    }
    // What the programs have learned does not wait. It gets the place of the first, and nothing else.
    use_again(&mut table, &mut allow, 6000, LATE);
    let more = [numbered(6001, LATE)];
    let refused = table.learn(&mut allow, &name("more.test"), grant(1), &more, NOW);
    assert!(matches!(refused, Err(AllowError::Full)));
    assert!(!has(&allow, 0) && (1..4).all(|number| has(&allow, number)));
    table.begin_decision(true, false);
    while !turn(&mut table, &mut allow, &new, &mut room) {}
    assert!(
        new.iter()
            .all(|one| allow.entries.contains_key(&one.address))
    );
    assert!(!has(&allow, 1) && !has(&allow, 2) && has(&allow, 3));
}

#[test]
fn the_responses_of_one_segment_do_not_evict_each_other() {
    let (mut table, mut allow) = (Table::new(), fake(4));
    use_again(&mut table, &mut allow, 0, LATE);
    table.begin_decision(false, false);
    for number in 1..4 {
        use_again(&mut table, &mut allow, number, LATE);
        table.begin_decision(true, false);
    }
    let mut learn = |last| {
        let (mut name, all) = (Arc::new(name("new.test")), [numbered(last, LATE)]);
        let all = (all.as_slice(), &mut Room::default());
        table.insert(&mut allow, &mut name, grant(1), all.0, all, NOW)
    };
    assert!(matches!(learn(5000), Poll::Ready(Ok(()))));
    assert!(matches!(learn(5001), Poll::Ready(Err(AllowError::Full))));
    assert!((1..4).all(|number| has(&allow, number)) && has(&allow, 5000));
}

/// After an edit, the rest of a segment gets the room of what the segment has not brought.
#[test]
fn an_edit_keeps_the_addresses_that_wait_to_be_sent_and_no_others() {
    // Whether the second response still waits in the queue.
    for has_queued in [false, true] {
        let (mut table, mut allow) = (Table::new(), fake(4));
        for number in 0..2 {
            table.begin_decision(false, false);
            use_again(&mut table, &mut allow, number, LATE);
        }
        table.begin_decision(false, has_queued);
        for number in 2..4 {
            use_again(&mut table, &mut allow, number, LATE);
            table.begin_decision(true, has_queued);
        }
        let mut allow_after = fake(4);
        let mut after = table
            .carry_over(&everything(), false, &mut allow_after, NOW)
            .unwrap();
        after.begin_decision(true, has_queued);
        let mut learn = |last| {
            let (new, mut room) = ([numbered(last, LATE)], Room::default());
            let mut name = Arc::new(name("new.test"));
            let all = (new.as_slice(), &mut room);
            after.insert(&mut allow_after, &mut name, grant(1), &new, all, NOW)
        };
        assert!(matches!(learn(5000), Poll::Ready(Ok(()))));
        let second = learn(5001);
        if has_queued {
            assert!(second.is_pending(), "{second:?}");
        } else {
            assert!(matches!(second, Poll::Ready(Ok(()))), "{second:?}");
            assert!(matches!(learn(5002), Poll::Ready(Err(AllowError::Full))));
        }
        assert!((2..4).all(|number| has(&allow_after, number)));
        assert!(!has(&allow_after, 0) && has(&allow_after, 1) == has_queued);
    }
}

#[test]
fn an_edit_that_allows_what_was_resolved_without_an_entry_keeps_room_for_the_next_response() {
    let mut table = Table::new();
    table.remember_unlisted(&name("old.test"), &[0, 1, 2, 3].map(|n| numbered(n, LATE)));
    table.begin_decision(true, false);
    let mut allow = fake(4);
    let mut after = table
        .carry_over(&everything(), false, &mut allow, NOW)
        .unwrap();
    after.begin_decision(true, false);
    let (new, mut room) = ([numbered(5000, LATE)], Room::default());
    let mut name = Arc::new(name("new.test"));
    let all = (new.as_slice(), &mut room);
    let learned = after.insert(&mut allow, &mut name, grant(1), &new, all, NOW);
    assert!(matches!(learned, Poll::Ready(Ok(()))), "{learned:?}");
    assert!(has(&allow, 5000));
}

#[test]
fn an_edit_during_the_choice_carries_every_address_over() {
    let (mut table, mut allow) = full(CAPACITY);
    let new = [numbered(5000, LATE)];
    let mut begun = insertion_of(&new);
    assert!(table.proceed(&mut allow, &mut begun, NOW).is_pending());
    table.continue_later(begun, b"message", NOW);
    let mut next_allow = fake(CAPACITY);
    let mut next = table
        .carry_over(&everything(), false, &mut next_allow, NOW)
        .unwrap();
    assert_eq!(next_allow.entries.len(), CAPACITY);
    assert!(next.begun(&EXCHANGE, b"message", (NOW, 1)).is_none());
    // The response is decided again by the new version.
    let mut again = insertion_of(&new);
    while next.proceed(&mut next_allow, &mut again, NOW).is_pending() {}
    assert!(has(&next_allow, 5000));
    assert_eq!(next.addresses.len(), next_allow.entries.len());
    // If the edit is cancelled, the insertion goes on where it was.
    let mut begun = table.begun(&EXCHANGE, b"message", (NOW, 1)).unwrap();
    while table.proceed(&mut allow, &mut begun, NOW).is_pending() {}
    assert!(has(&allow, 5000));
    assert_consistent(&table, &allow);
}

fn insertion_of(all: &[AnswerAddress]) -> Box<Insertion> {
    let names = vec![(Arc::new(name("new.test")), grant(1))];
    let answer = answer("new.test", A);
    Box::new(Insertion::new(
        EXCHANGE,
        answer,
        all.to_vec(),
        names,
        (NOW, 1),
    ))
}

/// The addresses in the order in which they are evicted, by looking at all of them at once.
fn reference(table: &Table, open: &[Address], capacity: usize) -> Vec<Address> {
    let part = capacity / 4;
    let is_crowding = |name: &Name| {
        let all = table.addresses.iter();
        all.filter(|(_, learned)| learned.source(name).is_some())
            .count()
            > part
    };
    let crowding: Vec<&str> = ["a.test", "b.test"]
        .into_iter()
        .filter(|text| is_crowding(&name(text)))
        .collect();
    let mut all: Vec<(usize, Address)> = table
        .addresses
        .from(Place::default())
        .filter(|(_, address, _)| !open.contains(address))
        .map(|(_, address, learned)| {
            let mut sources = learned.sources.iter();
            let group = if learned.expires_ns() <= NOW {
                0
            } else if sources.all(|source| crowding.contains(&&*source.name.to_string())) {
                1
            } else {
                2
            };
            (group, address)
        })
        .collect();
    all.sort_by_key(|&(group, _)| group);
    all.into_iter().map(|(_, address)| address).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_choice_in_parts_is_that_of_a_choice_at_once(
        seed in prop::collection::vec((0..4usize, any::<bool>()), 1200),
        open in prop::collection::vec(0..1200usize, 0..300),
        wanted in 1..32usize,
    ) {
        const CAPACITY: usize = 1200;
        let (mut table, mut allow) = (Table::new(), fake(CAPACITY));
        for (number, (names, is_expired)) in seed.into_iter().enumerate() {
            // Few have expired, so that the other groups count, too.
            let is_expired = is_expired && number.is_multiple_of(40);
            let all = [numbered(number, if is_expired { 50 } else { LATE })];
            let own = format!("n{number}.test");
            let names = [vec!["a.test"], vec!["a.test", "b.test"], vec!["b.test", &own], vec![&*own]]
                [names].clone();
            for text in names {
                table.learn(&mut allow, &name(text), grant(1), &all, 0).unwrap();
            }
        }
        allow.open = open.iter().map(|&number| numbered(number, 0).address).collect();
        allow.open_part = 100;
        let expected = reference(&table, &allow.open, CAPACITY);
        let before: Vec<Address> = allow.entries.keys().copied().collect();
        let new: Vec<_> = (5000..5000 + wanted).map(|number| numbered(number, LATE)).collect();
        let mut room = Room::default();
        while !turn(&mut table, &mut allow, &new, &mut room) {}
        let gone: HashSet<Address> = before
            .into_iter()
            .filter(|address| !allow.entries.contains_key(address))
            .collect();

        prop_assert!(gone.len() >= wanted && gone.len() <= wanted.max(AT_ONCE / 2), "{}", gone.len());
        let first = expected[..gone.len()].iter().copied();
        prop_assert_eq!(gone, first.collect::<HashSet<_>>());
    }

    #[test]
    fn whatever_happens_between_the_turns_no_address_in_use_is_evicted_and_the_books_agree(
        steps in prop::collection::vec((0..6u8, 0..CAPACITY), 1..40),
        each in 2..60usize,
    ) {
        let (mut table, mut allow) = full(each);
        let new: Vec<_> = (5000..5030).map(|number| numbered(number, LATER)).collect();
        allow.open = (0..200).map(|number| numbered(number * 7, 0).address).collect();
        allow.open_part = 64;
        let open = allow.open.clone();
        let mut used = HashSet::new();
        let mut room = Room::default();
        let mut is_over = false;
        for (step, number) in steps {
            match step {
                0 | 1 => {
                    use_again(&mut table, &mut allow, number, LATER);
                    used.insert(number);
                }
                2 => {
                    // A response that the agent does not see.
                    let id = id_of(&name(&format!("n{number}.test")));
                    let address = numbered(number, 0).address;
                    if allow.entries.contains_key(&address) {
                        allow.learned.insert(address, (LATER * SECOND, id));
                    }
                }
                3 => table.evict_more(&mut allow, NOW).unwrap(),
                4 => table.expire(&mut allow, NOW).unwrap(),
                _ if is_over => {}
                _ => is_over = turn(&mut table, &mut allow, &new, &mut room),
            }
            let is_open = |address: &Address| allow.entries.contains_key(address);
            prop_assert!(open.iter().all(is_open), "an address with an open flow");
            for &number in &used {
                prop_assert!(has(&allow, number), "{}", number);
            }
            assert_consistent(&table, &allow);
        }
        while !is_over {
            is_over = turn(&mut table, &mut allow, &new, &mut room);
        }
        prop_assert!(new.iter().all(|one| allow.entries.contains_key(&one.address)));
        assert_consistent(&table, &allow);
    }
}
