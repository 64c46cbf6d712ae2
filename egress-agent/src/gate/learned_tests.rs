use std::collections::{BTreeMap, HashSet};

use egress_common::{address::from_v4, classes::ClassSet};

use super::{
    super::{carry_over::CarryOver, learned_address::NAMES_PER_ADDRESS},
    fake::Fake,
    *,
};
use egress_policy::MayBeInternal;

#[path = "eviction_tests.rs"]
mod eviction;
#[path = "insertion_tests.rs"]
mod insertion;
#[path = "learned_names_tests.rs"]
mod names;

const SECOND: u64 = 1_000_000_000;

fn fake(capacity: usize) -> Fake {
    Fake {
        capacity,
        ..Fake::default()
    }
}

fn name(text: &str) -> Name {
    Name::from_labels(text.split('.').map(str::as_bytes)).unwrap()
}

fn address(last: u8) -> Address {
    from_v4([203, 0, 113, last])
}

fn answered(last: u8, expires_s: u64) -> AnswerAddress {
    AnswerAddress {
        address: address(last),
        by_stranger: false,
        expires_ns: expires_s * SECOND,
    }
}

/// The classes of these bits.
fn set(bits: u64) -> ClassSet {
    ClassSet { words: [bits, 0] }
}

/// These classes, for addresses that are not internal.
fn grant(bits: u64) -> Grant {
    let classes = set(bits);
    Grant {
        classes,
        internal: MayBeInternal::No,
    }
}

fn classes(allow: &Fake, last: u8) -> u64 {
    let [low, high] = allow.entries[&address(last)].classes.words;
    assert_eq!(high, 0);
    low
}

#[test]
fn classes_of_a_name_expire_with_it_while_another_name_lives_on() {
    let (mut table, mut allow) = (Table::new(), fake(8));
    let mut learn = |text, classes, expires_s| {
        table.learn(
            &mut allow,
            &name(text),
            grant(classes),
            &[answered(1, expires_s)],
            0,
        )
    };
    learn("a.test", 0b01, 10).unwrap();
    learn("b.test", 0b10, 60).unwrap();
    assert_eq!(classes(&allow, 1), 0b11);
    table.expire(&mut allow, 9 * SECOND).unwrap();
    assert_eq!(classes(&allow, 1), 0b11);
    table.expire(&mut allow, 10 * SECOND).unwrap();
    assert_eq!(classes(&allow, 1), 0b10);
    // When all have expired, the entry keeps its last classes.
    let writes = allow.writes;
    for second in 11..59 {
        table.expire(&mut allow, second * SECOND).unwrap();
    }
    assert_eq!(allow.writes, writes, "an unchanged entry is not written");
}

#[test]
fn classes_from_an_earlier_agent_expire_while_a_name_lives_on() {
    let mut allow = fake(8);
    let left = AllowEntry {
        classes: set(0b10),
        internal_classes: ClassSet::EMPTY,
        expires_ns: 10 * SECOND,
    };
    allow.entries.insert(address(1), left);
    let mut table = Table::taken_over(vec![(address(1), left)], &[], Some(&everything()));
    table
        .learn(
            &mut allow,
            &name("a.test"),
            grant(0b01),
            &[answered(1, 60)],
            0,
        )
        .unwrap();
    assert_eq!(classes(&allow, 1), 0b11);
    table.expire(&mut allow, 10 * SECOND).unwrap();
    assert_eq!(classes(&allow, 1), 0b01);
}

#[test]
fn a_failed_write_is_retried_and_does_not_delay_the_expiry_of_others() {
    let (mut table, mut allow) = (Table::new(), fake(8));
    for last in 1..=4 {
        for (text, classes, expires_s) in [("a.test", 0b01, 10), ("b.test", 0b10, 60)] {
            table
                .learn(
                    &mut allow,
                    &name(text),
                    grant(classes),
                    &[answered(last, expires_s)],
                    0,
                )
                .unwrap();
        }
    }
    allow.refused = vec![address(2)];
    assert!(table.expire(&mut allow, 11 * SECOND).is_err());
    for last in [1, 3, 4] {
        assert_eq!(classes(&allow, last), 0b10, "{last}");
    }
    allow.refused.clear();
    table.expire(&mut allow, 12 * SECOND).unwrap();
    assert_eq!(classes(&allow, 2), 0b10);
}

#[test]
fn the_only_name_that_gives_a_class_is_not_forgotten() {
    let (mut table, mut allow) = (Table::new(), fake(8));
    let mut learn = |text: &str, classes, expires_s| {
        table.learn(
            &mut allow,
            &name(text),
            grant(classes),
            &[answered(1, expires_s)],
            0,
        )
    };
    learn("ssh.test", 0b10, 60).unwrap();
    for n in 0..200 {
        learn(&format!("n{n}.test"), 0b01, 70 + n).unwrap();
    }
    assert_eq!(classes(&allow, 1), 0b11);
    let names = table.names_of(&address(1));
    assert!(names.len() <= NAMES_PER_ADDRESS, "{}", names.len());
    assert!(names.contains(&"ssh.test".to_owned()), "{names:?}");
}

#[test]
fn expired_addresses_are_evicted_first_then_the_least_recently_used() {
    let (mut table, mut allow) = (Table::new(), fake(4));
    let mut learn = |all: &[AnswerAddress], now_s| {
        table
            .learn(&mut allow, &name("a.test"), grant(1), all, now_s * SECOND)
            .unwrap();
        let mut left: Vec<u8> = allow.entries.keys().map(|address| address[15]).collect();
        left.sort_unstable();
        left
    };
    for (last, expires_s) in [(1, 100), (2, 20), (3, 100), (4, 30)] {
        learn(&[answered(last, expires_s)], 0);
    }
    assert_eq!(
        learn(&[answered(5, 100)], 10),
        [2, 3, 4, 5],
        "1 is the least recently used"
    );
    assert_eq!(
        learn(&[answered(6, 100)], 40),
        [3, 4, 5, 6],
        "2 has expired"
    );
    assert_eq!(
        learn(&[answered(7, 100)], 40),
        [3, 5, 6, 7],
        "4 has expired"
    );
    assert_eq!(
        learn(&[answered(8, 100)], 40),
        [5, 6, 7, 8],
        "3 is the least recently used"
    );
    // An address of the response itself is not evicted, however old it is.
    let again = [answered(5, 200), answered(9, 100)];
    assert_eq!(learn(&again, 50), [5, 7, 8, 9]);
}

#[test]
fn an_address_with_an_open_flow_is_never_evicted() {
    let (mut table, mut allow) = (Table::new(), fake(3));
    for (last, expires_s) in [(1, 10), (2, 100), (3, 100)] {
        let answered = [answered(last, expires_s)];
        table
            .learn(&mut allow, &name("a.test"), grant(1), &answered, 0)
            .unwrap();
    }
    allow.open = vec![address(1), address(2)];
    let mut learn = |allow: &mut Fake, all: &[AnswerAddress], now_s| {
        table.learn(allow, &name("b.test"), grant(1), all, now_s * SECOND)
    };
    // The first has expired and the second is the least recently used; both are in use.
    learn(&mut allow, &[answered(4, 100)], 50).unwrap();
    let left = |allow: &Fake| allow.entries.keys().map(|a| a[15]).collect::<Vec<_>>();
    assert_eq!(left(&allow), [1, 2, 4]);
    let refused = learn(&mut allow, &[answered(5, 100), answered(6, 100)], 50);
    assert!(matches!(refused, Err(AllowError::Full)));
    assert_eq!(left(&allow), [1, 2, 4], "a failed insertion evicts nothing");
    allow.open.clear();
    let refused = learn(&mut allow, &[answered(5, 100), answered(6, 100)], 50);
    assert!(
        matches!(refused, Err(AllowError::Full)),
        "too early to search again"
    );
    learn(&mut allow, &[answered(5, 100), answered(6, 100)], 51).unwrap();
    assert_eq!(left(&allow), [4, 5, 6]);
}

#[test]
fn a_name_with_ever_new_addresses_evicts_only_its_own() {
    let (mut table, mut allow) = (Table::new(), fake(16));
    table
        .learn(
            &mut allow,
            &name("quiet.test"),
            grant(1),
            &[answered(200, 900)],
            0,
        )
        .unwrap();
    for last in 0..100 {
        let all = [answered(last, 900)];
        table
            .learn(&mut allow, &name("robin.test"), grant(1), &all, SECOND)
            .unwrap();
    }
    assert!(allow.entries.contains_key(&address(200)));
    assert_eq!(allow.entries.len(), 16);
    // Many names share the map by age.
    for last in 100..140 {
        let all = [answered(last, 900)];
        let name = name(&format!("n{last}.test"));
        table
            .learn(&mut allow, &name, grant(1), &all, SECOND)
            .unwrap();
    }
    assert!(!allow.entries.contains_key(&address(200)));
}

#[test]
fn addresses_expired_for_a_day_are_removed_unless_a_flow_is_open() {
    const DAY: u64 = 24 * 3600;
    let (mut table, mut allow) = (Table::new(), fake(8));
    for (last, expires_s) in [(1, 10), (2, 10), (3, DAY)] {
        table
            .learn(
                &mut allow,
                &name("a.test"),
                grant(1),
                &[answered(last, expires_s)],
                0,
            )
            .unwrap();
    }
    let open = HashSet::from([address(2)]);
    let left = |allow: &Fake| allow.entries.keys().map(|a| a[15]).collect::<Vec<_>>();
    // For a day a denial can have the reason `expired`.
    for second in [300, 320, DAY, DAY + 9] {
        table.sweep(&mut allow, &open, second * SECOND).unwrap();
        assert_eq!(left(&allow), [1, 2, 3], "after {second} s");
    }
    table.sweep(&mut allow, &open, (DAY + 10) * SECOND).unwrap();
    assert_eq!(left(&allow), [2, 3]);
    table
        .sweep(&mut allow, &HashSet::new(), (DAY + 11) * SECOND)
        .unwrap();
    assert_eq!(left(&allow), [3]);
    assert_eq!(table.addresses.len(), 1);
}

#[test]
fn the_most_recently_expired_addresses_may_fill_a_quarter_of_the_map() {
    let (mut table, mut allow) = (Table::new(), fake(8));
    for last in 1..=6 {
        let all = [answered(last, u64::from(last))];
        let name = name(&format!("n{last}.test"));
        table.learn(&mut allow, &name, grant(1), &all, 0).unwrap();
    }
    let all = [answered(7, 9000)];
    table
        .learn(&mut allow, &name("alive.test"), grant(1), &all, 0)
        .unwrap();
    let left = |allow: &Fake| allow.entries.keys().map(|a| a[15]).collect::<Vec<_>>();
    // All are kept for five minutes, as long as there is room.
    table
        .sweep(&mut allow, &HashSet::new(), 300 * SECOND)
        .unwrap();
    assert_eq!((left(&allow).len(), table.in_use()), (7, 7));
    table
        .sweep(&mut allow, &HashSet::new(), 3600 * SECOND)
        .unwrap();
    assert_eq!(left(&allow), [5, 6, 7]);
    assert_eq!(table.in_use(), 1);
    assert_eq!(table.names_of(&address(5)), ["n5.test"]);
    // They are evicted when others need room.
    for last in 10..17 {
        let all = [answered(last, 9000)];
        let name = name(&format!("n{last}.test"));
        table
            .learn(&mut allow, &name, grant(1), &all, 3600 * SECOND)
            .unwrap();
    }
    assert_eq!(left(&allow), [7, 10, 11, 12, 13, 14, 15, 16]);
}

#[test]
fn a_large_map_evicts_in_batches() {
    let (mut table, mut allow) = (Table::new(), fake(64));
    let mut learn = |last| {
        let all = [answered(last, 900)];
        let name = name("a.test");
        table.learn(&mut allow, &name, grant(1), &all, 0).unwrap();
        allow.entries.len()
    };
    for last in 0..64 {
        learn(last);
    }
    // One address is evicted for the response, and three more for later ones.
    assert_eq!([64, 65, 66, 67, 68].map(learn), [61, 62, 63, 64, 61]);
}

/// Rules that allow everything below `test`, in class 1.
fn everything() -> NameRules {
    let own = BTreeMap::from([("egress-agent.dev/allow".to_owned(), "*.test:443".to_owned())]);
    let settings = crate::config::Config::default_config()
        .unwrap()
        .policy_settings();
    let own = egress_policy::Annotations::from_map(&own);
    let none = egress_policy::Annotations::from_map(&BTreeMap::new());
    egress_policy::compile(egress_policy::Inputs::annotations(&own, &none), &settings)
        .unwrap()
        .names
}

#[test]
fn an_edit_that_allows_more_than_the_map_holds_keeps_addresses_in_use() {
    let (mut table, mut before) = (Table::new(), fake(4));
    for last in 1..=4 {
        table
            .learn(
                &mut before,
                &name("a.test"),
                grant(1),
                &[answered(last, 100)],
                0,
            )
            .unwrap();
    }
    // Resolved without an entry, and reached although no entry allows the name.
    for last in 5..=7 {
        table
            .learn(
                &mut before,
                &name("b.test"),
                grant(0),
                &[answered(last, 100)],
                0,
            )
            .unwrap();
    }
    let mut after = fake(4);
    after.open = vec![address(1), address(6)];
    let next = table
        .carry_over(&everything(), false, &mut after, SECOND)
        .unwrap();
    let left: Vec<u8> = after.entries.keys().map(|address| address[15]).collect();
    assert_eq!(left, [1, 3, 4, 6]);
    assert_eq!(next.addresses.len(), 4);
}

#[test]
fn addresses_that_are_carried_over_in_parts_are_those_that_are_carried_over_at_once() {
    let filled = || {
        let (mut table, mut allow) = (Table::new(), fake(64));
        for n in 0..40u8 {
            for (name, bits) in [(format!("a{}.test", n % 7), 1), (format!("b{n}.test"), 0)] {
                let answered = [answered(n, 100), answered(n / 2, 50)];
                table
                    .learn(&mut allow, &self::name(&name), grant(bits), &answered, 0)
                    .unwrap();
            }
        }
        (table, allow)
    };
    let order = |table: &Table| -> Vec<Address> {
        table
            .addresses
            .iter()
            .map(|(&address, _)| address)
            .collect()
    };
    let (before, mut at_once) = (filled().0, fake(64));
    let whole = before
        .carry_over(&everything(), false, &mut at_once, SECOND)
        .unwrap();
    for most in [1, 2, 7, 1000] {
        let (before, kept) = filled();
        let order_before = order(&before);
        let mut in_parts = fake(64);
        in_parts.names.clone_from(&kept.names);
        let mut carry = CarryOver::begin(&before, &everything(), false, &in_parts, SECOND).unwrap();
        let mut parts = 0;
        while !carry
            .carry_part(&before, &everything(), &mut in_parts, SECOND, most)
            .unwrap()
        {
            parts += 1;
        }
        assert!(parts > 0 || most == 1000, "{most}");
        assert_eq!(in_parts.entries, at_once.entries);
        let next = carry.into_table();
        assert_eq!(order(&next), order(&whole));
        assert_eq!(order(&before), order_before, "the order of use has changed");
        // The names of all addresses are kept, and none is forgotten yet.
        for (address, learned) in next.addresses.iter() {
            for source in &learned.sources {
                let key = (*address, Name::clone(&source.name));
                assert!(in_parts.names.contains_key(&key), "{key:?}");
            }
        }
        assert!(
            kept.names
                .keys()
                .all(|key| in_parts.names.contains_key(key))
        );
    }
}

#[test]
fn a_hundred_thousand_names_do_not_exceed_the_map() {
    const CAPACITY: usize = 4096;
    let (mut table, mut allow) = (Table::new(), fake(CAPACITY));
    for n in 0..100_000u32 {
        let [a, b, c, d] = n.to_be_bytes();
        let answered = AnswerAddress {
            address: from_v4([10 + a, b, c, d]),
            by_stranger: false,
            expires_ns: 60 * SECOND,
        };
        let name = name(&format!("x{n}.wild.test"));
        table
            .learn(&mut allow, &name, grant(1), &[answered], 0)
            .unwrap();
        // The same number of names that no entry allows.
        table
            .learn(&mut allow, &name, grant(0), &[answered], 0)
            .unwrap();
    }
    assert!(table.addresses.len() <= CAPACITY);
    assert_eq!(table.addresses.len(), allow.entries.len());
    assert_eq!(table.unlisted.len(), UNLISTED_NAMES);
    let sources = table
        .addresses
        .iter()
        .map(|(_, learned)| learned.sources.len());
    assert!(sources.max() <= Some(NAMES_PER_ADDRESS));
}

#[test]
fn an_address_twice_in_a_response_takes_one_entry() {
    let (mut table, mut allow) = (Table::new(), fake(4));
    let mut learn =
        |all: &[AnswerAddress]| table.learn(&mut allow, &name("a.test"), grant(1), all, 0);
    learn(&[answered(1, 60), answered(2, 60)]).unwrap();
    let twice = [
        answered(3, 60),
        answered(4, 60),
        answered(3, 90),
        answered(4, 60),
    ];
    learn(&twice).unwrap();
    assert_eq!(allow.entries.len(), 4);
    assert_eq!(allow.entries[&address(3)].expires_ns, 90 * SECOND);
}

#[test]
fn a_response_larger_than_the_map_is_not_inserted() {
    let (mut table, mut allow) = (Table::new(), fake(2));
    let all = [answered(1, 60), answered(2, 60), answered(3, 60)];
    let learned = table.learn(&mut allow, &name("a.test"), grant(1), &all, 0);
    assert!(matches!(learned, Err(AllowError::Full)));
}
