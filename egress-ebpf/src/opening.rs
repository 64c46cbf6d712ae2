//! Flows that are not established: the newest evicts the oldest.
//!
//! Two queues have the keys in `opening` in the order of their insertion: one those of flows that the pod
//! opens, the other those of flows that others open, so that neither side evicts the other's. A queue is as
//! long as its side's share. A key that is evicted from the queue leaves `opening`, too.
//!
//! The kernel's own LRU maps are no alternative. They hand out entries to CPUs in advance (128 to each), so
//! that on a machine with many CPUs a map of this size evicts entries that were just inserted
//! (`bpf_common_lru_pop_free`, `kernel/bpf/bpf_lru_list.c`). They are also allocated at once, and take ten
//! times the memory of a queue.

use core::ptr;

use aya_ebpf::helpers::bpf_map_pop_elem;
use egress_common::{
    flow::{is_closed, is_established},
    ids::PodId,
    protocol,
    records::{FLOW_IN, FLOW_OUT, FLOW_SEEN_AGAIN, FLOW_SEEN_OUT, FlowKey, FlowValue},
};

use crate::{
    accepted,
    counters::count,
    flows::{
        ANY, EXIST, IN_FLOWS, IN_INBOUND, IN_OPENING, count_full, is_alive, is_flow, map_of, read,
    },
    maps::{EVICTED, Flows, METER, ORDER_FROM_POD, ORDER_TO_POD, Order},
    skb::now_ns,
};

/// How many of the oldest flows are examined to find one to evict: established flows move to other maps, and
/// active UDP flows are spared once.
const ATTEMPTS: u32 = 4;

/// Inserts a flow, or a fragmented packet, into `opening`. If there is no room, evicts the oldest of the same
/// side.
#[inline(always)]
pub fn admit(pod: PodId, value: &mut FlowValue) {
    let Some(opening) = map_of(pod, IN_OPENING) else {
        return;
    };
    let FlowValue { flow, key } = &*value;
    // The flow is there already, and has its place in the queue.
    if opening.insert(key, &*value, EXIST).is_ok() {
        return;
    }
    // SAFETY: the maps are not preallocated, so an inner map that is removed lives until the
    // program ends.
    let order = unsafe {
        let key = &pod.get();
        if flow.state == FLOW_IN {
            ORDER_TO_POD.get(key)
        } else {
            ORDER_FROM_POD.get(key)
        }
    };
    let Some(order) = order else {
        return;
    };
    if !has_place(pod, order, opening, key) || opening.insert(key, &*value, ANY).is_err() {
        count_full(pod);
        if accepted::is_record(key) {
            accepted::evict(pod, opening, &mut value.key, true);
        }
    }
}

/// Appends the key to the queue, and makes room if necessary.
#[inline(always)]
fn has_place(pod: PodId, order: &Order, opening: &Flows, key: &FlowKey) -> bool {
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        if order.push(key, ANY).is_ok() {
            return true;
        }
        // SAFETY: the memory lives as long as the map. No program interrupts another on its CPU, except where the kernel is
        // built for real time; then the wrong flow may be evicted.
        let Some(oldest) = (unsafe { EVICTED.get_ptr_mut(0).and_then(|oldest| oldest.as_mut()) })
        else {
            return false;
        };
        // SAFETY: the map is a queue of keys, and the buffer is one.
        let popped = unsafe {
            let queue = ptr::from_ref(order).cast_mut().cast();
            bpf_map_pop_elem(queue, (&raw mut oldest.key).cast())
        };
        if popped != 0 {
            attempt += 1;
            continue;
        }
        if accepted::is_record(&oldest.key) {
            accepted::evict(pod, opening, &mut oldest.key, false);
        } else {
            evict_or_spare(pod, order, opening, oldest, attempt + 1 == ATTEMPTS);
        }
        attempt += 1;
    }
    order.push(key, ANY).is_ok()
}

/// Evicts the oldest flow from `opening`, or spares it.
#[inline(never)]
fn evict_or_spare(pod: PodId, order: &Order, opening: &Flows, oldest: &mut FlowValue, must: bool) {
    let FlowValue { flow, key } = oldest;
    let Some(known) = read(opening, key) else {
        // The flow was established or forgotten meanwhile.
        return;
    };
    *flow = known;
    let is_tcp = key.protocol == protocol::TCP;
    let is_wanted = is_flow(key) && !(is_tcp && is_closed(flow)) && is_alive(key, flow, now_ns());
    let mut was_established = false;
    if is_wanted && is_established(key, flow) {
        // A UDP packet of the other side reopens a flow that was forgotten, and its source may be forged. So
        // such a flow gets no place in `inbound`, only another round in the queue.
        if flow.state == FLOW_IN && !is_tcp {
            if !must {
                flow.seen &= !(FLOW_SEEN_AGAIN | FLOW_SEEN_OUT);
                if order.push(key, ANY).is_ok() {
                    let _ = opening.insert(&oldest.key, &*oldest, EXIST);
                    return;
                }
            }
        } else {
            let place = if flow.state == FLOW_OUT {
                IN_FLOWS
            } else {
                IN_INBOUND
            };
            // In this order: the flow goes before the record that bars it ([`accepted::evict`]).
            let is_barred = place == IN_INBOUND && accepted::bars(opening, key);
            let key = &oldest.key;
            if !is_barred
                && (place == IN_FLOWS || opening.get_ptr(key).is_some())
                && let Some(flows) = map_of(pod, place)
                && flows.insert(key, &*oldest, ANY).is_ok()
            {
                let _ = opening.remove(key);
                return;
            }
            was_established = true;
        }
    }
    let _ = opening.remove(&oldest.key);
    if is_wanted {
        count_evicted(pod, was_established);
    }
}

#[inline(always)]
fn count_evicted(pod: PodId, was_established: bool) {
    count(|c| {
        if was_established {
            c.flows_evicted += 1;
        } else {
            c.openings_evicted += 1;
        }
    });
    if let Some(meter) = METER.get_ptr_mut(pod.get()) {
        // SAFETY: the entry lives while the program runs; racing writers only blur the count.
        unsafe {
            if was_established {
                (*meter).flows_evicted += 1;
            } else {
                (*meter).openings_evicted += 1;
            }
        }
    }
}
