//! The classes of a policy: the meaning of the bits of a [`ClassSet`], in the order of precedence.

use std::collections::BTreeSet;

use egress_common::{
    classes::{ClassSet, PortTable, TooManyIntervals},
    limits::{CLASSES, PORT_INTERVALS},
    records::{Policy, PortClass},
};

use super::{
    effective::Rule,
    entry::Destination,
    error::{PolicyError, Problem},
    limits::check_limit,
    objects::TierAction,
    tiers::{Effect, Run, Tiers},
};

/// The action of a class, and its precedence: the derived order. A number is the place of the run of
/// rules in its tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Action {
    Admin(usize, Effect),
    /// A list denies.
    Deny,
    /// A list allows.
    Allow,
    /// [`Rule::under_any`].
    AllowUnderAny,
    Baseline(usize, Effect),
}

impl Action {
    pub(super) fn denies(self) -> bool {
        self == Self::Deny || self.is_ordered(TierAction::Deny)
    }

    /// Whether this is an ordered rule with this action.
    fn is_ordered(self, action: TierAction) -> bool {
        self.effect().is_some_and(|effect| effect.action == action)
    }

    /// The effect of an ordered rule.
    fn effect(self) -> Option<Effect> {
        match self {
            Self::Admin(_, effect) | Self::Baseline(_, effect) => Some(effect),
            Self::Deny | Self::Allow | Self::AllowUnderAny => None,
        }
    }
}

/// All rules that decide about packets, each with its action.
pub(super) fn with_actions<'a>(
    tiers: &'a Tiers,
    allow: &'a [Rule],
    deny: &'a [Rule],
) -> impl Iterator<Item = (Action, &'a Rule)> {
    let allowed = allow.iter().map(|rule| {
        let action = if rule.under_any {
            Action::AllowUnderAny
        } else {
            Action::Allow
        };
        (action, rule)
    });
    of_runs(&tiers.admin, Action::Admin)
        .chain(deny.iter().map(|rule| (Action::Deny, rule)))
        .chain(allowed)
        .chain(of_runs(&tiers.baseline, Action::Baseline))
}

fn of_runs(
    runs: &[Run],
    action: fn(usize, Effect) -> Action,
) -> impl Iterator<Item = (Action, &Rule)> {
    runs.iter().enumerate().flat_map(move |(place, run)| {
        let action = action(place, run.effect);
        run.rules.iter().map(move |rule| (action, rule))
    })
}

/// The distinct (action, protocols, ports) of a policy, in order.
pub(super) struct Classes {
    distinct: Vec<(Action, PortClass)>,
    /// Whether there are ordered rules. Names that lists deny have a class only then: otherwise nobody resolves them.
    ordered: bool,
}

impl Classes {
    /// `ordered` tells whether objects with ordered rules select the pod.
    pub(super) fn new(
        ordered: bool,
        tiers: &Tiers,
        allow: &[Rule],
        deny: &[Rule],
    ) -> Result<Self, PolicyError> {
        let mut classes = Self {
            distinct: Vec::new(),
            ordered,
        };
        let distinct: BTreeSet<(Action, PortClass)> = with_actions(tiers, allow, deny)
            .filter(|(action, rule)| classes.has_class(*action, rule))
            .map(|(action, rule)| (action, rule.class))
            .collect();
        check_limit(
            "classes (distinct rule, action, protocol and port range)",
            distinct.len(),
            CLASSES,
        )?;
        classes.distinct = distinct.into_iter().collect();
        Ok(classes)
    }

    /// All of them.
    pub(super) fn all(&self) -> ClassSet {
        let mut all = ClassSet::EMPTY;
        for index in 0..self.distinct.len() {
            all |= ClassSet::one(index as u8);
        }
        all
    }

    /// The classes of the rules of `others`, whose actions are `moved` here. Their order is the same.
    pub(super) fn counterparts(&self, others: &Self, moved: impl Fn(Action) -> Action) -> ClassSet {
        let mut found = ClassSet::EMPTY;
        for (action, class) in &others.distinct {
            found |= self.number(&(moved(*action), *class));
        }
        found
    }

    /// The action of the class with this number.
    pub(super) fn action(&self, class: u8) -> Option<Action> {
        let (action, _) = self.distinct.get(usize::from(class))?;
        Some(*action)
    }

    fn has_class(&self, action: Action, rule: &Rule) -> bool {
        self.ordered || !action.denies() || !matches!(rule.destination, Destination::Names(_))
    }

    /// The set of the rule's class; empty if it has none.
    pub(super) fn bit(&self, action: Action, rule: &Rule) -> ClassSet {
        if !self.has_class(action, rule) {
            return ClassSet::EMPTY;
        }
        self.number(&(action, rule.class))
    }

    fn number(&self, class: &(Action, PortClass)) -> ClassSet {
        let found = self.distinct.binary_search(class);
        found.map_or(ClassSet::EMPTY, |index| ClassSet::one(index as u8))
    }

    /// The kernel's record, as far as it follows from the classes.
    pub(super) fn record(&self) -> Result<Policy, PolicyError> {
        let mut record = Policy::CLOSED;
        for (index, (action, class)) in self.distinct.iter().enumerate() {
            record.classes[index] = *class;
            let bit = ClassSet::one(index as u8);
            if action.denies() {
                record.deny |= bit;
            }
            match action {
                Action::Admin(..) => record.admin |= bit,
                Action::Baseline(..) => record.baseline |= bit,
                Action::AllowUnderAny => record.under_any |= bit,
                Action::Allow | Action::Deny => {}
            }
            if action.is_ordered(TierAction::Pass) {
                record.pass |= bit;
            }
            if action.effect().is_some_and(|effect| effect.spares_answers) {
                record.spares_answers |= bit;
            }
        }
        let classes = &record.classes[..self.distinct.len()];
        record.ports = PortTable::of(classes).map_err(|TooManyIntervals { needed }| {
            let what = "intervals of ports between the borders of its port ranges";
            PolicyError::from_problem(Problem::limit(what, needed, PORT_INTERVALS))
        })?;
        Ok(record)
    }
}
