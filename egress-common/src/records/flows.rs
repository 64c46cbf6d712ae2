//! The records of the flow maps.

use crate::{
    address::{Address, same},
    flow::peer_group,
    ids::PolicyId,
};

/// Key of a pod's flow maps. Aligned, so that programs compare it in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C, align(8))]
pub struct FlowKey {
    /// The pod's address.
    pub pod_addr: Address,
    /// The peer's address.
    pub peer_addr: Address,
    /// The pod's port; for ICMP echo the identifier; for a fragment the upper half of its identification.
    pub pod_port: u16,
    /// The peer's port; for ICMP echo the identifier; for a fragment the lower half of its identification.
    pub peer_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// One of the `FLOW_KEY_*` constants.
    pub kind: u8,
    /// Always zero.
    pub pad: u16,
}

/// The key is that of a flow.
pub const FLOW_KEY_FLOW: u8 = 0;
/// The key is that of a fragmented packet whose first fragment passed.
pub const FLOW_KEY_FRAGMENT: u8 = 1;
/// The key is an address and port to which the pod has connected ([`FlowKey::called`]).
pub const FLOW_KEY_CALLED: u8 = 2;
/// The key is that of a TCP connection that the other side has accepted, and so did not open
/// ([`FlowKey::accepted`]).
pub const FLOW_KEY_ACCEPTED: u8 = 3;
/// The key is a group of peers ([`FlowKey::accepted_group`]).
pub const FLOW_KEY_ACCEPTED_GROUP: u8 = 4;

impl FlowKey {
    /// The key with only the flow's peer: the pod's address and port are zero.
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

    /// The key of the record that the flow's other side has accepted the connection.
    #[must_use]
    #[inline(always)]
    pub const fn accepted(&self) -> Self {
        Self {
            kind: FLOW_KEY_ACCEPTED,
            ..*self
        }
    }

    /// The key of the record that some peer of the same group has accepted a connection whose own record had to give
    /// way. `secret` keeps others from choosing addresses of the same group.
    #[must_use]
    #[inline(always)]
    pub const fn accepted_group(&self, secret: u32) -> Self {
        let group = peer_group(&self.peer_addr, secret).to_be_bytes();
        let mut peer_addr = [0; 16];
        peer_addr[14] = group[0];
        peer_addr[15] = group[1];
        Self {
            pod_addr: [0; 16],
            peer_addr,
            pod_port: 0,
            peer_port: 0,
            protocol: self.protocol,
            kind: FLOW_KEY_ACCEPTED_GROUP,
            pad: 0,
        }
    }

    /// Whether two keys are equal. A comparison of the structures would call a function that the kernel does not have.
    #[must_use]
    #[inline(always)]
    #[expect(
        clippy::needless_bitwise_bool,
        reason = "the kernel's verifier follows each branch"
    )]
    pub const fn same(&self, other: &Self) -> bool {
        let ports = self.pod_port ^ other.pod_port | self.peer_port ^ other.peer_port;
        let kinds = self.protocol ^ other.protocol | self.kind ^ other.kind;
        same(&self.pod_addr, &other.pod_addr)
            & same(&self.peer_addr, &other.peer_addr)
            & (ports | kinds as u16 == 0)
    }

    /// The key of the flow that a record of [`Self::accepted`] is about.
    #[must_use]
    #[inline(always)]
    pub const fn flow(&self) -> Self {
        Self {
            kind: FLOW_KEY_FLOW,
            ..*self
        }
    }
}

/// A flow: in a pod's flow maps a part of [`super::FlowValue`], in its map `called` the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Flow {
    /// When a packet of the flow was last seen, in nanoseconds of `CLOCK_BOOTTIME`, with the precision of
    /// [`crate::flow::REFRESH_NS`]. For a flow that the other side opened, only its packets count.
    pub last_seen_ns: u64,
    /// [`PolicyId`] of the version that admitted the flow, or that found nothing to deny in it; [`UNJUDGED`] when
    /// none has judged it. A flow of an older version is judged again.
    policy: u32,
    /// One of the `FLOW_*` state constants.
    pub state: u8,
    /// Bits of the `FLOW_SEEN_*` constants.
    pub seen: u8,
    /// For a TCP connection that the other side is opening: the lower half of the acknowledgment number that
    /// its next segment must have. Otherwise zero.
    pub handshake: u16,
}

impl Flow {
    /// A flow in one of the states, of which no packet was seen, under this policy.
    #[must_use]
    #[inline(always)]
    pub const fn new(policy: PolicyId, state: u8, last_seen_ns: u64) -> Self {
        Self {
            last_seen_ns,
            policy: policy.get(),
            state,
            seen: 0,
            handshake: 0,
        }
    }

    /// The policy version that admitted the flow, or that found nothing to deny in it; [`UNJUDGED`] when none has
    /// judged it. A flow of an older version is judged again.
    #[must_use]
    #[inline(always)]
    pub const fn policy(&self) -> PolicyId {
        PolicyId::new(self.policy)
    }

    /// Notes that this policy version has judged the flow.
    #[inline(always)]
    pub const fn set_policy(&mut self, policy: PolicyId) {
        self.policy = policy.get();
    }
}

/// No policy has this number. In a flow it means that no policy has judged it yet.
pub const UNJUDGED: PolicyId = PolicyId::new(0);

/// The pod opened it, and the policy admitted it.
pub const FLOW_OUT: u8 = 1;
/// The other side opened it.
pub const FLOW_IN: u8 = 2;
/// The pod opened it, and a later policy denies it. It is kept so that the other side's packets do not make
/// it a flow that the other side opened.
pub const FLOW_CUT: u8 = 3;

/// The pod sent a TCP FIN.
pub const FLOW_SEEN_FIN_OUT: u8 = 1;
/// The other side sent a TCP FIN.
pub const FLOW_SEEN_FIN_IN: u8 = 1 << 1;
/// Either side sent a TCP RST.
pub const FLOW_SEEN_RST: u8 = 1 << 2;
/// The pod sent a packet.
pub const FLOW_SEEN_OUT: u8 = 1 << 3;
/// The other side sent a packet.
pub const FLOW_SEEN_IN: u8 = 1 << 4;
/// The side that opened the flow has sent again after an answer: the flow is established.
pub const FLOW_SEEN_AGAIN: u8 = 1 << 5;
/// The TCP RST came from the other side, and no later packet of the pod has contradicted it.
pub const FLOW_SEEN_RST_IN: u8 = 1 << 6;
