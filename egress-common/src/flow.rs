//! How long a flow is remembered.

use crate::{
    protocol,
    records::{
        FLOW_KEY_FLOW, FLOW_KEY_FRAGMENT, FLOW_OUT, FLOW_SEEN_FIN_IN, FLOW_SEEN_FIN_OUT,
        FLOW_SEEN_IN, FLOW_SEEN_OUT, FLOW_SEEN_RST, Flow, FlowKey,
    },
};

const SECOND_NS: u64 = 1_000_000_000;

/// A flow's `last_seen_ns` is written again only when it is older than this, so that a busy flow
/// does not write to shared memory with every packet.
pub const REFRESH_NS: u64 = SECOND_NS;

/// Idle time after which an established TCP flow is forgotten: six hours, above the two hours of
/// TCP keep-alive (RFC 1122, section 4.2.3.6).
pub const TCP_ESTABLISHED_NS: u64 = 6 * 3600 * SECOND_NS;
/// Idle time of a TCP flow that only one side has spoken on.
pub const TCP_OPENING_NS: u64 = 120 * SECOND_NS;
/// Idle time of a TCP flow after a RST, or a FIN from both sides.
pub const TCP_CLOSED_NS: u64 = 60 * SECOND_NS;
/// Idle time of a UDP flow on which both sides have spoken (RFC 4787, REQ-5 asks for at least two
/// minutes and recommends five).
pub const UDP_NS: u64 = 300 * SECOND_NS;
/// Idle time of every other flow.
pub const OTHER_NS: u64 = 120 * SECOND_NS;
/// How long later fragments may follow their first: the reassembly time-out of Linux
/// (`net.ipv4.ipfrag_time`).
pub const FRAGMENT_NS: u64 = 30 * SECOND_NS;

/// How long the flow may be idle before it is forgotten, in nanoseconds.
#[inline(always)]
pub const fn idle_limit_ns(key: &FlowKey, flow: &Flow) -> u64 {
    const BOTH_SIDES: u8 = FLOW_SEEN_IN | FLOW_SEEN_OUT;
    if key.kind == FLOW_KEY_FRAGMENT {
        return FRAGMENT_NS;
    }
    match key.protocol {
        protocol::TCP => {
            if is_closed(flow) {
                TCP_CLOSED_NS
            } else if flow.seen & BOTH_SIDES == BOTH_SIDES {
                TCP_ESTABLISHED_NS
            } else {
                TCP_OPENING_NS
            }
        }
        protocol::UDP => UDP_NS,
        _ => OTHER_NS,
    }
}

/// Whether a TCP flow has seen a RST, or a FIN from both sides.
#[inline(always)]
const fn is_closed(flow: &Flow) -> bool {
    const BOTH_FINS: u8 = FLOW_SEEN_FIN_IN | FLOW_SEEN_FIN_OUT;
    flow.seen & FLOW_SEEN_RST != 0 || flow.seen & BOTH_FINS == BOTH_FINS
}

/// Whether this is a flow that the pod opened and that goes on at `now_ns`, as far as anyone can
/// tell who sees packets alone.
pub const fn is_open(key: &FlowKey, flow: &Flow, now_ns: u64) -> bool {
    key.kind == FLOW_KEY_FLOW
        && flow.state == FLOW_OUT
        && is_alive(key, flow, now_ns)
        && !(key.protocol == protocol::TCP && is_closed(flow))
}

/// Whether the flow is still remembered at `now_ns` (nanoseconds of `CLOCK_BOOTTIME`).
#[inline(always)]
pub const fn is_alive(key: &FlowKey, flow: &Flow, now_ns: u64) -> bool {
    now_ns.saturating_sub(flow.last_seen_ns) <= idle_limit_ns(key, flow)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        Flow {
            last_seen_ns: 10 * SECOND_NS,
            policy: 0,
            state: FLOW_OUT,
            seen,
            pad: 0,
        }
    }

    fn tcp_limit(seen: u8) -> u64 {
        idle_limit_ns(&key(protocol::TCP, FLOW_KEY_FLOW), &flow(seen))
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
        // Half closed: the other side may go on sending for hours.
        assert_eq!(tcp_limit(BOTH | FLOW_SEEN_FIN_IN), TCP_ESTABLISHED_NS);
        assert_eq!(tcp_limit(BOTH | FLOW_SEEN_FIN_OUT), TCP_ESTABLISHED_NS);
    }

    #[test]
    fn a_flow_is_open_until_it_is_closed_or_idle_and_only_if_the_pod_opened_it() {
        let open = |protocol, kind, state, seen, now_ns| {
            let flow = Flow {
                state,
                ..flow(seen)
            };
            is_open(&key(protocol, kind), &flow, now_ns)
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
        let limit = |protocol, kind| idle_limit_ns(&key(protocol, kind), &flow(FLOW_SEEN_OUT));
        assert_eq!(limit(protocol::UDP, FLOW_KEY_FLOW), UDP_NS);
        assert_eq!(limit(protocol::SCTP, FLOW_KEY_FLOW), OTHER_NS);
        assert_eq!(limit(protocol::ICMPV6, FLOW_KEY_FLOW), OTHER_NS);
        // A fragment's key says nothing of the connection it belongs to.
        assert_eq!(limit(protocol::TCP, FLOW_KEY_FRAGMENT), FRAGMENT_NS);
    }

    #[test]
    fn a_flow_is_remembered_until_its_limit_and_not_longer() {
        let (key, flow) = (key(protocol::UDP, FLOW_KEY_FLOW), flow(FLOW_SEEN_OUT));
        let last = flow.last_seen_ns;
        assert!(is_alive(&key, &flow, last + UDP_NS));
        assert!(!is_alive(&key, &flow, last + UDP_NS + 1));
        // Another CPU may have written a later time than the one read here.
        assert!(is_alive(&key, &flow, last - 1));
    }
}
