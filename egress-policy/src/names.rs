//! What a policy says about a name: whether it may be asked for, and what its addresses are allowed.

use std::{collections::HashMap, fmt, sync::Arc};

use super::{
    Settings,
    pattern::{LabelGlobs, NamePattern},
    search_list::Form,
};
use egress_dns::Name;

/// Whether a question may go on to the resolver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuestionRule {
    /// It may.
    Allowed,
    /// A `deny` entry names it.
    Denied,
    /// No entry could allow it.
    NotListed,
}

/// Which names may lead to internal addresses, besides those of the cluster, where internal addresses
/// do not pass by themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InternalAnswers {
    /// Every name.
    All,
    /// These.
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

/// As what an error or a fingerprint has them.
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

/// What the addresses of a name are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Bitmap of their classes.
    pub classes: u64,
    /// Whether that holds for internal ones.
    pub internal: MayBeInternal,
}

/// Whether a name may lead to internal addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MayBeInternal {
    /// It may.
    Yes,
    /// It may if no name on the way is a stranger's.
    WithoutStrangers,
    /// It may not.
    No,
}

/// What entries say about a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NameRule {
    /// Classes of the `allow` entries.
    pub(super) classes: u64,
    /// Whether an `allow` or `resolve` entry names it.
    pub(super) askable: bool,
    /// The `deny` entry that names it, as written.
    pub(super) denied: Option<Box<str>>,
}

/// The rules about names, for lookups that take time in the number of a name's labels and not in
/// the number of entries; only patterns with `*` inside a label are tried one by one. Lookups do
/// not allocate, but for names below the cluster domain where the resolver walks search lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameRules {
    exactly: HashMap<Name, NameRule>,
    below: HashMap<Name, NameRule>,
    globs: Vec<(LabelGlobs, NameRule)>,
    cluster_domain: Name,
    internal_answers: Arc<InternalAnswers>,
    /// What holds for a name that no entry speaks of.
    unlisted: QuestionRule,
}

impl NameRules {
    /// Rules without entries.
    pub(super) fn new(settings: &Settings, unlisted: QuestionRule) -> Self {
        Self {
            exactly: HashMap::new(),
            below: HashMap::new(),
            globs: Vec::new(),
            cluster_domain: settings.cluster_domain.clone(),
            internal_answers: Arc::clone(&settings.internal_answers),
            unlisted,
        }
    }

    /// Adds rules, one to a pattern.
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

    /// Whether a question for this name may go on. A denial beats everything else, the cluster
    /// domain too.
    ///
    /// Where the resolver walks search lists (`walks`), a name below the cluster domain is judged by what
    /// it may ask upstream, too. Only an entry with the whole name lets such a name through.
    pub fn question(&self, name: &Name, walks: bool) -> QuestionRule {
        let mut askable = false;
        for rule in self.rules_of(name) {
            if rule.denied.is_some() {
                return QuestionRule::Denied;
            }
            askable |= rule.askable;
        }
        let form = Form::of(name, &self.cluster_domain);
        let Some(form) = form.filter(|_| walks) else {
            return if askable || name.is_within(&self.cluster_domain) {
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

    /// Whether the name is at or below the cluster domain.
    pub fn is_of_cluster(&self, name: &Name) -> bool {
        name.is_within(&self.cluster_domain)
    }

    fn is_listed_whole(&self, name: &Name) -> bool {
        self.exactly.get(name).is_some_and(|rule| rule.askable)
    }

    /// The name that an answer's alias shows as the asked one without its search suffix: what a
    /// resolver that walks search lists has found. `alias` is the asked name's alias.
    pub fn without_search_suffix<'a>(&self, asked: &Name, alias: &'a Name) -> Option<&'a Name> {
        let suffix = asked.after(alias).filter(|_| !alias.as_wire().is_empty())?;
        suffix.is_within(&self.cluster_domain).then_some(alias)
    }

    /// Whether a name that no entry speaks of may be asked for.
    pub fn allows_unlisted(&self) -> bool {
        self.unlisted == QuestionRule::Allowed
    }

    /// Bitmap of the classes that addresses get when they are answers to a question for this name;
    /// 0 for a denied name and for one that may only be asked for.
    pub fn classes(&self, name: &Name) -> u64 {
        let mut classes = 0;
        for rule in self.rules_of(name) {
            if rule.denied.is_some() {
                return 0;
            }
            classes |= rule.classes;
        }
        classes
    }

    /// What addresses get when they are answers to a question for this name.
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

    /// Whether a name on the way from the asked one to an address is a stranger's: neither one of the
    /// cluster nor one that may lead to internal addresses. An alias of the cluster (a Service of type
    /// `ExternalName`) may lead out of it, and whoever owns that name could answer with any address.
    pub fn is_strangers(&self, name: &Name) -> bool {
        !name.is_within(&self.cluster_domain) && !self.internal_answers.has(name)
    }

    /// The `deny` entry that names it, as written; or that names what a resolver which walks search
    /// lists would ask upstream.
    pub fn explain_denied(&self, name: &Name) -> Option<&str> {
        let named = self.rules_of(name).find_map(|rule| rule.denied.as_deref());
        named.or_else(|| {
            let public = Form::of(name, &self.cluster_domain)?.public?;
            self.explain_denied(&public)
        })
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
