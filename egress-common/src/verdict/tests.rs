//! Tests of the verdict.

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
    // A denied port is a port of the other side.
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

/// Destinations with every mixture of what the maps can say, but for expiry.
fn destinations() -> impl Iterator<Item = Destination> {
    let classes = [0, WEB, LOW, SSH | LOW];
    let ranges = [0, RANGE_INTERNAL, RANGE_PROTECTED, RANGE_NODE];
    classes.into_iter().flat_map(move |learned| {
        classes.into_iter().flat_map(move |cidr| {
            ranges.into_iter().flat_map(move |ranges| {
                [0, 1].map(|tunnel| Destination {
                    learned,
                    learned_internal: learned & WEB,
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
        for any in [0, LOW] {
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
