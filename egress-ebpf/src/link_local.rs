//! The link-local addresses that an interface may use.
//!
//! The API server and the kubelet do not know these addresses. An address that is derived from the frame's
//! source hardware address belongs to the sender: claiming it attracts no more traffic than the hardware
//! address does. Of all other addresses an interface may use one: the first that it uses, if no other
//! interface, nor the node, nor a gateway that the node knows, uses it.

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

/// Whether the interface may use this link-local address.
#[inline(always)]
pub fn is_own(skb: &Skb<'_>, address: &Address) -> bool {
    let ifindex = skb.ifindex();
    let key = LinkAddress { addr: *address };
    // SAFETY: the maps are not preallocated, so an entry that is replaced lives until the program
    // ends.
    if let Some(owner) = unsafe { LINK_OWNER.get(key) } {
        return owner.ifindex() == ifindex;
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
    // It becomes the interface's only one unless another interface has it; the interface that comes second
    // gets none.
    LINK_LOCAL.insert(ifindex.get(), key, NEW).is_ok()
        && LINK_OWNER
            .insert(key, LinkOwner::interface(ifindex), NEW)
            .is_ok()
}
