//! Annotations from their text to their compiled form.

mod errors;
mod rules;
mod tiers;
mod who_may_grant;

use crate::Inputs;
use std::collections::BTreeMap;

use egress_common::records::POLICY_OPEN;

use super::{Annotations, Compiled, QuestionRule, Settings, compile};
use egress_dns::Name;

fn annotations(pairs: &[(&str, &str)]) -> Annotations {
    let map: BTreeMap<String, String> = pairs
        .iter()
        .map(|(key, value)| (format!("egress-agent.dev/{key}"), (*value).to_owned()))
        .collect();
    Annotations::from_map(&map)
}

fn compiled(pod: &[(&str, &str)], namespace: &[(&str, &str)], settings: &Settings) -> Compiled {
    compile(
        Inputs::annotations(&annotations(pod), &annotations(namespace)),
        settings,
    )
    .unwrap()
}

fn name(text: &str) -> Name {
    Name::from_labels(text.split('.').map(str::as_bytes)).unwrap()
}

fn question(compiled: &Compiled, text: &str) -> QuestionRule {
    compiled.names.question(&name(text), false)
}

fn is_open(compiled: &Compiled) -> bool {
    compiled.record.flags & POLICY_OPEN != 0
}
