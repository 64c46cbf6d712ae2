//! Access to the fields of objects that were read.
//!
//! An unknown field may restrict a rule. So each object is read with the list of its known fields, and the reader
//! reports the others.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// A mapping and its place, such as `spec.egress[0]`.
#[derive(Clone, Debug)]
pub(crate) struct Fields<'a> {
    map: Option<&'a Map<String, Value>>,
    place: String,
}

/// A value of another type than expected. The text has its place.
pub(crate) type Wrong = String;

impl<'a> Fields<'a> {
    /// The mapping of a value; none for `null`.
    pub(crate) fn new(value: &'a Value, place: impl Into<String>) -> Result<Self, Wrong> {
        let place = place.into();
        match value {
            Value::Object(map) => Ok(Self {
                map: Some(map),
                place,
            }),
            Value::Null => Ok(Self { map: None, place }),
            _ => Err(format!("{place} is not a mapping")),
        }
    }

    /// The place, for messages.
    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    fn below(&self, key: &str) -> String {
        format!("{}.{key}", self.place)
    }

    /// The value of a field; `null` counts as none.
    pub(crate) fn value(&self, key: &str) -> Option<&'a Value> {
        self.map?.get(key).filter(|value| !value.is_null())
    }

    /// Whether the field is there.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    /// The names of the fields that are not among `known`.
    pub(crate) fn others(&self, known: &[&str]) -> Vec<String> {
        self.map
            .into_iter()
            .flatten()
            .filter(|(key, value)| !known.contains(&key.as_str()) && !value.is_null())
            .map(|(key, _)| key.clone())
            .collect()
    }

    /// A text. A number counts as its text.
    pub(crate) fn text(&self, key: &str) -> Result<Option<String>, Wrong> {
        self.value(key)
            .map(|value| text(value).ok_or_else(|| format!("{} is not a text", self.below(key))))
            .transpose()
    }

    /// A text that must be there.
    pub(crate) fn needed(&self, key: &str) -> Result<String, Wrong> {
        self.text(key)?
            .ok_or_else(|| format!("{} is missing", self.below(key)))
    }

    /// A number.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>, Wrong> {
        self.value(key)
            .map(|value| {
                value
                    .as_f64()
                    .ok_or_else(|| format!("{} is not a number", self.below(key)))
            })
            .transpose()
    }

    /// A boolean.
    pub(crate) fn truth(&self, key: &str) -> Result<Option<bool>, Wrong> {
        self.value(key)
            .map(|value| {
                value
                    .as_bool()
                    .ok_or_else(|| format!("{} is neither true nor false", self.below(key)))
            })
            .transpose()
    }

    /// A list; empty if the field is not there.
    pub(crate) fn list(&self, key: &str) -> Result<&'a [Value], Wrong> {
        match self.value(key) {
            None => Ok(&[]),
            Some(Value::Array(list)) => Ok(list),
            Some(_) => Err(format!("{} is not a list", self.below(key))),
        }
    }

    /// A list of mappings.
    pub(crate) fn mappings(&self, key: &str) -> Result<Vec<Fields<'a>>, Wrong> {
        self.list(key)?
            .iter()
            .enumerate()
            .map(|(i, value)| Fields::new(value, format!("{}[{i}]", self.below(key))))
            .collect()
    }

    /// A list of texts.
    pub(crate) fn texts(&self, key: &str) -> Result<Vec<String>, Wrong> {
        self.list(key)?
            .iter()
            .enumerate()
            .map(|(i, value)| {
                text(value).ok_or_else(|| format!("{}[{i}] is not a text", self.below(key)))
            })
            .collect()
    }

    /// A mapping; without fields if it is not there.
    pub(crate) fn mapping(&self, key: &str) -> Result<Fields<'a>, Wrong> {
        Fields::new(self.value(key).unwrap_or(&Value::Null), self.below(key))
    }

    /// A mapping of texts.
    pub(crate) fn text_map(&self, key: &str) -> Result<BTreeMap<String, String>, Wrong> {
        let inner = self.mapping(key)?;
        inner
            .map
            .into_iter()
            .flatten()
            .map(|(name, _)| Ok((name.clone(), inner.needed(name)?)))
            .collect()
    }
}

/// The text of a scalar.
pub(crate) fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(truth) => Some(truth.to_string()),
        _ => None,
    }
}
