//! Insertions in parts.

use std::task::Poll;

use egress_common::address::from_v4;

use super::*;
use crate::gate::insertion::{Insertion, PART};
use crate::gate::pending::{
    Exchange,
    tests::{A, EXCHANGE, answer},
};

const GENERATION: u32 = 7;

fn many(first: u16, count: usize) -> Vec<AnswerAddress> {
    let all = (first..).take(count).map(|number| {
        let [high, low] = number.to_be_bytes();
        AnswerAddress {
            address: from_v4([10, 0, high, low]),
            by_stranger: false,
            expires_ns: 60 * SECOND,
        }
    });
    all.collect()
}

fn insertion(names: &[&str], addresses: &[AnswerAddress]) -> Box<Insertion> {
    let answer = answer(names[0], A);
    let names = names
        .iter()
        .map(|text| (Arc::new(name(text)), grant(1)))
        .collect();
    Box::new(Insertion::new(
        EXCHANGE,
        answer,
        addresses.to_vec(),
        names,
        (0, GENERATION),
    ))
}

/// Whether all addresses are there.
fn inserted(progress: Poll<Result<(), AllowError>>) -> bool {
    progress.map(Result::unwrap).is_ready()
}

/// How many turns the insertion takes.
fn turns(table: &mut Table, allow: &mut Fake, insertion: &mut Insertion) -> usize {
    let mut turns = 1;
    while !inserted(table.proceed(allow, insertion, SECOND)) {
        turns += 1;
    }
    turns
}

#[test]
fn many_addresses_are_inserted_in_parts() {
    let (mut table, mut allow) = (Table::new(), fake(500));
    let all = many(0, 100);
    let mut insertion = insertion(&["a.test", "b.test"], &all);
    let mut most = 0;
    loop {
        let before = allow.writes;
        let is_done = inserted(table.proceed(&mut allow, &mut insertion, SECOND));
        most = most.max(allow.writes - before);
        if is_done {
            break;
        }
    }
    assert_eq!(most, PART);
    assert_eq!(allow.writes, 200, "each address for each of the names");
    assert_eq!(allow.entries.len(), 100);
    for text in ["a.test", "b.test"] {
        let name = name(text);
        assert!(all.iter().all(|one| table.has(&one.address, &name)));
    }
}

#[test]
fn few_addresses_are_inserted_at_once() {
    let (mut table, mut allow) = (Table::new(), fake(500));
    let mut insertion = insertion(&["a.test"], &many(0, PART));
    assert_eq!(turns(&mut table, &mut allow, &mut insertion), 1);
    assert_eq!(allow.entries.len(), PART);
}

#[test]
fn the_parts_of_a_response_do_not_evict_each_other() {
    let (mut table, mut allow) = (Table::new(), fake(200));
    let (old, new) = (many(0, 200), many(1000, 200));
    turns(&mut table, &mut allow, &mut insertion(&["old.test"], &old));
    turns(&mut table, &mut allow, &mut insertion(&["new.test"], &new));
    assert_eq!(allow.entries.len(), 200);
    assert!(
        new.iter()
            .all(|one| allow.entries.contains_key(&one.address))
    );
}

#[test]
fn a_response_of_many_parts_larger_than_the_map_is_not_inserted() {
    let (mut table, mut allow) = (Table::new(), fake(50));
    let mut insertion = insertion(&["a.test"], &many(0, 60));
    let inserted = table.proceed(&mut allow, &mut insertion, SECOND);
    assert!(matches!(inserted, Poll::Ready(Err(AllowError::Full))));
    assert!(allow.entries.is_empty());
}

#[test]
fn an_insertion_continues_only_for_its_own_response() {
    let (mut table, mut allow) = (Table::new(), fake(500));
    let other = Exchange { id: 1, ..EXCHANGE };
    for (exchange, message, settings, continues) in [
        (EXCHANGE, b"message", (2 * SECOND, GENERATION), true),
        (EXCHANGE, b"message", (3 * SECOND, GENERATION), false),
        (other, b"message", (SECOND, GENERATION), false),
        (EXCHANGE, b"another", (SECOND, GENERATION), false),
        (EXCHANGE, b"message", (SECOND, GENERATION + 1), false),
    ] {
        let mut insertion = insertion(&["a.test"], &many(0, 100));
        assert!(!inserted(table.proceed(&mut allow, &mut insertion, SECOND)));
        table.continue_later(insertion, b"message", SECOND);
        let begun = table.begun(&exchange, message, settings);
        assert_eq!(begun.is_some(), continues);
    }
}

#[test]
fn an_insertion_begins_again_when_one_of_its_addresses_is_removed() {
    let (mut table, mut allow) = (Table::new(), fake(500));
    let (all, other) = (many(0, 100), many(1000, 1));
    let mut rest = insertion(&["b.test"], &other);
    turns(&mut table, &mut allow, &mut rest);
    let mut begun = insertion(&["a.test"], &all);
    assert!(!inserted(table.proceed(&mut allow, &mut begun, SECOND)));
    table.continue_later(begun, b"message", SECOND);
    table.remove(&mut allow, other[0].address).unwrap();
    assert!(table.insertion.is_some(), "it has no such address");
    table.remove(&mut allow, all[0].address).unwrap();
    let mut begun = continued(&mut table);
    turns(&mut table, &mut allow, &mut begun);
    for one in &all {
        assert!(allow.entries.contains_key(&one.address));
    }
}

fn continued(table: &mut Table) -> Box<Insertion> {
    let settings = (SECOND, GENERATION);
    table.begun(&EXCHANGE, b"message", settings).unwrap()
}

#[test]
fn a_response_of_thousands_of_addresses_is_complete_whatever_is_inserted_meanwhile() {
    const CAPACITY: usize = 4096;
    let (mut table, mut allow) = (Table::new(), fake(CAPACITY));
    let name_of = |number: usize| name(&format!("n{number}.test"));
    // The map is full, and each address has a name of its own, so that none is evicted before others. The response repeats
    // some of them.
    for (number, one) in many(0, CAPACITY).into_iter().enumerate() {
        table
            .learn(&mut allow, &name_of(number), grant(1), &[one], 0)
            .unwrap();
        if number % 64 == 0 {
            allow.open.push(one.address);
        }
    }
    let all = many(4000, 4000);
    let others = many(9000, 1000);
    let mut begun = insertion(&["big.test"], &all);
    let (mut turns, mut noted) = (1, 0);
    while !inserted(table.proceed(&mut allow, &mut begun, SECOND)) {
        table.continue_later(begun, b"message", SECOND);
        table.evict_more(&mut allow, SECOND).unwrap();
        // What the programs have learned comes between the turns.
        for _ in 0..2 {
            let one = [others[noted % others.len()]];
            let name = name_of(10_000 + noted);
            // If it does not fit, it is not the response that suffers.
            let _ = table.learn(&mut allow, &name, grant(1), &one, SECOND);
            noted += 1;
        }
        begun = continued(&mut table);
        turns += 1;
        assert!(turns < 2000, "it makes no progress");
    }
    for one in &all {
        assert!(allow.entries.contains_key(&one.address));
        assert!(table.has(&one.address, &name("big.test")));
    }
    assert!(allow.open.iter().all(|one| allow.entries.contains_key(one)));
    assert_eq!(table.addresses.len(), allow.entries.len());
}

#[test]
fn a_response_of_thousands_of_addresses_that_does_not_fit_beside_open_flows_fails() {
    const CAPACITY: usize = 4096;
    let (mut table, mut allow) = (Table::new(), fake(CAPACITY));
    let mut old = insertion(&["old.test"], &many(0, CAPACITY));
    turns(&mut table, &mut allow, &mut old);
    allow.open = allow.entries.keys().copied().step_by(16).collect();
    let mut begun = insertion(&["big.test"], &many(5000, 4000));
    let result = loop {
        if let Poll::Ready(result) = table.proceed(&mut allow, &mut begun, SECOND) {
            break result;
        }
        table.evict_more(&mut allow, SECOND).unwrap();
    };
    assert!(matches!(result, Err(AllowError::Full)));
    assert_eq!(table.addresses.len(), allow.entries.len());
    assert!(allow.open.iter().all(|one| allow.entries.contains_key(one)));
}

#[test]
fn a_batch_is_evicted_in_parts_and_without_what_is_used_again() {
    const CAPACITY: usize = 2048;
    let (mut table, mut allow) = (Table::new(), fake(CAPACITY));
    let mut learn = |all: &[AnswerAddress], now_ns| {
        let before = allow.entries.len();
        table
            .learn(&mut allow, &name("a.test"), grant(1), all, now_ns)
            .unwrap();
        (
            before + all.len() - allow.entries.len(),
            allow.entries.len(),
        )
    };
    let old = many(0, CAPACITY);
    learn(&old, 0);
    // The first of a batch of 128.
    let (evicted, left) = learn(&many(5000, 1), SECOND);
    assert_eq!((evicted, left), (4, CAPACITY - 3));
    // The next ones of the batch would be these.
    learn(&old[4..36], SECOND);
    for number in 0..40 {
        learn(&many(5001 + number, 1), SECOND);
    }
    assert!(
        old[4..36]
            .iter()
            .all(|one| allow.entries.contains_key(&one.address))
    );
    assert!(!allow.entries.contains_key(&old[36].address));
}
