//! The verdict on a packet that leaves a pod, once the maps were asked.
//!
//! The kernel programs gather what the maps say about a destination into a [`Destination`] and
//! call [`judge`]; the agent calls the same function where it has to say what the kernel would do.

use crate::{
    limits::CLASSES,
    protocol::bits,
    reason::Reason,
    records::{
        NO_CLASS, POLICY_ALLOW_INTERNAL, POLICY_OPEN, POLICY_REFUSED, POLICY_SPEAKS_OF_NAMES,
        POLICY_UNIDENTIFIED, POLICY_UNREADABLE, Policy, RANGE_INTERNAL, RANGE_PROTECTED,
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
    /// Kinds of the address in `ranges`.
    pub ranges: u64,
    /// 1 when the packet is one of those that `tunnels` names: somebody at an internal address may
    /// unpack it and send on what is in it.
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
    const fn is_tunnel(&self) -> bool {
        self.tunnel != 0 && self.ranges & RANGE_INTERNAL != 0
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
/// `protocol` is one bit of [`bits`]; `port` is the destination port in host byte order and is
/// looked at only for protocols that have ports.
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
    if protocol & bits::WITH_PORTS == 0 {
        other_ports = 0;
    }
    same_protocol & !other_ports
}

/// Port of DNS.
const DNS_PORT: u16 = 53;
/// Port of DNS over TLS (RFC 7858) and over QUIC (RFC 9250).
const ENCRYPTED_DNS_PORT: u16 = 853;

/// Whether this is DNS, by its port. To an internal address too it needs a rule: a server there that
/// is not among the configured resolvers would carry out whatever a name can hold, and nobody would
/// look at it.
#[inline(always)]
pub const fn is_dns(protocol: u8, port: u16) -> bool {
    protocol & (bits::UDP | bits::TCP) != 0 && (port == DNS_PORT || port == ENCRYPTED_DNS_PORT)
}

/// Judges a packet to `destination` that no known flow carries: steps 6 to 9 of the order of the
/// verdict (`docs/architecture.md`).
///
/// `protocol` is one bit of [`bits`]; `port` is the destination port in host byte order.
#[inline(always)]
pub fn judge(policy: &Policy, destination: &Destination, protocol: u8, port: u16) -> Verdict {
    let matching = matching_classes(policy, protocol, port);
    let protected = destination.ranges & RANGE_PROTECTED != 0;
    let by_address = destination.needs_address_entry();
    let learned = destination.learned_classes(policy);
    let any = if by_address {
        policy.any & policy.deny
    } else {
        policy.any
    };
    let known = learned | destination.cidr | any;
    let dns = is_dns(protocol, port);
    let elsewhere = dns && policy.flags & POLICY_SPEAKS_OF_NAMES != 0;
    let counting = if elsewhere { destination.cidr } else { known };

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
/// otherwise. That the rules allow nothing there, or that the address is protected, does not matter.
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
    let denying = known & policy.deny & matching_classes(policy, protocol, port);
    if denying == 0 {
        return Verdict::Pass;
    }
    Verdict::Deny {
        reason: Reason::DenyRule,
        class: denying.trailing_zeros() as u8,
    }
}

#[cfg(test)]
mod tests {
    mod of_names;

    use super::*;
    use crate::records::PortClass;

    const fn class(protocols: u8, port_min: u16, port_max: u16) -> PortClass {
        PortClass {
            port_min,
            port_max,
            protocols,
            pad: [0; 3],
        }
    }

    /// Bit 0 allows TCP and UDP 443; bit 1 allows TCP 1-1023 and ICMP echo; bit 2 denies every
    /// protocol; bit 63 allows TCP 22.
    fn policy() -> Policy {
        let mut policy = Policy {
            deny: HOLE,
            named: WEB | SSH,
            ..Policy::CLOSED
        };
        policy.classes[0] = class(bits::TCP | bits::UDP, 443, 443);
        policy.classes[1] = class(bits::TCP | bits::ICMP_ECHO, 1, 1023);
        policy.classes[2] = class(bits::ALL, 0, u16::MAX);
        policy.classes[63] = class(bits::TCP, 22, 22);
        policy
    }

    const WEB: u64 = 1;
    const LOW: u64 = 1 << 1;
    const HOLE: u64 = 1 << 2;
    const SSH: u64 = 1 << 63;

    const NOWHERE: Destination = Destination {
        learned: 0,
        learned_internal: 0,
        expired: 0,
        cidr: 0,
        ranges: 0,
        tunnel: 0,
    };

    fn learned(classes: u64) -> Destination {
        Destination {
            learned: classes,
            ..NOWHERE
        }
    }

    fn in_prefix(classes: u64) -> Destination {
        Destination {
            cidr: classes,
            ..NOWHERE
        }
    }

    fn reason(policy: &Policy, destination: &Destination, protocol: u8, port: u16) -> Reason {
        match judge(policy, destination, protocol, port) {
            Verdict::Pass => panic!("it passes"),
            Verdict::Deny { reason, .. } => reason,
        }
    }

    #[test]
    fn a_resolved_name_opens_its_port_and_protocol_only() {
        assert_eq!(
            judge(&policy(), &learned(WEB), bits::TCP, 443),
            Verdict::Pass
        );
        assert_eq!(
            judge(&policy(), &learned(WEB), bits::UDP, 443),
            Verdict::Pass
        );
        assert_eq!(
            reason(&policy(), &learned(WEB), bits::TCP, 442),
            Reason::PortNotAllowed
        );
        assert_eq!(
            reason(&policy(), &learned(WEB), bits::TCP, 444),
            Reason::PortNotAllowed
        );
        assert_eq!(
            reason(&policy(), &learned(WEB), bits::SCTP, 443),
            Reason::PortNotAllowed
        );
        assert_eq!(
            reason(&policy(), &learned(WEB), bits::ICMP_ECHO, 0),
            Reason::PortNotAllowed
        );
    }

    #[test]
    fn both_ends_of_a_port_range_are_in_it() {
        for (port, passes) in [(0, false), (1, true), (1023, true), (1024, false)] {
            let verdict = judge(&policy(), &in_prefix(LOW), bits::TCP, port);
            assert_eq!(verdict == Verdict::Pass, passes, "port {port}");
        }
    }

    #[test]
    fn ping_passes_whatever_its_identifier() {
        for identifier in [0, 1, 5000] {
            let verdict = judge(&policy(), &in_prefix(LOW), bits::ICMP_ECHO, identifier);
            assert_eq!(verdict, Verdict::Pass);
        }
        assert_eq!(
            reason(&policy(), &in_prefix(LOW), bits::ICMP_OTHER, 0),
            Reason::PortNotAllowed
        );
    }

    #[test]
    fn the_last_of_64_classes_counts() {
        assert_eq!(
            judge(&policy(), &learned(SSH), bits::TCP, 22),
            Verdict::Pass
        );
        let mut full = policy();
        full.classes = [class(bits::TCP, 1, 1); CLASSES];
        full.deny = 0;
        full.classes[63] = class(bits::TCP, 22, 22);
        assert_eq!(
            judge(&full, &learned(u64::MAX), bits::TCP, 22),
            Verdict::Pass
        );
        assert_eq!(matching_classes(&full, bits::TCP, 22), 1 << 63);
        assert_eq!(matching_classes(&full, bits::TCP, 2), 0);
    }

    #[test]
    fn a_denied_address_stays_denied_whoever_allows_it() {
        let both = Destination {
            learned: WEB,
            cidr: HOLE,
            ..NOWHERE
        };
        let denied = Verdict::Deny {
            reason: Reason::DenyRule,
            class: 2,
        };
        assert_eq!(judge(&policy(), &both, bits::TCP, 443), denied);
        let everywhere = Policy {
            any: HOLE,
            ..policy()
        };
        assert_eq!(judge(&everywhere, &learned(WEB), bits::TCP, 443), denied);
        assert_eq!(judge(&everywhere, &NOWHERE, bits::OTHER, 0), denied);
        let internal = Destination {
            cidr: HOLE,
            ranges: RANGE_INTERNAL,
            ..NOWHERE
        };
        let lenient = Policy {
            flags: POLICY_ALLOW_INTERNAL | POLICY_OPEN,
            ..policy()
        };
        assert_eq!(judge(&lenient, &internal, bits::TCP, 443), denied);
    }

    #[test]
    fn the_metadata_service_opens_for_an_address_entry_and_nothing_else() {
        let protected = |destination| Destination {
            ranges: RANGE_PROTECTED,
            ..destination
        };
        let anywhere = Policy {
            any: WEB,
            flags: POLICY_OPEN | POLICY_ALLOW_INTERNAL,
            ..policy()
        };
        for destination in [NOWHERE, learned(WEB)] {
            let destination = protected(destination);
            assert_eq!(
                reason(&anywhere, &destination, bits::TCP, 443),
                Reason::Protected
            );
            let internal = Destination {
                ranges: RANGE_PROTECTED | RANGE_INTERNAL,
                ..destination
            };
            assert_eq!(
                reason(&anywhere, &internal, bits::TCP, 443),
                Reason::Protected
            );
        }
        assert_eq!(
            judge(&policy(), &protected(in_prefix(WEB)), bits::TCP, 443),
            Verdict::Pass
        );
        assert_eq!(
            reason(&policy(), &protected(in_prefix(WEB)), bits::TCP, 80),
            Reason::Protected
        );
        let hole = Policy {
            any: HOLE,
            ..policy()
        };
        assert_eq!(
            reason(&hole, &protected(NOWHERE), bits::TCP, 80),
            Reason::DenyRule
        );
    }

    #[test]
    fn an_answer_needs_no_rule_and_heeds_a_denial() {
        fn answer(policy: &Policy, destination: &Destination) -> Verdict {
            judge_answer(policy, destination, bits::TCP, 50_000)
        }
        let denied = Verdict::Deny {
            reason: Reason::DenyRule,
            class: 2,
        };
        let protected = Destination {
            ranges: RANGE_PROTECTED,
            ..NOWHERE
        };
        for destination in [NOWHERE, protected, learned(WEB), in_prefix(LOW)] {
            assert_eq!(answer(&policy(), &destination), Verdict::Pass);
        }
        let expired = Destination {
            expired: 1,
            ..learned(HOLE)
        };
        for destination in [in_prefix(HOLE), learned(HOLE), expired] {
            assert_eq!(answer(&policy(), &destination), denied);
        }
        let nothing = Policy {
            any: HOLE,
            ..policy()
        };
        let internal = Destination {
            ranges: RANGE_INTERNAL,
            ..NOWHERE
        };
        assert_eq!(answer(&nothing, &NOWHERE), denied);
        assert_eq!(answer(&nothing, &internal), Verdict::Pass);
        let named = Destination {
            cidr: HOLE,
            ..internal
        };
        assert_eq!(answer(&nothing, &named), denied);
        // A port that is denied is the other side's.
        let mut mail = policy();
        mail.classes[2] = class(bits::TCP, 25, 25);
        assert_eq!(answer(&mail, &in_prefix(HOLE)), Verdict::Pass);
        assert_eq!(judge_answer(&mail, &in_prefix(HOLE), bits::TCP, 25), denied);
    }

    #[test]
    fn dns_to_an_internal_address_needs_a_rule() {
        let mut lenient = policy();
        lenient.flags |= POLICY_ALLOW_INTERNAL;
        let internal = Destination {
            ranges: RANGE_INTERNAL,
            ..Destination::default()
        };
        assert_eq!(judge(&lenient, &internal, bits::UDP, 54), Verdict::Pass);
        for protocol in [bits::UDP, bits::TCP] {
            for port in [53, 853] {
                assert_eq!(
                    reason(&lenient, &internal, protocol, port),
                    Reason::DnsElsewhere
                );
            }
        }
    }

    #[test]
    fn a_tunnel_to_an_internal_address_needs_that_address_in_an_entry() {
        let everything = Policy {
            any: WEB,
            flags: POLICY_OPEN | POLICY_ALLOW_INTERNAL,
            ..policy()
        };
        let internal = |destination| Destination {
            ranges: RANGE_INTERNAL,
            tunnel: 1,
            ..destination
        };
        for destination in [NOWHERE, learned(WEB)] {
            let destination = internal(destination);
            assert_eq!(
                reason(&everything, &destination, bits::UDP, 443),
                Reason::Tunnel
            );
        }
        let listed = internal(in_prefix(WEB));
        assert_eq!(judge(&everything, &listed, bits::UDP, 443), Verdict::Pass);
        let denied = internal(in_prefix(WEB | HOLE));
        assert_eq!(
            reason(&everything, &denied, bits::UDP, 443),
            Reason::DenyRule
        );
        // Elsewhere it is a packet like any other.
        let outside = Destination {
            tunnel: 1,
            ..NOWHERE
        };
        assert_eq!(judge(&everything, &outside, bits::UDP, 443), Verdict::Pass);
    }

    #[test]
    fn internal_addresses_pass_only_when_the_operator_says_so() {
        let internal = Destination {
            ranges: RANGE_INTERNAL,
            ..NOWHERE
        };
        assert_eq!(reason(&policy(), &internal, bits::SCTP, 9), Reason::NoRule);
        let lenient = Policy {
            flags: POLICY_ALLOW_INTERNAL,
            ..policy()
        };
        assert_eq!(judge(&lenient, &internal, bits::SCTP, 9), Verdict::Pass);
        assert_eq!(reason(&lenient, &NOWHERE, bits::SCTP, 9), Reason::NoRule);
    }

    #[test]
    fn an_open_pod_reaches_what_nothing_denies() {
        let open = Policy {
            flags: POLICY_OPEN,
            ..policy()
        };
        assert_eq!(judge(&open, &NOWHERE, bits::OTHER, 0), Verdict::Pass);
        assert_eq!(
            reason(&open, &in_prefix(HOLE), bits::OTHER, 0),
            Reason::DenyRule
        );
    }

    #[test]
    fn an_expired_address_admits_nothing_new_and_says_why() {
        let expired = Destination {
            learned: WEB,
            expired: 1,
            ..NOWHERE
        };
        assert_eq!(reason(&policy(), &expired, bits::TCP, 443), Reason::Expired);
        // Its port was never allowed there, so its age is not the reason.
        assert_eq!(
            reason(&policy(), &expired, bits::TCP, 22),
            Reason::AddressNotLearned
        );
        let also_listed = Destination {
            cidr: WEB,
            ..expired
        };
        assert_eq!(
            judge(&policy(), &also_listed, bits::TCP, 443),
            Verdict::Pass
        );
    }

    #[test]
    fn a_denial_tells_an_address_that_was_not_resolved_from_one_no_rule_speaks_of() {
        assert_eq!(
            reason(&policy(), &NOWHERE, bits::TCP, 443),
            Reason::AddressNotLearned
        );
        assert_eq!(reason(&policy(), &NOWHERE, bits::TCP, 444), Reason::NoRule);
        assert_eq!(
            reason(&policy(), &in_prefix(LOW), bits::TCP, 2000),
            Reason::PortNotAllowed
        );
    }

    #[test]
    fn a_pod_that_is_closed_for_an_interface_is_told_so() {
        let refused = Policy {
            flags: POLICY_REFUSED,
            ..Policy::CLOSED
        };
        for ranges in [0, RANGE_INTERNAL] {
            let destination = Destination { ranges, ..NOWHERE };
            assert_eq!(
                reason(&refused, &destination, bits::TCP, 443),
                Reason::UnenforcedInterface
            );
        }
    }

    #[test]
    fn a_pod_with_unreadable_annotations_is_told_so() {
        let unreadable = Policy {
            flags: POLICY_UNREADABLE | POLICY_ALLOW_INTERNAL,
            ..Policy::CLOSED
        };
        assert_eq!(
            reason(&unreadable, &NOWHERE, bits::TCP, 443),
            Reason::PolicyUnreadable
        );
        let internal = Destination {
            ranges: RANGE_INTERNAL,
            ..NOWHERE
        };
        assert_eq!(judge(&unreadable, &internal, bits::TCP, 443), Verdict::Pass);
    }
}
