//! What a pod says on its own link over IPv6: whose an address is, and which groups it hears.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use egress_common::{address, packet::Packet, records::Policy};

use crate::{link_local, skb::Skb, sources::is_own};

/// What a message on the link is.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum LinkMessage {
    /// None, or one that the rules judge.
    Other,
    /// Housekeeping in the pod's own name.
    Passes,
    /// It speaks for an address that is not the pod's.
    NotOwn,
    /// It carries more than such a message needs.
    Malformed,
}

/// Judges what a pod says on its link.
///
/// A global function ([`crate`]): most packets are no such messages, and the many ways through one end here.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn judge_link_message(
    frame: *mut __sk_buff,
    policy: *const Policy,
    packet: *const Packet,
) -> LinkMessage {
    // SAFETY: the caller's own, or null, says the verifier, which has checked the caller's pointers.
    let (Some(policy), Some(packet)) = (unsafe { (policy.as_ref(), packet.as_ref()) }) else {
        return LinkMessage::Malformed;
    };
    let ctx = TcContext::new(frame);
    let skb = &Skb(&ctx);
    // As with ARP: an advertisement in somebody else's name draws their traffic here.
    if packet.is_neighbour_advertisement() && !claims_own_target(skb, policy, packet) {
        return LinkMessage::NotOwn;
    }
    let is_housekeeping = packet.is_link_housekeeping();
    if !is_housekeeping && !packet.is_neighbour_message() {
        return LinkMessage::Other;
    }
    if !packet.is_plain_link_message(skb) {
        return LinkMessage::Malformed;
    }
    if is_housekeeping && may_speak_on_link(skb, policy, packet) {
        return LinkMessage::Passes;
    }
    LinkMessage::Other
}

/// Whether the target of a neighbour message is an address that the pod may go by.
#[inline(always)]
fn claims_own_target(skb: &Skb<'_>, policy: &Policy, packet: &Packet) -> bool {
    let Some(target) = packet.neighbour_target(skb) else {
        return false;
    };
    if address::is_v6_link_local(&target) {
        return link_local::is_own(skb, &target);
    }
    is_own(policy, &target)
}

/// Whether the pod may send housekeeping in this name.
#[inline(always)]
fn may_speak_on_link(skb: &Skb<'_>, policy: &Policy, packet: &Packet) -> bool {
    if address::is_v6_link_local(&packet.src) {
        // A report says which groups the sender hears, and nothing of who has which address.
        return packet.is_listener_report() || link_local::is_own(skb, &packet.src);
    }
    if address::same(&packet.src, &address::UNSPECIFIED) {
        // Before it has an address, a host asks whether somebody else has it (RFC 4862, section 5.4).
        return !packet.is_neighbour_solicitation() || claims_own_target(skb, policy, packet);
    }
    is_own(policy, &packet.src)
}
