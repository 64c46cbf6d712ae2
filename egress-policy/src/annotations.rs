//! The annotations and their lists, and the lists of policy objects.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    Mode,
    closed::Spoken,
    entry::{Destination, Entry},
    error::{Origin, Problem, Unreadable, visible},
    objects::{NamespacePolicy, TierAction, TierRule},
    parse::EntryError,
    sets::Sets,
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
    pub(super) origin: Origin,
}

/// The place of an entry in its list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct At {
    /// Line of the annotation's value, or number of the entry in an object's list, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
}

/// The parsed lists of one object, or of several.
#[derive(Debug, Default)]
pub(super) struct Lists {
    pub(super) allow: Option<Vec<Written>>,
    pub(super) deny: Option<Vec<Written>>,
    pub(super) resolve: Option<Vec<Written>>,
    pub(super) mode: Option<Mode>,
    /// The objects with a list of rules or a mode.
    pub(super) spoken: Vec<Spoken>,
}

impl Lists {
    /// Whether there is a list with rules about packets.
    pub(super) fn has_rules(&self) -> bool {
        self.allow.is_some() || self.deny.is_some()
    }

    /// Adds the lists of another object. Of two modes, the tighter one counts.
    pub(super) fn add(&mut self, other: Self) {
        let Self {
            allow,
            deny,
            resolve,
            mode,
            spoken,
        } = other;
        self.spoken.extend(spoken);
        for (list, more) in [
            (&mut self.allow, allow),
            (&mut self.deny, deny),
            (&mut self.resolve, resolve),
        ] {
            if let Some(more) = more {
                list.get_or_insert_default().extend(more);
            }
        }
        self.mode = self.mode.max(mode);
    }
}

/// Parses the annotations of one object, and adds every error to `problems`.
pub(super) fn read(
    annotations: &Annotations,
    origin: &Origin,
    sets: &Sets<'_>,
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
            origin: origin.clone(),
            key: key.clone(),
            message: format!(
                "is not known: expected one of {ALLOW}, {DENY}, {RESOLVE}, {MODE}, {INTERFACE} \
                 under {PREFIX}"
            ),
        });
    }
    if *origin == Origin::Namespace && interface.is_some() {
        problems.push(Problem::Key {
            origin: origin.clone(),
            key: format!("{PREFIX}{INTERFACE}"),
            message: "names the interface of one pod: put it on the pod".to_owned(),
        });
    }
    let mut list = |value: &Option<String>, key: &str, check: Check| {
        value.as_ref().map(|value| {
            let list = List {
                key: &format!("{PREFIX}{key}"),
                origin,
                sets,
                check,
            };
            list.read(tokens(value), problems)
        })
    };
    let allow = list(allow, ALLOW, |_| Ok(()));
    let deny = list(deny, DENY, check_denied);
    let resolve = list(resolve, RESOLVE, check_resolved);
    let mode = mode.as_ref().and_then(|value| {
        let mode = Mode::from_text(value);
        if mode.is_none() {
            problems.push(Problem::Value {
                origin: origin.clone(),
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
    let speaks = allow.is_some() || deny.is_some() || mode.is_some();
    let spoken = speaks.then(|| Spoken {
        origin: origin.clone(),
        allows: allow.is_some(),
        mode,
    });
    Lists {
        allow,
        deny,
        resolve,
        mode,
        spoken: spoken.into_iter().collect(),
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

/// Parses the lists of an `EgressPolicy`. Without any list and mode it closes the pod, like a `NetworkPolicy` that
/// has no rule.
pub(super) fn read_policy(
    policy: &NamespacePolicy,
    sets: &Sets<'_>,
    problems: &mut Vec<Problem>,
) -> Lists {
    let origin = &Origin::Policy(Arc::clone(&policy.name));
    let mut list = |items: &Option<Vec<String>>, key: &str, check: Check| {
        items.as_ref().map(|items| {
            let list = List {
                key: &format!("spec.{key}"),
                origin,
                sets,
                check,
            };
            list.read_items(items, problems)
        })
    };
    let allow = list(&policy.allow, ALLOW, |_| Ok(()));
    let deny = list(&policy.deny, DENY, check_denied);
    let resolve = list(&policy.resolve, RESOLVE, check_resolved);
    let closes = deny.is_none() && policy.mode.is_none();
    let allow = allow.or_else(|| closes.then(Vec::new));
    let spoken = Spoken {
        origin: origin.clone(),
        allows: allow.is_some(),
        mode: policy.mode,
    };
    Lists {
        allow,
        deny,
        resolve,
        mode: policy.mode,
        spoken: vec![spoken],
    }
}

/// Parses the entries of a rule of a tier.
pub(super) fn read_rule(
    rule: &TierRule,
    origin: &Origin,
    sets: &Sets<'_>,
    problems: &mut Vec<Problem>,
) -> Vec<Written> {
    let list = List {
        key: &format!("spec.rules[{}].entries", rule.index),
        origin,
        sets,
        check: match rule.action {
            TierAction::Deny => check_denied,
            TierAction::Allow | TierAction::Pass => |_| Ok(()),
        },
    };
    list.read_items(&rule.entries, problems)
}

/// After this many problems no more entries are read.
const PROBLEMS: usize = 1000;

/// A list that is read.
struct List<'a> {
    /// The annotation's full key, or the path of the object's list.
    key: &'a str,
    origin: &'a Origin,
    sets: &'a Sets<'a>,
    check: Check,
}

impl List<'_> {
    /// Reads the items of an object's list, one entry each.
    fn read_items(&self, items: &[String], problems: &mut Vec<Problem>) -> Vec<Written> {
        let tokens = items.iter().zip(1..).map(|(text, number)| Token {
            text,
            line: number,
            column: 1,
        });
        self.read(tokens, problems)
    }

    fn read<'t>(
        &self,
        tokens: impl Iterator<Item = Token<'t>>,
        problems: &mut Vec<Problem>,
    ) -> Vec<Written> {
        let mut list = Vec::new();
        for token in tokens {
            if self.sets.are_exceeded() || problems.len() >= PROBLEMS {
                break;
            }
            match self.read_token(&token) {
                Ok(entries) => list.extend(entries.into_iter().map(|entry| Written {
                    entry,
                    text: visible(token.text.chars()),
                    at: At {
                        line: token.line,
                        column: token.column,
                    },
                    origin: self.origin.clone(),
                })),
                Err(EntryError { at, found, message }) => {
                    // An empty part has nothing to show, so show the whole entry.
                    let found = if found.is_empty() {
                        token.text.to_owned()
                    } else {
                        found
                    };
                    let column = token.column
                        + token
                            .text
                            .get(..at)
                            .map_or(0, |before| before.chars().count());
                    problems.push(Problem::Value {
                        origin: self.origin.clone(),
                        key: self.key.to_owned(),
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

    fn read_token(&self, token: &Token<'_>) -> Result<Vec<Entry>, EntryError> {
        let wrong = |message: &str| EntryError {
            at: 0,
            found: token.text.to_owned(),
            message: message.to_owned(),
        };
        if token.text.contains(|c| is_separator(c) || c == '#') {
            return Err(wrong(
                "is not one entry: expected one entry in each item of the list, without spaces, commas and comments",
            ));
        }
        let entries = self.sets.read(token.text)?;
        for entry in &entries {
            (self.check)(entry).map_err(wrong)?;
        }
        Ok(entries)
    }
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
