//! The IPv6 messages of a pod on its own link: neighbour discovery and multicast group reports.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use egress_common::{address, packet::Packet, records::Policy};

use crate::{link_local, skb::Skb, sources::is_own};

/// The decision on a message on the link.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum LinkMessage {
    /// The packet is no such message, or the rules judge it.
    Other,
    /// Housekeeping with one of the pod's own addresses.
    Passes,
    /// The message claims an address that is not the pod's.
    NotOwn,
    /// The message has more content than it needs.
    Malformed,
}

/// Judges the IPv6 messages of a pod on its own link.
///
/// A global function ([`crate`]): most packets are no such messages, and the many paths through one end here.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn judge_link_message(
    frame: *mut __sk_buff,
    policy: *const Policy,
    packet: *const Packet,
) -> LinkMessage {
    // SAFETY: each pointer is null or points to the caller's memory; the verifier has checked this.
    let (Some(policy), Some(packet)) = (unsafe { (policy.as_ref(), packet.as_ref()) }) else {
        return LinkMessage::Malformed;
    };
    let ctx = TcContext::new(frame);
    let skb = &Skb(&ctx);
    // As with ARP, an advertisement for another host's address attracts that host's traffic.
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

/// Whether the target of a neighbour message is an address that the pod may use.
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

/// Whether the pod may send housekeeping messages from this source.
#[inline(always)]
fn may_speak_on_link(skb: &Skb<'_>, policy: &Policy, packet: &Packet) -> bool {
    if address::is_v6_link_local(&packet.src) {
        // A report contains the groups of the sender, and claims no address.
        return packet.is_listener_report() || link_local::is_own(skb, &packet.src);
    }
    if address::same(&packet.src, &address::UNSPECIFIED) {
        // A host without an address asks whether another host uses its new address (RFC 4862, section 5.4).
        return !packet.is_neighbour_solicitation() || claims_own_target(skb, policy, packet);
    }
    is_own(policy, &packet.src)
}
