//! Learns the addresses of plain responses without the agent.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use egress_common::{
    classes,
    dns::{Message, message::START},
    limits::RESPONSE_TIMEOUT_NS,
    packet::Packet,
    protocol::bits,
    records::{
        DECISION_ALIASES, INTERFACE_LEARNS, Interface, LearnedNote, NAME_WORDS, RANGE_INTERNAL,
        RANGE_PROTECTED, RANGE_TRANSLATED,
    },
};

use crate::{
    entries,
    flows::{EXIST, NOEXIST},
    maps::{ALLOW, DNS_TIMES, LEARNED, LEARNED_NOTES, LEARNS, Learned, MESSAGE, PENDING, POLICY},
    message,
    rules::range_of,
    skb::{Skb, now_ns},
};

/// An entry is not written anew if its lifetime would grow by less than this.
const SLACK_NS: u64 = 1_000_000_000;
/// `BPF_RB_NO_WAKEUP`: the agent reads the ring when it does other work.
const NO_WAKEUP: u64 = 1;

/// Whether the datagram answers a query that [`crate::decided`] has let pass, and the pod's maps now have every address in
/// it. It is whole and not an aggregate.
#[inline(always)]
pub fn delivers(ctx: &TcContext, interface: &Interface, packet: &Packet) -> bool {
    LEARNS.load() != 0
        && interface.flags & INTERFACE_LEARNS != 0
        && packet.bit == bits::UDP
        && learn_response(ctx.skb.skb, interface, packet) != 0
}

/// A global function ([`crate`]).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn learn_response(
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
    let delivers =
        message::copy(&ctx, packet, message) && learn(&Skb(&ctx), interface, packet, message);
    message::give_back(message);
    u32::from(delivers)
}

#[inline(always)]
fn learn(skb: &Skb<'_>, interface: &Interface, packet: &Packet, message: &mut Message) -> bool {
    // SAFETY: an inner map that is replaced lives until the program ends.
    let Some(pending) = (unsafe { PENDING.get(&interface.pod().get()) }) else {
        return false;
    };
    message.key.pod_addr = packet.dst;
    message.key.resolver = packet.src;
    message.key.pod_port = packet.dst_port;
    message.key.resolver_port = packet.src_port;
    message.key.id = message.number(START) as u16;
    // SAFETY: the map is not preallocated. If another program removes the query meanwhile, this one does not deliver.
    let (Some(query), Some(times)) = (unsafe { pending.get(&message.key) }, DNS_TIMES.get(0))
    else {
        return false;
    };
    message.query.time_ns = entries::copy(&query.time_ns);
    message.query.decision = query.decision;
    message.query.len = query.len;
    let now_ns = now_ns();
    let is_open = query.policy == interface.policy().get()
        && query.decision.generation == times.generation
        && now_ns.saturating_sub(message.query.time_ns) <= RESPONSE_TIMEOUT_NS;
    if !is_open || !message::read_response(message, query) {
        return false;
    }
    // No two queries have the same time, so all that was read is of this one.
    if !entries::is_there(pending, &message.key, query)
        || entries::copy(&query.time_ns) != message.query.time_ns
    {
        return false;
    }
    if message.aliases != 0 && message.query.decision.flags & DECISION_ALIASES == 0 {
        return false;
    }
    if message.found != 0 {
        // The memory still has the name of another query.
        message::fold_name(message);
    }
    let mut index = 0;
    // As many as a message has room for.
    while index < 32 {
        if index >= message.found {
            break;
        }
        if learn_address(interface, index, now_ns) == 0 {
            return false;
        }
        index += 1;
    }
    message::is_current(skb, interface) && pending.remove(&message.key).is_ok()
}

/// Learns one address of the response. Returns 1 if the pod's maps have it with the decision's classes.
///
/// A global function ([`crate`]).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn learn_address(interface: *const Interface, index: u32, now_ns: u64) -> u32 {
    // SAFETY: the pointer is null or points to the caller's memory; the verifier has checked this.
    let Some(interface) = (unsafe { interface.as_ref() }) else {
        return 0;
    };
    // SAFETY: the caller has borrowed it.
    let Some(message) = (unsafe { MESSAGE.get_ptr_mut(0).and_then(|message| message.as_mut()) })
    else {
        return 0;
    };
    // SAFETY: an inner map that is replaced lives until the program ends.
    let learned = unsafe { LEARNED.get(&interface.policy().get()) };
    let (Some(times), Some(learned)) = (DNS_TIMES.get(0), learned) else {
        return 0;
    };
    let index = core::hint::black_box(index) as usize & (message.addresses.len() - 1);
    // SAFETY: the mask keeps the index within the array.
    let record = unsafe { &*message.addresses.as_ptr().add(index) };
    let ttl = record.ttl;
    message.address.addr = message.address_at(record.at, record.len);
    if !may_be_learned(interface, message) {
        return 0;
    }
    let decision = &message.query.decision;
    message.entry.classes = decision.classes;
    // Who owns the alias is not known here, so it leads to no internal address.
    let is_own = classes::mask_of(u64::from(message.aliases == 0));
    message.entry.internal_classes = decision.internal_classes.masked(is_own);
    message.entry.id = decision.id;
    message.entry.addr = message.address.addr;
    message.entry.expires_ns = now_ns + times.lifetime_ns(ttl);
    u32::from(write(interface, message, learned))
}

/// Whether the decision alone says what the address gets.
#[inline(always)]
fn may_be_learned(interface: &Interface, message: &Message) -> bool {
    let kinds = range_of(&message.address.addr).kinds;
    if kinds & (RANGE_PROTECTED | RANGE_TRANSLATED) != 0
        || kinds & RANGE_INTERNAL != 0 && message.aliases != 0
    {
        return false;
    }
    let policy = interface.policy().get();
    // SAFETY: none of the maps is preallocated, so an entry that is replaced lives until the program ends.
    let (record, allow) = unsafe {
        let allow = ALLOW
            .get(&policy)
            .and_then(|allow| allow.get(&message.address));
        (POLICY.get(policy), allow)
    };
    let Some(record) = record else {
        return false;
    };
    // Another name denies the address: the agent writes the entry of both.
    let denies = record.deny.or(record.pass);
    allow.is_none_or(|allow| {
        let is_denied = allow.classes.meets(denies);
        entries::is_of(&allow.addr, &message.address.addr) && !is_denied
    })
}

/// Writes the entry of an address, and notes for the agent what is new.
#[inline(always)]
fn write(interface: &Interface, message: &mut Message, learned: &Learned) -> bool {
    let expires_ns = message.entry.expires_ns;
    // SAFETY: the agent removes an entry only while the interface's entry says that nothing is learned.
    let known = unsafe { learned.get(&message.address) };
    let mut flags = NOEXIST;
    if let Some(known) = known {
        let has_same_classes = known.classes == message.entry.classes
            && known.internal_classes == message.entry.internal_classes;
        let (id, known_ns) = (known.id, known.expires_ns);
        if !has_same_classes || !entries::is_of(&known.addr, &message.address.addr) {
            return false;
        }
        if id == message.entry.id {
            return known_ns + SLACK_NS >= expires_ns
                || learned
                    .insert(&message.address, &message.entry, EXIST)
                    .is_ok();
        }
        // Two names have the address, and the one that lives longer counts.
        if known_ns > expires_ns {
            message.entry.expires_ns = known_ns;
        }
        flags = EXIST;
    }
    let Some(mut note) = LEARNED_NOTES.reserve_untyped::<LearnedNote>(0) else {
        return false;
    };
    let place = core::mem::MaybeUninit::as_mut_ptr(&mut note);
    // SAFETY: the record is ours until it is submitted.
    unsafe {
        let name = (&raw mut (*place).name.name).cast::<u64>();
        let mut index = 0;
        // A copy of the whole would go through the stack.
        while index < NAME_WORDS {
            name.add(index).write_volatile(message.name.name[index]);
            index += 1;
        }
        (&raw mut (*place).addr).write(message.address.addr);
        (&raw mut (*place).expires_ns).write(expires_ns);
        (&raw mut (*place).pod).write(interface.pod());
        (&raw mut (*place).by_alias).write(u32::from(message.aliases != 0));
    }
    if learned
        .insert(&message.address, &message.entry, flags)
        .is_err()
    {
        note.discard(NO_WAKEUP);
        return false;
    }
    note.submit(NO_WAKEUP);
    true
}
