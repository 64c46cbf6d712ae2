//! TCP connections that the other side has accepted, so that it did not open them.
//!
//! A host that opens a connection sends no SYN-ACK. `opening` has a record of each SYN-ACK that answers no connection
//! of the pod, under a key of its own ([`FlowKey::accepted`]). No other packet writes that key. So packets on other
//! CPUs, which read, change and write back the flow itself, cannot undo the record.
//!
//! The record is one of the flows that others open: when there are many, the newest evicts the oldest
//! ([`crate::opening`]). One that is evicted early leaves behind a record of the peer's group
//! ([`FlowKey::accepted_group`]), and takes the flow along. `opening` always has room for all groups.

use core::hint::black_box;

use egress_common::{
    flow::is_accepted_lately,
    ids::PodId,
    records::{FLOW_IN, FLOW_KEY_ACCEPTED, FLOW_KEY_FLOW, Flow, FlowKey, FlowValue, UNJUDGED},
};

use crate::{
    flows::{ANY, IN_INBOUND, IN_OPENING, NOWHERE, forget, map_of, read},
    maps::{Flows, STAMP},
    skb::now_ns,
};

/// The record of a SYN-ACK at this time.
#[inline(always)]
pub const fn record(now_ns: u64) -> Flow {
    Flow::new(UNJUDGED, FLOW_IN, now_ns)
}

/// Whether the other side has accepted the connection lately. An established flow does not count for its peer's group:
/// a flood with forged sources must not end it. `key` is a copy for this function, which changes it.
#[inline(always)]
pub fn is_noted(pod: PodId, key: &mut FlowKey, now_ns: u64, is_established: bool) -> bool {
    let Some(opening) = map_of(pod, IN_OPENING) else {
        return true;
    };
    key.kind = FLOW_KEY_ACCEPTED;
    if has(opening, key, now_ns) {
        return true;
    }
    if is_established {
        return false;
    }
    *key = key.accepted_group(STAMP.load());
    has(opening, key, now_ns)
}

/// Whether the map has a record that is not too old.
#[inline(always)]
fn has(opening: &Flows, key: &FlowKey, now_ns: u64) -> bool {
    read(opening, black_box(key)).is_some_and(|record| is_accepted_lately(&record, now_ns))
}

/// Whether the other side has accepted the connection of a flow that is about to move to another map. The key stays as
/// it is; a copy would take too much of the stack, of which all functions together have 512 bytes.
#[inline(always)]
pub fn bars(opening: &Flows, flow: &mut FlowKey) -> bool {
    flow.kind = FLOW_KEY_ACCEPTED;
    let is_noted = has(opening, flow, now_ns());
    flow.kind = FLOW_KEY_FLOW;
    is_noted
}

/// Whether the key is that of a record.
#[inline(always)]
pub const fn is_record(key: &FlowKey) -> bool {
    key.kind == FLOW_KEY_ACCEPTED
}

/// Forgets the flow at this place if the other side opened it; nothing at [`crate::flows::NOWHERE`].
///
/// A global function ([`crate`]).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn forget_opened(pod: u32, key: *const FlowKey, place: u32) -> u32 {
    // SAFETY: the pointer is null or points to the caller's memory; the verifier has checked this.
    let Some(key) = (unsafe { key.as_ref() }) else {
        return 0;
    };
    if place != NOWHERE {
        // Kernels such as 6.1 do not accept a caller's pointer as a map's key.
        forget_inbound(PodId::new(pod), place, &black_box(*key));
    }
    0
}

/// Evicts a record. Until it would have expired, no peer of the same group opens a connection to the pod. `must` is set
/// for a record that found no room.
///
/// While the record was there, no packet to the pod or from it changed the flow. So nothing brings the flow back that
/// is removed here. The record goes last: [`crate::opening`] looks for it before it moves a flow.
#[inline(never)]
pub fn evict(pod: PodId, opening: &Flows, key: &mut FlowKey, must: bool) {
    let now_ns = now_ns();
    let mut is_full = false;
    if must || has(opening, key, now_ns) {
        is_full = !note_group(opening, key, now_ns);
        key.kind = FLOW_KEY_FLOW;
        forget_inbound(pod, IN_INBOUND, key);
        forget_inbound(pod, IN_OPENING, key);
        key.kind = FLOW_KEY_ACCEPTED;
    }
    let key = &*key;
    let _ = opening.remove(key);
    // An earlier agent has made the map without room for the groups.
    if is_full {
        note_group(opening, key, now_ns);
    }
}

/// Returns whether the map has room.
#[inline(always)]
fn note_group(opening: &Flows, key: &FlowKey, now_ns: u64) -> bool {
    let group = FlowValue {
        flow: record(now_ns),
        key: key.accepted_group(STAMP.load()),
    };
    opening.insert(&group.key, &group, ANY).is_ok()
}

/// Removes the flow from this map if the other side opened it.
#[inline(always)]
fn forget_inbound(pod: PodId, place: u32, key: &FlowKey) {
    let flow = map_of(pod, place).and_then(|flows| read(flows, key));
    if flow.is_some_and(|flow| flow.state == FLOW_IN) {
        forget(pod, key, place);
    }
}
