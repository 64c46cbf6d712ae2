//! The flows of a pod: which are open, and which side opened them.
//!
//! A flow is in one of three maps of its pod. `opening` has the flows that are not established, or closed.
//! When a flow is established it moves from there to `flows` if the pod opened it, or to `inbound` if the
//! other side did. When it closes it moves back to `opening`. In `opening` the newest flow evicts the oldest
//! ([`crate::opening`]), so that no flood from either side evicts an established flow.
//!
//! A fourth map, `called`, has the addresses and ports to which the pod has connected by TCP. Its entries
//! outlive the flows: no other host opens a connection to the pod from such an address and port.
//!
//! The kernel may reuse the memory of a removed entry at once for another flow of the same map
//! (`bpf_mem_alloc`, kernel/bpf/memalloc.c, since 6.1). So each flow repeats its key ([`entries::flow`]), and the fields
//! on which verdicts depend (state, policy, whether the flow is established) are only written together with the key. The
//! fields that are written in place are harmless for any flow.

use core::hint::black_box;

use egress_common::{
    address::is_v6_link_local,
    flow::{self, REFRESH_NS, is_closed, is_established},
    ids::{PodId, PolicyId},
    packet::{Packet, TCP_FIN, TCP_RST},
    protocol::{self, bits},
    records::{
        FLOW_CUT, FLOW_IN, FLOW_KEY_ACCEPTED, FLOW_KEY_FLOW, FLOW_OUT, FLOW_SEEN_AGAIN,
        FLOW_SEEN_FIN_IN, FLOW_SEEN_FIN_OUT, FLOW_SEEN_IN, FLOW_SEEN_OUT, FLOW_SEEN_RST,
        FLOW_SEEN_RST_IN, Flow, FlowKey, FlowValue, Interface, UNJUDGED,
    },
};

use crate::{
    accepted,
    counters::count,
    entries,
    maps::{CALLED, FLOW, Flows, INBOUND, METER, OPENING, POLICY, UDP_IDLE_NS},
    opening,
    skb::{Skb, last_tick_ns, now_ns},
    sources::is_own,
};

/// `BPF_ANY`: insert or replace.
pub const ANY: u64 = 0;
/// `BPF_NOEXIST`: insert only.
pub const NOEXIST: u64 = 1;
/// `BPF_EXIST`: replace only.
pub const EXIST: u64 = 2;

/// The flow is in none of the maps.
pub const NOWHERE: u32 = 0;
/// The flow is in `flows`.
pub const IN_FLOWS: u32 = 1;
/// The flow is in `inbound`.
pub const IN_INBOUND: u32 = 2;
/// The flow is in `opening`.
pub const IN_OPENING: u32 = 3;

/// The state that a lookup finds instead of [`FLOW_IN`] if the other side has accepted the connection
/// ([`crate::accepted`]). No map has it.
const ACCEPTED: u8 = 4;

/// A flow at the time of the lookup.
pub struct Known {
    /// Only valid unless `place` is [`NOWHERE`].
    pub flow: Flow,
    /// [`NOWHERE`], or the map that has the flow.
    pub place: u32,
}

impl Known {
    /// An unknown flow.
    pub const NONE: Self = Self {
        flow: Flow::new(UNJUDGED, 0, 0),
        place: NOWHERE,
    };

    /// The state of a known flow, or 0.
    #[inline(always)]
    pub const fn state(&self) -> u8 {
        if self.place == NOWHERE {
            0
        } else {
            self.flow.state
        }
    }

    /// Whether the other side has accepted the connection, and the pod has not opened it. Such a flow is not of state
    /// [`FLOW_IN`]. ([`find`] tells of an unknown flow only if it is asked for.)
    #[inline(always)]
    pub const fn is_accepted(&self) -> bool {
        self.flow.state == ACCEPTED
    }

    /// Gives the flow its state in the map again.
    #[inline(always)]
    pub const fn ignore_accepted(&mut self) {
        if self.is_accepted() {
            self.flow.state = FLOW_IN;
        }
    }

    /// Whether the other side has completed the handshake. (A close of the flow since then does not change
    /// this.)
    #[inline(always)]
    pub const fn is_established(&self) -> bool {
        self.flow.seen & FLOW_SEEN_AGAIN != 0
    }
}

/// One of the pod's maps of flows.
#[inline(always)]
pub fn map_of(pod: PodId, place: u32) -> Option<&'static Flows> {
    let key = &pod.get();
    // SAFETY: the maps are not preallocated, so an inner map that is removed lives until the
    // program ends.
    unsafe {
        match place {
            IN_FLOWS => FLOW.get(key),
            IN_INBOUND => INBOUND.get(key),
            _ => OPENING.get(key),
        }
    }
}

/// Looks up the flow with this key. A flow that was idle for too long counts as unknown. `to_pod` is whether the packet
/// goes to the pod: then an unknown connection may be one that the other side has accepted ([`Known::is_accepted`]).
#[inline(always)]
pub fn find(skb: &Skb<'_>, pod: PodId, key: &FlowKey, now_ns: u64, to_pod: bool) -> Known {
    let mut known = Known::NONE;
    let found = &raw mut known.flow;
    known.place = look_up_flow(pod.get(), key, now_ns, found, u32::from(to_pod));
    skb.forget_flow(&mut known.flow);
    known.place = skb.forget_number(known.place);
    known
}

/// Returns which of the pod's maps has the flow, and copies the flow to `found`.
///
/// A global function ([`crate`]).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn look_up_flow(
    pod: u32,
    key: *const FlowKey,
    now_ns: u64,
    found: *mut Flow,
    to_pod: u32,
) -> u32 {
    // SAFETY: each pointer is null or points to the caller's memory; the verifier has checked this.
    let (Some(key), Some(found)) = (unsafe { (key.as_ref(), found.as_mut()) }) else {
        return NOWHERE;
    };
    // Kernels such as 6.1 do not accept a caller's pointer as a map's key.
    let mut key = *key;
    let key = black_box(&mut key);
    let pod = PodId::new(pod);
    let place = if is_in(IN_FLOWS, pod, key, now_ns, found) {
        IN_FLOWS
    } else if is_in(IN_INBOUND, pod, key, now_ns, found) {
        IN_INBOUND
    } else if is_in(IN_OPENING, pod, key, now_ns, found) {
        IN_OPENING
    } else {
        NOWHERE
    };
    let is_asked = if place == NOWHERE {
        to_pod != 0
    } else {
        found.state == FLOW_IN
    };
    if is_asked && key.protocol == protocol::TCP && is_flow(key) {
        let is_established = place != NOWHERE && found.seen & FLOW_SEEN_AGAIN != 0;
        if accepted::is_noted(pod, key, now_ns, is_established) {
            found.state = ACCEPTED;
        }
    }
    place
}

#[inline(always)]
fn is_in(place: u32, pod: PodId, key: &FlowKey, now_ns: u64, found: &mut Flow) -> bool {
    let Some(flow) = map_of(pod, place).and_then(|flows| read(flows, key)) else {
        return false;
    };
    let is_alive = is_alive(key, &flow, now_ns);
    if is_alive {
        *found = flow;
    }
    is_alive
}

/// The flow with this key.
#[inline(always)]
pub fn read(flows: &Flows, key: &FlowKey) -> Option<Flow> {
    // SAFETY: the memory stays an entry of this map until the program ends.
    let value = unsafe { flows.get(key) }?;
    entries::flow(value, key)
}

/// The bits that a packet adds to `Flow::seen`.
#[inline(always)]
pub const fn seen(bit: u8, tcp_flags: u8, from_pod: bool) -> u8 {
    let mut seen = if from_pod {
        FLOW_SEEN_OUT
    } else {
        FLOW_SEEN_IN
    };
    if bit == bits::TCP {
        if tcp_flags & TCP_RST != 0 {
            seen |= FLOW_SEEN_RST;
            if !from_pod {
                seen |= FLOW_SEEN_RST_IN;
            }
        }
        if tcp_flags & TCP_FIN != 0 {
            seen |= if from_pod {
                FLOW_SEEN_FIN_OUT
            } else {
                FLOW_SEEN_FIN_IN
            };
        }
    }
    seen
}

/// Writes the flow's new state, and moves it to the map in which it belongs. `is_new` means that it is
/// another flow than the known one with the same key.
#[inline(always)]
pub fn keep(
    skb: &Skb<'_>,
    interface: &Interface,
    key: &FlowKey,
    known: &Known,
    mut next: Flow,
    is_new: bool,
) {
    skb.forget_flow(&mut next);
    let is_new = skb.forget_number(u32::from(is_new)) != 0;
    let next = &next;
    let before = &known.flow;
    if !is_new
        && before.last_seen_ns == next.last_seen_ns
        && before.seen == next.seen
        && before.policy() == next.policy()
        && before.state == next.state
        && before.handshake == next.handshake
        && !is_promoted(key, next, known.place)
    {
        return;
    }
    let how = known.place | if is_new { IS_NEW } else { 0 };
    change_flow(whose(interface), key, before, next, how);
}

/// Whether the flow must leave `opening`. A connection that the other side opened stays there until its
/// eviction is due: most end earlier.
#[inline(always)]
fn is_promoted(key: &FlowKey, flow: &Flow, place: u32) -> bool {
    place == IN_OPENING
        && (flow.state == FLOW_CUT || (flow.state == FLOW_OUT && is_established(key, flow)))
}

/// The policy in the upper half and the pod in the lower half: a global function has at most five parameters.
#[inline(always)]
fn whose(interface: &Interface) -> u64 {
    u64::from(interface.policy().get()) << 32 | u64::from(interface.pod().get())
}

/// The part of `how` that is a place.
const PLACE: u32 = 0xff;
/// Added to the place of a flow: the written flow is another one than the known flow at that place.
const IS_NEW: u32 = 1 << 8;
/// Added to [`IS_NEW`]: what is written is the record that the flow's other side has accepted the connection. (Its key is
/// made here, because the caller has no room for it on the stack.)
const IS_ACCEPTED: u32 = 1 << 9;

/// Writes a flow of [`whose`] and moves it to the map in which it belongs. `how` is the earlier place of the
/// flow, plus [`IS_NEW`] for a new flow. Returns 0 if the pod may not answer the flow, which then is not written.
///
/// A global function ([`crate`]).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn change_flow(
    whose: u64,
    key: *const FlowKey,
    before: *const Flow,
    next: *const Flow,
    how: u32,
) -> u32 {
    // SAFETY: each pointer is null or points to the caller's memory; the verifier has checked this.
    let flows = unsafe { (key.as_ref(), before.as_ref(), next.as_ref()) };
    let (Some(key), Some(before), Some(next)) = flows else {
        return 0;
    };
    // Kernels such as 6.1 do not accept a caller's pointer as a map's key or value.
    let (flow, key) = (*next, *key);
    let mut value = FlowValue { flow, key };
    value.key.kind |= FLOW_KEY_ACCEPTED * (how >> IS_ACCEPTED.trailing_zeros() & 1) as u8;
    let value = black_box(&mut value);
    let policy = PolicyId::new((whose >> 32) as u32);
    let pod = PodId::new(whose as u32);
    let is_new = how & IS_NEW != 0;
    if is_new && value.flow.state == FLOW_IN && !may_answer(policy, &value.key) {
        return 0;
    }
    change(pod, before, value, how & PLACE, is_new);
    1
}

#[inline(always)]
fn change(pod: PodId, before: &Flow, value: &mut FlowValue, place: u32, is_new: bool) {
    let FlowValue { flow: next, key } = &*value;
    let is_established = place == IN_FLOWS || place == IN_INBOUND;
    let closes = is_established
        && next.state != FLOW_CUT
        && key.protocol == protocol::TCP
        && is_closed(next);
    if is_new || closes {
        if is_established {
            forget(pod, key, place);
        }
        opening::admit(pod, value);
        return;
    }
    if is_promoted(key, next, place)
        && let Some(flows) = map_of(pod, IN_FLOWS)
        && flows.insert(key, &*value, ANY).is_ok()
    {
        forget(pod, key, IN_OPENING);
        return;
    }
    let Some(flows) = map_of(pod, place) else {
        return;
    };
    // FINs and RSTs are added in place: they come from both sides at the same time, and a lost one would keep
    // the flow for hours.
    let decides = (before.seen ^ next.seen) & (FLOW_SEEN_AGAIN | FLOW_SEEN_RST_IN) != 0
        || before.policy() != next.policy()
        || before.state != next.state
        || before.handshake != next.handshake;
    if decides {
        // The flow may have been removed meanwhile.
        let _ = flows.insert(key, &*value, EXIST);
    } else if let Some(value) = flows.get_ptr_mut(key) {
        // SAFETY: the memory stays an entry of this map until the program ends.
        let flow = unsafe { &mut (*value).flow };
        note(flow, next.seen & !FLOW_SEEN_AGAIN);
        if next.last_seen_ns != before.last_seen_ns {
            flow.last_seen_ns = next.last_seen_ns;
        }
    }
}

/// Records that the pod connects to this address and port. Returns 0 if the map has no room; only connections over
/// TCP need any.
///
/// A global function ([`crate`]).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn note_call(pod: u32, key: *const FlowKey, now_ns: u64) -> u32 {
    // SAFETY: the pointer is null or points to the caller's memory; the verifier has checked this.
    let Some(key) = (unsafe { key.as_ref() }) else {
        return 0;
    };
    if key.protocol != protocol::TCP || !is_flow(key) {
        return 1;
    }
    let peer = &black_box(key.called());
    // SAFETY: the map is not preallocated, so an inner map that is removed lives until the program ends.
    let Some(called) = (unsafe { CALLED.get(&pod) }) else {
        return 0;
    };
    // An entry that is there is replaced: the agent may be removing it, and would not see a write to its memory.
    let called_at = Flow::new(UNJUDGED, FLOW_OUT, now_ns);
    if called.insert(peer, black_box(&called_at), ANY).is_ok() {
        return 1;
    }
    // The kernel has no memory.
    if let Some(known) = called.get_ptr_mut(peer) {
        // SAFETY: the memory stays an entry of this map until the program ends.
        unsafe { (*known).last_seen_ns = now_ns };
        // The agent may have removed it before the write.
        if called.get_ptr(peer).is_some() {
            return 1;
        }
    }
    count_full(PodId::new(pod));
    0
}

/// Whether the pod has connected to the peer's address and port. A server opens its own connections from
/// other ports, so a packet from this port answers the pod, or is forged.
///
/// A global function ([`crate`]).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn has_called(pod: u32, key: *const FlowKey) -> u32 {
    // SAFETY: the pointer is null or points to the caller's memory; the verifier has checked this.
    let Some(key) = (unsafe { key.as_ref() }) else {
        return 1;
    };
    let peer = &black_box(key.called());
    // SAFETY: as in `note_call`.
    let called = unsafe { CALLED.get(&pod) };
    u32::from(called.is_some_and(|called| called.get_ptr(peer).is_some()))
}

/// Whether the other side cannot have opened a TCP connection with this key.
#[inline(always)]
pub fn is_called(skb: &Skb<'_>, pod: PodId, key: &FlowKey) -> bool {
    key.protocol == protocol::TCP && skb.forget_number(has_called(pod.get(), key)) != 0
}

/// Whether the pod may answer flows that others open to this address. A bridge sends a frame to all its ports
/// if it does not know the receiver's port: other hosts could fill the pod's map with flows that are not the
/// pod's.
#[inline(always)]
fn may_answer(policy: PolicyId, key: &FlowKey) -> bool {
    // SAFETY: the memory is that of some entry of the map until the program ends, and any bytes are a valid entry.
    let Some(policy) = (unsafe { POLICY.get(policy.get()) }) else {
        return false;
    };
    // Neighbours reach the pod by its link-local addresses. While the pod has no own addresses in the policy,
    // they are not known yet.
    let is_on_link = key.protocol == protocol::ICMPV6 && is_v6_link_local(&key.pod_addr);
    policy.own_len == 0 || is_on_link || is_own(policy, &key.pod_addr)
}

/// Adds to `Flow::seen`, and writes to the shared memory only if that changes the value.
#[inline(always)]
fn note(flow: &mut Flow, seen: u8) {
    if flow.seen & seen != seen {
        flow.seen |= seen;
    }
}

/// Removes a flow from its map.
#[inline(always)]
pub fn forget(pod: PodId, key: &FlowKey, place: u32) {
    if let Some(flows) = map_of(pod, place) {
        let _ = flows.remove(key);
    }
}

/// Whether the pod opened this flow, it is established, and `policy` admitted it. Most flows were seen within
/// the last second; for those the time of the last tick suffices.
#[inline(always)]
pub fn is_open(pod: PodId, key: &FlowKey, policy: PolicyId) -> bool {
    let Some(flows) = map_of(pod, IN_FLOWS) else {
        return false;
    };
    let Some(value) = flows.get_ptr_mut(key) else {
        return false;
    };
    // SAFETY: the memory stays an entry of this map until the program ends.
    let value = unsafe { &mut *value };
    let Some(flow) = entries::flow(value, key) else {
        return false;
    };
    if flow.state != FLOW_OUT || flow.policy() != policy {
        return false;
    }
    // If the tick is before the flow's last packet, the machine has been suspended; the difference then wraps
    // around.
    if last_tick_ns().wrapping_sub(flow.last_seen_ns) < REFRESH_NS {
        return true;
    }
    let now_ns = now_ns();
    let is_alive = is_alive(key, &flow, now_ns);
    if is_alive && now_ns.saturating_sub(flow.last_seen_ns) >= REFRESH_NS {
        value.flow.last_seen_ns = now_ns;
    }
    is_alive
}

/// Whether the flow is still remembered at `now_ns`.
#[inline(always)]
pub fn is_alive(key: &FlowKey, flow: &Flow, now_ns: u64) -> bool {
    flow::is_alive(key, flow, now_ns, UDP_IDLE_NS.load())
}

/// Records that the first fragment of a packet from the pod has passed.
#[inline(always)]
pub fn remember_fragments(interface: &Interface, key: &FlowKey, now_ns: u64) {
    let flow = Flow::new(interface.policy(), FLOW_OUT, now_ns);
    let flow = &raw const flow;
    change_flow(whose(interface), key, flow, flow, NOWHERE | IS_NEW);
}

/// Writes the record that the flow's other side has accepted the connection ([`crate::accepted`]). Returns 0 if the pod
/// could not have answered.
#[inline(always)]
pub fn note_accepted(interface: &Interface, key: &FlowKey, record: &Flow) -> u32 {
    let how = NOWHERE | IS_NEW | IS_ACCEPTED;
    change_flow(whose(interface), key, record, record, how)
}

/// Counts a flow, or a destination, that could not be remembered.
#[inline(always)]
pub fn count_full(pod: PodId) {
    count(|c| c.flows_full += 1);
    if let Some(meter) = METER.get_ptr_mut(pod.get()) {
        // SAFETY: the entry lives while the program runs; racing writers only blur the count.
        unsafe { (*meter).flows_full += 1 };
    }
}

/// Whether packets of this kind have flows.
#[inline(always)]
pub const fn is_tracked(packet: &Packet) -> bool {
    matches!(
        packet.bit,
        bits::TCP | bits::UDP | bits::SCTP | bits::ICMP_ECHO
    )
}

/// Whether the key is that of a flow, and not of a fragmented packet.
#[inline(always)]
pub const fn is_flow(key: &FlowKey) -> bool {
    key.kind == FLOW_KEY_FLOW
}
