//! A denial before it becomes a line.

use std::{
    hash::{Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64},
    },
    time::SystemTime,
};

use arc_swap::ArcSwapOption;
use egress_common::{
    address::Address,
    reason::Reason,
    records::{VERDICT_AUDITED, VERDICT_DROPPED, VERDICT_REJECTED},
};

use super::{DecidedBy, DenialCounts, Subject};
use egress_policy::{Closer, EntrySource};

/// The pod of a denial, as lines print it. Two values with the same texts are the same pod.
#[derive(Debug)]
pub struct PodIdentity {
    /// Name of the node.
    pub node: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// UID of the pod.
    pub uid: String,
    /// How many denials of this pod are in the reporter's channel.
    pub(super) waiting: AtomicU32,
    /// How many denials of this pod exceeded its share of the channel and are not reported as lost yet.
    pub(super) overflow: AtomicU64,
    /// Its denials.
    pub counts: DenialCounts,
    /// The denials of its namespace, including this pod's.
    of_namespace: Arc<DenialCounts>,
    /// Its latest denial line.
    last_line: ArcSwapOption<String>,
}

impl PodIdentity {
    /// The pod, or the interface in quarantine, that this is the identity of.
    pub fn subject(&self) -> Subject {
        Subject::from_fields(&self.namespace, &self.name)
    }

    /// A pod without denials.
    pub fn new(
        node: impl Into<String>,
        namespace: impl Into<String>,
        name: impl Into<String>,
        uid: impl Into<String>,
    ) -> Self {
        Self {
            node: node.into(),
            namespace: namespace.into(),
            name: name.into(),
            uid: uid.into(),
            waiting: AtomicU32::new(0),
            overflow: AtomicU64::new(0),
            counts: DenialCounts::default(),
            of_namespace: Arc::default(),
            last_line: ArcSwapOption::empty(),
        }
    }

    /// The same pod, with the counters of its namespace.
    #[must_use]
    pub fn counted_in(self, of_namespace: Arc<DenialCounts>) -> Self {
        Self {
            of_namespace,
            ..self
        }
    }

    pub(super) fn count(&self, denied: &Denied) {
        let Denied {
            verdict,
            reason,
            count,
            ..
        } = *denied;
        self.counts.add(verdict, reason, count);
        self.of_namespace.add(verdict, reason, count);
        if let Some(policy) = DecidedBy::of(denied) {
            self.of_namespace.policies.add(&policy, verdict, count);
        }
    }

    pub(super) fn count_unreported(&self, count: u64) {
        self.counts.add_unreported(count);
        self.of_namespace.add_unreported(count);
    }

    pub(super) fn set_last_line(&self, line: String) {
        self.last_line.store(Some(Arc::new(line)));
    }

    /// The pod's latest denial line, a JSON object.
    pub fn last_line(&self) -> Option<Arc<String>> {
        self.last_line.load_full()
    }

    fn texts(&self) -> [&str; 4] {
        [&self.uid, &self.namespace, &self.name, &self.node]
    }
}

impl PartialEq for PodIdentity {
    fn eq(&self, other: &Self) -> bool {
        self.texts() == other.texts()
    }
}

impl Eq for PodIdentity {}

impl Hash for PodIdentity {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.texts().hash(state);
    }
}

/// The verdict on the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It was dropped.
    Dropped,
    /// It was dropped, and the sender got a rejection.
    Rejected,
    /// It passed, and would have been dropped in enforce mode.
    Audited,
}

impl Verdict {
    /// The verdict with this number in a kernel record.
    pub fn from_u8(value: u8) -> Option<Self> {
        match value {
            VERDICT_DROPPED => Some(Self::Dropped),
            VERDICT_REJECTED => Some(Self::Rejected),
            VERDICT_AUDITED => Some(Self::Audited),
            _ => None,
        }
    }

    /// The word in denial lines.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dropped => "dropped",
            Self::Rejected => "rejected",
            Self::Audited => "audited",
        }
    }
}

/// The source or destination of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// The address.
    pub address: Address,
    /// The port, host byte order, where the protocol has ports.
    pub port: Option<u16>,
}

/// A packet or a DNS message that was denied, or would have been.
#[derive(Clone, Debug)]
pub struct Denied {
    /// The pod.
    pub pod: Arc<PodIdentity>,
    /// The verdict.
    pub verdict: Verdict,
    /// The reason.
    pub reason: Reason,
    /// IP protocol number; `None` if the headers could not be parsed.
    pub protocol: Option<u8>,
    /// The source; `None` if the headers could not be parsed.
    pub src: Option<Endpoint>,
    /// The destination; `None` if the headers could not be parsed.
    pub dst: Option<Endpoint>,
    /// ICMP type and code, printed in place of ports.
    pub icmp: Option<(u8, u8)>,
    /// Name and type of a DNS query, printed in place of the destination's port.
    pub dns: Option<(String, String)>,
    /// Names that this pod resolved to the destination.
    pub dst_names: Vec<String>,
    /// The entry that denied it.
    pub rule: Option<EntrySource>,
    /// What closes the pod, at most [`egress_policy::CLOSERS`] objects.
    pub closed_by: Arc<[Closer]>,
    /// When it happened.
    pub time: SystemTime,
    /// How many packets this stands for.
    pub count: u64,
}
