//! Sources of pods.
//!
//! A source publishes [`Snapshot`]s: the whole known state, never a change. There are two sources: a
//! directory of ordinary Pod and Namespace manifests ([`directory`]), and a Kubernetes API server
//! ([`cluster`]).
//!
//! ```text
//!  bytes of a file ─ documents ─▶ YAML documents ─ manifest ─▶ objects and problems
//!  files of a directory ─ contents ─▶ contents in force of each file ─ snapshot ─▶ Snapshot
//!  objects of the API server ─ cluster/follow ─▶ tables of reduced objects ─ cluster/state ─▶ Snapshot
//! ```

mod checked;
pub mod cluster;
mod contents;
pub mod directory;
mod documents;
mod knowledge;
mod manifest;
mod name;
mod object;
mod places;
mod policies;
mod snapshot;
mod watching;
mod workload;
mod yaml_hint;

pub use checked::{Checked, read_for_check};
pub use cluster::Cluster;
pub use directory::{Directory, DirectoryThread};
pub use knowledge::{FactSource, Knowledge, SourcedFacts};
pub use name::NamespacedName;
pub use places::{Place, Places};
pub use policies::{
    ObjectVersion, PodCounts, PolicyFacts, PolicyKind, PolicyKinds, PolicyObjects, PolicyState,
};
pub use snapshot::{Facts, ObjectsOf, Pod, Problem, Snapshot};
pub use workload::kind_and_name;

/// Prefix of the agent's annotations; others are not kept.
pub const ANNOTATION_PREFIX: &str = "egress-agent.dev/";
/// Annotation that names a pod's host end.
pub const INTERFACE_ANNOTATION: &str = "egress-agent.dev/interface";
/// The problem of a pod that names an interface and no addresses.
pub const NO_ADDRESS: &str = "no address in status.podIPs: while the pod is enforced, every source \
                              address counts as spoofed and nothing that it sends passes";
