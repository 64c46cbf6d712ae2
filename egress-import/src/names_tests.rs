//! Compares the names that translated names match with the products' own meaning of `*`.

use egress_dns::Name;
use egress_policy::name_pattern;
use proptest::prelude::*;

use super::*;

const ALL: [Wildcards; 5] = [
    Wildcards::None,
    Wildcards::Within,
    Wildcards::OneLabel,
    Wildcards::Labels,
    Wildcards::Text,
];

fn names(text: &str, wildcards: Wildcards, verb: Verb) -> Vec<String> {
    translate(text, wildcards, verb, false).names
}

#[test]
fn a_name_stays_as_it_is() {
    for wildcards in ALL {
        assert_eq!(
            names("API.example.com.", wildcards, Verb::Allow),
            ["api.example.com"]
        );
    }
}

#[test]
fn a_wildcard_for_one_label_is_left_out_of_allow_and_offered() {
    for wildcards in [Wildcards::Within, Wildcards::OneLabel] {
        let translated = translate("*.example.com", wildcards, Verb::Allow, false);
        assert!(translated.names.is_empty());
        assert_eq!(translated.wider.as_deref(), Some("*.example.com"));
        assert!(translated.left_out.is_some());
        assert_eq!(
            names("*.example.com", wildcards, Verb::Deny),
            ["*.example.com"]
        );
        let deep = translate("*.example.com", wildcards, Verb::Allow, true);
        assert_eq!(deep.names, ["*.example.com"]);
        assert!(deep.note.unwrap().starts_with("wider than the original"));
    }
}

#[test]
fn wildcards_that_mean_the_same_stay_without_a_note() {
    for (text, wildcards) in [
        ("api-*.example.com", Wildcards::Within),
        ("s3.*.example.com", Wildcards::Within),
        ("s3.*.example.com", Wildcards::OneLabel),
        ("*.example.com", Wildcards::Labels),
        ("*.example.com", Wildcards::Text),
    ] {
        let translated = translate(text, wildcards, Verb::Allow, false);
        assert_eq!(translated, Translated::exactly(text.to_owned()), "{text}");
    }
}

#[test]
fn any_text_before_a_suffix_is_two_entries() {
    assert_eq!(
        names("*example.com", Wildcards::Text, Verb::Allow),
        ["*example.com", "*.*example.com"]
    );
}

#[test]
fn a_wildcard_in_the_middle_is_narrower_in_allow_and_wider_in_deny() {
    for wildcards in [Wildcards::Labels, Wildcards::Text] {
        let allow = translate("a.*.example.com", wildcards, Verb::Allow, false);
        assert_eq!(allow.names, ["a.*.example.com"]);
        assert!(allow.note.unwrap().starts_with("narrower"));
        assert_eq!(
            names("a.*.example.com", wildcards, Verb::Deny),
            ["*.example.com"]
        );
        assert!(names("a.*.example.com", wildcards, Verb::Pass).is_empty());
    }
}

#[test]
fn all_names_are_left_out_of_allow() {
    for wildcards in [Wildcards::Within, Wildcards::Labels, Wildcards::Text] {
        let translated = translate("*", wildcards, Verb::Allow, true);
        assert!(translated.names.is_empty());
        assert_eq!(translated.wider.as_deref(), Some("*"));
        assert_eq!(names("*", wildcards, Verb::Deny), ["*"]);
        assert!(names("example.*", wildcards, Verb::Allow).is_empty());
    }
}

/// Whether a product's pattern matches a name, by the definition in the product's documents.
fn theirs(pattern: &str, name: &str, wildcards: Wildcards) -> bool {
    let labels = |text: &str| text.split('.').map(str::to_owned).collect::<Vec<_>>();
    match wildcards {
        Wildcards::None => pattern == name,
        Wildcards::Text => glob(pattern.as_bytes(), name.as_bytes()),
        Wildcards::Within | Wildcards::OneLabel => {
            let (pattern, name) = (labels(pattern), labels(name));
            pattern.len() == name.len()
                && pattern
                    .iter()
                    .zip(&name)
                    .all(|(pattern, label)| glob(pattern.as_bytes(), label.as_bytes()))
        }
        Wildcards::Labels => some_labels(&labels(pattern), &labels(name)),
    }
}

fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|n| glob(rest, &text[n..])),
        Some((byte, rest)) => text.first() == Some(byte) && glob(rest, &text[1..]),
    }
}

fn some_labels(pattern: &[String], name: &[String]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some((label, rest)) if label == "*" => {
            (1..=name.len()).any(|n| some_labels(rest, &name[n..]))
        }
        Some((label, rest)) => name.first() == Some(label) && some_labels(rest, &name[1..]),
    }
}

fn ours(entries: &[String], name: &str) -> bool {
    let name = Name::from_labels(name.split('.').map(str::as_bytes)).unwrap();
    entries.iter().any(|entry| {
        entry == "*" || name_pattern(entry).is_ok_and(|pattern| pattern.matches(&name))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn an_allowed_name_is_allowed_by_the_original_and_a_denied_one_stays_denied(
        pattern in "(([ab]|\\*|a\\*|\\*b|a\\*b)\\.){0,3}(b|c|\\*)",
        name in "([ab]{1,3}\\.){0,4}(b|c)",
        wildcards in prop::sample::select(&ALL[1..]),
    ) {
        // Products with whole labels do not accept `*` within a label.
        let whole = pattern.split('.').all(|label| label == "*" || !label.contains('*'));
        if !whole && !matches!(wildcards, Wildcards::Within | Wildcards::Text) {
            return Ok(());
        }
        let theirs = theirs(&pattern, &name, wildcards);
        let allowed = names(&pattern, wildcards, Verb::Allow);
        if ours(&allowed, &name) {
            prop_assert!(theirs, "{allowed:?} allows {name}, and {pattern} does not");
        }
        let denied = names(&pattern, wildcards, Verb::Deny);
        if theirs {
            prop_assert!(ours(&denied, &name), "{pattern} denies {name}, and {denied:?} does not");
        }
        let passed = translate(&pattern, wildcards, Verb::Pass, false).names;
        if !passed.is_empty() {
            prop_assert_eq!(ours(&passed, &name), theirs);
        }
    }
}
