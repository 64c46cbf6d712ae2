//! The flows of a pod: what is open and who opened it.

use egress_common::{
    flow::{REFRESH_NS, is_alive},
    packet::{Packet, TCP_FIN, TCP_RST},
    protocol::bits,
    records::{
        FLOW_OUT, FLOW_SEEN_FIN_IN, FLOW_SEEN_FIN_OUT, FLOW_SEEN_IN, FLOW_SEEN_OUT, FLOW_SEEN_RST,
        Flow, FlowKey, Interface,
    },
};

use crate::{
    counters::count,
    maps::{FLOW, Flows, METER},
    skb::{last_tick_ns, now_ns},
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
pub const fn seen(bit: u8, tcp_flags: u8, from_pod: bool) -> u8 {
    let mut seen = if from_pod {
        FLOW_SEEN_OUT
    } else {
        FLOW_SEEN_IN
    };
    if bit == bits::TCP {
        if tcp_flags & TCP_RST != 0 {
            seen |= FLOW_SEEN_RST;
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

/// Adds to `Flow::seen`, and writes to the shared memory only if that changes it.
#[inline(always)]
fn note(flow: &mut Flow, seen: u8) {
    if flow.seen & seen != seen {
        flow.seen |= seen;
    }
}

/// Notes that a packet of the flow was seen.
#[inline(always)]
pub fn touch(flow: &mut Flow, seen: u8, now_ns: u64) {
    note(flow, seen);
    if now_ns.saturating_sub(flow.last_seen_ns) >= REFRESH_NS {
        flow.last_seen_ns = now_ns;
    }
}

/// Whether the pod has opened this flow and `policy` has admitted it; the packet is then noted. Most
/// flows have been seen within the second, and nothing but that has to be known of the time.
#[inline(always)]
pub fn is_open(flows: &Flows, key: &FlowKey, policy: u32, seen: u8) -> bool {
    let Some(flow) = flows.get_ptr_mut(key) else {
        return false;
    };
    // SAFETY: as in `find`.
    let flow = unsafe { &mut *flow };
    if flow.state != FLOW_OUT || flow.policy != policy {
        return false;
    }
    // A tick before the flow was last seen is that of a machine that has been suspended.
    if last_tick_ns().wrapping_sub(flow.last_seen_ns) < REFRESH_NS {
        note(flow, seen);
        return true;
    }
    let now_ns = now_ns();
    let is_alive = is_alive(key, flow, now_ns);
    if is_alive {
        touch(flow, seen, now_ns);
    }
    is_alive
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
