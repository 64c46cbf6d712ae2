//! Everything a pod sends, in the order of the verdict (`docs/architecture.md`).

use aya_ebpf::programs::TcContext;
use egress_common::{
    address::{self, Address},
    limits::OWN_ADDRESSES,
    packet::{Fragment, Packet, Walked, walk},
    protocol::bits,
    reason::Reason,
    records::{
        AllowKey, FLOW_CUT, FLOW_IN, FLOW_OUT, FROM_POD, HELD_QUESTION, Interface, MODE_AUDIT,
        MODE_RELEASED, NO_CLASS, POLICY_UNIDENTIFIED, Policy, RANGE_INTERNAL, Range, TunnelKey,
    },
    translation::embedded_v4,
    verdict::{self, Destination, Translated, Verdict},
};

use crate::{
    DROP, PASS, checksum,
    counters::count,
    denials::{Denied, deny},
    flows, held, link_local,
    maps::{
        ALLOW, BOUNCE_MARK, CIDR, DNS_PORT, Flows, INTERFACE, POLICY, PROBE_MARK, RANGE, TRACE,
        TUNNEL,
    },
    open_flow, probe,
    skb::{Skb, now_ns},
};

/// The verdict on a frame that the pod sent.
#[inline(always)]
pub fn judge(ctx: &TcContext) -> i32 {
    let skb = Skb(ctx);
    // A question that the agent has decided and put back. A pod cannot forge the mark: it is
    // scrubbed when a packet crosses network namespaces (skb_scrub_packet, net/core/skbuff.c).
    if skb.mark() == BOUNCE_MARK.load() {
        ctx.set_mark(0);
        return PASS;
    }
    if skb.mark() == PROBE_MARK.load() {
        probe::count(&skb);
        return DROP;
    }
    // SAFETY: neither map is preallocated, so an entry that is replaced lives until the program
    // ends; the agent never writes to an entry in place.
    let Some(interface) = (unsafe { INTERFACE.get(skb.ifindex()) }) else {
        count(|c| c.no_policy += 1);
        return DROP;
    };
    if interface.mode == MODE_RELEASED {
        return pass(&skb);
    }
    if TRACE.load() == 0 && open_flow::passes(&skb, interface) {
        return PASS;
    }
    // SAFETY: as above.
    let Some(policy) = (unsafe { POLICY.get(interface.policy) }) else {
        count(|c| c.no_policy += 1);
        return DROP;
    };
    let mut packet = Packet::EMPTY;
    let walked = if skb.own_headers() {
        walk(&skb, &mut packet)
    } else {
        Walked::Malformed
    };
    match walked {
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
            skb.ifindex(),
            packet.protocol,
            packet.dst,
            packet.dst_port
        );
    }
    judge_packet(ctx, interface, policy, &packet)
}

/// On a bridge, an ARP packet in somebody else's name draws their traffic here.
#[inline(always)]
fn judge_arp(ctx: &TcContext, interface: &Interface, policy: &Policy, packet: &Packet) -> i32 {
    let skb = Skb(ctx);
    // Who has no address yet asks whether somebody else has the one that it is to get (RFC 5227).
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
    // As with ARP: an advertisement in somebody else's name draws their traffic here.
    if packet.is_neighbour_advertisement() && !claims_own_target(&skb, policy, packet) {
        return deny(ctx, &Denied::from_pod(interface, packet, not_own(policy)));
    }
    let is_housekeeping = packet.is_link_housekeeping();
    if is_housekeeping || packet.is_neighbour_message() {
        if !packet.is_plain_link_message(&skb) {
            return deny(ctx, &Denied::from_pod(interface, packet, Reason::Malformed));
        }
        if is_housekeeping && may_speak_on_link(&skb, policy, packet) {
            return pass(&skb);
        }
    }
    let is_question = packet.bit & (bits::UDP | bits::TCP) != 0
        && may_be_dns_port(packet.dst_port)
        && range_of(&packet.dst).is_resolver_at(packet.dst_port);
    // A question of a pod that is not known yet waits, and its source is judged when it is.
    let waits = is_question && policy.flags & POLICY_UNIDENTIFIED != 0;
    if !waits && !is_own(policy, &packet.src) {
        return deny(ctx, &Denied::from_pod(interface, packet, not_own(policy)));
    }
    if is_question {
        return hold_question(ctx, interface, policy, packet);
    }
    let now_ns = now_ns();
    let Some(flows) = flows::of_pod(interface) else {
        return deny(ctx, &Denied::from_pod(interface, packet, Reason::NoPolicy));
    };
    if matches!(packet.fragment, Fragment::Later) {
        let first = flows::find(flows, &packet.fragment_from_pod(), now_ns);
        return if first.is_some_and(|first| first.policy == interface.policy) {
            pass(&skb)
        } else {
            deny(
                ctx,
                &Denied::from_pod(interface, packet, Reason::FragmentWithoutFirst),
            )
        };
    }
    let key = packet.flow_from_pod();
    let seen = flows::seen(packet.bit, packet.tcp_flags, true);
    let mut open = None;
    if packet.may_follow_flow()
        && let Some(flow) = flows::find(flows, &key, now_ns)
    {
        if flow.state == FLOW_IN || (flow.state == FLOW_OUT && flow.policy == interface.policy) {
            flows::touch(flow, seen, now_ns);
            count(|c| c.passed_by_flow += 1);
            return pass_first_fragment(&skb, flows, interface, packet, now_ns);
        }
        open = Some(flow);
    }

    if let Some(key) = packet.quoted_flow(&skb) {
        let known = flows::find(flows, &key, now_ns).is_some_and(|flow| {
            flow.state == FLOW_IN || (flow.state == FLOW_OUT && flow.policy == interface.policy)
        });
        if known {
            count(|c| c.passed_by_flow += 1);
            return pass(&skb);
        }
    }

    let mut destination = look_up(interface, policy, packet, now_ns);
    // A flow that an earlier policy admitted lives on if today's policy allows its destination,
    // even when the address's own lifetime has ended.
    if let Some(flow) = &open
        && flow.state == FLOW_OUT
    {
        destination.expired = 0;
    }
    match verdict::judge(policy, &destination, packet.bit, packet.dst_port) {
        Verdict::Pass => {
            match open {
                Some(flow) => {
                    flow.policy = interface.policy;
                    flow.state = FLOW_OUT;
                    flows::touch(flow, seen, now_ns);
                }
                None if flows::is_tracked(packet) => {
                    flows::remember(flows, &key, interface, FLOW_OUT, seen, now_ns);
                }
                None => {}
            }
            pass_first_fragment(&skb, flows, interface, packet, now_ns)
        }
        Verdict::Deny { reason, class } => {
            match open {
                Some(flow) => flow.state = FLOW_CUT,
                // In audit mode the packet leaves, and its answer must not look like something
                // that the other side opened.
                None if interface.mode == MODE_AUDIT && flows::is_tracked(packet) => {
                    flows::remember(flows, &key, interface, FLOW_CUT, seen, now_ns);
                }
                None => {}
            }
            let denied = Denied {
                interface,
                packet: Some(packet),
                reason,
                class,
                direction: FROM_POD,
            };
            deny(ctx, &denied)
        }
    }
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

/// Gives a question, or a segment of a connection with a resolver, to the agent. What cannot be
/// held is denied.
///
/// Until the pod is known its questions wait at the gate. Connections do not: their first segment is
/// soon repeated.
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

/// Whether a frame stands for several datagrams (`UDP_SEGMENT`, udp(7)). Its header is that of none of them,
/// and it is longer than what the agent can put back on the interface.
#[inline(always)]
pub fn is_several_datagrams(skb: &Skb<'_>, packet: &Packet) -> bool {
    packet.bit == bits::UDP && egress_common::packet::Frame::is_aggregate(skb)
}

/// Passes a packet that the rules or a flow admit, and lets its later fragments follow.
#[inline(always)]
fn pass_first_fragment(
    skb: &Skb<'_>,
    flows: &Flows,
    interface: &Interface,
    packet: &Packet,
    now_ns: u64,
) -> i32 {
    if matches!(packet.fragment, Fragment::First) {
        let key = packet.fragment_from_pod();
        flows::remember(flows, &key, interface, FLOW_OUT, 0, now_ns);
    }
    pass(skb)
}

#[inline(always)]
fn pass(skb: &Skb<'_>) -> i32 {
    let len = egress_common::packet::Frame::len(skb);
    count(|c| {
        c.passed_packets += 1;
        c.passed_bytes += u64::from(len);
    });
    PASS
}

#[inline(always)]
fn is_own(policy: &Policy, address: &Address) -> bool {
    let mut i = 0;
    while i < OWN_ADDRESSES {
        if i as u32 >= policy.own_len {
            return false;
        }
        if address::same(&policy.own[i], address) {
            return true;
        }
        i += 1;
    }
    false
}

/// Why a packet does not leave whose source is not among the pod's own addresses.
#[inline(always)]
fn not_own(policy: &Policy) -> Reason {
    // Nobody knows them yet.
    if policy.flags & POLICY_UNIDENTIFIED != 0 && policy.own_len == 0 {
        Reason::PodUnknown
    } else {
        Reason::SpoofedSource
    }
}

/// What the maps say about a destination.
#[inline(always)]
fn look_up(interface: &Interface, policy: &Policy, packet: &Packet, now_ns: u64) -> Destination {
    let address = &packet.dst;
    let mut destination = Destination {
        ranges: range_of(address).kinds,
        ..Destination::default()
    };
    // SAFETY: none of the maps is preallocated, so an entry that is replaced lives until the
    // program ends.
    unsafe {
        if let Some(entry) = ALLOW
            .get(&interface.policy)
            .and_then(|allow| allow.get(AllowKey { addr: *address }))
        {
            destination.learned = entry.classes;
            destination.learned_internal = entry.internal_classes;
            destination.expired = u64::from(entry.expires_ns <= now_ns);
        }
    }
    destination.cidr = prefix_classes(interface, address);
    if let Some(v4) = embedded_v4(address, destination.ranges) {
        let translated = Translated {
            cidr: prefix_classes(interface, &v4),
            ranges: range_of(&v4).kinds,
        };
        destination.add_translated(policy, translated);
    }
    destination.tunnel = u64::from(is_tunnel(destination.ranges, packet.bit, packet.dst_port));
    destination
}

/// Whether packets of this protocol to this port of an address of these kinds may be unpacked there
/// and sent on.
#[inline(always)]
pub fn is_tunnel(kinds: u64, protocol: u8, port: u16) -> bool {
    // SAFETY: the map is not preallocated, so an entry that is replaced lives until the program ends.
    kinds & RANGE_INTERNAL != 0 && unsafe { TUNNEL.get(TunnelKey::new(protocol, port)) }.is_some()
}

/// Classes of the address in the policy's CIDR trie.
#[inline(always)]
fn prefix_classes(interface: &Interface, address: &Address) -> u64 {
    // SAFETY: the maps are not preallocated, so an entry that is replaced lives until the program
    // ends.
    let entry =
        unsafe { CIDR.get(&interface.policy) }.and_then(|cidrs| cidrs.get(&lpm_key(address)));
    entry.map_or(0, |entry| entry.classes)
}

/// What kind of address this is on this node.
#[inline(always)]
pub fn range_of(address: &Address) -> Range {
    RANGE.get(&lpm_key(address)).copied().unwrap_or_default()
}

/// Whether a resolver may be asked on this port.
#[inline(always)]
pub fn may_be_dns_port(port: u16) -> bool {
    // SAFETY: the entry is there for as long as the map, and any bytes in it are ports.
    DNS_PORT
        .get(0)
        .is_some_and(|ports| unsafe { core::ptr::from_ref(ports).read_volatile() }.may_have(port))
}

#[inline(always)]
fn lpm_key(address: &Address) -> aya_ebpf::btf_maps::lpm_trie::Key<Address> {
    aya_ebpf::btf_maps::lpm_trie::Key::new(128, *address)
}
