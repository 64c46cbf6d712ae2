//! The annotations and their lists.

use std::collections::BTreeMap;

use super::{
    Mode,
    entry::{Destination, Entry},
    error::{Origin, Problem, Unreadable, visible},
    parse::{EntryError, read_entry},
};

/// The prefix of every key.
pub const PREFIX: &str = "egress-agent.dev/";

const ALLOW: &str = "allow";
const DENY: &str = "deny";
const RESOLVE: &str = "resolve";
const MODE: &str = "mode";
const INTERFACE: &str = "interface";

/// The values of one object's annotations under `egress-agent.dev/`, not parsed yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Annotations {
    /// Destinations that may be reached.
    pub allow: Option<String>,
    /// Destinations that may not be reached.
    pub deny: Option<String>,
    /// Names that may be queried although no entry allows them.
    pub resolve: Option<String>,
    /// `enforce`, `audit` or `off`.
    pub mode: Option<String>,
    /// Host end of the pod, if no cluster provides it.
    pub interface: Option<String>,
    /// Full keys under the prefix that are unknown. They make the policy unreadable: a mistyped
    /// `allow` must not leave a pod open.
    pub unknown: Vec<String>,
}

impl Annotations {
    /// Reads the keys under `egress-agent.dev/` and ignores all others.
    pub fn from_map(map: &BTreeMap<String, String>) -> Self {
        let mut annotations = Self::default();
        for (key, value) in map {
            let Some(name) = key.strip_prefix(PREFIX) else {
                continue;
            };
            let slot = match name {
                ALLOW => &mut annotations.allow,
                DENY => &mut annotations.deny,
                RESOLVE => &mut annotations.resolve,
                MODE => &mut annotations.mode,
                INTERFACE => &mut annotations.interface,
                _ => {
                    annotations.unknown.push(key.clone());
                    continue;
                }
            };
            *slot = Some(value.clone());
        }
        annotations
    }

    /// The value of a key that means something.
    pub(super) fn value(&self, key: &str) -> Option<&str> {
        let value = match key.strip_prefix(PREFIX)? {
            ALLOW => &self.allow,
            DENY => &self.deny,
            RESOLVE => &self.resolve,
            MODE => &self.mode,
            INTERFACE => &self.interface,
            _ => return None,
        };
        value.as_deref()
    }
}

/// A parsed entry with its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) entry: Entry,
    pub(super) text: String,
    pub(super) at: At,
}

/// The place of an entry in its annotation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct At {
    /// Line of the annotation's value, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
}

/// The parsed annotations of one object.
#[derive(Debug, Default)]
pub(super) struct Lists {
    pub(super) allow: Option<Vec<Written>>,
    pub(super) deny: Option<Vec<Written>>,
    pub(super) resolve: Option<Vec<Written>>,
    pub(super) mode: Option<Mode>,
}

impl Lists {
    /// Whether there is a list with rules about packets.
    pub(super) fn has_rules(&self) -> bool {
        self.allow.is_some() || self.deny.is_some()
    }
}

/// Parses the annotations of one object, and adds every error to `problems`.
pub(super) fn read(
    annotations: &Annotations,
    origin: Origin,
    problems: &mut Vec<Problem>,
) -> Lists {
    let Annotations {
        allow,
        deny,
        resolve,
        mode,
        interface,
        unknown,
    } = annotations;
    for key in unknown {
        problems.push(Problem::Key {
            origin,
            key: key.clone(),
            message: format!(
                "is not known: expected one of {ALLOW}, {DENY}, {RESOLVE}, {MODE}, {INTERFACE} \
                 under {PREFIX}"
            ),
        });
    }
    if origin == Origin::Namespace && interface.is_some() {
        problems.push(Problem::Key {
            origin,
            key: format!("{PREFIX}{INTERFACE}"),
            message: "names the interface of one pod: put it on the pod".to_owned(),
        });
    }
    let mut list = |value: &Option<String>, key: &str, check: Check| {
        value
            .as_ref()
            .map(|value| read_list(value, key, origin, check, problems))
    };
    let allow = list(allow, ALLOW, |_| Ok(()));
    let deny = list(deny, DENY, check_denied);
    let resolve = list(resolve, RESOLVE, check_resolved);
    let mode = mode.as_ref().and_then(|value| {
        let mode = Mode::from_text(value);
        if mode.is_none() {
            problems.push(Problem::Value {
                origin,
                key: format!("{PREFIX}{MODE}"),
                what: Unreadable {
                    line: 1,
                    column: 1,
                    found: value.clone(),
                    message: "is not a mode: expected enforce, audit or off".to_owned(),
                },
            });
        }
        mode
    });
    Lists {
        allow,
        deny,
        resolve,
        mode,
    }
}

/// A list's requirement for its entries beyond the grammar; the error is the message.
type Check = fn(&Entry) -> Result<(), &'static str>;

fn check_denied(entry: &Entry) -> Result<(), &'static str> {
    let limited = entry.ports.is_some() || entry.protocol.is_some();
    if matches!(entry.destination, Destination::Names(_)) && limited {
        return Err(
            "is a denied name with a port or protocol: queries for a denied name are refused, which affects \
                    every port; deny the address instead, or omit the port",
        );
    }
    Ok(())
}

fn check_resolved(entry: &Entry) -> Result<(), &'static str> {
    if matches!(entry.destination, Destination::Addresses(_)) {
        return Err("is an address: expected a name or wildcard that may be queried");
    }
    if entry.ports.is_some() || entry.protocol.is_some() {
        return Err("has a port or protocol: expected the name alone, since resolve opens nothing");
    }
    Ok(())
}

fn read_list(
    value: &str,
    key: &str,
    origin: Origin,
    check: Check,
    problems: &mut Vec<Problem>,
) -> Vec<Written> {
    let mut list = Vec::new();
    for token in tokens(value) {
        let read = read_entry(token.text).and_then(|entry| match check(&entry) {
            Ok(()) => Ok(entry),
            Err(message) => Err(EntryError {
                at: 0,
                found: token.text.to_owned(),
                message: message.to_owned(),
            }),
        });
        match read {
            Ok(entry) => list.push(Written {
                entry,
                text: visible(token.text.chars()),
                at: At {
                    line: token.line,
                    column: token.column,
                },
            }),
            Err(EntryError { at, found, message }) => {
                // An empty part has nothing to show, so show the whole entry.
                let found = if found.is_empty() {
                    token.text.to_owned()
                } else {
                    found
                };
                let column = token.column + token.text[..at].chars().count();
                problems.push(Problem::Value {
                    origin,
                    key: format!("{PREFIX}{key}"),
                    what: Unreadable {
                        line: token.line,
                        column,
                        found,
                        message,
                    },
                });
            }
        }
    }
    list
}

/// The text of one entry and its place, line and column counted from 1, the column in characters.
struct Token<'a> {
    text: &'a str,
    line: usize,
    column: usize,
}

/// Entries are separated by white space, commas and new lines; `#` comments to the end of a line.
fn tokens(value: &str) -> impl Iterator<Item = Token<'_>> {
    value.split('\n').enumerate().flat_map(|(index, line)| {
        let code = line.split_once('#').map_or(line, |(code, _comment)| code);
        let mut rest = code;
        let mut column = 1;
        std::iter::from_fn(move || {
            let separators = rest.find(|c| !is_separator(c))?;
            column += rest[..separators].chars().count();
            rest = &rest[separators..];
            let (text, after) = rest.split_at(rest.find(is_separator).unwrap_or(rest.len()));
            let token = Token {
                text,
                line: index + 1,
                column,
            };
            column += text.chars().count();
            rest = after;
            Some(token)
        })
    })
}

fn is_separator(c: char) -> bool {
    c.is_whitespace() || c == ','
}
