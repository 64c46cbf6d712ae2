//! The verdict on a packet that leaves a pod, once the maps were asked.
//!
//! The kernel programs gather what the maps say about a destination into a [`Destination`] and
//! call [`judge`]; the agent calls the same function where it has to say what the kernel would do.

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

/// What the maps say about one destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Destination {
    /// Classes of the address in the pod's allow map; 0 when it is not there.
    pub learned: u64,
    /// Of these, the ones that hold though the address is internal.
    pub learned_internal: u64,
    /// 1 when the allow map's entry has expired.
    pub expired: u64,
    /// Classes of the address in the policy's CIDR trie.
    pub cidr: u64,
    /// Kinds of the address in `ranges`, and [`RANGE_NODE`].
    pub ranges: u64,
    /// 1 when the packet is one of those that `tunnels` names: somebody at an internal address, or the
    /// node, may unpack it and send on what is in it.
    pub tunnel: u64,
}

impl Destination {
    /// Whether only an entry with the address opens the destination for this packet: neither what a
    /// name has taught nor an entry for any destination does.
    #[inline(always)]
    pub const fn needs_address_entry(&self) -> bool {
        self.ranges & RANGE_PROTECTED != 0 || self.is_tunnel()
    }

    /// Whether the packet may be a tunnel that ends at a node, or a pod, of the cluster.
    #[inline(always)]
    pub const fn is_tunnel(&self) -> bool {
        self.tunnel != 0 && self.ranges & (RANGE_INTERNAL | RANGE_NODE) != 0
    }

    /// Whether names have to be allowed to lead here: the address is internal, and internal addresses
    /// do not pass by themselves.
    #[inline(always)]
    const fn is_guarded(&self, policy: &Policy) -> bool {
        self.ranges & RANGE_INTERNAL != 0 && policy.flags & POLICY_ALLOW_INTERNAL == 0
    }

    /// The learned classes that count.
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

/// What was decided, and on what ground.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It leaves.
    Pass,
    /// It does not leave. The class is the bit that denied, or [`NO_CLASS`].
    Deny {
        /// The most specific reason known.
        reason: Reason,
        /// Bit number of the denying class, or [`NO_CLASS`].
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

/// Bitmap of the classes that match protocol and port.
///
/// `protocol` is one bit of [`bits`]; `port` is that of [`crate::packet::Packet::class_port`], and is looked at
/// only for protocols that have ports, and for [`bits::OTHER`].
///
/// The loop has no branches, on purpose: a verifier follows each of them, and 64 times two paths
/// through it are more than it explores. It is written so that no compiler finds a comparison in it
/// that it would make a branch of: what it yields for each class are sign bits, and they are put
/// together behind it.
#[inline(always)]
pub fn matching_classes(policy: &Policy, protocol: u8, port: u16) -> u64 {
    const SIGN: u64 = 1 << 63;
    // A compiler that knew how small a port is would see the comparisons in the subtractions.
    let port = core::hint::black_box(u64::from(port));
    // For no protocol at all this is 8, and leaves nothing of a class's eight bits.
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

/// Whether this is DNS, by its port. To an internal address too it needs a rule: a server there that
/// is not among the configured resolvers would carry out whatever a name can hold, and nobody would
/// look at it.
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

/// Judges a packet to `destination` that no known flow carries: steps 19 to 23 of `docs/verdict.md`.
///
/// `protocol` is one bit of [`bits`]; `port` is that of [`crate::packet::Packet::class_port`].
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

/// Judges a packet that answers what the other side opened: it passes unless a denying class says
/// otherwise, or it is a tunnel that no address entry opens. That the rules allow nothing there, or that
/// the address is protected, does not matter.
///
/// A `deny` of everything means that the pod opens nothing; what is internal still gets its answers,
/// or no probe would succeed. A denied address, prefix or name gets none.
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
    // Whoever sends from a tunnel's port in the name of an address would open a tunnel to it.
    if destination.is_tunnel() && destination.cidr & !policy.deny & matching == 0 {
        return Verdict::deny(Reason::Tunnel);
    }
    Verdict::Pass
}

#[cfg(test)]
mod tests;
