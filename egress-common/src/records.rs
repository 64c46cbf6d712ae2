//! The records in the BPF maps. All are `repr(C)` with explicit padding and no `bool`: the kernel compares
//! keys byte by byte, and the verifier rejects uninitialised padding.

mod flows;
mod links;
mod names;

pub use flows::{
    FLOW_CUT, FLOW_IN, FLOW_KEY_ACCEPTED, FLOW_KEY_ACCEPTED_GROUP, FLOW_KEY_CALLED, FLOW_KEY_FLOW,
    FLOW_KEY_FRAGMENT, FLOW_OUT, FLOW_SEEN_AGAIN, FLOW_SEEN_FIN_IN, FLOW_SEEN_FIN_OUT,
    FLOW_SEEN_IN, FLOW_SEEN_OUT, FLOW_SEEN_RST, FLOW_SEEN_RST_IN, Flow, FlowKey, UNJUDGED,
};
pub use links::{
    HARDWARE_REFUSED, HARDWARE_SETTLED, LinkAddress, LinkHardware, LinkOwner, NODE_OWNS,
};
pub use names::{NAME_BY_STRANGER, NAME_BYTES, NameEntry, NameKey};

use crate::{
    address::Address,
    limits::{CLASSES, DNS_PORTS, OWN_ADDRESSES, RESOLVER_PORTS},
};

/// Value of `interfaces`, keyed by ifindex: the policy of the interface.
///
/// To move a pod from one version of its policy to the next, the agent replaces this value. The kernel
/// replaces the whole value at once, so every packet is judged by one complete version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Interface {
    /// Key of the pod in `flows`, `meters` and `identities`; the same for the pod's whole life.
    pub pod: u32,
    /// Key in `policies`, `allow` and `cidrs`; a new one for each version of the pod's policy.
    pub policy: u32,
    /// One of the `MODE_*` constants.
    pub mode: u32,
    /// Bits of the `INTERFACE_*` constants.
    pub flags: u32,
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

/// A port class: the meaning of one bit of a class bitmap.
///
/// For [`crate::protocol::bits::OTHER`] the IP protocol number takes the place of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct PortClass {
    /// Lowest port, host byte order.
    pub port_min: u16,
    /// Highest port, inclusive, host byte order.
    pub port_max: u16,
    /// Set of [`crate::protocol::bits`].
    pub protocols: u8,
    /// Always zero.
    pub pad: [u8; 3],
}

impl PortClass {
    /// A class that matches nothing.
    pub const NONE: Self = Self {
        port_min: 0,
        port_max: 0,
        protocols: 0,
        pad: [0; 3],
    };
}

/// Value of `policies`, keyed by policy id: one immutable version of a pod's policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Policy {
    /// The meaning of each bit of a class bitmap.
    pub classes: [PortClass; CLASSES],
    /// Classes that deny; all others allow.
    pub deny: u64,
    /// Classes that apply to every destination.
    pub any: u64,
    /// Classes of address entries that count like an entry for any destination: they allow neither protected
    /// destinations nor tunnels, nor DNS to servers that are no resolvers.
    pub under_any: u64,
    /// Classes of entries with a name; only used for the reason of a denial.
    pub named: u64,
    /// Fingerprint of the entries with a name. The kernel does not read it. A restarted agent compares it to
    /// decide whether the addresses in the allow map are valid under the current rules.
    pub names: u64,
    /// Fingerprint of the ranges and tunnels under which the policy's flows were judged, without resolvers.
    /// The kernel does not read it. A restarted agent adopts the policy, and with it the flows, only if its
    /// own ranges have the same fingerprint. Zero, which no ranges have, if some may have been judged under others.
    pub ranges: u64,
    /// SHA-256 of the annotations from which the policy was compiled; zero if there were none. The kernel
    /// does not read it. A restarted agent trusts saved annotations only if they have this digest.
    pub annotations: [u8; 32],
    /// The pod's own addresses.
    pub own: [Address; OWN_ADDRESSES],
    /// The number of used elements of `own`.
    pub own_len: u32,
    /// Bits of the `POLICY_*` constants.
    pub flags: u32,
}

/// Packets that match no entry pass (a pod with only `deny`).
pub const POLICY_OPEN: u32 = 1;
/// Internal destinations pass unless denied (`ranges.internal`).
pub const POLICY_ALLOW_INTERNAL: u32 = 1 << 1;
/// The annotations could not be read; the reason of denials is `policy_unreadable`.
pub const POLICY_UNREADABLE: u32 = 1 << 2;
/// The pod of the interface is not known yet: queries with any source wait at the gate, and the reason of
/// denials is `pod_unknown`.
pub const POLICY_UNIDENTIFIED: u32 = 1 << 3;
/// The policy allows or denies names. So DNS to a server that is not a resolver needs an address entry: the
/// gate does not see the names in it.
pub const POLICY_SPEAKS_OF_NAMES: u32 = 1 << 4;

/// The pod has an interface that cannot be enforced, and is closed because of it; the reason of denials is
/// `unenforced_interface`.
pub const POLICY_REFUSED: u32 = 1 << 5;

/// Some of the own addresses were read from the pod's interfaces, and a program of the pod may have chosen
/// them. The kernel does not read the flag. It tells a restarted agent how far to trust them.
pub const POLICY_OWN_UNSURE: u32 = 1 << 6;

impl Policy {
    /// A policy without classes and addresses: every external destination is denied.
    pub const CLOSED: Self = Self {
        classes: [PortClass::NONE; CLASSES],
        deny: 0,
        any: 0,
        under_any: 0,
        named: 0,
        names: 0,
        ranges: 0,
        annotations: [0; 32],
        own: [[0; 16]; OWN_ADDRESSES],
        own_len: 0,
        flags: 0,
    };

    /// Whether names give addresses the same classes under both policies, and the classes mean the same. An
    /// entry of an allow map is then valid under both.
    pub fn names_alike(&self, other: &Self) -> bool {
        self.classes == other.classes
            && self.deny == other.deny
            && self.under_any == other.under_any
            && self.named == other.named
            && self.names == other.names
    }
}

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

/// Value of a pod's allow map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct AllowEntry {
    /// The bitmap of the address's classes.
    pub classes: u64,
    /// The subset of these classes that applies if the address is internal and internal addresses do not pass
    /// without a rule.
    pub internal_classes: u64,
    /// The end of the time in which the entry admits new connections, in nanoseconds of `CLOCK_BOOTTIME`.
    pub expires_ns: u64,
}

/// Value of a policy's CIDR trie: the bitmap of the classes of the prefix and of all prefixes that contain
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CidrEntry {
    /// Bitmap of classes.
    pub classes: u64,
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
    pub ifindex: u32,
    /// The pod, as in [`Interface::pod`].
    pub pod: u32,
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
    /// The pod, as in [`Interface::pod`].
    pub pod: u32,
    /// The policy version that denied it.
    pub policy: u32,
    /// The interface on which it was denied.
    pub ifindex: u32,
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
                // SAFETY: the type is `repr(C)`, `Copy`, has no padding (checked below) and every
                // bit pattern is a valid value of each field.
                #[allow(clippy::allow_attributes, reason = "expanded once for each record")]
                unsafe impl aya::Pod for $ty {}
            )+
        };
    }
    pod!(
        super::Interface,
        super::Identity,
        super::Policy,
        super::AllowKey,
        super::AllowEntry,
        super::NameKey,
        super::NameEntry,
        super::CidrEntry,
        super::Range,
        super::DnsPorts,
        super::FlowKey,
        super::Flow,
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
    );
}

// A record without padding is as long as its fields together.
const _: () = {
    assert!(size_of::<Interface>() == 16);
    assert!(size_of::<Identity>() == 64 + 256 + UID_BYTES);
    assert!(size_of::<PortClass>() == 8);
    assert!(size_of::<Policy>() == 8 * CLASSES + 48 + 32 + 16 * OWN_ADDRESSES + 8);
    assert!(size_of::<AllowKey>() == 16);
    assert!(size_of::<AllowEntry>() == 24);
    assert!(size_of::<NameKey>() == 16 + 1 + NAME_BYTES);
    assert!(size_of::<NameEntry>() == 16);
    assert!(size_of::<Range>() == 16);
    assert!(size_of::<DnsPorts>() == 16);
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<Flow>() == 16);
    assert!(size_of::<Held>() == 24);
    assert!(size_of::<Denial>() == 72);
    assert!(size_of::<Counters>() == 18 * 8);
    assert!(size_of::<Meter>() == 9 * 8);
    assert!(size_of::<Probes>() == 2 * 8);
    assert!(size_of::<Forged>() == 2 * 8);
    assert!(size_of::<TunnelKey>() == 4);
    assert!(size_of::<LinkAddress>() == 16);
    assert!(size_of::<LinkHardware>() == 8);
};
