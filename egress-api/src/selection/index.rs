//! Finds the policies that may select a pod without examining all others.
//!
//! A policy is filed under something that a pod must have to be selected by it: a label with its value, or else the
//! pod's namespace.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use egress_policy::objects::ObjectName;

use crate::policy::{PolicySubject, SelectedPod};

/// A property that a pod must have to be selected by a policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Anchor {
    /// A label.
    Label {
        /// The policy's namespace, if it has one.
        namespace: Option<String>,
        key: String,
        value: String,
    },
    /// A namespace.
    Namespace(String),
    /// A namespace with a label.
    NamespaceLabel { key: String, value: String },
    /// Nothing: the selectors require no label.
    Anything,
}

/// Policies by the property that they require of a pod.
#[derive(Debug, Default)]
pub(super) struct Index(BTreeMap<Anchor, BTreeSet<Arc<ObjectName>>>);

impl Index {
    pub(super) fn add(&mut self, name: &Arc<ObjectName>, subject: &PolicySubject) {
        for anchor in anchors(subject) {
            self.0.entry(anchor).or_default().insert(Arc::clone(name));
        }
    }

    pub(super) fn remove(&mut self, name: &Arc<ObjectName>, subject: &PolicySubject) {
        for anchor in anchors(subject) {
            if let Some(names) = self.0.get_mut(&anchor) {
                names.remove(name);
                if names.is_empty() {
                    self.0.remove(&anchor);
                }
            }
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The policies that may select a pod, among them all that do.
    pub(super) fn candidates(
        &self,
        pod: SelectedPod<'_>,
    ) -> impl Iterator<Item = &Arc<ObjectName>> {
        let own = Some(pod.namespace.to_owned());
        let of_labels = pod.labels.iter().flat_map(move |(key, value)| {
            [own.clone(), None].map(|namespace| Anchor::Label {
                namespace,
                key: key.clone(),
                value: value.clone(),
            })
        });
        let of_namespace = pod.namespace_labels.iter().map(|(key, value)| {
            let (key, value) = (key.clone(), value.clone());
            Anchor::NamespaceLabel { key, value }
        });
        let others = [
            Anchor::Namespace(pod.namespace.to_owned()),
            Anchor::Anything,
        ];
        let all = of_labels.chain(of_namespace).chain(others);
        all.filter_map(|anchor| self.0.get(&anchor)).flatten()
    }
}

/// Under which anchors a policy is filed: one for each value of the label that it requires. Labels of pods tell more
/// policies apart than namespaces do.
fn anchors(subject: &PolicySubject) -> Vec<Anchor> {
    let PolicySubject {
        namespace,
        namespaces,
        pods,
        ..
    } = subject;
    if let Some((key, values)) = pods.required() {
        let of_value = |value: &String| Anchor::Label {
            namespace: namespace.clone(),
            key: key.to_owned(),
            value: value.clone(),
        };
        return values.iter().map(of_value).collect();
    }
    if let Some(namespace) = namespace {
        return vec![Anchor::Namespace(namespace.clone())];
    }
    let Some((key, values)) = namespaces.required() else {
        return vec![Anchor::Anything];
    };
    let of_value = |value: &String| Anchor::NamespaceLabel {
        key: key.to_owned(),
        value: value.clone(),
    };
    values.iter().map(of_value).collect()
}
