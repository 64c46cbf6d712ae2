//! Errors in a policy, with their places.

use std::{cmp::Reverse, fmt, sync::Arc};

use super::{
    closed::{CLOSERS, Closer},
    objects::{ObjectName, Objects},
    services::ServiceName,
    sets::Sets,
};

/// What [`Problem::Limit`] counts when there are too many prefixes.
pub(super) const PREFIXES: &str = "address prefixes";

/// How many problems [`PolicyError`] prints; the rest are only counted.
const PRINTED: usize = 8;

/// How many policy objects are named when a limit is exceeded.
const LARGEST: usize = 3;

/// How many characters of the invalid text are printed.
const QUOTED: usize = 80;

/// The object in which an entry is written.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// The pod's annotations.
    Pod,
    /// Its namespace's annotations.
    Namespace,
    /// The lists of a policy object.
    Policy(Arc<ObjectName>),
    /// A rule of a policy object with ordered rules.
    Rule(Arc<RuleName>),
    /// A Service with an endpoint that no entry allows.
    Service(Arc<ServiceName>),
}

/// A rule of a policy object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleName {
    /// The object.
    pub object: Arc<ObjectName>,
    /// The rule's place in the object's list of rules, from 0.
    pub index: usize,
    /// The rule's name, if it has one.
    pub name: Option<String>,
}

impl Origin {
    /// The policy object, if it is one.
    pub fn object(&self) -> Option<&ObjectName> {
        match self {
            Self::Pod | Self::Namespace | Self::Service(_) => None,
            Self::Policy(object) => Some(object),
            Self::Rule(rule) => Some(&rule.object),
        }
    }
}

/// `pod`, `namespace`, `EgressPolicy shop/web`, ``ClusterEgressPolicy guard, rule 2 `mail` ``
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod => f.write_str("pod"),
            Self::Namespace => f.write_str("namespace"),
            Self::Policy(object) => write!(f, "{object}"),
            Self::Service(service) => write!(f, "Service {service}"),
            Self::Rule(rule) => {
                write!(f, "{}, rule {}", rule.object, rule.index + 1)?;
                match &rule.name {
                    Some(name) => write!(f, " {}", quote(name)),
                    None => Ok(()),
                }
            }
        }
    }
}

/// A text in a list that cannot be parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Line of the annotation's value, or number of the entry in an object's list, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The invalid text.
    pub found: String,
    /// What it is, and what was expected.
    pub message: String,
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// An annotation or an entry of an object cannot be parsed.
    Value {
        /// The object.
        origin: Origin,
        /// The annotation's full key, or the path of the object's list (`spec.allow`).
        key: String,
        /// The place and the text.
        what: Unreadable,
    },
    /// An annotation that is unknown, or not allowed on this object.
    Key {
        /// The object with the annotation.
        origin: Origin,
        /// The annotation's full key.
        key: String,
        /// What was expected.
        message: String,
    },
    /// All that concerns the pod exceeds a limit.
    Limit {
        /// What is counted.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// The limit.
        limit: usize,
        /// The policy objects with the most entries, and how many they have.
        largest: Vec<(Arc<ObjectName>, usize)>,
    },
    /// All that concerns the pod exceeds a limit, and was not read to its end.
    AtLeast {
        /// What is counted.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// The compiler of policies has failed.
    Internal,
}

impl Problem {
    /// An exceeded limit.
    pub(super) const fn limit(what: &'static str, count: usize, limit: usize) -> Self {
        Self::Limit {
            what,
            count,
            limit,
            largest: Vec::new(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value { origin, key, what } => {
                let Unreadable {
                    line,
                    column,
                    found,
                    message,
                } = what;
                let found = quote(found);
                // It may quote the text, too.
                let message = visible(message.chars());
                match origin.object() {
                    None => write!(
                        f,
                        "{origin} annotation {key}, line {line}, column {column}: {found} {message}"
                    ),
                    Some(object) => write!(
                        f,
                        "{object}, {key}[{}], column {column}: {found} {message}",
                        line - 1
                    ),
                }
            }
            Self::Key {
                origin,
                key,
                message,
            } => {
                write!(f, "{origin} annotation {} {message}", quote(key))
            }
            Self::Limit {
                what,
                count,
                limit,
                largest,
            } => {
                write!(f, "the policy has {count} {what}; the limit is {limit}")?;
                let mut before = ", with most entries from ";
                for (object, entries) in largest {
                    write!(f, "{before}{object} ({entries})")?;
                    before = ", ";
                }
                Ok(())
            }
            Self::AtLeast { what, limit } => write!(
                f,
                "the policy has more than {limit} {what}; that is the limit"
            ),
            Self::Internal => f.write_str(
                "the policy cannot be compiled because of a mistake in egress-agent: please report it with the \
                 lists of the pod, its namespace and its policy objects",
            ),
        }
    }
}

/// The problems of a policy that cannot be compiled, in the order in which they were found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct PolicyError {
    problems: Vec<Problem>,
}

impl PolicyError {
    /// The error with these problems; `None` if there are none.
    pub(super) fn from_problems(problems: Vec<Problem>) -> Option<Self> {
        if problems.is_empty() {
            None
        } else {
            Some(Self { problems })
        }
    }

    pub(super) fn from_problem(problem: Problem) -> Self {
        Self {
            problems: vec![problem],
        }
    }

    /// Whether there are more prefixes than a policy may have.
    pub fn is_over_prefixes(&self) -> bool {
        let is =
            |problem: &Problem| matches!(problem, Problem::Limit { what, .. } if *what == PREFIXES);
        self.problems.iter().any(is)
    }

    /// The same, in which each exceeded limit names the largest of these objects.
    pub(super) fn naming(mut self, objects: &Objects) -> Self {
        for problem in &mut self.problems {
            if let Problem::Limit { largest, .. } = problem {
                *largest = largest_of(objects);
            }
        }
        self
    }

    /// The objects that cannot be read, the first [`CLOSERS`] of them: they close a pod that never had a readable policy.
    pub fn closers(&self) -> Vec<Closer> {
        let mut closers = Vec::new();
        for problem in &self.problems {
            let origin = match problem {
                Problem::Value { origin, .. } | Problem::Key { origin, .. } => origin,
                Problem::Limit { .. } | Problem::AtLeast { .. } | Problem::Internal => continue,
            };
            let closer = Closer::Written(origin.clone());
            if closers.len() < CLOSERS && !closers.contains(&closer) {
                closers.push(closer);
            }
        }
        closers
    }

    /// All problems; never empty.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

/// The objects with the most entries, and how many they have. An entry that uses a set counts as the destinations of
/// the set.
fn largest_of(objects: &Objects) -> Vec<(Arc<ObjectName>, usize)> {
    let sets = Sets::new(&objects.sets);
    let count =
        |entries: &Vec<String>| -> usize { entries.iter().map(|text| sets.entries_of(text)).sum() };
    let of_lists = objects.namespace.iter().map(|policy| {
        let lists = [&policy.allow, &policy.deny, &policy.resolve];
        (&policy.name, lists.into_iter().flatten().map(count).sum())
    });
    let of_rules = objects.tiers.iter().map(|policy| {
        let rules = policy.rules.iter().map(|rule| count(&rule.entries));
        (&policy.name, rules.sum())
    });
    let mut all: Vec<(&Arc<ObjectName>, usize)> = of_lists.chain(of_rules).collect();
    all.sort_by_key(|(name, count)| (Reverse(*count), *name));
    let largest = all.into_iter().take(LARGEST);
    largest
        .map(|(name, count)| (Arc::clone(name), count))
        .collect()
}

/// One line: the first few problems, and how many more there are.
impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().take(PRINTED).enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            write!(f, "{problem}")?;
        }
        match self.problems.len().saturating_sub(PRINTED) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

/// The text in backticks, on one line and of bounded length.
fn quote(text: &str) -> String {
    let mut shown = visible(text.chars().take(QUOTED));
    if text.chars().nth(QUOTED).is_some() {
        shown.push('…');
    }
    format!("`{shown}`")
}

/// Escapes characters that a terminal would not show: control characters, and format characters such as those
/// that change the direction of text.
pub(super) fn visible(text: impl IntoIterator<Item = char>) -> String {
    let mut shown = String::new();
    for c in text {
        if matches!(c, '"' | '\'' | '\\') {
            shown.push(c);
        } else {
            shown.extend(c.escape_debug());
        }
    }
    shown
}
