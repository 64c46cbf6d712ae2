//! The verdict on a packet that leaves a pod, after the lookups in the maps.
//!
//! The kernel programs collect what the maps have about a destination in a [`Destination`] and call
//! [`judge`]. The agent calls the same function to explain the kernel's decision.

use crate::{
    classes::{ClassSet, mask_of},
    protocol::{DNS_PORT, ENCRYPTED_DNS_PORT, bits},
    reason::Reason,
    records::{
        NO_CLASS, POLICY_ALLOW_INTERNAL, POLICY_OPEN, POLICY_REFUSED, POLICY_SELECTED,
        POLICY_SPEAKS_OF_NAMES, POLICY_UNIDENTIFIED, POLICY_UNREADABLE, Policy, RANGE_INTERNAL,
        RANGE_NODE, RANGE_PROTECTED,
    },
};

pub use crate::translation::Translated;

/// The entries of the maps for one destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Destination {
    /// The classes of the address in the pod's allow map; none when the map does not have it.
    pub learned: ClassSet,
    /// The subset of these classes that applies even if the address is internal.
    pub learned_internal: ClassSet,
    /// 1 when the allow map's entry has expired.
    pub expired: u64,
    /// The classes of the address in the policy's CIDR trie.
    pub cidr: ClassSet,
    /// The kinds of the address in `ranges`, and [`RANGE_NODE`].
    pub ranges: u64,
    /// 1 when `tunnels` has the packet's protocol and port: a host at an internal address, or the node, may
    /// unpack the packet and forward its content.
    pub tunnel: u64,
}

impl Destination {
    /// Adds an entry of the allow map, or of the map `learned`; `has_expired` is 1 if it has. An expired entry does not
    /// count beside one that has not.
    #[inline(always)]
    pub fn add_learned(&mut self, classes: ClassSet, internal: ClassSet, has_expired: u64) {
        let known = classes.mask();
        let live = known & !mask_of(has_expired);
        let was_live = self.learned.mask() & !mask_of(self.expired);
        let keep = !(live & mask_of(self.expired));
        let take = live | !was_live;
        self.learned = self.learned.masked(keep).or(classes.masked(take));
        self.learned_internal = self.learned_internal.masked(keep).or(internal.masked(take));
        let expired = mask_of(self.expired) | (known & mask_of(has_expired));
        self.expired = expired & !live & !was_live & 1;
    }
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
    pub const fn learned_classes(&self, policy: &Policy) -> ClassSet {
        if self.needs_address_entry() || self.expired != 0 {
            ClassSet::EMPTY
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

/// Whether this is DNS by its port. It needs a rule even to an internal address: a server there that is not a
/// configured resolver would resolve any name, and the gate would not see the queries.
#[inline(always)]
pub const fn is_dns(protocol: u8, port: u16) -> bool {
    protocol & (bits::UDP | bits::TCP) != 0 && (port == DNS_PORT || port == ENCRYPTED_DNS_PORT)
}

/// Classes of the entries that apply to a destination. Where only an entry with the address allows a packet, classes
/// for any destination still deny it, or leave it to the next tier.
#[inline(always)]
const fn known_classes(policy: &Policy, destination: &Destination) -> ClassSet {
    let (any, cidr) = if destination.needs_address_entry() {
        (
            policy.any.and(policy.not_allowing()),
            address_entries(policy, destination),
        )
    } else {
        (policy.any, destination.cidr)
    };
    destination.learned_classes(policy).or(cidr).or(any)
}

/// Classes of the entries that name the address, or a CIDR with it.
#[inline(always)]
const fn address_entries(policy: &Policy, destination: &Destination) -> ClassSet {
    destination.cidr.without(policy.under_any)
}

/// Whether a packet is DNS to a server that is no resolver, from a pod whose policy has names.
#[inline(always)]
const fn is_dns_elsewhere(policy: &Policy, dns: bool) -> bool {
    dns && policy.flags & POLICY_SPEAKS_OF_NAMES != 0
}

/// Of the known classes, those whose entries can decide. DNS to a server that is no resolver is allowed only by
/// entries with its address.
#[inline(always)]
const fn counting_classes(
    policy: &Policy,
    destination: &Destination,
    known: ClassSet,
    elsewhere: bool,
) -> ClassSet {
    if elsewhere {
        known
            .and(policy.not_allowing())
            .or(address_entries(policy, destination))
    } else {
        known
    }
}

/// The set of the class that decides, of those that match; empty if none does, or if the next tier is to decide and
/// there is none.
#[inline(always)]
pub fn deciding_class(policy: &Policy, matching: ClassSet) -> ClassSet {
    // Only a class of the first tier can pass a packet on to another tier that has classes.
    let passes_on = matching.only_first().and(policy.admin).and(policy.pass);
    let matching = matching.without(policy.admin.masked(passes_on.mask()));
    matching.only_first().without(policy.pass)
}

/// Whether the address is internal, and internal addresses pass without a rule.
#[inline(always)]
const fn passes_as_internal(policy: &Policy, destination: &Destination) -> bool {
    destination.ranges & RANGE_INTERNAL != 0 && policy.flags & POLICY_ALLOW_INTERNAL != 0
}

/// The classes of the last tier where it is not asked. A pod with a list of its own or its namespace's is closed, but
/// for internal destinations: what comes after the lists is asked only about these.
#[inline(always)]
pub fn skipped_classes(policy: &Policy, destination: &Destination) -> ClassSet {
    let is = |flag: u32| mask_of((policy.flags & flag).into());
    let internal = mask_of(destination.ranges & RANGE_INTERNAL) & is(POLICY_ALLOW_INTERNAL);
    policy.baseline.masked(is(POLICY_SELECTED) & !internal)
}

/// Whether an entry lets a packet pass. A packet that [`judge`] lets pass without one is internal, or the policy is
/// open.
pub fn passes_by_entry(
    policy: &Policy,
    destination: &Destination,
    protocol: u8,
    port: u16,
) -> bool {
    let decides = deciding_entries(policy, destination, protocol, port);
    !decides.without(policy.deny).is_empty()
}

/// The set of the class that decides about a packet; empty if no entry does.
pub fn deciding_entries(
    policy: &Policy,
    destination: &Destination,
    protocol: u8,
    port: u16,
) -> ClassSet {
    let elsewhere = is_dns_elsewhere(policy, is_dns(protocol, port));
    let known = known_classes(policy, destination);
    let counting = counting_classes(policy, destination, known, elsewhere);
    let matching = policy.ports.matching(protocol, port);
    let matching = matching.without(skipped_classes(policy, destination));
    deciding_class(policy, counting.and(matching))
}

/// Judges a packet to `destination` that belongs to no known flow: steps 19 to 23 of `docs/verdict.md`.
///
/// `protocol` is one bit of [`bits`]; `port` is [`crate::packet::Packet::class_port`].
#[inline(always)]
pub fn judge(policy: &Policy, destination: &Destination, protocol: u8, port: u16) -> Verdict {
    let skipped = skipped_classes(policy, destination);
    let matching = policy.ports.matching(protocol, port).without(skipped);
    let protected = destination.ranges & RANGE_PROTECTED != 0;
    let by_address = destination.needs_address_entry();
    let known = known_classes(policy, destination);
    let dns = is_dns(protocol, port);
    let elsewhere = is_dns_elsewhere(policy, dns);
    let counting = counting_classes(policy, destination, known, elsewhere);

    let decides = deciding_class(policy, counting.and(matching));
    if !decides.is_empty() {
        return if decides.meets(policy.deny) {
            Verdict::Deny {
                reason: Reason::DenyRule,
                class: decides.first(),
            }
        } else {
            Verdict::Pass
        };
    }
    if protected {
        return Verdict::deny(Reason::Protected);
    }
    if by_address {
        return Verdict::deny(Reason::Tunnel);
    }
    let internal = passes_as_internal(policy, destination);
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
    let allowing = known.without(policy.not_allowing()).without(skipped);
    if dns && (internal || open || allowing.meets(matching)) {
        return Verdict::deny(Reason::DnsElsewhere);
    }
    let named = destination
        .learned
        .and(matching)
        .without(policy.not_allowing());
    if destination.is_guarded(policy) && !named.without(destination.learned_internal).is_empty() {
        return Verdict::deny(Reason::InternalAnswer);
    }
    if destination.expired != 0 && !named.is_empty() {
        return Verdict::deny(Reason::Expired);
    }
    if !allowing.is_empty() {
        return Verdict::deny(Reason::PortNotAllowed);
    }
    if policy.named.meets(matching) {
        return Verdict::deny(Reason::AddressNotLearned);
    }
    Verdict::deny(Reason::NoRule)
}

/// Judges a packet that answers a flow of the other side. It passes unless a denying class decides, or it is
/// a tunnel that no address entry allows. It needs no allowing rule, and the address may be protected.
///
/// A `deny` of every destination means that the pod opens nothing. Internal addresses still get answers, or
/// probes would fail. A denied address, prefix or name gets none, unless the denying class spares answers
/// ([`Policy::spares_answers`]). A name's denial counts even where the name opens nothing, such as after its time. An
/// entry that precedes a denial counts only where it lets the pod open a flow.
#[inline(always)]
pub fn judge_answer(
    policy: &Policy,
    destination: &Destination,
    protocol: u8,
    port: u16,
) -> Verdict {
    let spared = policy.spares_answers;
    judge_denials(policy, destination, protocol, port, spared)
}

/// Judges a connection that the pod opened before it was enforced, and that is to go on unless it is denied. It passes
/// as an answer does, but no denial spares it.
pub fn judge_kept(policy: &Policy, destination: &Destination, protocol: u8, port: u16) -> Verdict {
    judge_denials(policy, destination, protocol, port, ClassSet::EMPTY)
}

/// Whether a denying class decides about the packet, of those that are not spared, or it is a tunnel.
#[inline(always)]
fn judge_denials(
    policy: &Policy,
    destination: &Destination,
    protocol: u8,
    port: u16,
    spared: ClassSet,
) -> Verdict {
    let any = if destination.ranges & RANGE_INTERNAL != 0 {
        ClassSet::EMPTY
    } else {
        policy.any
    };
    let elsewhere = is_dns_elsewhere(policy, is_dns(protocol, port));
    let opening = known_classes(policy, destination);
    let opening = counting_classes(policy, destination, opening, elsewhere);
    let denying = destination.learned.or(destination.cidr).or(any);
    let known = opening.without(policy.deny).or(denying.and(policy.deny));
    let matching = policy.ports.matching(protocol, port);
    let matching = matching.without(skipped_classes(policy, destination).or(spared));
    let decides = deciding_class(policy, known.and(matching));
    if decides.meets(policy.deny) {
        return Verdict::Deny {
            reason: Reason::DenyRule,
            class: decides.first(),
        };
    }
    // Otherwise a sender that forges an address and uses a tunnel's port would open a tunnel to that address.
    let by_address = address_entries(policy, destination).without(policy.not_allowing());
    if destination.is_tunnel() && !by_address.meets(matching) {
        return Verdict::deny(Reason::Tunnel);
    }
    Verdict::Pass
}

#[cfg(test)]
mod tests;
