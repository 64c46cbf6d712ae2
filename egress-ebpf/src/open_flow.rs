//! The short path for most packets: those of a flow that the current policy has admitted.
//!
//! It passes no packet that the whole verdict in [`crate::from_pod`] would not pass. The flow shows that the
//! verdict was made under this policy version: the source was the pod's own, and the destination was allowed.
//! This module only checks that the packet belongs to the flow.

use egress_common::{
    packet::{Frame as _, Plain, TCP_FIN, TCP_RST, walk_plain},
    records::Interface,
};

use crate::{
    checksum,
    counters::count,
    flows,
    rules::may_be_dns_port,
    skb::{Linear, Skb},
};

/// Whether the frame belongs to such a flow; if so, counts it. If not, the whole verdict must decide.
#[inline(always)]
pub fn passes(skb: &Skb<'_>, interface: &Interface) -> bool {
    let mut plain = Plain::EMPTY;
    // The destination may have become a resolver since the flow was opened.
    if !walk_plain(&Linear(skb), &mut plain) || may_be_dns_port(plain.key.peer_port) {
        return false;
    }
    // A packet that closes a connection moves its flow to another map.
    if plain.tcp_flags & (TCP_FIN | TCP_RST) != 0 {
        return false;
    }
    if !flows::is_open(interface.pod(), &plain.key, interface.policy())
        || checksum::is_misplaced(skb, plain.earliest_checksum())
    {
        return false;
    }
    let len = skb.len();
    count(|c| {
        c.passed_by_flow += 1;
        c.passed_packets += 1;
        c.passed_bytes += u64::from(len);
    });
    true
}
