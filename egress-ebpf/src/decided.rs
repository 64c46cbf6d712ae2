//! Lets plain queries for decided names pass without the agent.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use egress_common::{
    dns::{Message, message::START},
    packet::Packet,
    protocol::bits,
    records::{INTERFACE_LEARNS, Interface},
};

use crate::{
    entries,
    flows::NOEXIST,
    maps::{DECISION, DNS_TIMES, LEARNS, PENDING},
    message,
    skb::{Skb, now_ns},
};

/// Whether the agent has decided that the pod may query this name, and a response to the query is now awaited. The
/// datagram is whole and not an aggregate.
#[inline(always)]
pub fn passes(ctx: &TcContext, interface: &Interface, packet: &Packet) -> bool {
    LEARNS.load() != 0
        && interface.flags & INTERFACE_LEARNS != 0
        && packet.bit == bits::UDP
        && pass_decided(ctx.skb.skb, interface, packet) != 0
}

/// A global function ([`crate`]).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pass_decided(
    frame: *mut __sk_buff,
    interface: *const Interface,
    packet: *const Packet,
) -> u32 {
    // SAFETY: each pointer is null or points to the caller's memory; the verifier has checked this.
    let (Some(interface), Some(packet)) = (unsafe { (interface.as_ref(), packet.as_ref()) }) else {
        return 0;
    };
    let ctx = TcContext::new(frame);
    let Some(message) = message::borrow() else {
        return 0;
    };
    let passes = message::copy(&ctx, packet, message)
        && message::read_query(message)
        && is_decided(interface, message)
        && await_response(&Skb(&ctx), interface, packet, message);
    message::give_back(message);
    u32::from(passes)
}

/// Whether the name is decided; if so, the decision is in [`Message::query`].
#[inline(always)]
fn is_decided(interface: &Interface, message: &mut Message) -> bool {
    let Some(times) = DNS_TIMES.get(0) else {
        return false;
    };
    // SAFETY: none of the maps is preallocated. The agent removes a decision only while the interface's entry says
    // that nothing passes; `await_response` looks for that.
    let Some(decisions) = (unsafe { DECISION.get(&interface.policy().get()) }) else {
        return false;
    };
    // SAFETY: as above.
    let Some(decision) = (unsafe { decisions.get(&message.name) }) else {
        return false;
    };
    message.query.decision = *decision;
    entries::is_there(decisions, &message.name, decision)
        && message.query.decision.generation == times.generation
        && times.passes_decided(now_ns())
}

/// Keeps the query, so that its response can be recognised. Returns false if that cannot be, or if a query with the same
/// ends and id is kept already.
#[inline(always)]
fn await_response(
    skb: &Skb<'_>,
    interface: &Interface,
    packet: &Packet,
    message: &mut Message,
) -> bool {
    // SAFETY: an inner map that is replaced lives until the program ends.
    let Some(pending) = (unsafe { PENDING.get(&interface.pod().get()) }) else {
        return false;
    };
    message.key.pod_addr = packet.src;
    message.key.resolver = packet.dst;
    message.key.pod_port = packet.src_port;
    message.key.resolver_port = packet.dst_port;
    message.key.id = message.number(START) as u16;
    message.query.time_ns = now_ns();
    message.query.policy = interface.policy().get();
    if pending
        .insert(&message.key, &message.query, NOEXIST)
        .is_err()
    {
        return false;
    }
    if message::is_current(skb, interface) {
        return true;
    }
    let _ = pending.remove(&message.key);
    false
}
