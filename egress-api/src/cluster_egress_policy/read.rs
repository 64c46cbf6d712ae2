//! Reads a `ClusterEgressPolicy`.

use std::sync::Arc;

use egress_policy::objects::{ObjectName, TierAction, TierPolicy, TierRule};
use serde_json::Value;

use super::{Action, Rule};
use crate::{
    policy::{Body, ONLY_TAKES_AWAY, Policy, PolicySubject, selector},
    read::Reader,
    tiers::{Place, consequence, deny_everything, fail_closed, name_in, rule_title, tighten},
};

const FIELDS: &[&str] = &[
    "tier",
    "priority",
    "namespaceSelector",
    "podSelector",
    "rules",
];
const RULE_FIELDS: &[&str] = &["name", "action", "entries"];

pub(crate) fn policy(name: Arc<ObjectName>, reader: &mut Reader<'_>) -> Policy {
    let mut is_good = reader.expect_only(FIELDS).is_ok();
    let place = Place::read(reader);
    is_good &= place.is_good;
    let subject = PolicySubject {
        namespaces: selector(reader, "namespaceSelector", &mut is_good),
        pods: selector(reader, "podSelector", &mut is_good),
        ..PolicySubject::default()
    };
    let mut problems = Vec::new();
    let mut rules: Vec<TierRule> = match reader.required::<Vec<Value>>("rules") {
        Some(rules) => {
            let rules = rules.iter().enumerate();
            rules
                .map(|(index, written)| rule(index, written, &mut problems))
                .collect()
        }
        None => vec![deny_everything(0, None)],
    };
    if !is_good {
        rules.iter_mut().for_each(tighten);
        reader.problems.push(ONLY_TAKES_AWAY.to_owned());
    }
    reader.problems.append(&mut problems);
    let body = TierPolicy {
        name: Arc::clone(&name),
        tier: place.tier,
        priority: place.priority,
        rules,
    };
    Policy {
        name,
        subject: Arc::new(subject),
        body: Body::Tier(Arc::new(body)),
        is_complete: reader.problems.is_empty(),
        problems: std::mem::take(&mut reader.problems),
    }
}

fn rule(index: usize, written: &Value, problems: &mut Vec<String>) -> TierRule {
    let name = name_in(written);
    let title = rule_title("rules", index, name.as_deref());
    let mut reader = Reader::new(written, title);
    let is_known = reader.expect_only(RULE_FIELDS).is_ok();
    let read = serde_json::from_value::<Rule>(written.clone());
    match read {
        Ok(rule) if is_known => TierRule {
            name,
            index,
            action: rule.action.into(),
            entries: rule.entries,
        },
        read => {
            let is_allow = written["action"] == "Allow";
            if let Err(error) = read {
                let title = rule_title("rules", index, name.as_deref());
                reader
                    .problems
                    .push(format!("{title} cannot be read: {error}"));
            }
            let what = reader.problems.join("; ");
            problems.push(format!("{what}: {}", consequence(is_allow)));
            fail_closed(index, name, is_allow)
        }
    }
}

impl From<Action> for TierAction {
    fn from(action: Action) -> Self {
        match action {
            Action::Allow => Self::Allow,
            Action::Deny => Self::Deny,
            Action::Pass => Self::Pass,
        }
    }
}
