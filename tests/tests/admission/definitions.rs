//! The expressions in the definitions of policy objects (manifests/base/crds.yaml): the API server refuses no entry
//! that the agent reads, and it refuses common mistakes.

use std::rc::Rc;

use cel::{Context, Program, Value as Cel};
use proptest::prelude::*;
use serde_json::Value;

use egress_tests::yaml;

use crate::{
    READABLE, UNREADABLE, almost_entries, annotations,
    policy::{find, find_all},
    readable,
};

/// The schema of the entries of a list.
pub(crate) struct Entries {
    longest: usize,
    rules: Vec<(Program, Program, String)>,
}

impl Entries {
    /// The schema of `spec.<list>` of a kind; of a list in rules, `rules.entries`.
    pub(crate) fn of(kind: &str, list: &str) -> Self {
        let definitions = yaml::objects("base/crds.yaml");
        let mut definitions = definitions.iter();
        let definition = definitions.find(|one| one["spec"]["names"]["kind"] == kind);
        let definition = definition.expect("the definition");
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let mut schema = &schema["properties"]["spec"];
        for field in list.split('.') {
            schema = &schema["properties"][field];
            assert!(schema["maxItems"].is_u64(), "{field}: {schema}");
            schema = &schema["items"];
        }
        let compile = |text: &Value| {
            let text = text.as_str().expect("an expression");
            Program::compile(text).unwrap_or_else(|error| panic!("{text}\n{error}"))
        };
        let rules = schema["x-kubernetes-validations"].as_array();
        Self {
            longest: schema["maxLength"].as_u64().expect("a length") as usize,
            rules: rules
                .expect("rules")
                .iter()
                .map(|rule| {
                    let message = rule["message"].as_str().expect("a message");
                    let expression = rule.get("messageExpression");
                    let quoted = Value::String(format!("'{message}'"));
                    (
                        compile(&rule["rule"]),
                        compile(expression.unwrap_or(&quoted)),
                        message.to_owned(),
                    )
                })
                .collect(),
        }
    }

    /// The reason why the entry is refused, if it is.
    pub(crate) fn refused(&self, entry: &str) -> Option<String> {
        if entry.is_empty() || entry.chars().count() > self.longest {
            return Some("its length".to_owned());
        }
        let mut context = Context::default();
        context.add_function("findAll", find_all).expect("findAll");
        context.add_function("find", find).expect("find");
        context.add_variable("self", entry).expect("self");
        for (program, message, name) in &self.rules {
            match program.execute(&context) {
                Ok(Cel::Bool(true)) => {}
                // The API server also refuses expressions that it cannot evaluate.
                Ok(Cel::Bool(false)) | Err(_) => match message.execute(&context) {
                    Ok(Cel::String(text)) => return Some(text.to_string()),
                    other => panic!("{name}: no message: {other:?}"),
                },
                other => panic!("{name}: no verdict: {other:?}"),
            }
        }
        None
    }
}

pub(crate) fn is_readable(list: &str, entry: &str) -> bool {
    readable(&annotations(&[(list, entry)])).is_ok()
}

/// The entries of a list of annotations.
pub(crate) fn entries_of(list: &str) -> Vec<&str> {
    let lines = list.lines().map(|line| line.split('#').next());
    let entries = lines
        .flatten()
        .flat_map(|line| line.split(|c: char| c == ',' || c.is_whitespace()));
    entries.filter(|entry| !entry.is_empty()).collect()
}

#[test]
fn entries_that_the_agent_reads_are_not_refused() {
    for list in ["allow", "deny", "resolve"] {
        let schema = Entries::of("EgressPolicy", list);
        for entry in READABLE.iter().copied().flat_map(entries_of) {
            let refused = schema.refused(entry);
            assert_eq!(
                refused.is_none(),
                is_readable(list, entry),
                "{list}: {entry}: {refused:?}"
            );
        }
    }
    let rules = Entries::of("ClusterEgressPolicy", "rules.entries");
    for entry in READABLE.iter().copied().flat_map(entries_of) {
        assert_eq!(rules.refused(entry), None, "{entry}");
    }
}

#[test]
fn entries_that_use_a_set_are_not_refused() {
    let schema = Entries::of("EgressPolicy", "allow");
    for entry in [
        "@github",
        "@github:443",
        "@github:443/tcp",
        "@a.b-c/icmp",
        "@a:1-2/udp",
    ] {
        assert_eq!(schema.refused(entry), None, "{entry}");
    }
    for entry in [
        "@", "@:443", "@GitHub", "@a b", "@a:https", "@-a", "@a:70000",
    ] {
        assert!(schema.refused(entry).is_some(), "{entry}");
    }
}

#[test]
fn mistyped_entries_are_refused_and_named() {
    let schema = Entries::of("EgressPolicy", "allow");
    for entry in UNREADABLE {
        let message = schema.refused(entry);
        let message = message.unwrap_or_else(|| panic!("{entry} is accepted"));
        assert!(
            message.contains(&format!("`{entry}`")),
            "{entry}: {message}"
        );
    }
    let longest = format!("{}.example:443", "a".repeat(300));
    assert!(schema.refused(&longest).is_some());
}

#[test]
fn a_set_has_destinations_without_ports() {
    let schema = Entries::of("EgressSet", "destinations");
    for entry in [
        "github.com",
        "*.github.com",
        "api-*.github.com",
        "bücher.example",
        "203.0.113.7",
        "10.0.0.0/8",
        "2001:db8::7",
        "2001:db8::/32",
    ] {
        assert_eq!(schema.refused(entry), None, "{entry}");
    }
    for entry in [
        "github.com:443",
        "github.com/tcp",
        "203.0.113.7:443",
        "10.0.0.0/8/tcp",
        "[2001:db8::7]",
        "[2001:db8::7]:443",
        "2001:db8::/32/tcp",
        "10.0.0.1/8",
        "@other",
    ] {
        assert!(schema.refused(entry).is_some(), "{entry}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_entry_that_the_agent_reads_is_refused(entry in almost_entries(), list in 0..3_usize) {
        let schemas = SCHEMAS.with(Rc::clone);
        let is_one = entries_of(&entry) == [entry.as_str()];
        if is_one && is_readable(LISTS[list], &entry) {
            prop_assert_eq!(schemas[list].refused(&entry), None);
        }
    }
}

pub(crate) const LISTS: [&str; 3] = ["allow", "deny", "resolve"];

thread_local! {
    /// Compilation takes longer than matching.
    static SCHEMAS: Rc<[Entries; 3]> =
        Rc::new(LISTS.map(|list| Entries::of("EgressPolicy", list)));
}
