//! Which hardware address a pod's frames may come from.
//!
//! A bridge learns from every frame behind which port its source address is. A pod that sends from a
//! neighbour's address draws the neighbour's traffic, and by ARP and neighbour discovery it can claim
//! what belongs to that address. So a port of a bridge sends from one hardware address, which the agent
//! writes into [`LINK_HARDWARE`]. An interface that the node routes has no neighbours, and no entry.

use egress_common::{
    packet::{Frame as _, same_hardware},
    records::HARDWARE_REFUSED,
};

use crate::{
    maps::LINK_HARDWARE,
    skb::{Linear, Skb},
};

/// Whether the frame's source hardware address is one that the interface may send from.
#[inline(always)]
pub fn is_own(skb: &Skb<'_>) -> bool {
    // SAFETY: the map is not preallocated, so an entry that is replaced lives until the program ends.
    let Some(bound) = (unsafe { LINK_HARDWARE.get(skb.ifindex()) }) else {
        return true;
    };
    let Some(source) = Linear(skb).read::<6>(6) else {
        return false;
    };
    bound.flags & HARDWARE_REFUSED == 0 && same_hardware(&bound.addr, &source)
}
