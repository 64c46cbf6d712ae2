//! Tests of the verdict.

mod answers;
mod names;

use super::*;
use crate::{classes::PortTable, limits::CLASSES, records::PortClass};

const fn class(protocols: u8, port_min: u16, port_max: u16) -> PortClass {
    PortClass {
        port_min,
        port_max,
        protocols,
        pad: [0; 3],
    }
}

/// Class 0 denies every protocol; class 1 allows TCP and UDP 443; class 2 allows TCP 1-1023 and ICMP echo; class 127
/// allows TCP 22.
fn policy() -> Policy {
    let mut policy = Policy {
        deny: HOLE,
        named: WEB.or(SSH),
        ..Policy::CLOSED
    };
    policy.classes[0] = class(bits::ALL, 0, u16::MAX);
    policy.classes[1] = class(bits::TCP | bits::UDP, 443, 443);
    policy.classes[2] = class(bits::TCP | bits::ICMP_ECHO, 1, 1023);
    policy.classes[127] = class(bits::TCP, 22, 22);
    with_ports(&policy)
}

/// The policy with the table of its classes.
fn with_ports(policy: &Policy) -> Policy {
    let ports = PortTable::of(&policy.classes).unwrap();
    Policy { ports, ..*policy }
}

const HOLE: ClassSet = ClassSet::one(0);
const WEB: ClassSet = ClassSet::one(1);
const LOW: ClassSet = ClassSet::one(2);
const SSH: ClassSet = ClassSet::one(127);

const NOWHERE: Destination = Destination {
    learned: ClassSet::EMPTY,
    learned_internal: ClassSet::EMPTY,
    expired: 0,
    cidr: ClassSet::EMPTY,
    ranges: 0,
    tunnel: 0,
};

fn learned(classes: ClassSet) -> Destination {
    Destination {
        learned: classes,
        ..NOWHERE
    }
}

fn in_prefix(classes: ClassSet) -> Destination {
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
fn the_last_of_128_classes_counts() {
    assert_eq!(
        judge(&policy(), &learned(SSH), bits::TCP, 22),
        Verdict::Pass
    );
    let mut full = policy();
    full.classes = [class(bits::TCP, 1, 1); CLASSES];
    full.deny = ClassSet::EMPTY;
    full.classes[127] = class(bits::TCP, 22, 22);
    let full = with_ports(&full);
    assert_eq!(
        judge(&full, &learned(ClassSet::ALL), bits::TCP, 22),
        Verdict::Pass
    );
    assert_eq!(full.ports.matching(bits::TCP, 22), SSH);
    assert_eq!(full.ports.matching(bits::TCP, 2), ClassSet::EMPTY);
}

/// The tiers of [`tiers`]: an exception, a denial and a hand-over of the first tier; then what a team denies and
/// allows; then a denial and an exception of the last tier.
const ADMIN_ALLOW: ClassSet = ClassSet::one(0);
const ADMIN_DENY: ClassSet = ClassSet::one(1);
const ADMIN_PASS: ClassSet = ClassSet::one(2);
const ADMIN_LAST: ClassSet = ClassSet::one(3);
const TEAM_DENY: ClassSet = ClassSet::one(4);
const TEAM_ALLOW: ClassSet = ClassSet::one(5);
const BASE_ALLOW: ClassSet = ClassSet::one(126);
const BASE_PASS: ClassSet = ClassSet::one(6);
const BASE_DENY: ClassSet = ClassSet::one(127);

/// Every class matches every packet.
fn tiers() -> Policy {
    let mut policy = Policy {
        deny: ADMIN_DENY.or(ADMIN_LAST).or(TEAM_DENY).or(BASE_DENY),
        pass: ADMIN_PASS.or(BASE_PASS),
        admin: ADMIN_ALLOW.or(ADMIN_DENY).or(ADMIN_PASS).or(ADMIN_LAST),
        baseline: BASE_PASS.or(BASE_ALLOW).or(BASE_DENY),
        ..Policy::CLOSED
    };
    policy.classes = [class(bits::ALL, 0, u16::MAX); CLASSES];
    with_ports(&policy)
}

/// Whether a TCP packet passes to a destination in prefixes of these classes, and otherwise the class that denies it.
fn decided(policy: &Policy, classes: &[ClassSet], ranges: u64) -> Result<(), Option<ClassSet>> {
    let mut cidr = ClassSet::EMPTY;
    for class in classes {
        cidr |= *class;
    }
    let destination = Destination {
        cidr,
        ranges,
        ..NOWHERE
    };
    match judge(policy, &destination, bits::TCP, 443) {
        Verdict::Pass => Ok(()),
        Verdict::Deny { class, .. } => Err((class != NO_CLASS).then(|| ClassSet::one(class))),
    }
}

#[test]
fn the_first_matching_rule_of_the_first_tier_decides() {
    let policy = tiers();
    let team = [TEAM_DENY, BASE_DENY];
    let with = |first: &[ClassSet]| decided(&policy, &[first, &team].concat(), 0);
    assert_eq!(with(&[ADMIN_ALLOW, ADMIN_DENY]), Ok(()));
    assert_eq!(with(&[ADMIN_DENY, ADMIN_PASS]), Err(Some(ADMIN_DENY)));
    assert_eq!(with(&[ADMIN_PASS, ADMIN_LAST]), Err(Some(TEAM_DENY)));
    assert_eq!(with(&[ADMIN_LAST]), Err(Some(ADMIN_LAST)));
    assert_eq!(with(&[]), Err(Some(TEAM_DENY)));
}

#[test]
fn the_last_tier_decides_where_no_team_has_a_list() {
    fn decided(flags: u32, classes: &[ClassSet], ranges: u64) -> Result<(), Option<ClassSet>> {
        let mut policy = tiers();
        policy.flags = flags;
        super::tests::decided(&policy, classes, ranges)
    }
    let base = [ADMIN_PASS, BASE_ALLOW, BASE_DENY];
    assert_eq!(decided(0, &base, 0), Ok(()));
    assert_eq!(decided(POLICY_OPEN, &[BASE_DENY], 0), Err(Some(BASE_DENY)));
    assert_eq!(decided(POLICY_OPEN, &[BASE_PASS, BASE_DENY], 0), Ok(()));
    assert_eq!(decided(0, &[BASE_PASS, BASE_ALLOW], 0), Err(None));
    assert_eq!(decided(0, &[TEAM_ALLOW, BASE_DENY], 0), Ok(()));
    // A team's list closes the pod. Internal addresses need no entry, so the last tier still decides about them.
    let selected = POLICY_SELECTED | POLICY_ALLOW_INTERNAL;
    assert_eq!(decided(selected, &base, 0), Err(None));
    assert_eq!(decided(selected, &base, RANGE_INTERNAL), Ok(()));
    let denied = decided(selected, &[BASE_DENY], RANGE_INTERNAL);
    assert_eq!(denied, Err(Some(BASE_DENY)));
    assert_eq!(decided(selected, &[BASE_PASS], RANGE_INTERNAL), Ok(()));
    let guarded = decided(POLICY_SELECTED, &base, RANGE_INTERNAL);
    assert_eq!(guarded, Err(None));
}

#[test]
fn handing_over_opens_neither_protected_addresses_nor_dns_elsewhere() {
    let everywhere = Policy {
        any: ADMIN_PASS.or(ADMIN_LAST),
        flags: POLICY_OPEN | POLICY_SPEAKS_OF_NAMES,
        ..tiers()
    };
    assert_eq!(decided(&everywhere, &[], 0), Ok(()));
    assert_eq!(decided(&everywhere, &[], RANGE_PROTECTED), Err(None));
    assert_eq!(
        reason(&everywhere, &NOWHERE, bits::UDP, 53),
        Reason::DnsElsewhere
    );
    let listed = in_prefix(ADMIN_ALLOW);
    assert_eq!(judge(&everywhere, &listed, bits::UDP, 53), Verdict::Pass);
    let denying = Policy {
        any: ADMIN_LAST,
        ..everywhere
    };
    let denied = Verdict::Deny {
        reason: Reason::DenyRule,
        class: 3,
    };
    assert_eq!(judge(&denying, &NOWHERE, bits::UDP, 53), denied);
    // An exception for any destination is none for these.
    let excepting = Policy {
        any: ADMIN_ALLOW.or(ADMIN_LAST),
        ..everywhere
    };
    assert_eq!(judge(&excepting, &NOWHERE, bits::UDP, 53), denied);
    assert_eq!(judge(&excepting, &NOWHERE, bits::UDP, 443), Verdict::Pass);
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
        class: 0,
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
    let denied = internal(in_prefix(WEB.or(HOLE)));
    assert_eq!(
        reason(&everything, &denied, bits::UDP, 443),
        Reason::DenyRule
    );
    let own = Destination {
        ranges: RANGE_NODE,
        tunnel: 1,
        ..NOWHERE
    };
    assert_eq!(reason(&everything, &own, bits::UDP, 443), Reason::Tunnel);
    // It does not pass as an answer, either.
    for destination in [internal(NOWHERE), internal(learned(WEB)), own] {
        let verdict = judge_answer(&everything, &destination, bits::UDP, 443);
        assert_eq!(verdict, Verdict::deny(Reason::Tunnel));
    }
    assert_eq!(
        judge_answer(&everything, &listed, bits::UDP, 443),
        Verdict::Pass
    );
    // Outside of the cluster the packet is judged like any other.
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
    // Its port was never allowed, so the reason is not that it has expired.
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
fn an_address_that_was_not_resolved_and_one_without_a_rule_have_different_reasons() {
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

/// Destinations with every combination of entries in the maps, but for expiry.
fn destinations() -> impl Iterator<Item = Destination> {
    let classes = [ClassSet::EMPTY, WEB, LOW, SSH.or(LOW)];
    let ranges = [0, RANGE_INTERNAL, RANGE_PROTECTED, RANGE_NODE];
    classes.into_iter().flat_map(move |learned| {
        classes.into_iter().flat_map(move |cidr| {
            ranges.into_iter().flat_map(move |ranges| {
                [0, 1].map(|tunnel| Destination {
                    learned,
                    learned_internal: learned.and(WEB),
                    cidr,
                    ranges,
                    tunnel,
                    ..NOWHERE
                })
            })
        })
    })
}

#[test]
fn a_packet_passes_by_an_entry_or_because_it_is_internal_or_the_policy_open() {
    let flags = [0, POLICY_OPEN, POLICY_ALLOW_INTERNAL];
    for flags in flags
        .map(|flags| [flags, flags | POLICY_SPEAKS_OF_NAMES])
        .concat()
    {
        for any in [ClassSet::EMPTY, LOW] {
            let policy = Policy {
                flags,
                any,
                under_any: any,
                ..policy()
            };
            for destination in destinations() {
                for port in [22, 53, 443, 853, 2000] {
                    let passes = judge(&policy, &destination, bits::TCP, port) == Verdict::Pass;
                    let by_entry = passes_by_entry(&policy, &destination, bits::TCP, port);
                    let without_entry = flags & POLICY_OPEN != 0
                        || flags & POLICY_ALLOW_INTERNAL != 0
                            && destination.ranges & RANGE_INTERNAL != 0;
                    assert!(passes || !by_entry, "{policy:?} {destination:?} {port}");
                    assert!(
                        !passes || by_entry || without_entry,
                        "{policy:?} {destination:?} {port}"
                    );
                }
            }
        }
    }
}

/// The map `learned` beside the allow map.
mod two_entries {
    use super::*;

    fn both(allow: Option<(u8, u64)>, learned: Option<(u8, u64)>) -> (ClassSet, u64) {
        let mut destination = Destination::default();
        for (class, expired) in [allow, learned].into_iter().flatten() {
            destination.add_learned(ClassSet::one(class), ClassSet::EMPTY, expired);
        }
        (destination.learned, destination.expired)
    }

    #[test]
    fn entries_that_live_count_together() {
        let together = ClassSet::one(1).or(ClassSet::one(2));
        assert_eq!(both(Some((1, 0)), Some((2, 0))), (together, 0));
    }

    #[test]
    fn an_expired_entry_does_not_count_beside_one_that_lives() {
        assert_eq!(both(Some((1, 1)), Some((2, 0))), (ClassSet::one(2), 0));
        assert_eq!(both(Some((1, 0)), Some((2, 1))), (ClassSet::one(1), 0));
    }

    #[test]
    fn two_expired_entries_are_expired() {
        let together = ClassSet::one(1).or(ClassSet::one(2));
        assert_eq!(both(Some((1, 1)), Some((2, 1))), (together, 1));
    }

    #[test]
    fn one_entry_counts_alone() {
        for expired in [0, 1] {
            assert_eq!(both(Some((1, expired)), None), (ClassSet::one(1), expired));
            assert_eq!(both(None, Some((1, expired))), (ClassSet::one(1), expired));
        }
        assert_eq!(both(None, None), (ClassSet::EMPTY, 0));
    }

    #[test]
    fn an_entry_without_classes_changes_nothing() {
        let mut destination = Destination::default();
        destination.add_learned(ClassSet::one(1), ClassSet::EMPTY, 1);
        destination.add_learned(ClassSet::EMPTY, ClassSet::EMPTY, 0);
        assert_eq!(
            (destination.learned, destination.expired),
            (ClassSet::one(1), 1)
        );
    }
}
