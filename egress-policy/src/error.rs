//! Errors in a policy, with their places.

use std::fmt;

/// How many problems [`PolicyError`] prints; the rest are only counted.
const PRINTED: usize = 8;

/// How many characters of the invalid text are printed.
const QUOTED: usize = 80;

/// The object with an annotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// The pod.
    Pod,
    /// Its namespace.
    Namespace,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pod => "pod",
            Self::Namespace => "namespace",
        })
    }
}

/// A text in an annotation that cannot be parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Line of the annotation's value, from 1.
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
    /// The value of an annotation cannot be parsed.
    Value {
        /// The object with the annotation.
        origin: Origin,
        /// The annotation's full key.
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
    /// Pod and namespace together exceed a limit.
    Limit {
        /// What is counted.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// The limit.
        limit: usize,
    },
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
                write!(
                    f,
                    "{origin} annotation {key}, line {line}, column {column}: {found} {message}"
                )
            }
            Self::Key {
                origin,
                key,
                message,
            } => {
                write!(f, "{origin} annotation {} {message}", quote(key))
            }
            Self::Limit { what, count, limit } => {
                write!(f, "the policy has {count} {what}; the limit is {limit}")
            }
        }
    }
}

/// The problems of annotations that cannot be compiled, in the order in which they were found.
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

    /// All problems; never empty.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
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
