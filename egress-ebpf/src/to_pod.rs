//! Judges the frames on their way to a pod. It stops only malformed frames, DNS responses, and fragments that
//! may belong to a response, and what belongs to a TCP connection that the pod has not opened and the other side has
//! accepted. It records flows that others open, so that the pod's answers pass.

use aya_ebpf::{bindings::BPF_F_INGRESS, helpers::bpf_redirect, programs::TcContext};
use egress_common::{
    address,
    flow::{after_packet_to_pod, is_closed},
    packet::{Fragment, Packet, TCP_ACK, Walked},
    protocol::{self, bits},
    reason::Reason,
    records::{
        FLOW_CUT, FLOW_IN, FLOW_OUT, Flow, HELD_ANSWER, INTERFACE_SETTLING, INTERFACE_SOURCES,
        Interface, MODE_AUDIT, MODE_RELEASED, NO_CLASS, RANGE_RESOLVER, Range, TO_POD, UNJUDGED,
    },
};

use crate::{
    DROP, PASS, accepted, checksum,
    counters::count,
    denials::{Denied, deny},
    entries::{self, Found},
    flows, forged,
    from_pod::is_several_datagrams,
    headers, held, learn,
    maps::{AGAIN_MARK, BOUNCE_MARK, DELIVER_MARK, PROBE_MARK},
    rules::{may_be_dns_port, range_of},
    skb::{Skb, now_ns},
    unread,
};

/// The verdict on a frame to the pod.
#[inline(always)]
pub fn judge(ctx: &TcContext) -> i32 {
    let skb = Skb(ctx);
    let mark = skb.mark();
    let again = mark == AGAIN_MARK.load();
    if again {
        ctx.set_mark(0);
    }
    if again || mark == BOUNCE_MARK.load() || mark == PROBE_MARK.load() {
        // The agent can only send towards the pod. A query that it puts back is turned round here and goes on
        // as if the pod had just sent it; without its mark `from_pod` also judges it. A probe reaches
        // `from_pod` like everything that the pod sends.
        // SAFETY: the helper takes plain numbers.
        return unsafe { bpf_redirect(skb.ifindex().get(), u64::from(BPF_F_INGRESS)) } as i32;
    }
    if mark == DELIVER_MARK.load() {
        ctx.set_mark(0);
        return PASS;
    }
    let interface = match entries::of_interface(skb.ifindex()) {
        Found::Entry(interface) => interface,
        Found::Nothing => return PASS,
        Found::Replaced => {
            count(|c| c.no_policy += 1);
            return DROP;
        }
    };
    let interface = &interface;
    if interface.mode == MODE_RELEASED || interface.flags & INTERFACE_SETTLING != 0 {
        return PASS;
    }
    let mut packet = Packet::EMPTY;
    let earliest = match headers::read(ctx, &mut packet) {
        Walked::Ip => {
            skb.forget_path(&mut packet);
            if let Some(action) = judge_packet(ctx, interface, &packet) {
                return action;
            }
            packet.earliest_checksum()
        }
        Walked::Arp | Walked::NotIp => None,
        // It might be a response that the pod can read although the walk cannot.
        Walked::Malformed => return deny(ctx, &denied(interface, None, Reason::Malformed)),
    };
    // It could become a response: where the host's end of the interface leaves no checksums to the pod's end,
    // the sum is written after this program. This check comes last, so that the verifier follows its outcomes
    // no further.
    if checksum::is_misplaced(&skb, earliest) {
        return deny(ctx, &denied(interface, None, Reason::Malformed));
    }
    PASS
}

/// The decision on a packet; `None` when it passes.
#[inline(always)]
fn judge_packet(ctx: &TcContext, interface: &Interface, packet: &Packet) -> Option<i32> {
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
    let has_ports = !matches!(packet.fragment, Fragment::Later);
    let refused = if is_answer {
        if packet.bit == bits::TCP && is_fragment(packet) {
            // TCP discovers the maximum segment size, so its fragments are not reassembled.
            Some(Reason::DnsFragmented)
        } else if is_several_datagrams(&skb, packet) {
            Some(Reason::DnsMalformed)
        } else {
            None
        }
    } else if has_ports && !note_flow(&skb, interface, packet) {
        Some(Reason::TcpUnsolicited)
    } else {
        None
    };
    if let Some(reason) = refused {
        return Some(deny(ctx, &denied(interface, Some(packet), reason)));
    }
    if !is_held {
        return None;
    }
    // The gate held no queries of a pod that only begins to be judged.
    if interface.flags & INTERFACE_SOURCES != 0 {
        return None;
    }
    if interface.mode == MODE_AUDIT {
        held::take(&skb, interface, HELD_ANSWER, false);
        return Some(PASS);
    }
    if is_answer && !is_fragment(packet) && learn::delivers(ctx, interface, packet) {
        count(|c| c.passed_answers += 1);
        return None;
    }
    if unread::passes() {
        count(|c| c.unread_answers += 1);
        return None;
    }
    if !held::take(&skb, interface, HELD_ANSWER, true) {
        return Some(deny(
            ctx,
            &denied(interface, Some(packet), Reason::DnsNotHeld),
        ));
    }
    Some(DROP)
}

#[inline(always)]
const fn is_fragment(packet: &Packet) -> bool {
    !matches!(packet.fragment, Fragment::None)
}

/// Whether the pod may reassemble this fragment with others to a response over UDP. IPv4 reassembles
/// fragments with the same protocol (RFC 791, section 3.2), IPv6 fragments with any protocol in later ones
/// (RFC 8200, section 4.5).
#[inline(always)]
const fn may_belong_to_answer(packet: &Packet) -> bool {
    is_fragment(packet) && (packet.version == 6 || packet.protocol == protocol::UDP)
}

/// Records the flow that a packet belongs to, or opens, so that the pod may answer it. Returns `false` for a segment that
/// the pod should not receive: it belongs to a connection that the other side has accepted, and the pod has not opened.
///
/// A host that has opened a connection sends no SYN-ACK. Without this, somebody who forges the segments of both ends
/// could join a handshake with the pod and one with a server to a connection between the two. The pod must not even
/// see the server's number: somebody to whom it tells the number could complete the connection in the pod's name.
#[inline(always)]
fn note_flow(skb: &Skb<'_>, interface: &Interface, packet: &Packet) -> bool {
    let now_ns = now_ns();
    let mut key = packet.flow_to_pod();
    if packet.is_neighbour_message() && address::is_v6_multicast(&packet.dst) {
        // A solicitation goes to a multicast group of the address; the answer comes from its target.
        if let Some(target) = packet.neighbour_target(skb) {
            key.pod_addr = target;
        }
    }
    let mut known = flows::find(skb, interface.pod(), &key, now_ns, true);
    let seen = flows::seen(packet.bit, packet.tcp_flags, false);
    let accepts = packet.accepts_tcp();
    // A SYN-ACK answers a SYN of the pod: there is a flow that the pod opened or, if that was evicted, an entry in `called`.
    // An entry does not count beside a flow that the other side opened: the pod's SYN would have replaced that flow.
    let is_unsolicited = !matches!(known.state(), FLOW_OUT | FLOW_CUT)
        && (accepts || known.is_accepted())
        && skb
            .forget_number(u32::from(!flows::is_called(skb, interface.pod(), &key)) | known.place)
            != 0;
    // While only the sources are judged, the pod's own connections are not all noted yet.
    let is_reported = is_unsolicited && interface.flags & INTERFACE_SOURCES == 0;
    if is_unsolicited && accepts {
        // A pod that sees the other side's number may go on with the connection later than the record is kept.
        let is_seen = u32::from(!is_reported) | u32::from(interface.mode == MODE_AUDIT);
        let forgotten = known.place * skb.forget_number(is_seen);
        accepted::forget_opened(interface.pod().get(), &raw const key, forgotten);
        known.flow = accepted::record(now_ns);
        let noted = flows::note_accepted(interface, &key, &known.flow);
        // A bridge sends frames for others to all its ports.
        return !is_reported || skb.forget_number(noted) == 0;
    }
    if is_reported && interface.mode != MODE_AUDIT {
        return false;
    }
    known.ignore_accepted();
    let state = known.state();
    let is_reopened =
        state == FLOW_IN && packet.opens_tcp() && is_closed(&known.flow) && !is_unsolicited;
    let is_new = state == 0 || is_reopened;
    let next = if !is_new {
        let completes = packet.bit != bits::TCP || completes_handshake(skb, packet, &known.flow);
        after_packet_to_pod(&known.flow, seen, completes, now_ns)
    } else if packet.opens_inbound()
        && !is_unsolicited
        && !flows::is_called(skb, interface.pod(), &key)
        && !forged::may_be(skb, interface.pod(), now_ns)
    {
        // The policy judges it when the pod answers.
        let mut flow = Flow::new(UNJUDGED, FLOW_IN, now_ns);
        flow.seen = seen;
        flow
    } else {
        return !is_reported;
    };
    flows::keep(skb, interface, &key, &known, next, is_new);
    !is_reported
}

/// Whether a TCP packet acknowledges the pod's SYN-ACK. A sender that forges its address does not see the
/// SYN-ACK.
#[inline(always)]
fn completes_handshake(skb: &Skb<'_>, packet: &Packet, flow: &Flow) -> bool {
    packet.tcp_flags & TCP_ACK != 0
        && packet
            .tcp_numbers(skb)
            .is_some_and(|(_, acknowledged)| acknowledged == flow.handshake)
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
