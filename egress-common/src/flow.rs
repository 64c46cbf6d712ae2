//! How packets change a flow, and how long a flow is remembered.

use crate::{
    address::Address,
    limits::ACCEPTED_GROUPS,
    protocol,
    records::{
        FLOW_IN, FLOW_KEY_ACCEPTED, FLOW_KEY_ACCEPTED_GROUP, FLOW_KEY_FLOW, FLOW_KEY_FRAGMENT,
        FLOW_OUT, FLOW_SEEN_AGAIN, FLOW_SEEN_FIN_IN, FLOW_SEEN_FIN_OUT, FLOW_SEEN_IN,
        FLOW_SEEN_OUT, FLOW_SEEN_RST, FLOW_SEEN_RST_IN, Flow, FlowKey,
    },
};

const SECOND_NS: u64 = 1_000_000_000;

/// A flow's `last_seen_ns` is updated only when it is older than this, so that a busy flow does not write to
/// shared memory with every packet.
pub const REFRESH_NS: u64 = SECOND_NS;

/// The idle time after which an established TCP flow is forgotten: six hours, which is more than the two
/// hours of TCP keep-alive (RFC 1122, section 4.2.3.6).
pub const TCP_ESTABLISHED_NS: u64 = 6 * 3600 * SECOND_NS;
/// The idle time of a TCP flow with packets from one side only.
pub const TCP_OPENING_NS: u64 = 120 * SECOND_NS;
/// The idle time of a TCP flow after a RST, or after a FIN from both sides.
pub const TCP_CLOSED_NS: u64 = 60 * SECOND_NS;
/// The default idle time of a UDP flow that the pod opened (RFC 4787, REQ-5 requires at least two minutes and
/// recommends five).
pub const UDP_NS: u64 = 300 * SECOND_NS;
/// How long the pod may answer UDP, or a TCP connection that is not established, after the other side's last
/// packet. UDP servers expect such a limit: address translators on the path forget a flow after a few minutes
/// at most, and so clients send regularly (`WireGuard`'s keep-alive every 25 seconds, RTCP reports every 5,
/// QUIC's idle timeout of about 30). Linux gives up an incomplete handshake after 63 seconds
/// (`net.ipv4.tcp_synack_retries`).
pub const INBOUND_NS: u64 = 60 * SECOND_NS;
/// The idle time of every other flow.
pub const OTHER_NS: u64 = 120 * SECOND_NS;
/// How long later fragments may follow their first: the reassembly timeout of Linux (`net.ipv4.ipfrag_time`).
pub const FRAGMENT_NS: u64 = 30 * SECOND_NS;
/// How long it is remembered that the other side of a TCP connection has accepted it, after its last SYN-ACK. It must
/// be longer than the other side may complete the connection. Linux takes a SYN cookie for up to 120 seconds
/// (`MAX_SYNCOOKIE_AGE`, include/net/tcp.h), and waits at most as long before it repeats a SYN-ACK (`TCP_RTO_MAX`).
pub const ACCEPTED_NS: u64 = 180 * SECOND_NS;
/// How long a frame that a pod sent with another's source may take until it comes back to the pod. A node
/// keeps a packet for three seconds while it resolves the receiver's hardware address
/// (`net.ipv4.neigh.*.mcast_solicit` attempts, one each second).
pub const FORGED_NS: u64 = 10 * SECOND_NS;

/// How long the flow may be idle before it is forgotten, in nanoseconds. `udp_ns` applies to UDP flows that
/// the pod opened.
#[inline(always)]
pub const fn idle_limit_ns(key: &FlowKey, flow: &Flow, udp_ns: u64) -> u64 {
    const BOTH_SIDES: u8 = FLOW_SEEN_IN | FLOW_SEEN_OUT;
    match key.kind {
        FLOW_KEY_FRAGMENT => return FRAGMENT_NS,
        FLOW_KEY_ACCEPTED | FLOW_KEY_ACCEPTED_GROUP => return ACCEPTED_NS,
        _ => {}
    }
    let is_inbound = flow.state == FLOW_IN;
    match key.protocol {
        protocol::TCP => {
            if is_closed(flow) {
                TCP_CLOSED_NS
            } else if is_inbound && flow.seen & FLOW_SEEN_AGAIN == 0 {
                INBOUND_NS
            } else if flow.seen & BOTH_SIDES == BOTH_SIDES {
                TCP_ESTABLISHED_NS
            } else {
                TCP_OPENING_NS
            }
        }
        protocol::UDP if is_inbound => INBOUND_NS,
        protocol::UDP => udp_ns,
        _ => OTHER_NS,
    }
}

/// Whether the side that opened the flow has sent again after an answer, and the flow is not closed.
#[inline(always)]
pub const fn is_established(key: &FlowKey, flow: &Flow) -> bool {
    key.kind == FLOW_KEY_FLOW
        && flow.seen & FLOW_SEEN_AGAIN != 0
        && !(key.protocol == protocol::TCP && is_closed(flow))
}

/// The flow after one more packet from the pod, with these bits of `FLOW_SEEN_*`.
///
/// Packets from the pod do not extend the lifetime of a flow that the other side opened.
#[inline(always)]
pub const fn after_packet_from_pod(flow: &Flow, seen: u8, now_ns: u64) -> Flow {
    let mut next = *flow;
    // A side that accepts a RST sends nothing more on that connection, so the RST was forged.
    if flow.seen & FLOW_SEEN_RST_IN != 0 && seen & FLOW_SEEN_RST == 0 {
        next.seen &= !(FLOW_SEEN_RST | FLOW_SEEN_RST_IN);
    }
    next.seen |= seen;
    if flow.state == FLOW_IN {
        return next;
    }
    if flow.seen & FLOW_SEEN_IN != 0 {
        next.seen |= FLOW_SEEN_AGAIN;
    }
    refresh(&mut next, now_ns);
    next
}

/// The flow after one more packet to the pod, with these bits of `FLOW_SEEN_*`. `completes` is whether a TCP
/// packet acknowledges the pod's SYN-ACK ([`Flow::handshake`]); for other protocols it is `true`.
#[inline(always)]
pub const fn after_packet_to_pod(flow: &Flow, seen: u8, completes: bool, now_ns: u64) -> Flow {
    let mut next = *flow;
    next.seen |= seen;
    if flow.state == FLOW_IN && flow.seen & FLOW_SEEN_OUT != 0 && completes {
        next.seen |= FLOW_SEEN_AGAIN;
    }
    refresh(&mut next, now_ns);
    next
}

#[inline(always)]
const fn refresh(flow: &mut Flow, now_ns: u64) {
    if now_ns.saturating_sub(flow.last_seen_ns) >= REFRESH_NS {
        flow.last_seen_ns = now_ns;
    }
}

/// Whether a TCP flow has seen a RST, or a FIN from both sides.
#[inline(always)]
pub const fn is_closed(flow: &Flow) -> bool {
    const BOTH_FINS: u8 = FLOW_SEEN_FIN_IN | FLOW_SEEN_FIN_OUT;
    flow.seen & FLOW_SEEN_RST != 0 || flow.seen & BOTH_FINS == BOTH_FINS
}

/// Whether the pod opened this flow and it is still open at `now_ns`, as far as packets alone show it.
pub const fn is_open(key: &FlowKey, flow: &Flow, now_ns: u64, udp_ns: u64) -> bool {
    key.kind == FLOW_KEY_FLOW
        && flow.state == FLOW_OUT
        && is_alive(key, flow, now_ns, udp_ns)
        && !(key.protocol == protocol::TCP && is_closed(flow))
}

/// Whether a record that the other side has accepted a connection still counts at `now_ns`. The same as [`is_alive`]
/// says of its key; without branches, for the kernel's verifier.
#[inline(always)]
pub const fn is_accepted_lately(record: &Flow, now_ns: u64) -> bool {
    // Another CPU may have written a later time than this one has read.
    let age_ns = now_ns.wrapping_sub(record.last_seen_ns);
    age_ns.wrapping_add(SECOND_NS) <= ACCEPTED_NS + SECOND_NS
}

/// Whether the flow is still remembered at `now_ns` (nanoseconds of `CLOCK_BOOTTIME`); see [`idle_limit_ns`].
#[inline(always)]
pub const fn is_alive(key: &FlowKey, flow: &Flow, now_ns: u64, udp_ns: u64) -> bool {
    now_ns.saturating_sub(flow.last_seen_ns) <= idle_limit_ns(key, flow, udp_ns)
}

/// The group of an address, out of [`ACCEPTED_GROUPS`]. The IPv6 addresses of a network of 64 bits, which one host may
/// choose from, are in one group.
#[must_use]
#[inline(always)]
pub const fn peer_group(address: &Address, secret: u32) -> u16 {
    let (high, low) = (word(address, 0), word(address, 4));
    // Only IPv4 addresses, in their mapped form, and addresses that no host has begin with 64 zeros. (All ones then, and
    // else zero. A branch would be one more path for the kernel's verifier.)
    let begins = high | low;
    let mask = ((begins | begins.wrapping_neg()) >> 31).wrapping_sub(1);
    let hash = mixed(mixed(secret ^ high) ^ low ^ word(address, 12) & mask);
    (hash & (ACCEPTED_GROUPS - 1)) as u16
}

#[inline(always)]
const fn word(address: &Address, at: usize) -> u32 {
    u32::from_ne_bytes([
        address[at],
        address[at + 1],
        address[at + 2],
        address[at + 3],
    ])
}

/// The finalizer of `MurmurHash3`: each bit of the result depends on each bit of the word.
#[inline(always)]
const fn mixed(word: u32) -> u32 {
    let mut hash = word;
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^ hash >> 16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::UNJUDGED;

    const fn key(protocol: u8, kind: u8) -> FlowKey {
        FlowKey {
            pod_addr: [0; 16],
            peer_addr: [0; 16],
            pod_port: 0,
            peer_port: 0,
            protocol,
            kind,
            pad: 0,
        }
    }

    const fn flow(seen: u8) -> Flow {
        flow_of(FLOW_OUT, seen)
    }

    const fn flow_of(state: u8, seen: u8) -> Flow {
        let mut flow = Flow::new(UNJUDGED, state, 10 * SECOND_NS);
        flow.seen = seen;
        flow
    }

    fn tcp_limit(seen: u8) -> u64 {
        idle_limit_ns(&key(protocol::TCP, FLOW_KEY_FLOW), &flow(seen), UDP_NS)
    }

    #[test]
    fn an_established_connection_outlives_two_hours_of_silence() {
        let limit = tcp_limit(FLOW_SEEN_IN | FLOW_SEEN_OUT);
        assert_eq!(limit, TCP_ESTABLISHED_NS);
        assert!(limit > 2 * 3600 * SECOND_NS);
    }

    #[test]
    fn a_connection_that_nobody_answered_is_forgotten_early() {
        assert_eq!(tcp_limit(FLOW_SEEN_OUT), TCP_OPENING_NS);
        assert_eq!(tcp_limit(FLOW_SEEN_IN), TCP_OPENING_NS);
    }

    #[test]
    fn a_connection_is_closed_by_a_reset_or_by_both_sides() {
        const BOTH: u8 = FLOW_SEEN_IN | FLOW_SEEN_OUT;
        assert_eq!(tcp_limit(BOTH | FLOW_SEEN_RST), TCP_CLOSED_NS);
        assert_eq!(
            tcp_limit(BOTH | FLOW_SEEN_FIN_IN | FLOW_SEEN_FIN_OUT),
            TCP_CLOSED_NS
        );
        // Half closed: the other side may continue to send for hours.
        assert_eq!(tcp_limit(BOTH | FLOW_SEEN_FIN_IN), TCP_ESTABLISHED_NS);
        assert_eq!(tcp_limit(BOTH | FLOW_SEEN_FIN_OUT), TCP_ESTABLISHED_NS);
    }

    #[test]
    fn a_flow_is_open_until_it_is_closed_or_idle_and_only_if_the_pod_opened_it() {
        let open = |protocol, kind, state, seen, now_ns| {
            let flow = flow_of(state, seen);
            is_open(&key(protocol, kind), &flow, now_ns, UDP_NS)
        };
        let now = 11 * SECOND_NS;
        let both = FLOW_SEEN_IN | FLOW_SEEN_OUT;
        assert!(open(protocol::TCP, FLOW_KEY_FLOW, FLOW_OUT, both, now));
        assert!(open(protocol::UDP, FLOW_KEY_FLOW, FLOW_OUT, both, now));
        let reset = both | FLOW_SEEN_RST;
        assert!(!open(protocol::TCP, FLOW_KEY_FLOW, FLOW_OUT, reset, now));
        let late = now + UDP_NS;
        assert!(!open(protocol::UDP, FLOW_KEY_FLOW, FLOW_OUT, both, late));
        assert!(!open(protocol::TCP, FLOW_KEY_FLOW, FLOW_OUT + 1, both, now));
        assert!(!open(protocol::TCP, FLOW_KEY_FRAGMENT, FLOW_OUT, both, now));
    }

    #[test]
    fn other_protocols_have_limits_of_their_own() {
        let limit =
            |protocol, kind| idle_limit_ns(&key(protocol, kind), &flow(FLOW_SEEN_OUT), UDP_NS);
        assert_eq!(limit(protocol::UDP, FLOW_KEY_FLOW), UDP_NS);
        assert_eq!(limit(protocol::SCTP, FLOW_KEY_FLOW), OTHER_NS);
        assert_eq!(limit(protocol::ICMPV6, FLOW_KEY_FLOW), OTHER_NS);
        // The key of a fragment does not identify a connection.
        assert_eq!(limit(protocol::TCP, FLOW_KEY_FRAGMENT), FRAGMENT_NS);
    }

    fn inbound(seen: u8) -> Flow {
        flow_of(FLOW_IN, seen)
    }

    #[test]
    fn only_packets_of_the_other_side_keep_alive_a_flow_that_it_opened() {
        let limit = |protocol, seen| {
            idle_limit_ns(&key(protocol, FLOW_KEY_FLOW), &inbound(seen), 7 * UDP_NS)
        };
        let both = FLOW_SEEN_IN | FLOW_SEEN_OUT;
        assert_eq!(limit(protocol::UDP, both), INBOUND_NS);
        assert_eq!(limit(protocol::TCP, both), INBOUND_NS);
        let established = both | FLOW_SEEN_AGAIN;
        assert_eq!(limit(protocol::UDP, established), INBOUND_NS);
        assert_eq!(limit(protocol::TCP, established), TCP_ESTABLISHED_NS);

        let late = 100 * SECOND_NS;
        let answered = after_packet_from_pod(&inbound(FLOW_SEEN_IN), FLOW_SEEN_OUT, late);
        assert_eq!(answered.last_seen_ns, 10 * SECOND_NS);
        let asked = after_packet_to_pod(&answered, FLOW_SEEN_IN, true, late);
        assert_eq!(asked.last_seen_ns, late);
        let own = after_packet_from_pod(&flow(FLOW_SEEN_OUT), FLOW_SEEN_OUT, late);
        assert_eq!(own.last_seen_ns, late);
    }

    #[test]
    fn a_flow_is_established_when_its_opener_speaks_after_an_answer() {
        let now = 10 * SECOND_NS;
        let is_established = |flow: &Flow| is_established(&key(protocol::TCP, FLOW_KEY_FLOW), flow);
        let out = after_packet_from_pod(&flow(FLOW_SEEN_OUT), FLOW_SEEN_OUT, now);
        assert!(!is_established(&out));
        let answered = after_packet_to_pod(&out, FLOW_SEEN_IN, true, now);
        assert!(!is_established(&answered));
        let out = after_packet_from_pod(&answered, FLOW_SEEN_OUT, now);
        assert!(is_established(&out));

        let opening = inbound(FLOW_SEEN_IN);
        let repeated = after_packet_to_pod(&opening, FLOW_SEEN_IN, true, now);
        assert!(!is_established(&repeated));
        let answered = after_packet_from_pod(&repeated, FLOW_SEEN_OUT, now);
        assert!(!is_established(&answered));
        let forged = after_packet_to_pod(&answered, FLOW_SEEN_IN, false, now);
        assert!(!is_established(&forged));
        let complete = after_packet_to_pod(&answered, FLOW_SEEN_IN, true, now);
        assert!(is_established(&complete));
        let closed = after_packet_to_pod(&complete, FLOW_SEEN_RST | FLOW_SEEN_RST_IN, true, now);
        assert!(!is_established(&closed));
    }

    #[test]
    fn a_connection_stays_open_if_the_pod_goes_on_sending_after_a_reset() {
        let now = 10 * SECOND_NS;
        let established = flow(FLOW_SEEN_OUT | FLOW_SEEN_IN | FLOW_SEEN_AGAIN);
        let bits = FLOW_SEEN_IN | FLOW_SEEN_RST | FLOW_SEEN_RST_IN;
        let reset = after_packet_to_pod(&established, bits, true, now);
        assert!(is_closed(&reset));
        assert!(!is_closed(&after_packet_from_pod(
            &reset,
            FLOW_SEEN_OUT,
            now
        )));
        let own = FLOW_SEEN_OUT | FLOW_SEEN_RST;
        assert!(is_closed(&after_packet_from_pod(&reset, own, now)));
        // After a RST from the pod itself, its later packets do not reopen the flow.
        let own = after_packet_from_pod(&established, own, now);
        assert!(is_closed(&after_packet_from_pod(&own, FLOW_SEEN_OUT, now)));
    }

    #[test]
    fn a_record_of_a_syn_ack_outlives_a_syn_cookie() {
        let record = inbound(0);
        let last = record.last_seen_ns;
        for kind in [FLOW_KEY_ACCEPTED, FLOW_KEY_ACCEPTED_GROUP] {
            let key = key(protocol::TCP, kind);
            assert_eq!(idle_limit_ns(&key, &record, UDP_NS), ACCEPTED_NS);
        }
        for (now, counts) in [
            (last - 1, true),
            (last + 120 * SECOND_NS, true),
            (last + ACCEPTED_NS, true),
            (last + ACCEPTED_NS + 1, false),
            (last + 3600 * SECOND_NS, false),
        ] {
            assert_eq!(is_accepted_lately(&record, now), counts, "{now}");
            let key = key(protocol::TCP, FLOW_KEY_ACCEPTED);
            assert_eq!(is_alive(&key, &record, now, UDP_NS), counts, "{now}");
        }
    }

    #[test]
    fn peers_are_spread_over_the_groups_by_host() {
        use crate::address::from_v4;
        let secret = 0x1234_5678;
        let v4 = |n: u16| from_v4([10, 0, n.to_be_bytes()[0], n.to_be_bytes()[1]]);
        let v6 = |n: u16, host: u8| {
            let mut address = [0x20; 16];
            address[6..8].copy_from_slice(&n.to_be_bytes());
            address[15] = host;
            address
        };
        for spread in [
            (0..4096).map(|n| peer_group(&v4(n), secret)).collect(),
            (0..4096)
                .map(|n| peer_group(&v6(n, 1), secret))
                .collect::<std::collections::HashSet<_>>(),
        ] {
            assert!(
                spread
                    .iter()
                    .all(|group| u32::from(*group) < ACCEPTED_GROUPS)
            );
            // By chance, 63 of 100 groups are taken.
            assert!(spread.len() > 2400, "{}", spread.len());
        }
        assert_eq!(peer_group(&v6(7, 1), secret), peer_group(&v6(7, 2), secret));
        assert_ne!(peer_group(&v4(7), secret), peer_group(&v4(7), secret + 1));
    }

    #[test]
    fn a_flow_is_remembered_until_its_limit_and_not_longer() {
        let (key, flow) = (key(protocol::UDP, FLOW_KEY_FLOW), flow(FLOW_SEEN_OUT));
        let last = flow.last_seen_ns;
        for limit in [UDP_NS, 7 * UDP_NS] {
            assert!(is_alive(&key, &flow, last + limit, limit));
            assert!(!is_alive(&key, &flow, last + limit + 1, limit));
            // Another CPU may have written a later time than this one has read.
            assert!(is_alive(&key, &flow, last - 1, limit));
        }
    }
}
