//! Judges everything that a pod sends, in the order of `docs/verdict.md`.

use aya_ebpf::programs::TcContext;
use egress_common::{
    address,
    flow::after_packet_from_pod,
    packet::{Fragment, Frame, Packet, TCP_RST, TCP_SYN, Walked},
    protocol::bits,
    reason::Reason,
    records::{
        FLOW_CUT, FLOW_IN, FLOW_OUT, FLOW_SEEN_OUT, FROM_POD, Flow, FlowKey, HELD_QUESTION,
        INTERFACE_SOURCES, Interface, MODE_AUDIT, MODE_RELEASED, NO_CLASS, POLICY_UNIDENTIFIED,
        Policy,
    },
};

use crate::{
    DROP, PASS, checksum,
    counters::count,
    decided,
    denials::{Denied, deny},
    entries::{self, Found},
    flows::{self, Known},
    forged,
    frame_record::is_packet_list,
    hardware, headers, held,
    housekeeping::{LinkMessage, judge_link_message},
    maps::{BOUNCE_MARK, POLICY, PROBE_MARK, STAMP, TRACE},
    open_flow, probe,
    rules::{IS_TUNNEL, PASSES, Rules, denied, judge_by_rules, may_be_dns_port, range_of},
    skb::{Skb, now_ns},
    sources::{asks_for_an_address, is_own, not_own},
    unread,
};

/// The verdict on a frame from the pod.
#[inline(always)]
pub fn judge(ctx: &TcContext) -> i32 {
    let skb = Skb(ctx);
    // Before anything else, so that no path through the program omits it.
    skb.stamp(STAMP.load());
    // The node's own frame, not one of the pod.
    if skb.is_looped_back() {
        return PASS;
    }
    // A query that the agent has decided and put back. A pod cannot forge the mark: the kernel scrubs it when
    // a packet crosses network namespaces (skb_scrub_packet, net/core/skbuff.c).
    if skb.mark() == BOUNCE_MARK.load() {
        ctx.set_mark(0);
        return PASS;
    }
    if skb.mark() == PROBE_MARK.load() {
        probe::count(&skb);
        return DROP;
    }
    let Found::Entry(interface) = entries::of_interface(skb.ifindex()) else {
        count(|c| c.no_policy += 1);
        return DROP;
    };
    let interface = &interface;
    if interface.mode == MODE_RELEASED {
        return pass(&skb);
    }
    let refused = if !hardware::is_own(&skb) {
        // Before the other checks: the bridge learns the source address of every frame that passes.
        Some(Reason::SpoofedHardware)
    } else if skb.is_aggregate() && is_packet_list(ctx.skb.skb) {
        // The programs see only the headers of the first packet.
        Some(Reason::Malformed)
    } else {
        None
    };
    if let Some(reason) = refused {
        return deny(
            ctx,
            &Denied {
                interface,
                packet: None,
                reason,
                class: NO_CLASS,
                direction: FROM_POD,
            },
        );
    }
    if TRACE.load() == 0 && open_flow::passes(&skb, interface) {
        return PASS;
    }
    // SAFETY: the agent removes a policy version after it has waited until no program judges by it.
    let Some(policy) = (unsafe { POLICY.get(interface.policy().get()) }) else {
        count(|c| c.no_policy += 1);
        return DROP;
    };
    let mut packet = Packet::EMPTY;
    match headers::read(ctx, &mut packet) {
        Walked::Arp => {
            return judge_arp(ctx, interface, policy, &packet);
        }
        Walked::Ip => skb.forget_path(&mut packet),
        Walked::NotIp | Walked::Malformed => {
            return deny(
                ctx,
                &Denied {
                    interface,
                    packet: None,
                    reason: Reason::Malformed,
                    class: NO_CLASS,
                    direction: FROM_POD,
                },
            );
        }
    }
    if TRACE.load() != 0 {
        aya_log_ebpf::info!(
            ctx,
            "from_pod: interface {}, protocol {}, to {:i} port {}",
            skb.ifindex().get(),
            packet.protocol,
            packet.dst,
            packet.dst_port
        );
    }
    judge_packet(ctx, interface, policy, &packet)
}

/// On a bridge, an ARP packet with another host's address attracts that host's traffic.
#[inline(always)]
fn judge_arp(ctx: &TcContext, interface: &Interface, policy: &Policy, packet: &Packet) -> i32 {
    let skb = Skb(ctx);
    // A host without an address asks whether another host uses its new address (RFC 5227).
    let claimed = if address::same(&packet.src, &address::UNSPECIFIED_V4) {
        &packet.dst
    } else {
        &packet.src
    };
    let reason = if checksum::is_misplaced(&skb, None) {
        Reason::Malformed
    } else if is_own(policy, claimed) {
        return pass(&skb);
    } else {
        not_own(policy)
    };
    let denied = Denied {
        packet: None,
        ..Denied::from_pod(interface, packet, reason)
    };
    deny(ctx, &denied)
}

#[inline(always)]
fn judge_packet(ctx: &TcContext, interface: &Interface, policy: &Policy, packet: &Packet) -> i32 {
    let skb = Skb(ctx);
    if checksum::is_misplaced(&skb, packet.earliest_checksum()) {
        return deny(ctx, &Denied::from_pod(interface, packet, Reason::Malformed));
    }
    match judge_link_message(ctx.skb.skb, policy, packet) {
        LinkMessage::Other => {}
        LinkMessage::Passes => return pass(&skb),
        LinkMessage::NotOwn => {
            return deny(ctx, &Denied::from_pod(interface, packet, not_own(policy)));
        }
        LinkMessage::Malformed => {
            return deny(ctx, &Denied::from_pod(interface, packet, Reason::Malformed));
        }
    }
    let is_question = packet.bit & (bits::UDP | bits::TCP) != 0
        && may_be_dns_port(packet.dst_port)
        && range_of(&packet.dst).is_resolver_at(packet.dst_port);
    // A query of a pod that is not known yet waits, and its source is judged when the pod is known.
    let waits = is_question && policy.flags & POLICY_UNIDENTIFIED != 0;
    if !waits && !is_own(policy, &packet.src) && !asks_for_an_address(packet) {
        return deny(ctx, &Denied::from_pod(interface, packet, not_own(policy)));
    }
    // These connections create no flow, or their flow already counts as opened by the other side.
    if is_question || interface.flags & INTERFACE_SOURCES != 0 || interface.mode == MODE_AUDIT {
        let opens = packet.opens_tcp() && !matches!(packet.fragment, Fragment::Later);
        if opens
            && flows::note_call(interface.pod().get(), &packet.flow_from_pod(), now_ns()) == 0
            && interface.mode != MODE_AUDIT
        {
            return deny(
                ctx,
                &Denied::from_pod(interface, packet, Reason::DestinationsFull),
            );
        }
    }
    // Only the sources are judged yet; the other steps follow soon.
    if interface.flags & INTERFACE_SOURCES != 0 {
        let rules = Rules::All as u32;
        let judged = judge_by_rules(policy, interface.policy().get(), packet, rules, now_ns());
        // A host on the node would unpack the packet and forward its content, with any source.
        if judged & IS_TUNNEL != 0 {
            return deny(ctx, &Denied::from_pod(interface, packet, Reason::Tunnel));
        }
        return pass(&skb);
    }
    if is_question {
        return hold_question(ctx, interface, policy, packet);
    }
    let now_ns = now_ns();
    if flows::map_of(interface.pod(), flows::IN_OPENING).is_none() {
        return deny(ctx, &Denied::from_pod(interface, packet, Reason::NoPolicy));
    }
    judge_by_flow(ctx, interface, policy, packet, now_ns)
}

/// The verdict by the packet's flow and, if that does not suffice, by the rules.
#[inline(always)]
fn judge_by_flow(
    ctx: &TcContext,
    interface: &Interface,
    policy: &Policy,
    packet: &Packet,
    now_ns: u64,
) -> i32 {
    let skb = Skb(ctx);
    let mut key = packet.flow_from_pod();
    let is_later = matches!(packet.fragment, Fragment::Later);
    if is_later {
        packet.name_fragments(&mut key);
    }
    // An ICMP error belongs to the flow that it is about.
    let is_error = packet.bit == bits::ICMP_OTHER && quotes_flow(ctx, packet, &mut key) != 0;
    let known = flows::find(&skb, interface.pod(), &key, now_ns, false);
    if is_later {
        if known.place != flows::NOWHERE && known.flow.policy() == interface.policy() {
            return pass(&skb);
        }
        let denied = Denied::from_pod(interface, packet, Reason::FragmentWithoutFirst);
        return deny(ctx, &denied);
    }

    let follows = is_error || packet.may_follow_flow();
    let is_current = known.flow.policy() == interface.policy();
    let opened_by_pod = follows && known.state() == FLOW_OUT;
    let answers = follows
        && known.state() == FLOW_IN
        && (is_error || may_answer(ctx, packet, u32::from(known.is_established())) != 0)
        // Otherwise the other side's SYN was forged before the pod's connection was recorded.
        && (known.is_established()
            || packet.bit != bits::TCP
            || !flows::is_called(&skb, interface.pod(), &key));
    let passes_by_flow = (opened_by_pod && is_current)
        // Neighbour discovery is answered, too: without it a denied neighbour would not even get the rejection.
        || (answers && (is_current || packet.is_neighbour_message()));

    let mut judged = if passes_by_flow {
        PASSES
    } else {
        let rules = if answers {
            Rules::Answer
        } else if opened_by_pod && !is_error {
            Rules::OpenFlow
        } else {
            Rules::All
        };
        judge_by_rules(
            policy,
            interface.policy().get(),
            packet,
            rules as u32,
            now_ns,
        )
    };
    if passes_by_flow {
        count(|c| c.passed_by_flow += 1);
    }
    let mut passes = skb.forget_number(u32::from(judged == PASSES)) != 0;
    if !is_error
        && !note(
            ctx, interface, packet, &key, &known, answers, passes, now_ns,
        )
    {
        judged = denied(Reason::DestinationsFull, NO_CLASS);
        passes = false;
    }
    if passes {
        if matches!(packet.fragment, Fragment::First) {
            packet.name_fragments(&mut key);
            flows::remember_fragments(interface, &key, now_ns);
        }
        return pass(&skb);
    }
    if judged & IS_TUNNEL != 0 && interface.mode == MODE_AUDIT {
        // The tunnel's content leaves the node with any source that the pod chooses.
        forged::note(interface.pod());
    }
    let denied = Denied {
        interface,
        packet: Some(packet),
        reason: Reason::from_u8((judged >> 8) as u8).unwrap_or(Reason::NoRule),
        class: judged as u8,
        direction: FROM_POD,
    };
    deny(ctx, &denied)
}

/// Records in its flow whether a packet passes, or creates a flow for it. Returns whether it may pass: in enforce
/// mode no connection begins whose destination cannot be recorded, because the other side could later seem to have
/// opened it.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "a part of the function above")]
fn note(
    ctx: &TcContext,
    interface: &Interface,
    packet: &Packet,
    key: &FlowKey,
    known: &Known,
    answers: bool,
    passes: bool,
    now_ns: u64,
) -> bool {
    let seen = flows::seen(packet.bit, packet.tcp_flags, true);
    let state = known.state();
    let follows = packet.may_follow_flow();
    let mut is_new = false;
    let mut next = known.flow;
    if passes && answers {
        next = after_packet_from_pod(&known.flow, seen, now_ns);
        next.set_policy(interface.policy());
        if packet.bit == bits::TCP && !known.is_established() {
            if packet.tcp_flags & TCP_SYN != 0 {
                next.handshake = expected_acknowledgment(ctx, packet) as u16;
            } else {
                // Only a SYN-ACK is an answer that the other side can acknowledge.
                next.seen &= !FLOW_SEEN_OUT;
                next.seen |= known.flow.seen & FLOW_SEEN_OUT;
            }
        }
    } else if passes && follows && (state == FLOW_OUT || state == FLOW_CUT) {
        next = after_packet_from_pod(&known.flow, seen, now_ns);
        next.set_policy(interface.policy());
        next.state = FLOW_OUT;
    } else if !passes && follows && state == FLOW_OUT {
        next.state = FLOW_CUT;
    } else {
        // If the rules allow a packet of a connection that the other side is opening, the flow remains one of
        // the other side. In audit mode a denied packet leaves, too, and its answer must not look like a flow
        // that the other side opened.
        let begins = if passes {
            !(follows && state == FLOW_IN)
        } else {
            // (No host answers a RST, and the pod answers any forged segment with one.)
            interface.mode == MODE_AUDIT
                && (known.place == flows::NOWHERE || known.is_accepted())
                && packet.tcp_flags & TCP_RST == 0
        };
        if !begins || !flows::is_tracked(packet) {
            return true;
        }
        // A RST answers what anybody has sent. (In audit mode a SYN has been noted before.)
        let audits = interface.mode == MODE_AUDIT;
        let is_call = packet.tcp_flags & TCP_RST == 0 && !(audits && packet.opens_tcp());
        let is_noted = !is_call || flows::note_call(interface.pod().get(), key, now_ns) != 0;
        if !is_noted && !audits {
            return false;
        }
        is_new = true;
        let state = if passes { FLOW_OUT } else { FLOW_CUT };
        next = Flow::new(interface.policy(), state, now_ns);
        next.seen = seen;
    }
    flows::keep(&Skb(ctx), interface, key, known, next, is_new);
    true
}

/// Holds a query, or a segment of a connection with a resolver, for the agent. If it cannot be held, it is
/// denied.
///
/// Until the pod is known, its queries over UDP wait at the gate. Segments do not: the first segment of a
/// connection is repeated soon.
#[inline(always)]
fn hold_question(ctx: &TcContext, interface: &Interface, policy: &Policy, packet: &Packet) -> i32 {
    let skb = Skb(ctx);
    let is_known = policy.flags & POLICY_UNIDENTIFIED == 0;
    let is_whole = matches!(packet.fragment, Fragment::None);
    if !is_whole || !(is_known || packet.bit == bits::UDP) {
        let reason = if is_known {
            Reason::DnsFragmented
        } else {
            Reason::PodUnknown
        };
        return deny(ctx, &Denied::from_pod(interface, packet, reason));
    }
    if is_several_datagrams(&skb, packet) {
        return deny(
            ctx,
            &Denied::from_pod(interface, packet, Reason::DnsMalformed),
        );
    }
    if interface.mode == MODE_AUDIT {
        held::take(&skb, interface, HELD_QUESTION, false);
        return pass(&skb);
    }
    if decided::passes(ctx, interface, packet) {
        count(|c| c.passed_questions += 1);
        return pass(&skb);
    }
    if is_known && unread::passes() {
        count(|c| c.unread_questions += 1);
        return pass(&skb);
    }
    if !held::take(&skb, interface, HELD_QUESTION, true) {
        let reason = if is_known {
            Reason::DnsNotHeld
        } else {
            Reason::PodUnknown
        };
        return deny(ctx, &Denied::from_pod(interface, packet, reason));
    }
    DROP
}

/// Whether a frame is an aggregate of several datagrams (`UDP_SEGMENT`, udp(7)). Its header is not that of
/// any of them, and it is too long for the agent to put back on the interface.
#[inline(always)]
pub fn is_several_datagrams(skb: &Skb<'_>, packet: &Packet) -> bool {
    packet.bit == bits::UDP && skb.is_aggregate()
}

#[inline(always)]
fn pass(skb: &Skb<'_>) -> i32 {
    let len = skb.len();
    count(|c| {
        c.passed_packets += 1;
        c.passed_bytes += u64::from(len);
    });
    PASS
}

// The following functions read a packet, and are not inlined because all active functions share 512 bytes of
// stack.

/// See [`Packet::may_answer`].
#[inline(never)]
fn may_answer(ctx: &TcContext, packet: &Packet, is_established: u32) -> u32 {
    u32::from(packet.may_answer(&Skb(ctx), is_established != 0))
}

/// The lower half of the number that acknowledges a SYN-ACK.
#[inline(never)]
fn expected_acknowledgment(ctx: &TcContext, packet: &Packet) -> u32 {
    packet
        .tcp_numbers(&Skb(ctx))
        .map_or(0, |(sequence, _)| u32::from(sequence.wrapping_add(1)))
}

/// Whether the packet is an ICMP error about a flow; if so, writes the flow's key to `key`.
#[inline(never)]
fn quotes_flow(ctx: &TcContext, packet: &Packet, key: &mut FlowKey) -> u32 {
    match packet.quoted_flow(&Skb(ctx)) {
        Some(quoted) => {
            *key = quoted;
            1
        }
        None => 0,
    }
}
