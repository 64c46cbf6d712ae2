//! The hardware addresses from which a pod's frames may come.
//!
//! A bridge learns from every frame which port its source address is behind. A pod that sends from a
//! neighbour's address attracts the neighbour's traffic, and by ARP and neighbour discovery it can claim the
//! IP addresses that belong to that hardware address. So a port of a bridge may send from one hardware
//! address only, which the agent writes into [`LINK_HARDWARE`]. A routed interface has no neighbours, and no
//! entry.

use egress_common::{
    packet::{Frame as _, same_hardware},
    records::HARDWARE_REFUSED,
};

use crate::{
    maps::LINK_HARDWARE,
    skb::{Linear, Skb},
};

/// Whether the interface may send from the frame's source hardware address.
#[inline(always)]
pub fn is_own(skb: &Skb<'_>) -> bool {
    // SAFETY: the map is not preallocated, so an entry that is replaced lives until the program ends.
    let Some(bound) = (unsafe { LINK_HARDWARE.get(skb.ifindex().get()) }) else {
        return true;
    };
    let Some(source) = Linear(skb).read::<6>(6) else {
        return false;
    };
    bound.flags & HARDWARE_REFUSED == 0 && same_hardware(&bound.addr, &source)
}
