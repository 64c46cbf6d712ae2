//! The records of the flow maps.

use crate::address::Address;

/// Key of a pod's flow maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowKey {
    /// The pod's address.
    pub pod_addr: Address,
    /// The other side's address.
    pub peer_addr: Address,
    /// The pod's port; for ICMP echo the identifier; for a fragment the upper half of its id.
    pub pod_port: u16,
    /// The other side's port; for ICMP echo the identifier; for a fragment the lower half of its id.
    pub peer_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// One of the `FLOW_KEY_*` constants.
    pub kind: u8,
    /// Always zero.
    pub pad: u16,
}

/// The key names a flow.
pub const FLOW_KEY_FLOW: u8 = 0;
/// The key names a fragmented packet whose first fragment passed.
pub const FLOW_KEY_FRAGMENT: u8 = 1;
/// The key names an address and port that the pod has connected to ([`FlowKey::called`]).
pub const FLOW_KEY_CALLED: u8 = 2;

impl FlowKey {
    /// The key of the flow's other side alone: the pod's address and port are zero.
    #[must_use]
    #[inline(always)]
    pub const fn called(&self) -> Self {
        Self {
            pod_addr: [0; 16],
            peer_addr: self.peer_addr,
            pod_port: 0,
            peer_port: self.peer_port,
            protocol: self.protocol,
            kind: FLOW_KEY_CALLED,
            pad: 0,
        }
    }
}

/// Value of a pod's flow maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Flow {
    /// When a packet of the flow was last seen, in nanoseconds of `CLOCK_BOOTTIME`; exact to
    /// [`crate::flow::REFRESH_NS`]. For a flow that the other side opened, only its packets count.
    pub last_seen_ns: u64,
    /// The policy version that admitted it, or that found nothing to deny in it; [`UNJUDGED`] when none
    /// has looked at it. A flow from an older version is judged again.
    pub policy: u32,
    /// One of the `FLOW_*` state constants.
    pub state: u8,
    /// Bits of the `FLOW_SEEN_*` constants.
    pub seen: u8,
    /// Of a TCP connection that the other side opens: the lower half of the sequence number that
    /// its next segment has to acknowledge. Otherwise zero.
    pub handshake: u16,
}

/// No policy has this number: in a flow it means that none has judged it yet.
pub const UNJUDGED: u32 = 0;

/// The pod opened it and the policy admitted it.
pub const FLOW_OUT: u8 = 1;
/// The other side opened it.
pub const FLOW_IN: u8 = 2;
/// The pod opened it and a later policy forbids it. Kept so that the other side's packets do not
/// make it a flow that they opened.
pub const FLOW_CUT: u8 = 3;

/// The pod sent a TCP FIN.
pub const FLOW_SEEN_FIN_OUT: u8 = 1;
/// The other side sent a TCP FIN.
pub const FLOW_SEEN_FIN_IN: u8 = 1 << 1;
/// Either side sent a TCP RST.
pub const FLOW_SEEN_RST: u8 = 1 << 2;
/// The pod sent something.
pub const FLOW_SEEN_OUT: u8 = 1 << 3;
/// The other side sent something.
pub const FLOW_SEEN_IN: u8 = 1 << 4;
/// Who opened the flow has spoken again after an answer: it is established.
pub const FLOW_SEEN_AGAIN: u8 = 1 << 5;
/// The TCP RST came from the other side, and the pod has not disproved it.
pub const FLOW_SEEN_RST_IN: u8 = 1 << 6;
