//! The flows of a pod: what is open and who opened it.

use egress_common::{
    flow::{REFRESH_NS, is_alive},
    packet::{Packet, TCP_FIN, TCP_RST},
    protocol::bits,
    records::{
        FLOW_SEEN_FIN_IN, FLOW_SEEN_FIN_OUT, FLOW_SEEN_IN, FLOW_SEEN_OUT, FLOW_SEEN_RST, Flow,
        FlowKey, Interface,
    },
};

use crate::{
    counters::count,
    maps::{FLOW, Flows, METER},
};

/// `BPF_ANY`: insert or replace.
const ANY: u64 = 0;

/// The pod's own flow map.
#[inline(always)]
pub fn of_pod(interface: &Interface) -> Option<&'static Flows> {
    // SAFETY: the map is not preallocated, so an inner map that is replaced lives until the program
    // ends.
    unsafe { FLOW.get(&interface.pod) }
}

/// The flow under this key, if it is remembered and has not been idle for too long.
#[inline(always)]
#[expect(
    clippy::mut_from_ref,
    reason = "the map is memory shared with other CPUs and the agent, whatever is borrowed here"
)]
pub fn find<'a>(flows: &'a Flows, key: &FlowKey, now_ns: u64) -> Option<&'a mut Flow> {
    let flow = flows.get_ptr_mut(key)?;
    // SAFETY: the entry lives until the program ends; all writers write whole aligned fields.
    let flow = unsafe { &mut *flow };
    is_alive(key, flow, now_ns).then_some(flow)
}

/// What a packet adds to `Flow::seen`.
#[inline(always)]
pub const fn seen(packet: &Packet, from_pod: bool) -> u8 {
    let mut seen = if from_pod {
        FLOW_SEEN_OUT
    } else {
        FLOW_SEEN_IN
    };
    if packet.bit == bits::TCP {
        if packet.tcp_flags & TCP_RST != 0 {
            seen |= FLOW_SEEN_RST;
        }
        if packet.tcp_flags & TCP_FIN != 0 {
            seen |= if from_pod {
                FLOW_SEEN_FIN_OUT
            } else {
                FLOW_SEEN_FIN_IN
            };
        }
    }
    seen
}

/// Notes that a packet of the flow was seen.
#[inline(always)]
pub fn touch(flow: &mut Flow, seen: u8, now_ns: u64) {
    if flow.seen & seen != seen {
        flow.seen |= seen;
    }
    if now_ns.saturating_sub(flow.last_seen_ns) >= REFRESH_NS {
        flow.last_seen_ns = now_ns;
    }
}

/// Remembers a flow, or a fragmented packet.
#[inline(always)]
pub fn remember(
    flows: &Flows,
    key: &FlowKey,
    interface: &Interface,
    state: u8,
    seen: u8,
    now_ns: u64,
) {
    let flow = Flow {
        last_seen_ns: now_ns,
        policy: interface.policy,
        state,
        seen,
        pad: 0,
    };
    if flows.insert(key, flow, ANY).is_err() {
        count(|c| c.flows_full += 1);
        if let Some(meter) = METER.get_ptr_mut(interface.pod) {
            // SAFETY: the entry lives while the program runs; racing writers only blur the count.
            unsafe { (*meter).flows_full += 1 };
        }
    }
}

/// Whether flows are kept for packets of this kind.
#[inline(always)]
pub const fn is_tracked(packet: &Packet) -> bool {
    matches!(
        packet.bit,
        bits::TCP | bits::UDP | bits::SCTP | bits::ICMP_ECHO
    )
}
