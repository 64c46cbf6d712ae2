//! What a denial is, before it becomes a line.

use std::{
    hash::{Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64},
    },
    time::SystemTime,
};

use egress_common::{
    address::Address,
    reason::Reason,
    records::{VERDICT_AUDITED, VERDICT_DROPPED, VERDICT_REJECTED},
};

/// Whose denial it is, as lines print it. Two values with the same texts are the same pod.
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
    /// Denials of this pod that wait in the reporter's channel.
    pub(super) waiting: AtomicU32,
    /// Denials of this pod that found no room there, and have not been told about yet.
    pub(super) turned_away: AtomicU64,
}

impl PodIdentity {
    /// A pod.
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
            turned_away: AtomicU64::new(0),
        }
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

/// What became of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It was dropped.
    Dropped,
    /// It was dropped, and the sender was told.
    Rejected,
    /// It passed, and would not have in enforce mode.
    Audited,
}

impl Verdict {
    /// The verdict that a kernel record carries as this number.
    pub fn from_u8(value: u8) -> Option<Self> {
        match value {
            VERDICT_DROPPED => Some(Self::Dropped),
            VERDICT_REJECTED => Some(Self::Rejected),
            VERDICT_AUDITED => Some(Self::Audited),
            _ => None,
        }
    }

    /// The word that lines print.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dropped => "dropped",
            Self::Rejected => "rejected",
            Self::Audited => "audited",
        }
    }
}

/// One end of a packet's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// The address.
    pub address: Address,
    /// The port, host byte order, where the protocol has ports.
    pub port: Option<u16>,
}

/// A packet or a DNS message that did not pass, or would not have.
#[derive(Clone, Debug)]
pub struct Denied {
    /// Whose it was.
    pub pod: Arc<PodIdentity>,
    /// What became of it.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// IP protocol number; `None` where the headers could not be walked.
    pub protocol: Option<u8>,
    /// Where it came from; `None` where the headers could not be walked.
    pub src: Option<Endpoint>,
    /// Where it was going; `None` where the headers could not be walked.
    pub dst: Option<Endpoint>,
    /// ICMP type and code, printed in place of ports.
    pub icmp: Option<(u8, u8)>,
    /// Name and type of a DNS question, printed in place of the destination's port.
    pub dns: Option<(String, String)>,
    /// Names that this pod resolved to the destination.
    pub dst_names: Vec<String>,
    /// The entry that denied it.
    pub rule: Option<String>,
    /// When it happened.
    pub time: SystemTime,
    /// How many packets this stands for.
    pub count: u64,
}
