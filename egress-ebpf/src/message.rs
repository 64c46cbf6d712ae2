//! The memory in which the programs read a DNS message, one for each CPU.

use aya_ebpf::{helpers::bpf_skb_load_bytes, programs::TcContext};
use egress_common::{
    dns::{MESSAGE_MAX, Message, Steps, message, query, response},
    packet::{Frame as _, Packet},
    records::{INTERFACE_LEARNS, Interface, PendingQuery},
};

use crate::{
    entries::{self, Found},
    maps::MESSAGE,
    skb::Skb,
};

/// The length of a UDP header.
const UDP_HEADER: u32 = 8;

/// This CPU's message, or `None` while another program uses it. [`give_back`] must follow.
///
/// No program interrupts another on its CPU, except where the kernel is built for real time.
#[inline(always)]
pub fn borrow() -> Option<&'static mut Message> {
    // SAFETY: the memory lives as long as the map, and `busy` keeps others away.
    let message = unsafe { &mut *MESSAGE.get_ptr_mut(0)? };
    let busy = &raw mut message.busy;
    // SAFETY: a field of the above.
    unsafe {
        if busy.read_volatile() != 0 {
            return None;
        }
        busy.write_volatile(1);
    }
    Some(message)
}

/// See [`borrow`].
#[inline(always)]
pub fn give_back(message: &mut Message) {
    // SAFETY: a field of a borrowed record.
    unsafe { (&raw mut message.busy).write_volatile(0) };
}

/// Copies the payload of a UDP datagram. Returns whether it can be read.
#[inline(always)]
pub fn copy(ctx: &TcContext, packet: &Packet, message: &mut Message) -> bool {
    let skb = Skb(ctx);
    // Bytes that stay in other owners' pages could change after they were judged.
    if !skb.own_frame() {
        return false;
    }
    let Some(len) = skb.read::<2>(packet.l4_offset + 4) else {
        return false;
    };
    // The verifier must see both bounds on the register that it checks; see `held`.
    let len = u32::from(u16::from_be_bytes(len)).wrapping_sub(UDP_HEADER);
    let last = core::hint::black_box(len.wrapping_sub(1));
    if last >= MESSAGE_MAX {
        return false;
    }
    // SAFETY: the length is between 1 and `MESSAGE_MAX`, which is the room at this place.
    let failed = unsafe {
        bpf_skb_load_bytes(
            skb.as_ptr(),
            packet.l4_offset + UDP_HEADER,
            message.place().cast(),
            last + 1,
        )
    };
    failed == 0 && message.set_len(last + 1)
}

/// Whether the interface still has the entry that this program found when it began, so that the agent has not changed
/// anything meanwhile that the program relies on.
///
/// The agent changes the entry before it changes what an interface's programs have learned, and reads the ring of notes
/// afterwards. So either the program sees the change here, or the agent sees what the program has written.
#[inline(always)]
pub fn is_current(skb: &Skb<'_>, interface: &Interface) -> bool {
    let Found::Entry(now) = entries::of_interface(skb.ifindex()) else {
        return false;
    };
    now.flags == interface.flags
        && now.policy() == interface.policy()
        && now.flags & INTERFACE_LEARNS != 0
}

/// Calls each function as a global function ([`crate`]).
pub struct Global;

impl Steps for Global {
    #[inline(always)]
    fn walk_name(message: &mut Message, at: u32) -> u32 {
        dns_walk_name(message, at)
    }
    #[inline(always)]
    fn fold_name(message: &mut Message, name_len: u32) -> u32 {
        dns_fold_name(message, name_len)
    }
    #[inline(always)]
    fn read_options(message: &mut Message, at: u32, end: u32) -> u32 {
        dns_read_options(message, at, end)
    }
    #[inline(always)]
    fn follow_name(message: &mut Message, at: u32) -> u32 {
        dns_follow_name(message, at)
    }
    #[inline(always)]
    fn follow_label(message: &mut Message) -> u32 {
        dns_follow_label(message)
    }
    #[inline(always)]
    fn same_bytes(message: &mut Message, a: u32, b: u32, len: u32) -> u32 {
        dns_same_bytes(message, a, b, len)
    }
    #[inline(always)]
    fn read_record(message: &mut Message, in_answer: u32) -> u32 {
        dns_read_record(message, in_answer)
    }
}

macro_rules! global {
    ($($name:ident($($argument:ident),*) = $function:expr;)+) => {
        $(
            /// A global function ([`crate`]).
            #[unsafe(no_mangle)]
            #[inline(never)]
            extern "C" fn $name(message: *mut Message, $($argument: u32),*) -> u32 {
                // SAFETY: the pointer is null or points to the caller's memory; the verifier has checked this.
                match unsafe { message.as_mut() } {
                    Some(message) => $function(message, $($argument),*),
                    None => 0,
                }
            }
        )+
    };
}

global! {
    dns_walk_name(at) = message::walk_name;
    dns_fold_name(name_len) = query::fold_name;
    dns_read_options(at, end) = query::read_options;
    dns_follow_name(at) = response::follow_labels::<Global>;
    dns_follow_label() = response::follow_label;
    dns_same_bytes(a, b, len) = response::same_bytes;
    dns_read_record(in_answer) = response::read_record::<Global>;
    dns_read_query() = query::read::<Global>;
    dns_read_response() = response::read::<Global>;
}

/// See [`query::read`].
#[inline(always)]
pub fn read_query(message: &mut Message) -> bool {
    dns_read_query(message) != 0
}

/// Writes the name of a response that answers its query to [`Message::name`].
#[inline(always)]
pub fn fold_name(message: &mut Message) {
    let len = message.query.len;
    // Without type and class.
    dns_fold_name(message, len.wrapping_sub(4));
}

/// See [`response::answers`] and [`response::read`].
#[inline(always)]
pub fn read_response(message: &mut Message, query: &PendingQuery) -> bool {
    dns_answers(message, query) != 0 && dns_read_response(message) != 0
}

/// A global function ([`crate`]).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dns_answers(message: *mut Message, query: *const PendingQuery) -> u32 {
    // SAFETY: as above.
    match unsafe { (message.as_mut(), query.as_ref()) } {
        (Some(message), Some(query)) => response::answers(message, query),
        _ => 0,
    }
}
