//! The BPF maps; `docs/bpftool.md` shows how to read them.

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, HashOfMaps, LpmTrie, PerCpuArray, Queue, RingBuf},
    macros::btf_map,
};
use egress_common::{
    address::Address,
    dns::Message,
    limits::{
        ALLOW_ENTRIES, CIDR_ENTRIES, DECISIONS, DENIALS_RING_BYTES, FLOW_ENTRIES, FlowLimits,
        HELD_RING_BYTES, INTERFACES, LEARNED_ENTRIES, LEARNED_RING_BYTES, LINK_OWNERS,
        NODE_ADDRESSES, PENDING_QUERIES, POLICIES, RANGE_MAP_ENTRIES, TUNNEL_MAP_ENTRIES,
    },
    records::{
        AllowKey, AllowValue, CidrEntry, Counters, Decision, DecisionKey, Denial, DnsPorts,
        DnsTimes, Flow, FlowKey, FlowValue, Forged, Held, Identity, InterfaceValue, LearnedEntry,
        LearnedNote, LinkAddress, LinkHardware, LinkOwner, Meter, NameEntry, NameKey, NodeAddress,
        PendingKey, PendingQuery, Policy, Probes, Range, Tunnel, TunnelKey,
    },
};

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// A pod's allow map.
pub type Allow = HashMap<AllowKey, AllowValue, { ALLOW_ENTRIES as usize }, NO_PREALLOC>;
/// A policy's CIDR trie.
pub type Cidrs = LpmTrie<Address, CidrEntry, { CIDR_ENTRIES as usize }>;
/// A pod's flows of one kind.
pub type Flows = HashMap<FlowKey, FlowValue, { FLOW_ENTRIES as usize }, NO_PREALLOC>;
/// The addresses and ports to which a pod has connected.
pub type Called = HashMap<FlowKey, Flow, { FLOW_ENTRIES as usize }, NO_PREALLOC>;
/// Keys in the order of their insertion into `opening`.
pub type Order = Queue<FlowKey, { FlowLimits::of(FLOW_ENTRIES).opening_to_pod as usize }>;

#[btf_map(name = "interfaces")]
pub static INTERFACE: HashMap<u32, InterfaceValue, { INTERFACES as usize }, NO_PREALLOC> =
    HashMap::new();

#[btf_map(name = "identities")]
pub static IDENTITY: HashMap<u32, Identity, { INTERFACES as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map(name = "policies")]
pub static POLICY: HashMap<u32, Policy, { POLICIES as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map(name = "allow")]
pub static ALLOW: HashOfMaps<u32, Allow, { POLICIES as usize }, NO_PREALLOC> = HashOfMaps::new();

#[btf_map(name = "cidrs")]
pub static CIDR: HashOfMaps<u32, Cidrs, { POLICIES as usize }, NO_PREALLOC> = HashOfMaps::new();

/// Established flows that the pod opened.
#[btf_map(name = "flows")]
pub static FLOW: HashOfMaps<u32, Flows, { INTERFACES as usize }, NO_PREALLOC> = HashOfMaps::new();

/// Established TCP connections that others opened.
#[btf_map(name = "inbound")]
pub static INBOUND: HashOfMaps<u32, Flows, { INTERFACES as usize }, NO_PREALLOC> =
    HashOfMaps::new();

/// Flows that are not established, or closed, and fragmented packets.
#[btf_map(name = "opening")]
pub static OPENING: HashOfMaps<u32, Flows, { INTERFACES as usize }, NO_PREALLOC> =
    HashOfMaps::new();

/// The addresses and ports to which the pod has connected by TCP ([`FlowKey::called`]).
#[btf_map(name = "called")]
pub static CALLED: HashOfMaps<u32, Called, { INTERFACES as usize }, NO_PREALLOC> =
    HashOfMaps::new();

/// The order of the keys in `opening` whose flows the pod opened.
#[btf_map(name = "order_from_pod")]
pub static ORDER_FROM_POD: HashOfMaps<u32, Order, { INTERFACES as usize }, NO_PREALLOC> =
    HashOfMaps::new();

/// The order of the keys in `opening` whose flows others opened.
#[btf_map(name = "order_to_pod")]
pub static ORDER_TO_POD: HashOfMaps<u32, Order, { INTERFACES as usize }, NO_PREALLOC> =
    HashOfMaps::new();

/// The template of a pod's map of names: no program uses it, and this map stays empty.
#[btf_map(name = "names")]
pub static NAME: HashMap<NameKey, NameEntry, 1, NO_PREALLOC> = HashMap::new();

/// A policy's decided names.
pub type Decisions = HashMap<DecisionKey, Decision, { DECISIONS as usize }, NO_PREALLOC>;
/// The queries of a pod that the programs have let pass.
pub type Pending = HashMap<PendingKey, PendingQuery, { PENDING_QUERIES as usize }, NO_PREALLOC>;
/// The addresses that the programs have learned under a policy.
pub type Learned = HashMap<AllowKey, LearnedEntry, { LEARNED_ENTRIES as usize }, NO_PREALLOC>;

#[btf_map(name = "decisions")]
pub static DECISION: HashOfMaps<u32, Decisions, { POLICIES as usize }, NO_PREALLOC> =
    HashOfMaps::new();

#[btf_map(name = "pending")]
pub static PENDING: HashOfMaps<u32, Pending, { INTERFACES as usize }, NO_PREALLOC> =
    HashOfMaps::new();

#[btf_map(name = "learned")]
pub static LEARNED: HashOfMaps<u32, Learned, { POLICIES as usize }, NO_PREALLOC> =
    HashOfMaps::new();

#[btf_map(name = "learned_notes")]
pub static LEARNED_NOTES: RingBuf<LearnedNote, { LEARNED_RING_BYTES as usize }> = RingBuf::new();

#[btf_map(name = "dns_times")]
pub static DNS_TIMES: Array<DnsTimes, 1> = Array::new();

/// The flow that a program evicts: the stack has no room for it.
#[btf_map(name = "evicted")]
pub static EVICTED: PerCpuArray<FlowValue, 1> = PerCpuArray::new();

/// Where a program reads a DNS message.
#[btf_map(name = "message")]
pub static MESSAGE: PerCpuArray<Message, 1> = PerCpuArray::new();

#[btf_map(name = "ranges")]
pub static RANGE: LpmTrie<Address, Range, { RANGE_MAP_ENTRIES as usize }> = LpmTrie::new();

#[btf_map(name = "dns_ports")]
pub static DNS_PORT: Array<DnsPorts, 1> = Array::new();

#[btf_map(name = "meters")]
pub static METER: HashMap<u32, Meter, { INTERFACES as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map(name = "counters")]
pub static COUNTERS: PerCpuArray<Counters, 1> = PerCpuArray::new();

#[btf_map(name = "held")]
pub static HELD: RingBuf<Held, { HELD_RING_BYTES as usize }> = RingBuf::new();

#[btf_map(name = "denials")]
pub static DENIALS: RingBuf<Denial, { DENIALS_RING_BYTES as usize }> = RingBuf::new();

#[btf_map(name = "probes")]
pub static PROBES: HashMap<u32, Probes, { INTERFACES as usize }, NO_PREALLOC> = HashMap::new();

/// The times at which pods may have sent frames with another's source. No entry means never.
#[btf_map(name = "forged")]
pub static FORGED: HashMap<u32, Forged, { INTERFACES as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map(name = "link_owners")]
pub static LINK_OWNER: HashMap<LinkAddress, LinkOwner, { LINK_OWNERS as usize }, NO_PREALLOC> =
    HashMap::new();

/// The one link-local address of each interface that is not derived from its hardware address.
#[btf_map(name = "link_locals")]
pub static LINK_LOCAL: HashMap<u32, LinkAddress, { INTERFACES as usize }, NO_PREALLOC> =
    HashMap::new();

/// The hardware address from which each port of a bridge may send.
#[btf_map(name = "link_hardware")]
pub static LINK_HARDWARE: HashMap<u32, LinkHardware, { INTERFACES as usize }, NO_PREALLOC> =
    HashMap::new();

/// The node itself receives packets to these prefixes.
#[btf_map(name = "node_addresses")]
pub static NODE_ADDRESS: LpmTrie<Address, NodeAddress, { NODE_ADDRESSES as usize }> =
    LpmTrie::new();

#[btf_map(name = "tunnels")]
pub static TUNNEL: HashMap<TunnelKey, Tunnel, { TUNNEL_MAP_ENTRIES as usize }, NO_PREALLOC> =
    HashMap::new();

/// Whether the gate polls the ring [`HELD`] (1), or sleeps and must be woken (0).
#[btf_map(name = "gate_awake")]
pub static GATE_AWAKE: Array<u32, 1> = Array::new();

/// The value of [`STAMP`]. The agent keeps it here, so that the next agent's programs use the same stamp.
#[btf_map(name = "stamp")]
pub static STAMP_KEPT: Array<u32, 1> = Array::new();

/// The value to which [`crate::from_pod`] sets `skb->priority`, so that netfilter can distinguish frames that
/// passed through the program from those that did not. Never zero once loaded.
#[unsafe(no_mangle)]
pub static STAMP: Global<u32> = Global::new(0);

/// The mark of a frame that the agent puts back on its way to the pod. Never zero once loaded.
#[unsafe(no_mangle)]
pub static DELIVER_MARK: Global<u32> = Global::new(0);

/// The mark of a frame that the agent puts back on its way from the pod: [`crate::to_pod`] turns it round.
/// Never zero once loaded.
#[unsafe(no_mangle)]
pub static BOUNCE_MARK: Global<u32> = Global::new(0);

/// The mark of a frame that the pod sent before it was known, and that the agent sends again to be judged
/// now: [`crate::to_pod`] turns it round without the mark. Never zero once loaded.
#[unsafe(no_mangle)]
pub static AGAIN_MARK: Global<u32> = Global::new(0);

/// The mark of a probe frame, by which the agent tests whether the packets of an interface reach the
/// programs: [`crate::to_pod`] turns it round; [`crate::from_pod`] counts and drops it. Never zero once
/// loaded.
#[unsafe(no_mangle)]
pub static PROBE_MARK: Global<u32> = Global::new(0);

/// Whether the programs trace their decisions (`--datapath-log`). The kernel removes the traces when this is
/// zero, because the value is constant when the programs are verified.
#[unsafe(no_mangle)]
pub static TRACE: Global<u8> = Global::new(0);

/// How long a UDP flow that the pod opened may be idle, in nanoseconds (`limits.udpIdle`).
#[unsafe(no_mangle)]
pub static UDP_IDLE_NS: Global<u64> = Global::new(0);

/// Whether the programs pass decided DNS on without the agent (`dns.learn`). The kernel removes that part when this is
/// zero.
#[unsafe(no_mangle)]
pub static LEARNS: Global<u8> = Global::new(0);

/// Whether the kernel has `bpf_ktime_get_coarse_ns`. The agent tests this before it loads the programs.
#[unsafe(no_mangle)]
pub static COARSE_CLOCK: Global<u8> = Global::new(0);
