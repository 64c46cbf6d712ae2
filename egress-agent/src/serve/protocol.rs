//! The protocol of the Unix socket: one line of JSON each way, then the connection ends.
//!
//! `docs/status.md` describes the documents for those who read them with `--json`.

use std::{collections::BTreeMap, net::IpAddr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Longest request, in bytes.
pub const REQUEST_MAX: usize = 8 * 1024;
/// Longest response, in bytes.
pub const RESPONSE_MAX: u64 = 64 << 20;

/// A request to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// The state of all pods, or of one.
    Status {
        /// `namespace/pod`.
        pod: Option<String>,
        /// Whether to include resolved names.
        names: bool,
    },
    /// Whether a pod may reach something, and why.
    Explain {
        /// `namespace/pod`.
        pod: String,
        /// `name-or-address[:port][/protocol]`.
        target: String,
    },
    /// Whether the agent is ready, or ready to take over from the one that runs.
    Ready,
}

/// The agent's response.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// The response to [`Request::Status`].
    Status(Box<Status>),
    /// The response to [`Request::Explain`].
    Explanation(Box<Explanation>),
    /// The response to [`Request::Ready`]: the missing prerequisites.
    Ready(Vec<String>),
    /// The reason why there is no response.
    Error(String),
}

/// The output of `status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct Status {
    pub agent: AgentStatus,
    pub resolvers: Vec<ResolverStatus>,
    pub problems: Vec<ProblemStatus>,
    pub losses: BTreeMap<String, u64>,
    pub policies: Vec<PolicyStatus>,
    pub pods: Vec<PodStatus>,
    /// How many pods lack their names, because there are too many names in all.
    pub names_left_out_of: usize,
}

/// The agent itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct AgentStatus {
    pub node: String,
    pub version: String,
    pub pid: u32,
    pub hook: String,
    pub started: String,
    pub uptime_seconds: u64,
    pub healthy: bool,
    pub unhealthy: Vec<String>,
    pub ready: bool,
    pub not_ready: Vec<String>,
    pub pods_known: bool,
    pub existing_connections: ExistingStatus,
}

/// Connections that pods had open before they were enforced.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct ExistingStatus {
    pub outbound: String,
    pub because: String,
    pub inbound_kept: u64,
    pub inbound_judged: u64,
    pub outbound_trusted: u64,
}

/// A resolver.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct ResolverStatus {
    pub address: IpAddr,
    pub port: u16,
    pub source: String,
}

/// A problem that belongs to no single pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct ProblemStatus {
    pub about: String,
    pub message: String,
}

/// A policy object.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct PolicyStatus {
    pub kind: String,
    pub namespace: Option<String>,
    pub name: String,
    pub generation: Option<i64>,
    pub applied_generation: Option<i64>,
    pub selected: u32,
    pub enforced: u32,
    pub applied: bool,
    pub problem: Option<String>,
}

/// A pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct PodStatus {
    pub namespace: String,
    pub pod: String,
    pub uid: String,
    pub mode: String,
    pub enforced: bool,
    pub interfaces: Vec<InterfaceStatus>,
    pub unenforced_interfaces: Vec<UnenforcedStatus>,
    pub applied: Option<String>,
    pub policy_version: Option<u64>,
    pub names: usize,
    pub addresses: usize,
    pub denied: BTreeMap<String, u64>,
    pub would_deny: BTreeMap<String, u64>,
    pub denials_unreported: u64,
    pub last_denial: Option<Value>,
    pub problem: Option<String>,
    pub resolved: Option<Vec<ResolvedStatus>>,
    /// How many addresses are not in `resolved`, because there are too many.
    pub resolved_left_out: usize,
}

/// An interface.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct InterfaceStatus {
    pub index: u32,
    pub name: Option<String>,
}

/// An interface in a pod that cannot be enforced.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct UnenforcedStatus {
    pub name: String,
    pub kind: String,
    pub leads_to: String,
}

/// A name that a pod has resolved.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct ResolvedStatus {
    pub name: Option<String>,
    pub listed: bool,
    pub addresses: Vec<AddressStatus>,
}

/// An address that a name resolved to.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct AddressStatus {
    pub address: IpAddr,
    pub remaining_seconds: u64,
}

/// The verdict on packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// They pass.
    Allowed,
    /// They are dropped.
    Denied,
    /// They pass, and would be dropped in enforce mode.
    WouldDeny,
    /// They are not judged: the pod should be enforced and is not.
    Unknown,
}

/// The output of `explain`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct Explanation {
    pub pod: String,
    pub target: String,
    pub mode: String,
    pub decision: Decision,
    pub because: String,
    pub reason: Option<String>,
    #[serde(default)]
    pub closed_by: Vec<String>,
    pub entries: Vec<EntryStatus>,
    pub ports: Vec<PortsStatus>,
    pub question: Option<QuestionExplained>,
    pub addresses: Vec<AddressExplained>,
    pub addresses_left_out: usize,
    pub hint: Option<String>,
    pub problem: Option<String>,
}

/// An entry of an annotation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct EntryStatus {
    pub of: String,
    pub annotation: String,
    pub entry: String,
    pub line: usize,
    pub column: usize,
}

/// Ports that are open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct PortsStatus {
    pub protocol: String,
    pub first: Option<u16>,
    pub last: Option<u16>,
}

/// Whether a name may be queried.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct QuestionExplained {
    pub allowed: bool,
    pub because: String,
    pub entries: Vec<EntryStatus>,
}

/// An address and the verdict on packets to it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "docs/status.md describes each field")]
pub struct AddressExplained {
    pub address: IpAddr,
    pub names: Vec<String>,
    pub remaining_seconds: Option<u64>,
    pub allowed: bool,
    pub because: String,
    pub reason: Option<String>,
    pub entries: Vec<EntryStatus>,
    pub ports: Vec<PortsStatus>,
}
