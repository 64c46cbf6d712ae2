//! The written objects, with their remarks.

use std::collections::BTreeMap;

use egress_api::{Action, Tier};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

use crate::remark::Remark;

/// The label with a namespace's name, which the API server sets.
pub(crate) const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// The result for one object that was read.
#[derive(Debug, Default)]
pub(crate) struct Document {
    /// File and line.
    pub(crate) origin: String,
    /// Kind, namespace and name of the original.
    pub(crate) source: String,
    pub(crate) remarks: Vec<Remark>,
    pub(crate) objects: Vec<Object>,
}

/// A written object.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) name: String,
    /// Only for [`Spec::Policy`].
    pub(crate) namespace: Option<String>,
    pub(crate) remarks: Vec<Remark>,
    pub(crate) spec: Spec,
}

/// The specification.
#[derive(Debug)]
pub(crate) enum Spec {
    /// `EgressPolicy`
    Policy(Policy),
    /// `ClusterEgressPolicy`
    Cluster(Cluster),
    /// `EgressSet`
    Set(Entries),
}

/// An `EgressPolicy`.
#[derive(Debug, Default)]
pub(crate) struct Policy {
    pub(crate) pods: LabelSelector,
    pub(crate) allow: Option<Entries>,
    pub(crate) deny: Option<Entries>,
}

/// A `ClusterEgressPolicy`.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) tier: Tier,
    pub(crate) priority: u32,
    pub(crate) subject: Subject,
    pub(crate) rules: Vec<ClusterRule>,
}

/// The selected pods.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Subject {
    pub(crate) namespaces: LabelSelector,
    pub(crate) pods: LabelSelector,
}

impl Subject {
    /// Pods of one namespace.
    pub(crate) fn of_namespace(namespace: &str, pods: LabelSelector) -> Self {
        Self {
            namespaces: labels([(NAMESPACE_NAME.to_owned(), namespace.to_owned())]),
            pods,
        }
    }
}

/// A rule of a `ClusterEgressPolicy`.
#[derive(Clone, Debug)]
pub(crate) struct ClusterRule {
    pub(crate) name: Option<String>,
    pub(crate) action: Action,
    pub(crate) entries: Entries,
}

/// A list of entries with remarks in between.
#[derive(Clone, Debug, Default)]
pub(crate) struct Entries(pub(crate) Vec<Line>);

/// A line of such a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Remark(Remark),
    Entry {
        text: String,
        /// Whether the destination is a name.
        is_name: bool,
    },
    /// An entry that is written as a comment.
    Offered(String),
}

impl Entries {
    /// One entry for every address.
    pub(crate) fn everything() -> Self {
        Self(vec![Line::Entry {
            text: "*".to_owned(),
            is_name: false,
        }])
    }

    /// Adds a remark unless it is there already.
    pub(crate) fn remark(&mut self, remark: Remark) {
        self.add(Line::Remark(remark));
    }

    /// Adds a line unless it is there already.
    pub(crate) fn add(&mut self, line: Line) {
        if !self.0.contains(&line) {
            self.0.push(line);
        }
    }

    pub(crate) fn extend(&mut self, other: Self) {
        for line in other.0 {
            self.add(line);
        }
    }

    /// Takes a suffix from all entries.
    pub(crate) fn without_suffix(&mut self, suffix: &str) {
        for line in &mut self.0 {
            if let Line::Entry { text, .. } | Line::Offered(text) = line
                && let Some(rest) = text.strip_suffix(suffix)
            {
                *text = rest.to_owned();
            }
        }
    }

    pub(crate) fn has_entries(&self) -> bool {
        self.texts().next().is_some()
    }

    pub(crate) fn texts(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|line| match line {
            Line::Entry { text, .. } => Some(text.as_str()),
            Line::Remark(_) | Line::Offered(_) => None,
        })
    }

    pub(crate) fn remarks(&self) -> impl Iterator<Item = &Remark> {
        self.0.iter().filter_map(|line| match line {
            Line::Remark(remark) => Some(remark),
            Line::Entry { .. } | Line::Offered(_) => None,
        })
    }
}

impl Object {
    /// All remarks of the object.
    pub(crate) fn all_remarks(&self) -> Vec<&Remark> {
        let lists: Vec<&Entries> = match &self.spec {
            Spec::Policy(policy) => policy.allow.iter().chain(&policy.deny).collect(),
            Spec::Cluster(cluster) => cluster.rules.iter().map(|rule| &rule.entries).collect(),
            Spec::Set(entries) => vec![entries],
        };
        self.remarks
            .iter()
            .chain(lists.into_iter().flat_map(Entries::remarks))
            .collect()
    }

    /// The kind.
    pub(crate) const fn kind(&self) -> &'static str {
        match self.spec {
            Spec::Policy(_) => "EgressPolicy",
            Spec::Cluster(_) => "ClusterEgressPolicy",
            Spec::Set(_) => "EgressSet",
        }
    }
}

/// A selector of labels.
pub(crate) fn labels(pairs: impl IntoIterator<Item = (String, String)>) -> LabelSelector {
    let map: BTreeMap<String, String> = pairs.into_iter().collect();
    LabelSelector {
        match_labels: (!map.is_empty()).then_some(map),
        match_expressions: None,
    }
}

/// Adds a requirement.
pub(crate) fn require(
    selector: &mut LabelSelector,
    key: &str,
    operator: &str,
    values: Vec<String>,
) {
    selector
        .match_expressions
        .get_or_insert_with(Vec::new)
        .push(LabelSelectorRequirement {
            key: key.to_owned(),
            operator: operator.to_owned(),
            values: (!values.is_empty()).then_some(values),
        });
}

/// Adds a requirement of one value.
pub(crate) fn require_label(selector: &mut LabelSelector, key: String, value: String) {
    let map = selector.match_labels.get_or_insert_with(BTreeMap::new);
    if map.get(&key).is_some_and(|other| *other != value) {
        // Both must hold, and no pod fulfils both.
        require(selector, &key, "In", vec![value]);
    } else {
        map.insert(key, value);
    }
}

/// Pods that fulfil both.
pub(crate) fn both(mut a: LabelSelector, b: LabelSelector) -> LabelSelector {
    for (key, value) in b.match_labels.into_iter().flatten() {
        require_label(&mut a, key, value);
    }
    for requirement in b.match_expressions.into_iter().flatten() {
        a.match_expressions
            .get_or_insert_with(Vec::new)
            .push(requirement);
    }
    a
}
