//! Label selectors.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

/// The labels of an object.
pub type Labels = BTreeMap<String, String>;

/// The label that the API server gives to every namespace: its name.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// The labels of a namespace, with the one that the API server adds. Old servers do not, and manifests need not have
/// it.
pub fn namespace_labels(name: &str, labels: Option<Labels>) -> Labels {
    let mut labels = labels.unwrap_or_default();
    labels.insert(NAMESPACE_NAME.to_owned(), name.to_owned());
    labels
}

/// Longest value of a label, and longest name in its key, in bytes.
const NAME_MAX: usize = 63;
/// Longest prefix of a label's key, in bytes.
const PREFIX_MAX: usize = 253;

/// A selector that has been read. All its requirements must hold; one without requirements selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector(Vec<Requirement>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    is: Is,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Is {
    In(BTreeSet<String>),
    NotIn(BTreeSet<String>),
    Present,
    Absent,
}

/// Why a selector cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// An operator of a later API, or a spelling mistake.
    #[error("the operator {0:?} is not known: expected In, NotIn, Exists or DoesNotExist")]
    Operator(String),
    /// `In` and `NotIn` need values.
    #[error("the operator {operator} of {key:?} has no values")]
    NoValues {
        /// The operator.
        operator: &'static str,
        /// The label's key.
        key: String,
    },
    /// `Exists` and `DoesNotExist` take none.
    #[error("the operator {operator} of {key:?} takes no values")]
    Values {
        /// The operator.
        operator: &'static str,
        /// The label's key.
        key: String,
    },
    /// No object can have this key.
    #[error("{0:?} is not the key of a label")]
    Key(String),
    /// No object can have this value.
    #[error("{0:?} is not the value of a label")]
    Value(String),
}

impl Selector {
    /// Reads a selector.
    ///
    /// # Errors
    ///
    /// See [`SelectorError`]. The API server refuses the same selectors where it knows that they are selectors.
    pub fn read(selector: &LabelSelector) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for (key, value) in selector.match_labels.iter().flatten() {
            check_key(key)?;
            check_value(value)?;
            requirements.push(Requirement {
                key: key.clone(),
                is: Is::In(BTreeSet::from([value.clone()])),
            });
        }
        for expression in selector.match_expressions.iter().flatten() {
            requirements.push(read_expression(expression)?);
        }
        Ok(Self(requirements))
    }

    /// The key of a label without which no object is selected, and the values of which it must have one. Of several it
    /// is the label with the fewest values.
    pub(crate) fn required(&self) -> Option<(&str, &BTreeSet<String>)> {
        let required = self
            .0
            .iter()
            .filter_map(|requirement| match &requirement.is {
                Is::In(values) => Some((requirement.key.as_str(), values)),
                Is::NotIn(_) | Is::Present | Is::Absent => None,
            });
        required.min_by_key(|(_, values)| values.len())
    }

    /// Whether an object with these labels is selected.
    pub fn selects(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| {
            let value = labels.get(&requirement.key);
            match &requirement.is {
                Is::In(values) => value.is_some_and(|value| values.contains(value)),
                Is::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
                Is::Present => value.is_some(),
                Is::Absent => value.is_none(),
            }
        })
    }
}

fn read_expression(expression: &LabelSelectorRequirement) -> Result<Requirement, SelectorError> {
    let LabelSelectorRequirement {
        key,
        operator,
        values,
    } = expression;
    check_key(key)?;
    let values = values.as_deref().unwrap_or_default();
    let some = |operator| {
        if values.is_empty() {
            let key = key.clone();
            return Err(SelectorError::NoValues { operator, key });
        }
        values.iter().try_for_each(|value| check_value(value))?;
        Ok(values.iter().cloned().collect())
    };
    let none = |operator, is| {
        if values.is_empty() {
            return Ok(is);
        }
        let key = key.clone();
        Err(SelectorError::Values { operator, key })
    };
    let is = match operator.as_str() {
        "In" => Is::In(some("In")?),
        "NotIn" => Is::NotIn(some("NotIn")?),
        "Exists" => none("Exists", Is::Present)?,
        "DoesNotExist" => none("DoesNotExist", Is::Absent)?,
        other => return Err(SelectorError::Operator(other.to_owned())),
    };
    let key = key.clone();
    Ok(Requirement { key, is })
}

/// Checks `[prefix/]name`.
fn check_key(key: &str) -> Result<(), SelectorError> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    let is_part = |part: &str| {
        let bytes = part.as_bytes();
        let ends = [bytes.first(), bytes.last()];
        let ends_well = |end: Option<&u8>| {
            end.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        };
        ends.into_iter().all(ends_well)
            && bytes
                .iter()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-')
    };
    let has_good_prefix =
        prefix.is_none_or(|prefix| prefix.len() <= PREFIX_MAX && prefix.split('.').all(is_part));
    if has_good_prefix && is_name(name) {
        Ok(())
    } else {
        Err(SelectorError::Key(key.to_owned()))
    }
}

fn check_value(value: &str) -> Result<(), SelectorError> {
    if value.is_empty() || is_name(value) {
        Ok(())
    } else {
        Err(SelectorError::Value(value.to_owned()))
    }
}

fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() <= NAME_MAX
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(selector: serde_json::Value) -> Result<Selector, SelectorError> {
        let selector = serde_json::from_value(selector).expect("a selector");
        Selector::read(&selector)
    }

    fn selects(selector: serde_json::Value, labels: &[(&str, &str)]) -> bool {
        let labels = labels.iter();
        let labels = labels
            .map(|&(key, value)| (key.into(), value.into()))
            .collect();
        read(selector).expect("a selector").selects(&labels)
    }

    #[test]
    fn an_empty_selector_selects_everything() {
        assert!(selects(json!({}), &[]));
        assert!(selects(
            json!({"matchLabels": {}, "matchExpressions": []}),
            &[("a", "b")]
        ));
    }

    #[test]
    fn every_label_must_be_as_required() {
        let selector = json!({"matchLabels": {"app": "web", "example.com/tier": ""}});
        assert!(selects(
            selector.clone(),
            &[("app", "web"), ("example.com/tier", ""), ("x", "y")]
        ));
        assert!(!selects(selector.clone(), &[("app", "web")]));
        assert!(!selects(
            selector,
            &[("app", "db"), ("example.com/tier", "")]
        ));
    }

    #[test]
    fn each_operator_does_what_it_says() {
        let of = |operator: &str, values: &[&str]| {
            let one = json!({"key": "app", "operator": operator, "values": values});
            json!({"matchExpressions": [one]})
        };
        for (operator, values, web, db, none) in [
            ("In", &["web", "api"][..], true, false, false),
            ("NotIn", &["web", "api"], false, true, true),
            ("Exists", &[], true, true, false),
            ("DoesNotExist", &[], false, false, true),
        ] {
            let selector = of(operator, values);
            assert_eq!(
                selects(selector.clone(), &[("app", "web")]),
                web,
                "{operator}"
            );
            assert_eq!(
                selects(selector.clone(), &[("app", "db")]),
                db,
                "{operator}"
            );
            assert_eq!(selects(selector, &[]), none, "{operator}");
        }
    }

    #[test]
    fn labels_and_expressions_must_all_hold() {
        let selector = json!({
            "matchLabels": {"app": "web"},
            "matchExpressions": [{"key": "canary", "operator": "DoesNotExist"}],
        });
        assert!(selects(selector.clone(), &[("app", "web")]));
        assert!(!selects(selector, &[("app", "web"), ("canary", "yes")]));
    }

    #[test]
    fn a_selector_that_no_object_could_meet_as_written_is_an_error() {
        let error = |key: &str, operator: &str, values: &[&str]| {
            let one = json!({"key": key, "operator": operator, "values": values});
            read(json!({"matchExpressions": [one]})).expect_err("an error")
        };
        assert_eq!(
            error("app", "Like", &["w*"]),
            SelectorError::Operator("Like".into())
        );
        assert!(matches!(
            error("app", "In", &[]),
            SelectorError::NoValues { .. }
        ));
        assert!(matches!(
            error("app", "Exists", &["x"]),
            SelectorError::Values { .. }
        ));
        for key in ["", "a b", "/a", "Example.com/a", "a/b/c", "-a"] {
            assert!(
                matches!(error(key, "Exists", &[]), SelectorError::Key(_)),
                "{key}"
            );
        }
        let long = "x".repeat(NAME_MAX + 1);
        for value in ["a b", "-a", long.as_str()] {
            assert!(
                matches!(error("app", "In", &[value]), SelectorError::Value(_)),
                "{value}"
            );
        }
    }
}
