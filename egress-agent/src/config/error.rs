//! Errors in a configuration file, with their places.

use std::fmt;

/// Line and column in characters, both counted from 1.
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

/// Why a text is not a configuration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The text is not YAML.
    #[error("{message}")]
    Yaml {
        /// The place, if it is known.
        place: Option<Place>,
        /// The message of the YAML reader. It names the place.
        message: String,
    },
    /// A key is unknown, or its value is not what it takes.
    #[error("{place}: {key}: {message}")]
    Value {
        /// The full key, such as `dns.minTtl`.
        key: String,
        /// The place of the key or of the value.
        place: Place,
        /// The value that was found, and what was expected.
        message: String,
    },
    /// A key without a default is missing.
    #[error("{key} is missing: {message}")]
    Missing {
        /// The full key.
        key: &'static str,
        /// Why it is needed.
        message: &'static str,
    },
    /// `node` is missing, and the name of the machine cannot be read.
    #[error("node is missing, and the machine's own name cannot be read: {message}")]
    Hostname {
        /// The error of the operating system.
        message: String,
    },
    /// There are more prefixes than the kernel's map holds.
    #[error("ranges: {count} prefixes, the built-in ones included; the limit is {limit}")]
    Ranges {
        /// Their number.
        count: usize,
        /// The size of the map.
        limit: usize,
    },
}
