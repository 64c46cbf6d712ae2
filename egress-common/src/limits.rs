//! Limits that the kernel side and the agent agree on.
//!
//! A limit is an error the user sees, never a silent cut: the agent checks each one before it
//! writes a map.

/// Most classes (distinct action, protocol and port range) in one pod's policy.
pub const CLASSES: usize = 64;

/// Most addresses one pod may own (`status.podIPs`).
pub const OWN_ADDRESSES: usize = 8;

/// Most interfaces that can be enforced on one node.
pub const INTERFACES: u32 = 4096;

/// Most policy versions alive at once on one node: one for each pod and one more while it changes.
pub const POLICIES: u32 = 8192;

/// Default for the most addresses that one pod's allow map holds.
pub const ALLOW_ENTRIES: u32 = 4096;

/// Most CIDR prefixes in one pod's policy.
pub const CIDR_ENTRIES: u32 = 4096;

/// Most prefixes in the node's `ranges` map.
pub const RANGE_ENTRIES: u32 = 4096;

/// Most ports on which one resolver is asked.
pub const RESOLVER_PORTS: usize = 4;

/// Most ports on which the node's resolvers are asked.
pub const DNS_PORTS: usize = 4;

/// Most link-local addresses in `link_owners`: one for each pod's interface that is not made of its
/// hardware address, the node's own and its gateways'.
pub const LINK_OWNERS: u32 = 3 * INTERFACES;

/// Most prefixes in `node_addresses`. A node that offers services by IPVS has each service's address.
pub const NODE_ADDRESSES: u32 = 32_768;

/// Most kinds of tunnels in the node's `tunnels` map.
pub const TUNNELS: u32 = 64;

/// Default for the most established flows that are remembered for one pod: as many that it opened,
/// and as many that others opened. (The kernel allots the buckets, 16 bytes each, at once.)
pub const FLOW_ENTRIES: u32 = 16_384;

/// How many flows of each kind are remembered for one pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowLimits {
    /// Established flows that the pod opened; and as many that others opened.
    pub established: u32,
    /// Flows that the pod opens or has closed, and its fragmented packets.
    pub opening_from_pod: u32,
    /// Flows that others open or have closed.
    pub opening_to_pod: u32,
    /// Addresses and ports that the pod has connected to by TCP.
    pub called: u32,
}

impl FlowLimits {
    /// The shares for a pod that may have this many established flows.
    ///
    /// Handshakes from outside get most of the room for what is not established: when the pod
    /// floods, only its own new connections suffer.
    #[must_use]
    pub const fn of(established: u32) -> Self {
        Self {
            established,
            opening_from_pod: established.div_ceil(16),
            opening_to_pod: established.div_ceil(16) * 3,
            called: established.div_ceil(4),
        }
    }

    /// Room for everything that is not established.
    #[must_use]
    pub const fn opening(self) -> u32 {
        self.opening_from_pod + self.opening_to_pod
    }
}

/// Bytes in the ring buffer of held DNS messages; a power of two and a multiple of the page size.
pub const HELD_RING_BYTES: u32 = 4 << 20;

/// Bytes in the ring buffer of denial records.
pub const DENIALS_RING_BYTES: u32 = 1 << 20;

/// Longest frame that is held, in bytes: an Ethernet header, an IPv6 header, and the 65,535 bytes
/// that may follow it, rounded up. What is longer (a jumbogram, RFC 2675) is dropped and counted.
pub const HELD_FRAME_BYTES: usize = 65_600;

/// Most IPv6 extension headers walked before a packet counts as malformed. A packet made by an
/// ordinary stack carries at most one of each of the five kinds (RFC 8200, section 4.1).
pub const EXTENSION_HEADERS: usize = 6;

/// Bytes of a frame that hold its headers in nearly every case: an Ethernet header, and an IPv4 and a
/// TCP header with all the options that they have room for. A frame of which less is in memory that the
/// kernel owns has its beginning copied there before its headers are read.
pub const HEADER_BYTES: u32 = 14 + 60 + 60;

/// Bytes of a frame that are copied then. What is judged and lies behind them is malformed. The longest
/// that is read of an ordinary frame is a multicast listener report: 14 + 48 + 328 bytes.
pub const COPIED_HEADER_BYTES: u32 = 512;

/// Denial records one pod may emit in a burst, and the rate per second at which they refill.
pub const DENIAL_BURST: u32 = 512;
/// See [`DENIAL_BURST`].
pub const DENIALS_PER_SECOND: u32 = 256;

/// Room in the ring that short frames take, in bytes. Others take a multiple of it.
pub const HELD_UNIT: usize = 512;

/// Room that one pod may take in a burst while the ring is more than half full, in [`HELD_UNIT`]s, and
/// the rate per second at which it refills: 256 KiB, an eighth of the other half. While the ring is
/// emptier there is no such limit.
pub const HELD_BURST: u32 = 512;
/// See [`HELD_BURST`].
pub const HELD_PER_SECOND: u32 = 4096;

/// Most bytes that the programs read of the kernel's own record of a frame.
pub const FRAME_RECORD_BYTES: usize = 160;
