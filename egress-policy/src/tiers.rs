//! Ordered rules before and after what annotations and namespaced policies say.
//!
//! Objects of one tier are evaluated by priority, the lowest first, and the rules of an object in their order. Two
//! objects of one priority come by kind, namespace and name, but the denials with which each begins come first.

use std::{cmp::Reverse, sync::Arc};

use super::{
    annotations::{self, Written},
    effective::{self, Rule},
    error::{Origin, Problem, RuleName},
    objects::{ObjectKind, Objects, Tier, TierAction, TierPolicy, TierRule},
    sets::Sets,
};

/// What happens to packets that match an ordered rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Effect {
    pub(super) action: TierAction,
    /// Whether a denial is only about connections that the pod opens. Rules of a `ClusterNetworkPolicy` are about connections,
    /// and egress rules about those that the pod opens.
    pub(super) spares_answers: bool,
}

impl Effect {
    fn of(policy: &TierPolicy, action: TierAction) -> Self {
        let is_about_connections = policy.name.kind == ObjectKind::ClusterNetworkPolicy;
        Self {
            action,
            spares_answers: is_about_connections && action == TierAction::Deny,
        }
    }
}

/// Rules of one effect that follow each other. Their order among themselves means nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) effect: Effect,
    pub(super) rules: Vec<Rule>,
}

/// The rules of both tiers, in the order of evaluation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tiers {
    pub(super) admin: Vec<Run>,
    pub(super) baseline: Vec<Run>,
}

impl Tiers {
    /// Whether no object with ordered rules selects the pod.
    pub(super) fn is_empty(&self) -> bool {
        self.admin.is_empty() && self.baseline.is_empty()
    }

    /// All rules with their actions, in order.
    pub(super) fn rules(&self) -> impl Iterator<Item = (TierAction, &Rule)> {
        let runs = self.admin.iter().chain(&self.baseline);
        runs.flat_map(|run| run.rules.iter().map(|rule| (run.effect.action, rule)))
    }
}

/// Parses the rules of the objects, and adds a warning for two objects with the same priority.
pub(super) fn read(
    objects: &Objects,
    sets: &Sets<'_>,
    problems: &mut Vec<Problem>,
    warnings: &mut Vec<String>,
) -> Tiers {
    let mut tier = |tier: Tier| {
        let mut policies: Vec<&TierPolicy> = objects
            .tiers
            .iter()
            .map(Arc::as_ref)
            .filter(|policy| policy.tier == tier)
            .collect();
        policies.sort_by_key(|policy| (policy.priority, &policy.name));
        let mut runs: Vec<Run> = Vec::new();
        for same in policies.chunk_by(|a, b| a.priority == b.priority) {
            if let [first, second, ..] = same {
                warnings.push(format!(
                    "{} and {} have the same tier and priority ({}): denials with which one of them begins come \
                     first, then {} as a whole; give them different priorities",
                    first.name, second.name, first.priority, first.name
                ));
            }
            for (policy, rule) in in_order(same) {
                let origin = Origin::Rule(Arc::new(RuleName {
                    object: Arc::clone(&policy.name),
                    index: rule.index,
                    name: rule.name.clone(),
                }));
                let written = annotations::read_rule(rule, &origin, sets, problems);
                let effect = Effect::of(policy, rule.action);
                let rules = rules(rule.action, &written);
                match runs.last_mut() {
                    Some(last) if last.effect == effect => last.rules.extend(rules),
                    _ => runs.push(Run { effect, rules }),
                }
            }
        }
        runs
    };
    Tiers {
        admin: tier(Tier::Admin),
        baseline: tier(Tier::Baseline),
    }
}

/// The rules of objects of one priority, in the order of evaluation.
fn in_order<'a>(
    policies: &[&'a TierPolicy],
) -> impl Iterator<Item = (&'a TierPolicy, &'a TierRule)> {
    let mut rules: Vec<_> = policies
        .iter()
        .flat_map(|policy| {
            let denials = policy
                .rules
                .iter()
                .take_while(|rule| rule.action == TierAction::Deny)
                .count();
            let numbered = policy.rules.iter().enumerate();
            numbered.map(move |(number, rule)| (number < denials, *policy, rule))
        })
        .collect();
    // The sort is stable.
    rules.sort_by_key(|(is_first_denial, ..)| Reverse(*is_first_denial));
    rules.into_iter().map(|(_, policy, rule)| (policy, rule))
}

/// The rules of the entries. An entry without protocol that denies or passes on means every protocol; one that allows
/// means what it means in annotations.
fn rules(action: TierAction, written: &[Written]) -> Vec<Rule> {
    match action {
        TierAction::Allow => effective::allow_rules(Some(written)),
        TierAction::Deny | TierAction::Pass => effective::deny_rules(Some(written)),
    }
}
