//! Names that are kept for the next agent.

use super::*;

/// The names that are kept, each with the last byte of its address.
fn kept_names(allow: &Fake) -> Vec<(String, u8)> {
    let names = allow.names.keys();
    names
        .map(|(address, name)| (name.to_string(), address[15]))
        .collect()
}

#[test]
fn names_are_kept_exactly_for_the_addresses_in_the_map() {
    let (mut table, mut allow) = (Table::new(), fake(2));
    let mut learn = |allow: &mut Fake, text, last, now_s| {
        let all = [answered(last, now_s + 10)];
        table.learn(allow, &name(text), grant(1), &all, now_s * SECOND)
    };
    learn(&mut allow, "a.test", 1, 0).unwrap();
    learn(&mut allow, "b.test", 1, 0).unwrap();
    learn(&mut allow, "c.test", 2, 5).unwrap();
    let kept = |names: &[(&str, u8)]| {
        let names = names.iter();
        names
            .map(|&(name, last)| (name.to_owned(), last))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        kept_names(&allow),
        kept(&[("a.test", 1), ("b.test", 1), ("c.test", 2)])
    );
    // The first address has expired and is evicted, with its names.
    learn(&mut allow, "d.test", 3, 12).unwrap();
    assert_eq!(kept_names(&allow), kept(&[("c.test", 2), ("d.test", 3)]));
    allow.refused.push(address(2));
    learn(&mut allow, "e.test", 2, 13).unwrap_err();
    assert_eq!(kept_names(&allow), kept(&[("c.test", 2), ("d.test", 3)]));
    // A name that is resolved again has the longer lifetime for the next agent, too.
    learn(&mut allow, "d.test", 3, 14).unwrap();
    assert_eq!(
        allow.names[&(address(3), name("d.test"))].expires_ns,
        24 * SECOND
    );
    table.sweep(&mut allow, &HashSet::new(), u64::MAX).unwrap();
    assert_eq!(kept_names(&allow), []);
}

#[test]
fn an_address_is_inserted_even_if_its_name_cannot_be_kept() {
    let (mut table, mut allow) = (Table::new(), fake(8));
    allow.most_names = Some(1);
    for text in ["a.test", "b.test"] {
        table
            .learn(&mut allow, &name(text), grant(1), &[answered(1, 10)], 0)
            .unwrap();
    }
    assert_eq!(table.names_of(&address(1)), ["a.test", "b.test"]);
    let lost = table.names_lost.take().map(|(times, _)| times);
    assert_eq!(lost, Some(1));
    assert!(table.names_lost.take().is_none());
}

#[test]
fn a_taken_over_name_gives_no_more_than_its_entry() {
    let grant = everything().classes(&name("a.test"));
    assert_eq!(grant, set(1));
    let entry = |bits| AllowEntry {
        classes: set(bits),
        internal_classes: ClassSet::EMPTY,
        expires_ns: 60 * SECOND,
    };
    let kept = |text, last, expires_s| Kept {
        address: address(last),
        name: name(text),
        by_stranger: false,
        expires_ns: expires_s * SECOND,
    };
    let kept = [
        // Kept for a response whose address was not inserted, or for longer than the entry.
        kept("a.test", 1, 60),
        kept("a.test", 2, 900),
        kept("lost.test", 9, 60),
        // The earlier agent gave the second class for a name that it could not keep.
        kept("a.test", 3, 10),
    ];
    let entries = vec![
        (address(1), entry(0b10)),
        (address(2), entry(0b01)),
        (address(3), entry(0b11)),
    ];
    let mut allow = fake(8);
    allow.entries = entries.iter().copied().collect();
    let rules = everything();
    let mut table = Table::taken_over(entries.clone(), &kept, Some(&rules));
    table.expire(&mut allow, 20 * SECOND).unwrap();
    assert_eq!(allow.entries[&address(1)], entry(0b10));
    assert_eq!(allow.entries[&address(2)], entry(0b01));
    // For the third address, the name's class has expired, and the other class stays.
    assert_eq!(allow.entries[&address(3)], entry(0b10));
    assert!(!allow.entries.contains_key(&address(9)));
    assert_eq!(table.nameless(), 2);

    // At an edit, names count by the new rules. Classes that no name accounts for are carried over if the
    // rules are alike.
    let mut next = fake(8);
    let over = table
        .carry_over(&rules, true, &mut next, 20 * SECOND)
        .unwrap();
    let all = [1, 2, 3].map(|last| classes(&next, last));
    assert_eq!(all, [0b11, 0b01, 0b10]);
    assert_eq!(over.nameless(), 2);
    // An agent that was killed may have left two interfaces under two versions.
    let twice = [entries.clone(), entries].concat();
    let unknown = Table::taken_over(twice, &kept, None);
    let mut next = fake(8);
    unknown.carry_over(&rules, false, &mut next, 0).unwrap();
    assert_eq!([1, 2, 3].map(|last| classes(&next, last)), [1, 1, 1]);
}
