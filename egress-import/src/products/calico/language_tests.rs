//! Calico's selectors and their translations.

use super::*;
use crate::selector::words;

fn pods(text: &str) -> Result<String, String> {
    let Subject { namespaces, pods } = Expression::read(text)?.subject()?;
    assert_eq!(namespaces, LabelSelector::default(), "{text}");
    Ok(words(&pods))
}

#[test]
fn what_a_selector_of_labels_can_say_is_translated() {
    for (text, expected) in [
        ("", "all"),
        ("all()", "all"),
        ("app == 'web'", "app=web"),
        ("app == \"web\" && has(tier)", "app=web, tier Exists ()"),
        ("!has(tier)", "tier DoesNotExist ()"),
        ("app != 'web'", "app NotIn (web)"),
        ("zone in {'a', 'b'}", "zone In (a, b)"),
        ("zone not in {'a','b'}", "zone NotIn (a, b)"),
        ("!(zone in {'a', 'b'})", "zone NotIn (a, b)"),
        ("app == 'a' || app == 'b'", "app In (a, b)"),
        (
            "!(app == 'a' || has(x))",
            "app NotIn (a), x DoesNotExist ()",
        ),
        ("(app == 'web') && (tier == 'front')", "app=web, tier=front"),
        ("a.b/c-d == 'x_y.z'", "a.b/c-d=x_y.z"),
        ("projectcalico.org/orchestrator == 'k8s'", "all"),
        ("!(!has(x))", "x Exists ()"),
        ("app == 'a' && app == 'b'", "app=a, app In (b)"),
    ] {
        assert_eq!(pods(text).as_deref(), Ok(expected), "{text}");
    }
}

#[test]
fn what_it_cannot_say_is_refused() {
    for text in [
        "app == 'a' || tier == 'b'",
        "app contains 'a'",
        "app starts with 'a'",
        "app ends with 'a'",
        "!(app == 'a' && has(x))",
        "!all()",
        "global()",
        "app in {}",
        "projectcalico.org/serviceaccount == 'x'",
        "projectcalico.org/orchestrator == 'cni'",
    ] {
        assert!(pods(text).is_err(), "{text}");
    }
}

#[test]
fn nonsense_is_refused() {
    for text in [
        "app",
        "app ==",
        "app == web",
        "== 'a'",
        "(app == 'a'",
        "app == 'a",
        "app == 'a' 'b'",
        "has()",
        "ä == 'a'",
    ] {
        assert!(Expression::read(text).is_err(), "{text}");
    }
    assert!(Expression::read(&"!".repeat(10_000)).is_err());
    assert!(Expression::read(&"(".repeat(10_000)).is_err());
}

#[test]
fn labels_of_namespaces_select_namespaces() {
    let subject = Expression::read("projectcalico.org/namespace == 'shop' && app == 'web'")
        .unwrap()
        .subject()
        .unwrap();
    assert_eq!(
        words(&subject.namespaces),
        "kubernetes.io/metadata.name=shop"
    );
    assert_eq!(words(&subject.pods), "app=web");
    let namespaces = Expression::read("projectcalico.org/name == 'shop' && team == 'a'")
        .unwrap()
        .namespaces()
        .unwrap();
    assert_eq!(
        words(&namespaces),
        "kubernetes.io/metadata.name=shop, team=a"
    );
}

#[test]
fn labels_of_sets_are_compared() {
    let labels: BTreeMap<String, String> =
        [("role".to_owned(), "db".to_owned())].into_iter().collect();
    for (text, expected) in [
        ("role == 'db'", true),
        ("role != 'db'", false),
        ("has(zone)", false),
        ("role starts with 'd' || has(zone)", true),
        ("!(role contains 'x')", true),
        ("global()", false),
    ] {
        assert_eq!(
            Expression::read(text).unwrap().matches(&labels),
            expected,
            "{text}"
        );
    }
}
