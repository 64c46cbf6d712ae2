//! Which link-local addresses an interface may go by.
//!
//! A pod's source knows none of them. The one that is made of the hardware address in the frame is the
//! sender's: who claims it draws no more than that hardware address does. Of all others an interface
//! has one, the first that it goes by, if nobody else does: no other interface, not the node, and no
//! gateway that the node knows.

use egress_common::{
    address::{Address, is_host_link_local, is_of_hardware, link_local_of, same},
    packet::Frame as _,
    records::{LinkAddress, LinkOwner},
};

use crate::{
    maps::{LINK_LOCAL, LINK_OWNER},
    skb::Skb,
};

/// `BPF_NOEXIST`: insert only.
const NEW: u64 = 1;

/// Whether the interface may go by this link-local address.
#[inline(always)]
pub fn is_own(skb: &Skb<'_>, address: &Address) -> bool {
    let ifindex = skb.ifindex();
    let key = LinkAddress { addr: *address };
    // SAFETY: the maps are not preallocated, so an entry that is replaced lives until the program
    // ends.
    if let Some(owner) = unsafe { LINK_OWNER.get(key) } {
        return owner.ifindex == ifindex;
    }
    let Some(hardware) = skb.read::<6>(6) else {
        return false;
    };
    if same(address, &link_local_of(hardware)) {
        return true;
    }
    if is_of_hardware(address) || !is_host_link_local(address) {
        return false;
    }
    // The interface's only one, and nobody else's; whoever comes second gets nothing.
    LINK_LOCAL.insert(ifindex, key, NEW).is_ok()
        && LINK_OWNER.insert(key, LinkOwner { ifindex }, NEW).is_ok()
}
