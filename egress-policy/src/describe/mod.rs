//! Describes a policy, for `egress-agent check`: its rules in the order of evaluation, and where each comes from.

mod text;

use egress_common::records::POLICY_SPEAKS_OF_NAMES;

use super::{
    Closer, Compiled, Inputs, Mode, ModeSource, Origin, PolicyError, Settings,
    annotations::At,
    compile,
    effective::{self, Effective, Rule},
    entry::{Destination, class_words},
    explain::List,
    objects::{Tier, TierAction},
    tiers::Run,
};

/// The meaning of a policy for a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// The mode.
    pub mode: Mode,
    /// Who sets it.
    pub mode_by: ModeSource,
    /// The rules in effect, in the order of evaluation. Of annotations and namespaced policies, `deny` is before
    /// `allow`, and the order within each of the two means nothing.
    pub rules: Vec<DescribedRule>,
    /// Whether everything may be reached that no rule denies, except protected addresses.
    pub open: bool,
    /// What closes the pod.
    pub closed_by: Vec<Closer>,
    /// Whether the tier `Baseline` is asked about internal destinations only.
    pub baseline_for_internal: bool,
    /// Whether internal destinations may be reached that no rule denies.
    pub reaches_internal: bool,
    /// Further facts about the whole, each a sentence without its period.
    pub notes: Vec<String>,
    /// Warnings for the author.
    pub warnings: Vec<String>,
}

/// A rule in effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescribedRule {
    /// Its tier; `None` for annotations and namespaced policies.
    pub tier: Option<Tier>,
    /// Its list, or the action of its rule.
    pub list: List,
    /// The destination.
    pub destination: String,
    /// The packets that it matches.
    pub packets: String,
    /// The text of its entry.
    pub entry: String,
    /// The object with the entry.
    pub origin: Origin,
    /// The place of the entry there.
    pub at: At,
}

impl DescribedRule {
    /// The annotation's key, or the path of the object's list.
    pub fn path(&self) -> String {
        match &self.origin {
            Origin::Pod | Origin::Namespace => {
                format!("{}{}", super::annotations::PREFIX, self.list.as_str())
            }
            Origin::Policy(_) => format!("spec.{}", self.list.as_str()),
            Origin::Rule(rule) => format!("spec.rules[{}].entries", rule.index),
            Origin::Service(_) => "endpoints".to_owned(),
        }
    }
}

/// Describes what concerns a pod.
///
/// # Errors
///
/// As [`compile()`].
pub fn describe(inputs: Inputs<'_>, settings: &Settings) -> Result<Description, PolicyError> {
    // Exceeding a limit of the compiled form is an error here too.
    let compiled = compile(inputs, settings)?;
    let effective = effective::resolve(inputs, settings)?;
    Ok(Description::of(effective, settings, &compiled))
}

impl Description {
    fn of(effective: Effective, settings: &Settings, compiled: &Compiled) -> Self {
        let Effective {
            mode,
            mode_by,
            open,
            closed_by,
            selected,
            tiers,
            allow,
            deny,
            resolve,
            warnings: _,
        } = effective;
        let reaches_any = allow
            .iter()
            .any(|rule| rule.destination == Destination::Any);
        let mut rules = Vec::new();
        rules.extend(ordered(Tier::Admin, &tiers.admin));
        rules.extend(listed(List::Deny, &deny));
        rules.extend(listed(List::Allow, &allow));
        rules.extend(listed(List::Resolve, &resolve));
        rules.extend(ordered(Tier::Baseline, &tiers.baseline));
        let mut notes = Vec::new();
        if reaches_any {
            notes.push("protected addresses only with an entry that names the address".to_owned());
        }
        notes.push(if compiled.names.allows_unlisted() {
            "every name may be queried, unless denied".to_owned()
        } else {
            format!(
                "names in {} may always be queried, unless denied",
                settings.cluster_domain
            )
        });
        if compiled.record.flags & POLICY_SPEAKS_OF_NAMES != 0 {
            notes.push(
                "DNS servers other than resolvers only with an entry that names the address"
                    .to_owned(),
            );
        }
        Self {
            mode,
            mode_by,
            rules,
            open,
            closed_by,
            baseline_for_internal: selected,
            reaches_internal: open || settings.allow_internal,
            notes,
            warnings: compiled.warnings.clone(),
        }
    }

    /// Whether no packet is judged, and nothing is written that could take effect in another mode.
    pub fn says_nothing(&self) -> bool {
        self.mode == Mode::Off && self.rules.is_empty()
    }
}

/// The rules of a tier.
fn ordered(tier: Tier, runs: &[Run]) -> impl Iterator<Item = DescribedRule> {
    runs.iter().flat_map(move |run| {
        let list = match run.effect.action {
            TierAction::Allow => List::Allow,
            TierAction::Deny => List::Deny,
            TierAction::Pass => List::Pass,
        };
        run.rules
            .iter()
            .map(move |rule| described(Some(tier), list, rule, class_words(&rule.class)))
    })
}

/// The rules of a list, by destination.
fn listed(list: List, rules: &[Rule]) -> Vec<DescribedRule> {
    let mut rules: Vec<&Rule> = rules.iter().collect();
    rules.sort_by(|rule, other| {
        (&rule.destination, rule.class, &rule.origin).cmp(&(
            &other.destination,
            other.class,
            &other.origin,
        ))
    });
    let packets = |rule: &Rule| match (list, &rule.destination) {
        (List::Resolve, _) => String::new(),
        (List::Deny, Destination::Names(_)) => "queries are refused".to_owned(),
        _ => class_words(&rule.class),
    };
    let rules = rules.into_iter();
    rules
        .map(|rule| described(None, list, rule, packets(rule)))
        .collect()
}

fn described(tier: Option<Tier>, list: List, rule: &Rule, packets: String) -> DescribedRule {
    DescribedRule {
        tier,
        list,
        destination: match &rule.destination {
            Destination::Any => "* (anywhere)".to_owned(),
            other => other.to_string(),
        },
        packets,
        entry: rule.text.clone(),
        origin: rule.origin.clone(),
        at: rule.at,
    }
}
