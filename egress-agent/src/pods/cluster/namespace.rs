//! A namespace, reduced to what enforcement needs.

use std::{collections::BTreeMap, sync::Arc};

use egress_api::{Labels, namespace_labels};
use k8s_openapi::api::core::v1;
use kube::core::PartialObjectMeta;

use super::super::object::own_annotations;

/// The fields of a namespace that the agent uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Namespace {
    /// The agent's annotations.
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) labels: Arc<Labels>,
}

impl Namespace {
    pub(super) fn read(read: PartialObjectMeta<v1::Namespace>) -> Option<Self> {
        let metadata = read.metadata;
        let labels = namespace_labels(metadata.name.as_deref()?, metadata.labels);
        Some(Self {
            annotations: own_annotations(metadata.annotations),
            labels: Arc::new(labels),
        })
    }
}
