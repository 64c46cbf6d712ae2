//! The current problems, and logging how they changed since the last reconcile.

use std::{collections::BTreeMap, fmt};

use crate::report::Subject;

/// The subject of a problem.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::control) enum About {
    /// A pod, or an interface in quarantine.
    Subject(Subject),
    /// Something else: a file, an object of the cluster, a part of the node.
    Node(String),
}

impl About {
    /// Something of the node, by its name for people.
    pub(in crate::control) fn node(what: impl Into<String>) -> Self {
        Self::Node(what.into())
    }
}

impl From<Subject> for About {
    fn from(subject: Subject) -> Self {
        Self::Subject(subject)
    }
}

impl fmt::Display for About {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Subject(subject) => subject.fmt(f),
            Self::Node(what) => f.write_str(what),
        }
    }
}

/// The problems of one reconcile; each thing has at most one text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::control) struct Problems(BTreeMap<About, String>);

impl Problems {
    /// Sets the problem of a subject.
    pub(in crate::control) fn set(&mut self, about: impl Into<About>, what: impl Into<String>) {
        self.0.insert(about.into(), what.into());
    }

    /// Adds to the problem of a subject.
    pub(in crate::control) fn add(&mut self, about: impl Into<About>, what: &str) {
        let known = self.0.entry(about.into()).or_default();
        if !known.is_empty() {
            known.push_str("; ");
        }
        known.push_str(what);
    }

    /// These problems and others.
    pub(in crate::control) fn and(mut self, others: Self) -> Self {
        self.0.extend(others.0);
        self
    }

    /// The problem of a pod or an interface in quarantine.
    pub(in crate::control) fn of(&self, subject: &Subject) -> Option<&String> {
        self.about(&About::Subject(subject.clone()))
    }

    /// The problem of any subject.
    pub(in crate::control) fn about(&self, about: &About) -> Option<&String> {
        self.0.get(about)
    }

    /// All problems.
    pub(in crate::control) fn iter(&self) -> impl Iterator<Item = (&About, &String)> {
        self.0.iter()
    }

    /// Logs the problems that are new since the last reconcile, and those that are gone.
    pub(in crate::control) fn log_changes(&self, before: &Self) {
        for (about, what) in &self.0 {
            if before.0.get(about) != Some(what) {
                tracing::error!(%about, "{what}");
            }
        }
        for about in before.0.keys() {
            if !self.0.contains_key(about) {
                tracing::info!(%about, "the problem is gone");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_problems_of_one_file_are_one_text() {
        let mut problems = Problems::default();
        problems.add(About::node("a.yaml:1"), "first");
        problems.add(About::node("a.yaml:1"), "second");
        problems.set(Subject::pod("shop", "cart"), "third");
        let all: Vec<String> = problems
            .iter()
            .map(|(about, what)| format!("{about}: {what}"))
            .collect();
        assert_eq!(all, ["shop/cart: third", "a.yaml:1: first; second"]);
        assert_eq!(
            problems
                .of(&Subject::pod("shop", "cart"))
                .map(String::as_str),
            Some("third")
        );
    }
}
