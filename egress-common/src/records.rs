//! The records in the BPF maps. All are `repr(C)` with explicit padding and no `bool`: the kernel compares
//! keys byte by byte, and the verifier rejects uninitialised padding. Ids are
//! plain numbers in them ([`crate::ids`]).

mod dns;
mod flows;
mod keyed;
mod links;
mod names;
mod policy;

pub use dns::{
    DECISION_ALIASES, Decision, DecisionKey, DnsTimes, LearnedEntry, LearnedNote, NAME_WORDS,
    PendingKey, PendingQuery, QUESTION_WORDS,
};
pub use flows::{
    FLOW_CUT, FLOW_IN, FLOW_KEY_ACCEPTED, FLOW_KEY_ACCEPTED_GROUP, FLOW_KEY_CALLED, FLOW_KEY_FLOW,
    FLOW_KEY_FRAGMENT, FLOW_OUT, FLOW_SEEN_AGAIN, FLOW_SEEN_FIN_IN, FLOW_SEEN_FIN_OUT,
    FLOW_SEEN_IN, FLOW_SEEN_OUT, FLOW_SEEN_RST, FLOW_SEEN_RST_IN, Flow, FlowKey, UNJUDGED,
};
pub use keyed::{AllowValue, FlowValue, InterfaceValue};
pub use links::{HARDWARE_REFUSED, HARDWARE_SETTLED, LinkAddress, LinkHardware, LinkOwner};
pub use names::{NAME_BY_STRANGER, NAME_BYTES, NameEntry, NameKey};
pub use policy::{
    POLICY_ALLOW_INTERNAL, POLICY_OPEN, POLICY_OWN_UNSURE, POLICY_REFUSED, POLICY_SELECTED,
    POLICY_SPEAKS_OF_NAMES, POLICY_UNIDENTIFIED, POLICY_UNREADABLE, Policy, PortClass,
};

use crate::{
    address::Address,
    classes::{ClassSet, PortTable},
    ids::{IfIndex, PodId, PolicyId},
    limits::{CLASSES, DNS_PORTS, OWN_ADDRESSES, RESOLVER_PORTS},
};

/// The policy of an interface. The map `interfaces` has it as an [`InterfaceValue`].
///
/// To move a pod from one version of its policy to the next, the agent replaces this value. The kernel
/// replaces the whole value at once, so every packet is judged by one complete version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Interface {
    /// [`PodId`]: the key of the pod in `flows`, `meters` and `identities`.
    pod: u32,
    /// [`PolicyId`]: the key in `policies`, `allow` and `cidrs`.
    policy: u32,
    /// One of the `MODE_*` constants.
    pub mode: u32,
    /// Bits of the `INTERFACE_*` constants.
    pub flags: u32,
}

impl Interface {
    /// The interface of a pod, under a policy, in one of the modes, without flags.
    #[must_use]
    pub const fn new(pod: PodId, policy: PolicyId, mode: u32) -> Self {
        Self {
            pod: pod.get(),
            policy: policy.get(),
            mode,
            flags: 0,
        }
    }

    /// The same under another policy version.
    #[must_use]
    pub const fn under(mut self, policy: PolicyId) -> Self {
        self.policy = policy.get();
        self
    }

    /// The pod that the interface belongs to.
    #[must_use]
    #[inline(always)]
    pub const fn pod(&self) -> PodId {
        PodId::new(self.pod)
    }

    /// The policy version by which its packets are judged.
    #[must_use]
    #[inline(always)]
    pub const fn policy(&self) -> PolicyId {
        PolicyId::new(self.policy)
    }
}

/// Judge, drop and hold.
pub const MODE_ENFORCE: u32 = 1;
/// Judge and report; drop nothing and hold only copies.
pub const MODE_AUDIT: u32 = 2;
/// Pass everything; judge and report nothing: the agent is about to detach.
pub const MODE_RELEASED: u32 = 3;

/// Copy denied packets to the agent so that it rejects them (`onDeny: reject`).
pub const INTERFACE_REJECT: u32 = 1;
/// The pod begins to be enforced: only the sources of its packets are judged, and no DNS is held.
pub const INTERFACE_SOURCES: u32 = 1 << 1;
/// The pod begins to be enforced, and frames that it sent before its sources were judged may still be on
/// their way back to it. Everything to the pod passes, and no flows are recorded.
pub const INTERFACE_SETTLING: u32 = 1 << 2;
/// The programs pass plain queries for decided names, and learn from plain responses to them.
pub const INTERFACE_LEARNS: u32 = 1 << 3;

/// The longest UID in bytes: room for a namespace, a slash and a name.
pub const UID_BYTES: usize = 320;

/// Value of `identities`, keyed by pod: the pod's names, by which a restarted agent finds it again. Each
/// field is text, padded with zero bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Identity {
    /// Namespace: a DNS label (RFC 1123), at most 63 bytes.
    pub namespace: [u8; 64],
    /// Name: a DNS subdomain (RFC 1123), at most 253 bytes.
    pub name: [u8; 256],
    /// The UID of the API server or the manifest, or `<namespace>/<name>`.
    pub uid: [u8; UID_BYTES],
}

/// Key of a pod's allow map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct AllowKey {
    /// The destination.
    pub addr: Address,
}

/// What a pod's allow map has about an address. The map has it as an [`AllowValue`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct AllowEntry {
    /// The address's classes.
    pub classes: ClassSet,
    /// The subset of these classes that applies if the address is internal and internal addresses do not pass
    /// without a rule.
    pub internal_classes: ClassSet,
    /// The end of the time in which the entry admits new connections, in nanoseconds of `CLOCK_BOOTTIME`.
    pub expires_ns: u64,
}

/// Value of a policy's CIDR trie: the classes of the prefix and of all prefixes that contain it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CidrEntry {
    /// The classes.
    pub classes: ClassSet,
}

/// Value of `ranges`: the kind of an address on this node. A prefix has the bits of all prefixes that contain
/// it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(C)]
pub struct Range {
    /// Bits of the `RANGE_*` constants.
    pub kinds: u64,
    /// The ports of a resolver, over UDP and TCP, in host byte order; unused elements are 0.
    pub resolver_ports: [u16; RESOLVER_PORTS],
}

impl Range {
    /// Whether this is a resolver with this port.
    #[inline(always)]
    pub const fn is_resolver_at(&self, port: u16) -> bool {
        self.kinds & RANGE_RESOLVER != 0 && port != 0 && has_port(&self.resolver_ports, port)
    }
}

/// Value of the single entry of `dns_ports`: the ports of all resolvers, so that most packets are
/// distinguished from DNS without a lookup in `ranges`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DnsPorts {
    /// The ports, in host byte order; unused elements are 0. While the configuration changes, the earlier
    /// ports and the new ones.
    pub ports: [[u16; DNS_PORTS]; 2],
}

impl DnsPorts {
    /// Whether a resolver may have this port. Port 0 may be reported as one.
    #[inline(always)]
    pub const fn may_have(&self, port: u16) -> bool {
        has_port(&self.ports[0], port) || has_port(&self.ports[1], port)
    }
}

/// Whether one of the ports is this one. The product of the four differences is zero only then, and needs one
/// branch instead of four.
#[inline(always)]
const fn has_port(ports: &[u16; 4], port: u16) -> bool {
    let [a, b, c, d] = *ports;
    (a ^ port) as u64 * (b ^ port) as u64 * (c ^ port) as u64 * (d ^ port) as u64 == 0
}

/// Value of `node_addresses`, keyed by prefix: the node itself receives packets to these addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct NodeAddress {
    /// Always 1.
    pub is_node: u32,
}

/// Key of `tunnels`: packets that a host may unpack and forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct TunnelKey {
    /// One of [`crate::protocol::bits`].
    pub protocol: u8,
    /// Always zero.
    pub pad: u8,
    /// Destination port in host byte order; 0 for protocols without ports.
    pub port: u16,
}

impl TunnelKey {
    /// Packets of the protocol with this bit of [`crate::protocol::bits`], to this port.
    #[inline(always)]
    pub const fn new(protocol: u8, port: u16) -> Self {
        Self {
            protocol,
            pad: 0,
            port,
        }
    }
}

/// Value of `tunnels`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Tunnel {
    /// 1 when such packets need an address entry to internal addresses.
    pub closed: u32,
}

/// A configured resolver.
pub const RANGE_RESOLVER: u64 = 1;
/// A pod, service or node address.
pub const RANGE_INTERNAL: u64 = 1 << 1;
/// Only an explicit address entry allows it; DNS never does.
pub const RANGE_PROTECTED: u64 = 1 << 2;
/// The node itself receives packets to the address. No entry of `ranges` has this bit: the map
/// `node_addresses` has these addresses.
pub const RANGE_NODE: u64 = 1 << 3;
/// The address is in a range of Services. Verdicts ignore this; the next agent reads it.
pub const RANGE_SERVICES: u64 = 1 << 4;
/// The length in bits of the translator's prefix that contains the address; see [`crate::translation`].
pub const RANGE_TRANSLATED: u64 = 0xff << RANGE_TRANSLATED_SHIFT;
/// The shift of [`RANGE_TRANSLATED`].
pub const RANGE_TRANSLATED_SHIFT: u32 = 8;

/// The head of each record in the `held` ring; the frame's bytes follow, from its Ethernet header on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Held {
    /// When the frame was held, in nanoseconds of `CLOCK_BOOTTIME`.
    pub time_ns: u64,
    /// The interface on which it was held.
    pub ifindex: IfIndex,
    /// The pod of the interface.
    pub pod: PodId,
    /// The number of bytes of the frame that follow.
    pub len: u32,
    /// One of the `HELD_*` constants.
    pub kind: u8,
    /// 1 when the original was dropped and waits to be put back; 0 when this is only a copy.
    pub taken: u8,
    /// Offset of the IP header in the frame.
    pub l3_offset: u8,
    /// Always zero.
    pub pad: u8,
}

/// A DNS query, or a TCP segment, on its way from the pod to a resolver.
pub const HELD_QUESTION: u8 = 1;
/// A DNS response, a TCP segment, or a fragment that may belong to a response, on its way from a resolver to
/// the pod.
pub const HELD_ANSWER: u8 = 2;
/// The beginning of a denied packet that the agent answers with a rejection.
pub const HELD_REJECT: u8 = 3;

/// Record of the `denials` ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Denial {
    /// When the packet was denied, in nanoseconds of `CLOCK_BOOTTIME`.
    pub time_ns: u64,
    /// Source address.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
    /// The pod of the interface.
    pub pod: PodId,
    /// The policy version that denied it.
    pub policy: PolicyId,
    /// The interface on which it was denied.
    pub ifindex: IfIndex,
    /// Length of the frame in bytes.
    pub len: u32,
    /// Source port, or 0.
    pub src_port: u16,
    /// Destination port, or 0.
    pub dst_port: u16,
    /// IP protocol number; 0 where the headers could not be walked.
    pub protocol: u8,
    /// A [`crate::reason::Reason`].
    pub reason: u8,
    /// ICMP type, or 0.
    pub icmp_type: u8,
    /// ICMP code, or 0.
    pub icmp_code: u8,
    /// One of the `VERDICT_*` constants.
    pub verdict: u8,
    /// The bit number of the class that denied, or [`NO_CLASS`].
    pub class: u8,
    /// [`FROM_POD`] or [`TO_POD`].
    pub direction: u8,
    /// 1 when `src`, `dst`, `protocol` and the ports were read.
    pub walked: u8,
    /// EtherType of the frame.
    pub ether_type: u16,
    /// Always zero.
    pub pad: u16,
}

/// The value of [`Denial::class`] when no class denied.
pub const NO_CLASS: u8 = 0xff;

/// The packet was dropped.
pub const VERDICT_DROPPED: u8 = 1;
/// The packet was dropped and is answered with a rejection.
pub const VERDICT_REJECTED: u8 = 2;
/// The packet passed; it would have been dropped in enforce mode.
pub const VERDICT_AUDITED: u8 = 3;

/// The pod sent it.
pub const FROM_POD: u8 = 1;
/// It was on its way to the pod.
pub const TO_POD: u8 = 2;

/// The node's counters, one copy per CPU in the single entry of `counters`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counters {
    /// Packets from pods that passed.
    pub passed_packets: u64,
    /// Bytes of these packets.
    pub passed_bytes: u64,
    /// Packets from pods that passed because of a known flow (also in `passed_packets`).
    pub passed_by_flow: u64,
    /// Packets that were dropped, in either direction, except held DNS messages.
    pub denied_packets: u64,
    /// Bytes of these packets.
    pub denied_bytes: u64,
    /// Packets that passed in audit mode and would have been denied.
    pub audited_packets: u64,
    /// DNS queries that the programs held; over TCP, segments.
    pub held_questions: u64,
    /// DNS responses that the programs held; over TCP, segments; and fragments that may belong to one.
    pub held_answers: u64,
    /// DNS messages dropped because the `held` ring was full.
    pub held_lost: u64,
    /// DNS messages dropped because their pod was over its share of a crowded `held` ring.
    pub held_limited: u64,
    /// DNS messages dropped because they were too long to be held.
    pub held_too_long: u64,
    /// Denied packets that were not answered with a rejection because the ring was crowded.
    pub rejects_lost: u64,
    /// Denials without a record because their pod was over its share.
    pub denials_limited: u64,
    /// Denials without a record because the `denials` ring was full.
    pub denials_lost: u64,
    /// Flows that could not be remembered: the kernel had no memory, or another CPU had the map's lock.
    pub flows_full: u64,
    /// Flows that were evicted before they were established.
    pub openings_evicted: u64,
    /// Established flows that were evicted because their pod had as many as it may.
    pub flows_evicted: u64,
    /// Packets on an interface without an entry in `interfaces` or `policies`.
    pub no_policy: u64,
    /// DNS queries for decided names that the programs let pass.
    pub passed_questions: u64,
    /// DNS responses that the programs let pass after they had learned the addresses.
    pub passed_answers: u64,
    /// DNS queries that passed unread because no agent ran; over TCP, segments.
    pub unread_questions: u64,
    /// DNS responses that passed unread because no agent ran; over TCP, segments; and fragments that may belong to one.
    pub unread_answers: u64,
}

/// Value of `meters`, keyed by pod: the pod's token buckets for the ring buffers, and the number of packets
/// and messages that were not reported because of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Meter {
    /// Denial records left.
    pub denial_tokens: u64,
    /// When `denial_tokens` was last refilled.
    pub denial_refill_ns: u64,
    /// Held messages left while the ring is crowded.
    pub held_tokens: u64,
    /// When `held_tokens` was last refilled.
    pub held_refill_ns: u64,
    /// Denials without a record: the pod was over its share, or the ring was full. Only grows.
    pub denials_unreported: u64,
    /// DNS messages of the pod that were dropped because the ring was full, the pod was over its share, or
    /// the message was too long. Only grows.
    pub held_unreported: u64,
    /// Flows that could not be remembered. Only grows.
    pub flows_full: u64,
    /// Flows that were evicted before they were established. Only grows.
    pub openings_evicted: u64,
    /// Established flows that were evicted for others of the pod. Only grows.
    pub flows_evicted: u64,
}

/// Value of `probes`, keyed by ifindex: how many of the agent's probe frames have reached `from_pod` on this
/// interface. Only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Probes {
    /// IPv4 frames.
    pub v4: u64,
    /// IPv6 frames.
    pub v6: u64,
}

/// Value of `forged`, keyed by pod: the times at which the pod may have sent frames with another's source
/// that a host on the node can send back to it. Times are nanoseconds of `CLOCK_BOOTTIME`; 0 means never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Forged {
    /// The last time at which a frame left in audit mode whose source was not known to be the pod's own.
    pub sent_ns: u64,
    /// When the pod began to be enforced, if its sources were not judged before.
    pub unjudged_ns: u64,
}

#[cfg(feature = "agent")]
mod pod {
    macro_rules! pod {
        ($($ty:ty),+ $(,)?) => {
            $(
                // SAFETY: the type is `repr(C)`, or a number; it is `Copy`, has no padding (checked below) and every
                // bit pattern is a valid value of each field.
                #[allow(clippy::allow_attributes, reason = "expanded once for each record")]
                unsafe impl aya::Pod for $ty {}
            )+
        };
    }
    pod!(
        crate::ids::PodId,
        crate::ids::PolicyId,
        crate::ids::IfIndex,
        super::InterfaceValue,
        super::Identity,
        super::Policy,
        super::AllowKey,
        super::AllowValue,
        super::NameKey,
        super::NameEntry,
        super::CidrEntry,
        super::Range,
        super::DnsPorts,
        super::FlowKey,
        super::Flow,
        super::FlowValue,
        super::Counters,
        super::Meter,
        super::Probes,
        super::Forged,
        super::TunnelKey,
        super::LinkAddress,
        super::LinkOwner,
        super::LinkHardware,
        super::NodeAddress,
        super::Tunnel,
        super::DecisionKey,
        super::Decision,
        super::PendingKey,
        super::PendingQuery,
        super::LearnedEntry,
        super::DnsTimes,
    );
}

// A record without padding is as long as its fields together.
const _: () = {
    assert!(size_of::<InterfaceValue>() == 20);
    assert!(size_of::<Identity>() == 64 + 256 + UID_BYTES);
    assert!(size_of::<PortClass>() == 8);
    assert!(
        size_of::<Policy>()
            == 8 * CLASSES
                + size_of::<PortTable>()
                + 8 * size_of::<ClassSet>()
                + 16
                + 32
                + 16 * OWN_ADDRESSES
                + 8
    );
    assert!(size_of::<AllowKey>() == 16);
    assert!(size_of::<AllowValue>() == 56);
    assert!(size_of::<NameKey>() == 16 + 1 + NAME_BYTES);
    assert!(size_of::<NameEntry>() == 16);
    assert!(size_of::<Range>() == 16);
    assert!(size_of::<DnsPorts>() == 16);
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<Flow>() == 16);
    assert!(size_of::<FlowValue>() == 40 + 16);
    assert!(size_of::<Held>() == 24);
    assert!(size_of::<Denial>() == 72);
    assert!(size_of::<Counters>() == 22 * 8);
    assert!(size_of::<DecisionKey>() == 256);
    assert!(size_of::<Decision>() == 48);
    assert!(size_of::<PendingKey>() == 40);
    assert!(size_of::<PendingQuery>() == 264 + 48 + 16);
    assert!(size_of::<LearnedEntry>() == 64);
    assert!(size_of::<LearnedNote>() == 256 + 16 + 16);
    assert!(size_of::<DnsTimes>() == 48);
    assert!(size_of::<Meter>() == 9 * 8);
    assert!(size_of::<Probes>() == 2 * 8);
    assert!(size_of::<Forged>() == 2 * 8);
    assert!(size_of::<TunnelKey>() == 4);
    assert!(size_of::<LinkAddress>() == 16);
    assert!(size_of::<LinkHardware>() == 8);
};
