//! Reads the parts of an object one by one, so that one unreadable part does not hide the others.

use serde::de::DeserializeOwned;
use serde_json::Value;

/// The parts of an object, and their problems.
pub(crate) struct Reader<'a> {
    object: &'a Value,
    /// What precedes the names of fields in messages, such as `spec`.
    path: String,
    pub(crate) problems: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(object: &'a Value, path: impl Into<String>) -> Self {
        Self {
            object,
            path: path.into(),
            problems: Vec::new(),
        }
    }

    /// The field; `None` if it is missing, null, or unreadable. The latter is a problem.
    pub(crate) fn optional<T: DeserializeOwned>(&mut self, field: &str) -> Option<T> {
        self.try_optional(field).unwrap_or_default()
    }

    /// As [`Self::optional`], but distinguishes a missing field from an unreadable one.
    pub(crate) fn try_optional<T: DeserializeOwned>(
        &mut self,
        field: &str,
    ) -> Result<Option<T>, Unreadable> {
        let Some(value) = self.object.get(field).filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        match serde_json::from_value(value.clone()) {
            Ok(read) => Ok(Some(read)),
            Err(error) => {
                self.problem(field, &format!("cannot be read: {error}"));
                Err(Unreadable)
            }
        }
    }

    /// The field, which must be there.
    pub(crate) fn required<T: DeserializeOwned>(&mut self, field: &str) -> Option<T> {
        let read = self.try_optional(field).ok()?;
        if read.is_none() {
            self.problem(field, "is missing");
        }
        read
    }

    /// Reports fields that the kind does not have: a misspelled one must not widen a policy.
    pub(crate) fn expect_only(&mut self, fields: &[&str]) -> Result<(), Unreadable> {
        let Some(object) = self.object.as_object() else {
            self.problems
                .push(format!("{} is not an object", self.path));
            return Err(Unreadable);
        };
        let unknown = object.keys().find(|key| !fields.contains(&key.as_str()));
        let Some(unknown) = unknown else {
            return Ok(());
        };
        self.problem(
            unknown,
            &format!("is not known: expected one of {}", fields.join(", ")),
        );
        Err(Unreadable)
    }

    pub(crate) fn problem(&mut self, field: &str, what: &str) {
        self.problems.push(format!("{}.{field} {what}", self.path));
    }
}

/// A part is unreadable; the reader has the problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unreadable;
