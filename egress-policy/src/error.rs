//! What is wrong with a policy, and where.

use std::fmt;

/// Problems that [`PolicyError`] prints; the rest are counted.
const PRINTED: usize = 8;

/// Characters of the offending text that are printed.
const QUOTED: usize = 80;

/// Who wrote an annotation.
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

/// A text inside an annotation that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Line of the annotation's value, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The offending text.
    pub found: String,
    /// What it is, and what was expected.
    pub message: String,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// The value of an annotation cannot be read.
    Value {
        /// Who wrote it.
        origin: Origin,
        /// The annotation's full key.
        key: String,
        /// Where, and what.
        what: Unreadable,
    },
    /// An annotation that means nothing where it stands.
    Key {
        /// Who wrote it.
        origin: Origin,
        /// The annotation's full key.
        key: String,
        /// What was expected.
        message: String,
    },
    /// Pod and namespace together are over a limit.
    Limit {
        /// What is counted.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there may be.
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

/// Why annotations make no policy: everything that is wrong with them, in the order it was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct PolicyError {
    problems: Vec<Problem>,
}

impl PolicyError {
    /// The error made of these problems; `None` when there are none.
    pub(super) fn from_problems(problems: Vec<Problem>) -> Option<Self> {
        if problems.is_empty() {
            None
        } else {
            Some(Self { problems })
        }
    }

    /// Everything that is wrong; never empty.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

/// One line; the first few problems and how many there are besides.
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

/// The text with everything escaped that a terminal would not show as it is: control characters, and format
/// characters such as those that turn the direction of writing.
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
