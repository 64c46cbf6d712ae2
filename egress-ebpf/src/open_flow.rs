//! The short way for what most packets are: more of a flow that the current policy has admitted.
//!
//! It passes nothing that the whole verdict in [`crate::from_pod`] would not pass, for the flow says
//! that the verdict was made under this very policy: by then the source was the pod's own, and the
//! destination allowed. All that is left to see is that this packet belongs to it.

use egress_common::{
    packet::{Frame as _, Plain, TCP_FIN, TCP_RST, walk_plain},
    records::Interface,
};

use crate::{
    checksum,
    counters::count,
    flows,
    from_pod::may_be_dns_port,
    skb::{Linear, Skb},
};

/// Whether the frame belongs to such a flow; it is then counted. If not, nothing is said about it.
#[inline(always)]
pub fn passes(skb: &Skb<'_>, interface: &Interface) -> bool {
    let mut plain = Plain::EMPTY;
    // A resolver may have been an ordinary address when the flow was opened.
    if !walk_plain(&Linear(skb), &mut plain) || may_be_dns_port(plain.key.peer_port) {
        return false;
    }
    // What closes a connection moves it to another map.
    if plain.tcp_flags & (TCP_FIN | TCP_RST) != 0 {
        return false;
    }
    if !flows::is_open(interface.pod, &plain.key, interface.policy)
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
