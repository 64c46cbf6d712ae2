//! What `ClusterEgressPolicy` and `ClusterNetworkPolicy` have in common: a place in a tier, and ordered rules.

use std::sync::Arc;

use egress_policy::objects::{Tier, TierAction, TierPolicy, TierRule};
use serde_json::Value;

use crate::{cluster_egress_policy as ours, read::Reader};

/// The highest priority number.
pub(crate) const PRIORITY_MAX: u32 = 1000;

/// The place of a policy, and whether it could be read.
pub(crate) struct Place {
    pub(crate) tier: Tier,
    pub(crate) priority: u32,
    pub(crate) is_good: bool,
}

impl Place {
    /// Reads `tier` and `priority`. Rules whose place cannot be read come first.
    pub(crate) fn read(reader: &mut Reader<'_>) -> Self {
        let tier: Option<ours::Tier> = reader.required("tier");
        let mut priority: Option<u32> = reader.required("priority");
        if let Some(number) = priority.filter(|number| *number > PRIORITY_MAX) {
            let what = format!("is {number}: expected 0 to {PRIORITY_MAX}");
            reader.problem("priority", &what);
            priority = None;
        }
        Self {
            tier: tier.map_or(Tier::Admin, Into::into),
            priority: priority.unwrap_or(0),
            is_good: tier.is_some() && priority.is_some(),
        }
    }
}

/// Rules that are not lists, or not readable as a whole: everything is denied.
pub(crate) fn deny_everything(index: usize, name: Option<String>) -> TierRule {
    TierRule {
        name,
        index,
        action: TierAction::Deny,
        entries: vec!["*".to_owned()],
    }
}

/// The rule that takes the place of one that cannot be read. One whose action allows matches nothing, any other
/// denies everything.
pub(crate) fn fail_closed(index: usize, name: Option<String>, is_allow: bool) -> TierRule {
    if is_allow {
        TierRule {
            name,
            index,
            action: TierAction::Allow,
            entries: Vec::new(),
        }
    } else {
        deny_everything(index, name)
    }
}

/// Leaves of the rules of a policy only what takes away; `None` if nothing is left.
pub fn only_takes_away(policy: &TierPolicy) -> Option<TierPolicy> {
    let takes_away = |rule: &&TierRule| rule.action != TierAction::Allow;
    let mut rules: Vec<TierRule> = policy.rules.iter().filter(takes_away).cloned().collect();
    if rules.is_empty() {
        return None;
    }
    rules.iter_mut().for_each(tighten);
    Some(TierPolicy {
        name: Arc::clone(&policy.name),
        rules,
        ..*policy
    })
}

/// Leaves of a rule only what takes away: the rule may be meant for other pods, or for a later place.
pub(crate) fn tighten(rule: &mut TierRule) {
    match rule.action {
        TierAction::Allow => rule.entries.clear(),
        TierAction::Pass => rule.action = TierAction::Deny,
        TierAction::Deny => {}
    }
}

/// How messages name a rule.
pub(crate) fn rule_title(list: &str, index: usize, name: Option<&str>) -> String {
    match name {
        Some(name) if !name.is_empty() => format!("spec.{list}[{index}] ({name})"),
        _ => format!("spec.{list}[{index}]"),
    }
}

/// What follows for a rule that cannot be applied.
pub(crate) fn consequence(is_allow: bool) -> &'static str {
    if is_allow {
        "the rule matches nothing"
    } else {
        "the rule denies everything"
    }
}

/// The name in a rule of unknown form.
pub(crate) fn name_in(rule: &Value) -> Option<String> {
    let name = rule.get("name")?.as_str()?;
    (!name.is_empty()).then(|| name.to_owned())
}

impl From<ours::Tier> for Tier {
    fn from(tier: ours::Tier) -> Self {
        match tier {
            ours::Tier::Admin => Self::Admin,
            ours::Tier::Baseline => Self::Baseline,
        }
    }
}
