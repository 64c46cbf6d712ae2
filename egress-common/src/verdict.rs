//! The verdict on a packet that leaves a pod, after the lookups in the maps.
//!
//! The kernel programs collect what the maps have about a destination in a [`Destination`] and call
//! [`judge`]. The agent calls the same function to explain the kernel's decision.

use crate::{
    limits::CLASSES,
    protocol::{DNS_PORT, ENCRYPTED_DNS_PORT, bits},
    reason::Reason,
    records::{
        NO_CLASS, POLICY_ALLOW_INTERNAL, POLICY_OPEN, POLICY_REFUSED, POLICY_SPEAKS_OF_NAMES,
        POLICY_UNIDENTIFIED, POLICY_UNREADABLE, Policy, RANGE_INTERNAL, RANGE_NODE,
        RANGE_PROTECTED,
    },
};

pub use crate::translation::Translated;

/// What the maps have about one destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Destination {
    /// The classes of the address in the pod's allow map; 0 when the map does not have it.
    pub learned: u64,
    /// The subset of these classes that applies even if the address is internal.
    pub learned_internal: u64,
    /// 1 when the allow map's entry has expired.
    pub expired: u64,
    /// The classes of the address in the policy's CIDR trie.
    pub cidr: u64,
    /// The kinds of the address in `ranges`, and [`RANGE_NODE`].
    pub ranges: u64,
    /// 1 when `tunnels` has the packet's protocol and port: a host at an internal address, or the node, may
    /// unpack the packet and forward its content.
    pub tunnel: u64,
}

impl Destination {
    /// Whether only an entry with the address allows this packet to the destination: neither a resolved name
    /// nor an entry for any destination does.
    #[inline(always)]
    pub const fn needs_address_entry(&self) -> bool {
        self.ranges & RANGE_PROTECTED != 0 || self.is_tunnel()
    }

    /// Whether the packet may be a tunnel that ends at a node or pod of the cluster.
    #[inline(always)]
    pub const fn is_tunnel(&self) -> bool {
        self.tunnel != 0 && self.ranges & (RANGE_INTERNAL | RANGE_NODE) != 0
    }

    /// Whether a name must be permitted to lead here: the address is internal, and internal addresses do not
    /// pass without a rule.
    #[inline(always)]
    const fn is_guarded(&self, policy: &Policy) -> bool {
        self.ranges & RANGE_INTERNAL != 0 && policy.flags & POLICY_ALLOW_INTERNAL == 0
    }

    /// The learned classes that apply.
    #[inline(always)]
    pub const fn learned_classes(&self, policy: &Policy) -> u64 {
        if self.needs_address_entry() || self.expired != 0 {
            0
        } else if self.is_guarded(policy) {
            self.learned_internal
        } else {
            self.learned
        }
    }
}

/// The verdict and its reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The packet leaves.
    Pass,
    /// The packet does not leave.
    Deny {
        /// The most specific reason that is known.
        reason: Reason,
        /// The bit number of the denying class, or [`NO_CLASS`].
        class: u8,
    },
}

impl Verdict {
    #[inline(always)]
    const fn deny(reason: Reason) -> Self {
        Self::Deny {
            reason,
            class: NO_CLASS,
        }
    }
}

/// The bitmap of the classes that match the protocol and the port.
///
/// `protocol` is one bit of [`bits`]; `port` is [`crate::packet::Packet::class_port`], and is used only for
/// protocols with ports and for [`bits::OTHER`].
///
/// The loop deliberately has no branches: the verifier follows each branch, and two paths in each of 64
/// iterations are more than it explores. It is written so that the compiler finds no comparison to turn into
/// a branch: each iteration yields sign bits, which are combined after the loop.
#[inline(always)]
pub fn matching_classes(policy: &Policy, protocol: u8, port: u16) -> u64 {
    const SIGN: u64 = 1 << 63;
    // If the compiler knew how small a port is, it would recognise the subtractions as comparisons.
    let port = core::hint::black_box(u64::from(port));
    // Without any protocol this is 8, and shifts out all eight bits of a class.
    let shift = protocol.trailing_zeros();
    let mut other_ports = 0;
    let mut same_protocol = 0;
    let mut i = 0;
    while i < CLASSES {
        let class = &policy.classes[i];
        let below = port.wrapping_sub(u64::from(class.port_min));
        let above = u64::from(class.port_max).wrapping_sub(port);
        other_ports = (other_ports >> 1) | ((below | above) & SIGN);
        same_protocol = (same_protocol >> 1) | ((u64::from(class.protocols) >> shift) << 63);
        i += 1;
    }
    if protocol & (bits::WITH_PORTS | bits::OTHER) == 0 {
        other_ports = 0;
    }
    same_protocol & !other_ports
}

/// Whether this is DNS by its port. It needs a rule even to an internal address: a server there that is not a
/// configured resolver would resolve any name, and the gate would not see the queries.
#[inline(always)]
pub const fn is_dns(protocol: u8, port: u16) -> bool {
    protocol & (bits::UDP | bits::TCP) != 0 && (port == DNS_PORT || port == ENCRYPTED_DNS_PORT)
}

/// Classes of the entries that apply to a destination.
#[inline(always)]
const fn known_classes(policy: &Policy, destination: &Destination) -> u64 {
    let (any, cidr) = if destination.needs_address_entry() {
        (
            policy.any & policy.deny,
            address_entries(policy, destination),
        )
    } else {
        (policy.any, destination.cidr)
    };
    destination.learned_classes(policy) | cidr | any
}

/// Classes of the entries that name the address, or a CIDR with it.
#[inline(always)]
const fn address_entries(policy: &Policy, destination: &Destination) -> u64 {
    destination.cidr & !policy.under_any
}

/// Whether a packet is DNS to a server that is no resolver, from a pod whose policy has names.
#[inline(always)]
const fn is_dns_elsewhere(policy: &Policy, dns: bool) -> bool {
    dns && policy.flags & POLICY_SPEAKS_OF_NAMES != 0
}

/// Of the known classes, those whose entries can let a packet pass.
#[inline(always)]
const fn counting_classes(
    policy: &Policy,
    destination: &Destination,
    known: u64,
    elsewhere: bool,
) -> u64 {
    if elsewhere {
        address_entries(policy, destination)
    } else {
        known
    }
}

/// Whether an entry lets a packet pass. A packet that [`judge`] lets pass without one is internal, or the policy is
/// open.
pub fn passes_by_entry(
    policy: &Policy,
    destination: &Destination,
    protocol: u8,
    port: u16,
) -> bool {
    let elsewhere = is_dns_elsewhere(policy, is_dns(protocol, port));
    let known = known_classes(policy, destination);
    let counting = counting_classes(policy, destination, known, elsewhere);
    counting & !policy.deny & matching_classes(policy, protocol, port) != 0
}

/// Judges a packet to `destination` that belongs to no known flow: steps 19 to 23 of `docs/verdict.md`.
///
/// `protocol` is one bit of [`bits`]; `port` is [`crate::packet::Packet::class_port`].
#[inline(always)]
pub fn judge(policy: &Policy, destination: &Destination, protocol: u8, port: u16) -> Verdict {
    let matching = matching_classes(policy, protocol, port);
    let protected = destination.ranges & RANGE_PROTECTED != 0;
    let by_address = destination.needs_address_entry();
    let known = known_classes(policy, destination);
    let dns = is_dns(protocol, port);
    let elsewhere = is_dns_elsewhere(policy, dns);
    let counting = counting_classes(policy, destination, known, elsewhere);

    let denying = known & policy.deny & matching;
    if denying != 0 {
        return Verdict::Deny {
            reason: Reason::DenyRule,
            class: denying.trailing_zeros() as u8,
        };
    }
    if counting & !policy.deny & matching != 0 {
        return Verdict::Pass;
    }
    if protected {
        return Verdict::deny(Reason::Protected);
    }
    if by_address {
        return Verdict::deny(Reason::Tunnel);
    }
    let internal =
        destination.ranges & RANGE_INTERNAL != 0 && policy.flags & POLICY_ALLOW_INTERNAL != 0;
    let open = policy.flags & POLICY_OPEN != 0;
    if (internal && !dns) || (open && !elsewhere) {
        return Verdict::Pass;
    }
    if policy.flags & POLICY_UNREADABLE != 0 {
        return Verdict::deny(Reason::PolicyUnreadable);
    }
    if policy.flags & POLICY_UNIDENTIFIED != 0 {
        return Verdict::deny(Reason::PodUnknown);
    }
    if policy.flags & POLICY_REFUSED != 0 {
        return Verdict::deny(Reason::UnenforcedInterface);
    }
    if dns && (internal || open || known & !policy.deny & matching != 0) {
        return Verdict::deny(Reason::DnsElsewhere);
    }
    let left_out = destination.learned & !destination.learned_internal;
    if destination.is_guarded(policy) && left_out & matching != 0 {
        return Verdict::deny(Reason::InternalAnswer);
    }
    if destination.expired != 0 && destination.learned & matching != 0 {
        return Verdict::deny(Reason::Expired);
    }
    if known & !policy.deny != 0 {
        return Verdict::deny(Reason::PortNotAllowed);
    }
    if policy.named & matching != 0 {
        return Verdict::deny(Reason::AddressNotLearned);
    }
    Verdict::deny(Reason::NoRule)
}

/// Judges a packet that answers a flow of the other side. It passes unless a denying class matches, or it is
/// a tunnel that no address entry allows. It needs no allowing rule, and the address may be protected.
///
/// A `deny` of every destination means that the pod opens nothing. Internal addresses still get answers, or
/// probes would fail. A denied address, prefix or name gets none.
#[inline(always)]
pub fn judge_answer(
    policy: &Policy,
    destination: &Destination,
    protocol: u8,
    port: u16,
) -> Verdict {
    let any = if destination.ranges & RANGE_INTERNAL != 0 {
        0
    } else {
        policy.any
    };
    let known = destination.learned | destination.cidr | any;
    let matching = matching_classes(policy, protocol, port);
    let denying = known & policy.deny & matching;
    if denying != 0 {
        return Verdict::Deny {
            reason: Reason::DenyRule,
            class: denying.trailing_zeros() as u8,
        };
    }
    // Otherwise a sender that forges an address and uses a tunnel's port would open a tunnel to that address.
    if destination.is_tunnel() && destination.cidr & !policy.deny & matching == 0 {
        return Verdict::deny(Reason::Tunnel);
    }
    Verdict::Pass
}

#[cfg(test)]
mod tests;
