//! The YAML document as a tree in which every value knows its key and its place, so that each error
//! can name both.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::{Location, Spanned};

use super::error::{ConfigError, Place};

/// A value as YAML has it.
#[derive(Debug)]
enum Value {
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List(Vec<Spanned<Value>>),
    Map(Vec<(Spanned<String>, Spanned<Value>)>),
}

impl Value {
    /// The value as an error shows it.
    fn shown(&self) -> String {
        match self {
            Self::Null => "nothing".to_owned(),
            Self::Bool(value) => format!("`{value}`"),
            Self::Integer(value) => format!("`{value}`"),
            Self::Float(value) => format!("`{value}`"),
            Self::Text(value) => format!("`{}`", value.escape_debug()),
            Self::List(_) => "a list".to_owned(),
            Self::Map(_) => "a mapping".to_owned(),
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Deserialize::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Integer(value.into()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Value, E> {
        Ok(Value::Integer(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = access.next_element()? {
            list.push(value);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Vec::new();
        while let Some(entry) = access.next_entry()? {
            map.push(entry);
        }
        Ok(Value::Map(map))
    }
}

/// A value, its full key (`dns.minTtl`) and its place.
#[derive(Debug)]
pub(super) struct Node {
    key: String,
    place: Place,
    value: Value,
}

impl Node {
    /// Reads a document.
    pub(super) fn document(text: &str) -> Result<Self, ConfigError> {
        // Otherwise `off` would be a truth value, as it was in YAML 1.1.
        let options = serde_saphyr::options! { strict_booleans: true };
        let read = serde_saphyr::from_str_with_options(text, options);
        let document: Spanned<Value> = read.map_err(|error: serde_saphyr::Error| {
            let error = error.without_snippet();
            ConfigError::Yaml {
                place: error.location().map(place),
                message: error.render_with_formatter(&serde_saphyr::UserMessageFormatter),
            }
        })?;
        Ok(Self::new(String::new(), document))
    }

    fn new(key: String, value: Spanned<Value>) -> Self {
        Self {
            key,
            place: place(value.referenced),
            value: value.value,
        }
    }

    /// The error that the value is not what was expected.
    pub(super) fn error(&self, message: impl fmt::Display) -> ConfigError {
        ConfigError::Value {
            key: if self.key.is_empty() {
                "the file".to_owned()
            } else {
                self.key.clone()
            },
            place: self.place,
            message: format!("{} {message}", self.value.shown()),
        }
    }

    /// The mapping's entries.
    pub(super) fn section(self) -> Result<Section, ConfigError> {
        match self.value {
            // A key with nothing behind it, and an empty document.
            Value::Null => Ok(Section {
                key: self.key,
                entries: Vec::new(),
            }),
            Value::Map(entries) => Ok(Section {
                key: self.key,
                entries,
            }),
            _ => Err(self.error("is not a mapping of keys to values")),
        }
    }

    /// The list's elements, each with the list's key.
    pub(super) fn list(self) -> Result<Vec<Self>, ConfigError> {
        self.list_or("expected values in brackets or behind dashes")
    }

    /// The same; `expected` says what is expected in place of something else.
    pub(super) fn list_or(self, expected: &str) -> Result<Vec<Self>, ConfigError> {
        match self.value {
            Value::Null => Ok(Vec::new()),
            Value::List(list) => Ok(list
                .into_iter()
                .map(|value| Self::new(self.key.clone(), value))
                .collect()),
            _ => Err(self.error(format!("is not a list: {expected}"))),
        }
    }

    /// The text.
    pub(super) fn text(&self) -> Result<&str, ConfigError> {
        match &self.value {
            Value::Text(text) => Ok(text),
            Value::Bool(_) | Value::Integer(_) | Value::Float(_) => {
                Err(self.error("is not a text: put it in quotes"))
            }
            Value::Null | Value::List(_) | Value::Map(_) => Err(self.error("is not a text")),
        }
    }

    /// `true` or `false`.
    pub(super) fn truth(&self) -> Result<bool, ConfigError> {
        match self.value {
            Value::Bool(value) => Ok(value),
            _ => Err(self.error("is neither true nor false")),
        }
    }

    /// The integer, if it is one.
    pub(super) fn integer(&self) -> Option<i128> {
        match self.value {
            Value::Integer(value) => Some(value),
            _ => None,
        }
    }

    /// What one of these words stands for.
    pub(super) fn word<T: Copy>(&self, words: &[(&str, T)]) -> Result<T, ConfigError> {
        let found = match &self.value {
            Value::Text(text) => words.iter().find(|(word, _)| word == text),
            _ => None,
        };
        found.map(|(_, meaning)| *meaning).ok_or_else(|| {
            let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.error(format!("is not one of {}", words.join(", ")))
        })
    }
}

/// The entries of a mapping, taken one by one.
pub(super) struct Section {
    key: String,
    entries: Vec<(Spanned<String>, Spanned<Value>)>,
}

impl Section {
    /// A section that is not there.
    pub(super) fn absent() -> Self {
        Self {
            key: String::new(),
            entries: Vec::new(),
        }
    }

    /// Takes the values of these keys; any other key is an error.
    pub(super) fn take<const N: usize>(
        self,
        known: [&str; N],
    ) -> Result<[Option<Node>; N], ConfigError> {
        let mut taken = [const { None }; N];
        for (key, value) in self.entries {
            let full = match self.key.as_str() {
                "" => key.value.clone(),
                section => format!("{section}.{}", key.value),
            };
            let Some(index) = known.iter().position(|known| *known == key.value) else {
                return Err(ConfigError::Value {
                    key: full,
                    place: place(key.referenced),
                    message: format!("is not a known key: expected one of {}", known.join(", ")),
                });
            };
            taken[index] = Some(Node::new(full, value));
        }
        Ok(taken)
    }
}

fn place(location: Location) -> Place {
    Place {
        line: location.line(),
        column: location.column(),
    }
}
