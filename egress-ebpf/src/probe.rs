//! Counts the probe frames by which the agent tests whether an interface's packets reach the programs.

use crate::{maps::PROBES, skb::Skb};

/// `ETH_P_IPV6` (`include/uapi/linux/if_ether.h`) in network byte order, as in `__sk_buff`.
const IPV6: u32 = 0x86dd_u16.to_be() as u32;

/// Counts a probe of this interface. The agent inserts the entry; without an entry the probe is not counted.
#[inline(always)]
pub fn count(skb: &Skb<'_>) {
    if let Some(probes) = PROBES.get_ptr_mut(skb.ifindex().get()) {
        // SAFETY: the map is not preallocated, so the entry lives until the program ends. The agent
        // sends the next probe of an interface long after this one has come or is lost.
        unsafe {
            if skb.protocol() == IPV6 {
                (*probes).v6 += 1;
            } else {
                (*probes).v4 += 1;
            }
        }
    }
}
