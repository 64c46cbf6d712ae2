//! The definitions of the policy kinds (`CustomResourceDefinition`), of which only the metadata is read.
//!
//! They show at once when a kind begins to be served. They also distinguish the removal of a kind from the removal of
//! its objects: in both cases the API server first deletes every object, but only in the first case the definition.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{Api, Client, api::ListParams, core::PartialObjectMeta};

use super::{super::policies::PolicyKind, health::Failure, policies::resource, table::Table};

/// The definition of a policy kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Definition {
    is_being_deleted: bool,
    /// It changes with the definition's status, too, and so when the kind begins to be served.
    version: Option<String>,
}

impl Definition {
    /// Reduces a definition; `None` for those of other kinds.
    pub(super) fn read(read: PartialObjectMeta<CustomResourceDefinition>) -> Option<Self> {
        let metadata = read.metadata;
        let name = metadata.name?;
        let is_ours = PolicyKind::ALL
            .into_iter()
            .any(|kind| name_of(kind) == name);
        is_ours.then_some(Self {
            is_being_deleted: metadata.deletion_timestamp.is_some(),
            version: metadata.resource_version,
        })
    }

    /// Whether there is a definition of a kind that is not being deleted.
    pub(super) fn is_there(definitions: &Table<Self>, kind: PolicyKind) -> bool {
        let definition = definitions.get("", &name_of(kind));
        definition.is_some_and(|definition| !definition.is_being_deleted)
    }
}

/// The signals about definitions to the tasks that follow kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Signals {
    /// Changes with every change of a definition.
    pub(super) changes: u64,
    /// For each kind, in the order of [`PolicyKind::ALL`], changes when its objects must be listed anew.
    pub(super) lists: [u64; PolicyKind::ALL.len()],
    /// Which of them are known to have no definition.
    pub(super) is_undefined: [bool; PolicyKind::ALL.len()],
}

/// Why the server does not serve a kind although its definition exists: not yet, or not in the version that the agent
/// reads. Only this reads a whole definition.
pub(super) async fn why_not_served(client: Client, kind: PolicyKind) -> Failure {
    let api = Api::<CustomResourceDefinition>::all(client);
    let named = ListParams::default().fields(&format!("metadata.name={}", name_of(kind)));
    // Without the definition, nothing says that the kind will not be served.
    let Ok(list) = api.list(&named).await else {
        return Failure::NotServedYet;
    };
    let versions = list.items.iter().flat_map(|one| &one.spec.versions);
    let mut served = versions.filter(|version| version.served);
    if list.items.is_empty() || served.any(|version| version.name == kind.version()) {
        Failure::NotServedYet
    } else {
        Failure::OtherVersion
    }
}

/// The name of the definition of a kind.
pub(super) fn name_of(kind: PolicyKind) -> String {
    format!("{}.{}", resource(kind).plural, kind.group())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_have_the_names_of_the_manifests() {
        assert_eq!(
            PolicyKind::ALL.map(name_of),
            [
                "egresspolicies.egress-agent.dev",
                "clusteregresspolicies.egress-agent.dev",
                "clusternetworkpolicies.policy.networking.k8s.io",
                "egresssets.egress-agent.dev",
            ]
        );
    }
}
