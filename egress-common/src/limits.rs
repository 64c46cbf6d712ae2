//! The limits that the kernel programs and the agent share.
//!
//! The agent checks each limit before it writes a map. Exceeding a limit is an error for the user; nothing is
//! cut silently.

/// Most classes (different combinations of precedence, action, protocols and port range) in one pod's policy.
pub const CLASSES: usize = 128;

/// Most intervals into which the borders of the classes' port ranges divide all ports. Different single ports that
/// are no neighbours need two for each and one more.
pub const PORT_INTERVALS: usize = 256;

/// Most own addresses of one pod (`status.podIPs`).
pub const OWN_ADDRESSES: usize = 8;

/// Most enforced interfaces on one node.
pub const INTERFACES: u32 = 4096;

/// Most policy versions on one node at the same time: one for each pod, and one more while it changes.
pub const POLICIES: u32 = 8192;

/// Default for the capacity of one pod's allow map, in addresses.
pub const ALLOW_ENTRIES: u32 = 4096;

/// Most CIDR prefixes in one pod's policy.
pub const CIDR_ENTRIES: u32 = 4096;

/// Most prefixes of the node's ranges.
pub const RANGE_ENTRIES: u32 = 4096;

/// The size of the map `ranges`. While ranges change it has those of before and those of after.
pub const RANGE_MAP_ENTRIES: u32 = 2 * RANGE_ENTRIES;

/// Most ports of one resolver.
pub const RESOLVER_PORTS: usize = 4;

/// Most different ports of the node's resolvers.
pub const DNS_PORTS: usize = 4;

/// Most link-local addresses in `link_owners`: for each pod's interface one that is not derived from its
/// hardware address, and those of the node and its gateways.
pub const LINK_OWNERS: u32 = 3 * INTERFACES;

/// Most prefixes in `node_addresses`. A node that provides services by IPVS has the address of each service.
pub const NODE_ADDRESSES: u32 = 32_768;

/// Most kinds of tunnels in the node's `tunnels` map.
pub const TUNNELS: u32 = 64;

/// The size of the map `tunnels`, for those of before and those of after a change.
pub const TUNNEL_MAP_ENTRIES: u32 = 2 * TUNNELS;

/// Default for the number of established flows that are remembered for one pod: this many that it opened, and
/// as many that others opened. (The kernel allocates the buckets, 16 bytes each, at once.)
pub const FLOW_ENTRIES: u32 = 16_384;

/// The number of flows of each kind that are remembered for one pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowLimits {
    /// Established flows that the pod opened; the same number applies to those that others opened.
    pub established: u32,
    /// Flows that the pod is opening or that are closed, and its fragmented packets.
    pub opening_from_pod: u32,
    /// Flows that others are opening or that are closed.
    pub opening_to_pod: u32,
    /// Addresses and ports to which the pod has connected by TCP.
    pub called: u32,
}

impl FlowLimits {
    /// The limits of a pod that may have this many established flows.
    ///
    /// Handshakes from outside get most of the room for flows that are not established: a flood from the pod
    /// affects only its own new connections.
    #[must_use]
    pub const fn of(established: u32) -> Self {
        Self {
            established,
            opening_from_pod: established.div_ceil(16),
            opening_to_pod: established.div_ceil(16) * 3,
            called: established.div_ceil(4),
        }
    }

    /// The room for all flows that are not established.
    #[must_use]
    pub const fn opening(self) -> u32 {
        self.opening_from_pod + self.opening_to_pod
    }

    /// The capacity of the map `opening`: these flows, and the groups of peers that have accepted connections.
    #[must_use]
    pub const fn opening_entries(self) -> u32 {
        self.opening() + ACCEPTED_GROUPS
    }
}

/// The number of groups into which the peers of a pod are divided
/// ([`FlowKey::accepted_group`](crate::records::FlowKey::accepted_group)); a power of two.
pub const ACCEPTED_GROUPS: u32 = 4096;

/// Bytes in the ring buffer of held DNS messages; a power of two and a multiple of the page size.
pub const HELD_RING_BYTES: u32 = 4 << 20;

/// Bytes in the ring buffer of denial records.
pub const DENIALS_RING_BYTES: u32 = 1 << 20;

/// The longest frame that is held, in bytes: an Ethernet header, an IPv6 header, and the 65,535 bytes that
/// may follow it, rounded up. A longer frame (a jumbogram, RFC 2675) is dropped and counted.
pub const HELD_FRAME_BYTES: usize = 65_600;

/// Most IPv6 extension headers of a packet; a packet with more is malformed. An ordinary stack sends at most
/// one of each of the five kinds (RFC 8200, section 4.1).
pub const EXTENSION_HEADERS: usize = 6;

/// The number of bytes that nearly always contain all headers of a frame: an Ethernet header, and an IPv4 and
/// a TCP header with the most options that they have room for. If fewer bytes of a frame are in memory that
/// the kernel owns, the beginning of the frame is copied there before its headers are read.
pub const HEADER_BYTES: u32 = 14 + 60 + 60;

/// The number of bytes that are copied then. A packet is malformed if the programs have to read beyond them.
/// The longest part of an ordinary frame that is read is a multicast listener report: 14 + 48 + 328 bytes.
pub const COPIED_HEADER_BYTES: u32 = 512;

/// The denial records that one pod may emit in a burst; [`DENIALS_PER_SECOND`] is the rate of refill.
pub const DENIAL_BURST: u32 = 512;
/// See [`DENIAL_BURST`].
pub const DENIALS_PER_SECOND: u32 = 256;

/// The room in the ring that short frames take, in bytes. Others take a multiple of it.
pub const HELD_UNIT: usize = 512;

/// The room that one pod may take in a burst while more than half of the ring is full, in [`HELD_UNIT`]s, and
/// the rate per second at which it refills: 256 KiB, an eighth of the other half. The limit does not apply
/// while the ring is emptier.
pub const HELD_BURST: u32 = 512;
/// See [`HELD_BURST`].
pub const HELD_PER_SECOND: u32 = 4096;

/// Most bytes of the kernel's `struct sk_buff` that the programs read for one frame.
pub const FRAME_RECORD_BYTES: usize = 160;

/// Most names of one pod that the programs know as decided. Each takes some 350 bytes.
pub const DECISIONS: u32 = 1024;

/// Most queries of one pod that the programs have let pass and that wait for a response.
pub const PENDING_QUERIES: u32 = 512;

/// Most addresses of one pod that the programs have learned.
pub const LEARNED_ENTRIES: u32 = 1024;

/// Bytes in the ring buffer of the addresses that the programs have learned.
pub const LEARNED_RING_BYTES: u32 = 512 << 10;

/// How long a response may take, in nanoseconds. Stub resolvers give up after 5 seconds (resolv.conf(5), `timeout`), or
/// after 30 at most.
pub const RESPONSE_TIMEOUT_NS: u64 = 30_000_000_000;
