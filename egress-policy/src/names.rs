//! The rules about names: whether a name may be queried, and the classes of its addresses.

use std::{collections::HashMap, fmt, sync::Arc};

use egress_common::classes::ClassSet;
use egress_dns::Name;

use super::{
    EntrySource, Settings,
    openings::Openings,
    pattern::{LabelGlobs, NamePattern},
    search_list::Form,
};

/// Whether a query may be sent to the resolver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuestionRule {
    /// It may be sent.
    Allowed,
    /// A `deny` entry matches the name.
    Denied,
    /// No entry could allow the name.
    NotListed,
}

/// The names, besides those of the cluster, that may resolve to internal addresses where internal addresses
/// need an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InternalAnswers {
    /// Every name.
    All,
    /// The names that match one of these patterns.
    Names(Vec<NamePattern>),
}

impl InternalAnswers {
    fn has(&self, name: &Name) -> bool {
        match self {
            Self::All => true,
            Self::Names(patterns) => patterns.iter().any(|pattern| pattern.matches(name)),
        }
    }
}

/// The text for an error or a fingerprint.
impl fmt::Display for InternalAnswers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Names(patterns) => patterns
                .iter()
                .try_for_each(|pattern| write!(f, "{pattern} ")),
        }
    }
}

/// The permissions that a name gives to its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Their classes.
    pub classes: ClassSet,
    /// Whether internal addresses get the classes too.
    pub internal: MayBeInternal,
}

/// Whether a name may resolve to internal addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MayBeInternal {
    /// Yes.
    Yes,
    /// Only if no name in the chain is a stranger's.
    WithoutStrangers,
    /// No.
    No,
}

/// The entries for one name pattern.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NameRule {
    /// Classes of the entries.
    pub(super) classes: ClassSet,
    /// Whether an `allow` or `resolve` entry has the pattern. Under ordered rules only `resolve` entries count:
    /// for the others see [`Openings`].
    pub(super) queryable: bool,
    /// The first entry that denies the pattern.
    pub(super) denied: Option<EntrySource>,
}

/// What entries say about querying a name.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    queryable: bool,
    denied: bool,
}

/// The rules about names. A lookup takes time proportional to the number of a name's labels, not to
/// the number of entries; only patterns with `*` inside a label are tried one by one. Lookups do
/// not allocate, except for names below the cluster domain if the resolver walks search lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameRules {
    exactly: HashMap<Name, NameRule>,
    below: HashMap<Name, NameRule>,
    globs: Vec<(LabelGlobs, NameRule)>,
    cluster_domain: Name,
    internal_answers: Arc<InternalAnswers>,
    /// The rule for a name that no entry matches.
    unlisted: QuestionRule,
    /// What names open, if the pod is under ordered rules.
    openings: Option<Openings>,
    /// The ordered rule that denies every destination, if there is one.
    closed_by: Option<EntrySource>,
}

impl NameRules {
    /// Rules without entries.
    pub(super) fn new(
        settings: &Settings,
        unlisted: QuestionRule,
        openings: Option<Openings>,
    ) -> Self {
        Self {
            exactly: HashMap::new(),
            below: HashMap::new(),
            globs: Vec::new(),
            cluster_domain: settings.cluster_domain.clone(),
            internal_answers: Arc::clone(&settings.internal_answers),
            unlisted,
            openings,
            closed_by: None,
        }
    }

    /// Sets the ordered rule that denies every destination.
    pub(super) fn closed_by(&mut self, source: Option<EntrySource>) {
        self.closed_by = source;
    }

    /// Adds rules, one for each pattern.
    pub(super) fn extend(&mut self, rules: impl IntoIterator<Item = (NamePattern, NameRule)>) {
        for (pattern, rule) in rules {
            match pattern {
                NamePattern::Exactly(name) => {
                    self.exactly.insert(name, rule);
                }
                NamePattern::Below(name) => {
                    self.below.insert(name, rule);
                }
                NamePattern::Glob(globs) => self.globs.push((globs, rule)),
            }
        }
    }

    /// Whether a query for this name may be sent. A denial overrides everything else, including the cluster
    /// domain.
    ///
    /// If the resolver walks search lists (`walks`), a name below the cluster domain is also judged by the
    /// name that the resolver may query upstream. Only an entry with the whole name admits such a name then.
    pub fn question(&self, name: &Name, walks: bool) -> QuestionRule {
        let Asked { queryable, denied } = self.asked(name);
        if denied {
            return QuestionRule::Denied;
        }
        let form = Form::of(name, &self.cluster_domain);
        let Some(form) = form.filter(|_| walks) else {
            return if queryable || name.is_within(&self.cluster_domain) {
                QuestionRule::Allowed
            } else {
                self.unlisted
            };
        };
        let public = form.public.map(|public| self.question(&public, walks));
        match public {
            Some(QuestionRule::Denied) => QuestionRule::Denied,
            Some(QuestionRule::NotListed) if !form.is_own && !self.is_listed_whole(name) => {
                QuestionRule::NotListed
            }
            _ => QuestionRule::Allowed,
        }
    }

    /// The decision of the entries that match a name about querying it.
    fn asked(&self, name: &Name) -> Asked {
        let mut asked = Asked::default();
        let mut classes = ClassSet::EMPTY;
        for rule in self.rules_of(name) {
            asked.denied |= rule.denied.is_some();
            asked.queryable |= rule.queryable;
            classes |= rule.classes;
        }
        if let Some(openings) = &self.openings {
            if !classes.is_empty() && openings.opens(classes) {
                // Somebody's denial comes after what allows it.
                return Asked {
                    queryable: true,
                    denied: false,
                };
            }
            asked.queryable &= openings.may_open(classes);
        }
        asked
    }

    /// Whether the name is at or below the cluster domain.
    pub fn is_of_cluster(&self, name: &Name) -> bool {
        name.is_within(&self.cluster_domain)
    }

    fn is_listed_whole(&self, name: &Name) -> bool {
        let whole = self.exactly.get(name);
        whole.is_some_and(|rule| match &self.openings {
            Some(openings) => {
                openings.opens(rule.classes) || (rule.queryable && openings.may_open(rule.classes))
            }
            None => rule.queryable,
        })
    }

    /// The alias, if it is the queried name without its search suffix: a resolver that walks search lists
    /// answers so. `alias` is the queried name's alias.
    pub fn without_search_suffix<'a>(&self, asked: &Name, alias: &'a Name) -> Option<&'a Name> {
        let suffix = asked.after(alias).filter(|_| !alias.as_wire().is_empty())?;
        suffix.is_within(&self.cluster_domain).then_some(alias)
    }

    /// Whether a name that no entry matches may be queried.
    pub fn allows_unlisted(&self) -> bool {
        self.unlisted == QuestionRule::Allowed
    }

    /// The classes for addresses in responses to a query for this name;
    /// none for a denied name and for one that may only be queried.
    pub fn classes(&self, name: &Name) -> ClassSet {
        if self.asked(name).denied {
            return ClassSet::EMPTY;
        }
        let mut classes = ClassSet::EMPTY;
        for rule in self.rules_of(name) {
            classes |= rule.classes;
        }
        classes
    }

    /// The permissions for addresses in responses to a query for this name.
    pub fn grant(&self, name: &Name) -> Grant {
        let internal = if self.internal_answers.has(name) {
            MayBeInternal::Yes
        } else if name.is_within(&self.cluster_domain) {
            MayBeInternal::WithoutStrangers
        } else {
            MayBeInternal::No
        };
        Grant {
            classes: self.classes(name),
            internal,
        }
    }

    /// Whether both give the same permissions to the addresses of every name. They may differ in which names may be
    /// queried.
    pub fn grants_alike(&self, other: &Self) -> bool {
        fn alike((a, b): (&NameRule, &NameRule)) -> bool {
            a.classes == b.classes && a.denied.is_some() == b.denied.is_some()
        }
        let of_names = |a: &HashMap<Name, NameRule>, b: &HashMap<Name, NameRule>| {
            let mut rules = a.iter();
            a.len() == b.len()
                && rules.all(|(name, rule)| b.get(name).is_some_and(|other| alike((rule, other))))
        };
        let of_globs = || {
            let mut pairs = self.globs.iter().zip(&other.globs);
            self.globs.len() == other.globs.len()
                && pairs.all(|((a, rule), (b, other))| a == b && alike((rule, other)))
        };
        let named = self.exactly.values().chain(self.below.values());
        let mut rules = named.chain(self.globs.iter().map(|(_, rule)| rule));
        // Whether a denial counts depends on what ordered rules open before it.
        let denials_alike =
            self.openings == other.openings || rules.all(|rule| rule.denied.is_none());
        self.cluster_domain == other.cluster_domain
            && self.internal_answers == other.internal_answers
            && of_names(&self.exactly, &other.exactly)
            && of_names(&self.below, &other.below)
            && of_globs()
            && denials_alike
    }

    /// Whether a name in the chain from the queried name to an address is a stranger's: neither a name of the
    /// cluster nor one that may resolve to internal addresses. An alias of the cluster (a Service of type
    /// `ExternalName`) may point out of it, and the owner of the target name could answer with any address.
    pub fn is_strangers(&self, name: &Name) -> bool {
        !name.is_within(&self.cluster_domain) && !self.internal_answers.has(name)
    }

    /// The entry that denies the name, or the name which a resolver that walks search lists would query upstream.
    pub fn explain_denied(&self, name: &Name) -> Option<&EntrySource> {
        let named = self.rules_of(name).find_map(|rule| rule.denied.as_ref());
        named.or_else(|| {
            let public = Form::of(name, &self.cluster_domain)?.public?;
            self.explain_denied(&public)
        })
    }

    /// The ordered rule because of which a name that no entry matches may not be queried, if it is one.
    pub fn explain_unlisted(&self) -> Option<&EntrySource> {
        self.closed_by.as_ref()
    }

    fn rules_of<'a>(&'a self, name: &Name) -> impl Iterator<Item = &'a NameRule> {
        let exactly = self.exactly.get(name.as_wire());
        let below = name
            .suffixes()
            .skip(1)
            .filter_map(move |suffix| self.below.get(suffix));
        let globs = self
            .globs
            .iter()
            .filter(move |(globs, _)| globs.matches(name));
        exactly
            .into_iter()
            .chain(below)
            .chain(globs.map(|(_, rule)| rule))
    }
}
