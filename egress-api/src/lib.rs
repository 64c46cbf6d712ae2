//! The policy objects of a cluster, as the API server has them.
//!
//! | object | whose statement it is |
//! |---|---|
//! | [`EgressPolicy`] | a team's, about pods of its namespace |
//! | [`ClusterEgressPolicy`] | the platform's, before or after what teams say |
//! | [`EgressSet`] | a list of destinations that entries of all of them may use |
//! | [`ClusterNetworkPolicy`] | the platform's, in the upstream form (`policy.networking.k8s.io`) |
//! | [`EgressNodeReport`] | an agent's, about what its node has in force |
//!
//! [`Policy`] is the form of a policy object in which it is evaluated, and [`Selection`] finds the pods of each.
//!
//! All but `ClusterNetworkPolicy` are this project's. Their definitions for the API server are generated from these types.

mod cluster_egress_policy;
mod cluster_network_policy;
mod definitions;
mod egress_node_report;
mod egress_policy;
mod egress_set;
mod policy;
mod read;
mod schema;
mod selection;
mod selector;
mod tiers;

pub use cluster_egress_policy::{Action, ClusterEgressPolicy, ClusterEgressPolicySpec, Rule, Tier};
pub use cluster_network_policy::{
    ClusterNetworkPolicy, ClusterNetworkPolicySpec, ENTRIES_MAX, EgressPeer, EgressRule, NamedPort,
    NamespacedPod, NetworkPolicy, PeerPod, Peers, Port, PortRange, Ports, Protocol, RuleAction,
    Subject,
};
pub use definitions::definitions;
pub use egress_node_report::{
    EgressNodeReport, EgressNodeReportStatus, PROBLEM_ABOUT_MAX, PROBLEM_TEXT_MAX, PolicyCounts,
    REPORTED_POLICIES_MAX, REPORTED_PROBLEMS_MAX, ReportedPods, ReportedPolicy, ReportedProblem,
};
pub use egress_policy::{EgressPolicy, EgressPolicySpec, Mode};
pub use egress_set::{EgressSet, EgressSetSpec, read_set};
pub use policy::{Body, Policy, PolicySubject, SelectedPod};
pub use selection::{Applied, Rules, Selection};
pub use selector::{Labels, Selector, SelectorError, namespace_labels};
pub use tiers::only_takes_away;
