//! What is on its way to a pod. Nothing but DNS answers, and fragments that may belong to one, is
//! stopped here; flows that others open are noted, so that the pod's replies pass.

use aya_ebpf::{bindings::BPF_F_INGRESS, helpers::bpf_redirect, programs::TcContext};
use egress_common::{
    address,
    packet::{Fragment, Packet, Walked, walk},
    protocol::{self, bits},
    reason::Reason,
    records::{
        FLOW_IN, HELD_ANSWER, Interface, MODE_AUDIT, MODE_RELEASED, NO_CLASS, RANGE_RESOLVER,
        Range, TO_POD,
    },
};

use crate::{
    DROP, PASS, checksum,
    denials::{Denied, deny},
    flows,
    from_pod::{is_several_datagrams, is_tunnel, may_be_dns_port, range_of},
    held,
    maps::{AGAIN_MARK, BOUNCE_MARK, DELIVER_MARK, INTERFACE, PROBE_MARK},
    skb::{Skb, now_ns},
};

/// The verdict on a frame that is about to reach the pod.
#[inline(always)]
pub fn judge(ctx: &TcContext) -> i32 {
    let skb = Skb(ctx);
    let mark = skb.mark();
    let again = mark == AGAIN_MARK.load();
    if again {
        ctx.set_mark(0);
    }
    if again || mark == BOUNCE_MARK.load() || mark == PROBE_MARK.load() {
        // The agent can only send towards the pod; a question that it puts back is turned round
        // here and goes on as if the pod had just sent it; without its mark it is judged, too.
        // A probe comes to `from_pod` like everything that the pod sends.
        // SAFETY: the helper takes plain numbers.
        return unsafe { bpf_redirect(skb.ifindex(), u64::from(BPF_F_INGRESS)) } as i32;
    }
    if mark == DELIVER_MARK.load() {
        ctx.set_mark(0);
        return PASS;
    }
    // SAFETY: the map is not preallocated, so an entry that is replaced lives until the program
    // ends; the agent never writes to an entry in place.
    let Some(interface) = (unsafe { INTERFACE.get(skb.ifindex()) }) else {
        return PASS;
    };
    if interface.mode == MODE_RELEASED {
        return PASS;
    }
    let mut packet = Packet::EMPTY;
    let walked = if skb.own_headers() {
        walk(&skb, &mut packet)
    } else {
        Walked::Malformed
    };
    match walked {
        Walked::Ip => {
            skb.forget_path(&mut packet);
            judge_packet(ctx, interface, &packet)
        }
        // What is written into it later must not make it an answer.
        Walked::Arp | Walked::NotIp if !checksum::is_misplaced(&skb, None) => PASS,
        // It might be an answer in a disguise that the pod sees through.
        Walked::Arp | Walked::NotIp | Walked::Malformed => {
            deny(ctx, &denied(interface, None, Reason::Malformed))
        }
    }
}

#[inline(always)]
fn judge_packet(ctx: &TcContext, interface: &Interface, packet: &Packet) -> i32 {
    let skb = Skb(ctx);
    let may_be_dns = packet.bit & (bits::UDP | bits::TCP) != 0 && may_be_dns_port(packet.src_port);
    let may_belong = may_belong_to_answer(packet);
    let range = if may_be_dns || may_belong {
        range_of(&packet.src)
    } else {
        Range::default()
    };
    let is_answer = may_be_dns && range.is_resolver_at(packet.src_port);
    let is_held = is_answer || (may_belong && range.kinds & RANGE_RESOLVER != 0);
    // TCP finds out how long its segments may be, and its fragments are not put together.
    if is_answer && packet.bit == bits::TCP && is_fragment(packet) {
        return deny(ctx, &denied(interface, Some(packet), Reason::DnsFragmented));
    }
    if is_answer && is_several_datagrams(&skb, packet) {
        return deny(ctx, &denied(interface, Some(packet), Reason::DnsMalformed));
    }
    // What is held is put back as it was judged; into anything else a sum may be written later, where
    // the host's end of the interface leaves no checksums to the pod's.
    if !is_held && checksum::is_misplaced(&skb, packet.earliest_checksum()) {
        return deny(ctx, &denied(interface, Some(packet), Reason::Malformed));
    }
    let has_ports = !matches!(packet.fragment, Fragment::Later);
    if has_ports && !is_answer {
        note_flow(&skb, interface, packet);
    }
    if !is_held {
        return PASS;
    }
    if interface.mode == MODE_AUDIT {
        held::take(&skb, interface, HELD_ANSWER, false);
        return PASS;
    }
    if !held::take(&skb, interface, HELD_ANSWER, true) {
        return deny(ctx, &denied(interface, Some(packet), Reason::DnsNotHeld));
    }
    DROP
}

#[inline(always)]
const fn is_fragment(packet: &Packet) -> bool {
    !matches!(packet.fragment, Fragment::None)
}

/// Whether the pod may put this together with others to an answer over UDP. IPv4 puts together what
/// has the same protocol (RFC 791, section 3.2), IPv6 whatever protocol later fragments name (RFC
/// 8200, section 4.5).
#[inline(always)]
const fn may_belong_to_answer(packet: &Packet) -> bool {
    is_fragment(packet) && (packet.version == 6 || packet.protocol == protocol::UDP)
}

/// Notes the flow that a packet belongs to, or opens, so that the pod may answer it.
#[inline(always)]
fn note_flow(skb: &Skb<'_>, interface: &Interface, packet: &Packet) {
    let Some(flows) = flows::of_pod(interface) else {
        return;
    };
    let now_ns = now_ns();
    let mut key = packet.flow_to_pod();
    if packet.is_neighbour_message() && address::is_v6_multicast(&packet.dst) {
        // A solicitation goes to a group of addresses; the answer comes from its target.
        if let Some(target) = packet.neighbour_target(skb) {
            key.pod_addr = target;
        }
    }
    let seen = flows::seen(packet.bit, packet.tcp_flags, false);
    match flows::find(flows, &key, now_ns) {
        Some(flow) => flows::touch(flow, seen, now_ns),
        // The pod's answer would be a tunnel that no rule was asked about.
        None if is_tunnel(range_of(&packet.src).kinds, packet.bit, packet.src_port) => {}
        None if packet.opens_inbound() => {
            flows::remember(flows, &key, interface, FLOW_IN, seen, now_ns);
        }
        None => {}
    }
}

#[inline(always)]
fn denied<'a>(interface: &'a Interface, packet: Option<&'a Packet>, reason: Reason) -> Denied<'a> {
    Denied {
        interface,
        packet,
        reason,
        class: NO_CLASS,
        direction: TO_POD,
    }
}
