//! What is wrong with a configuration file, and where.

use std::fmt;

/// Line and column in characters, both from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The line.
    pub line: u64,
    /// The column.
    pub column: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

/// Why a text is no configuration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// It is not YAML.
    #[error("{message}")]
    Yaml {
        /// Where, when that is known.
        place: Option<Place>,
        /// What the reader of YAML says; it names the place.
        message: String,
    },
    /// A key is unknown, or its value is not what it takes.
    #[error("{place}: {key}: {message}")]
    Value {
        /// The full key, such as `dns.minTtl`.
        key: String,
        /// Where.
        place: Place,
        /// What was found, and what was expected.
        message: String,
    },
    /// A key that has no default is missing.
    #[error("{key} is missing: {message}")]
    Missing {
        /// The full key.
        key: &'static str,
        /// Why it is needed.
        message: &'static str,
    },
    /// The name of the machine cannot be read and `node` is not there.
    #[error("node is missing, and the machine's own name cannot be read: {message}")]
    Hostname {
        /// What the operating system says.
        message: String,
    },
    /// More prefixes than the kernel's map holds.
    #[error("ranges: {count} prefixes, the built-in ones included; the limit is {limit}")]
    Ranges {
        /// How many there are.
        count: usize,
        /// How many there may be.
        limit: usize,
    },
}
