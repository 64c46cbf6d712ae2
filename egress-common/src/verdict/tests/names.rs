//! Tests of policies with entries for names.

use super::*;

#[test]
fn a_pod_with_name_rules_needs_an_address_entry_for_other_dns_servers() {
    let mut names = policy();
    names.classes[3] = class(bits::TCP | bits::UDP, 0, u16::MAX);
    let all = ClassSet::one(3);
    names.any = all;
    names.flags = POLICY_OPEN | POLICY_ALLOW_INTERNAL;
    let mut names = with_ports(&names);
    for destination in [NOWHERE, learned(all)] {
        assert_eq!(judge(&names, &destination, bits::UDP, 53), Verdict::Pass);
    }
    names.flags |= POLICY_SPEAKS_OF_NAMES;
    for (protocol, port) in [(bits::UDP, 53), (bits::TCP, 53), (bits::UDP, 853)] {
        for destination in [NOWHERE, learned(all)] {
            assert_eq!(
                reason(&names, &destination, protocol, port),
                Reason::DnsElsewhere
            );
        }
        assert_eq!(
            judge(&names, &in_prefix(all), protocol, port),
            Verdict::Pass
        );
    }
    assert_eq!(judge(&names, &NOWHERE, bits::SCTP, 53), Verdict::Pass);
    assert_eq!(judge(&names, &NOWHERE, bits::UDP, 443), Verdict::Pass);
    // Without DNS the packet would match no rule, either.
    let closed = Policy {
        flags: POLICY_SPEAKS_OF_NAMES,
        ..policy()
    };
    assert_eq!(reason(&closed, &NOWHERE, bits::UDP, 53), Reason::NoRule);
}

#[test]
fn a_name_leads_to_an_internal_address_only_where_it_may() {
    let internal = Destination {
        ranges: RANGE_INTERNAL,
        ..learned(WEB)
    };
    assert_eq!(
        reason(&policy(), &internal, bits::TCP, 443),
        Reason::InternalAnswer
    );
    // The name does not allow another port, whether or not the address is internal.
    assert_eq!(reason(&policy(), &internal, bits::TCP, 444), Reason::NoRule);
    let may = Destination {
        learned_internal: WEB,
        ..internal
    };
    assert_eq!(judge(&policy(), &may, bits::TCP, 443), Verdict::Pass);
    assert_eq!(
        reason(
            &policy(),
            &Destination { expired: 1, ..may },
            bits::TCP,
            443
        ),
        Reason::Expired
    );
    let listed = Destination {
        cidr: WEB,
        ..internal
    };
    assert_eq!(judge(&policy(), &listed, bits::TCP, 443), Verdict::Pass);
    let lenient = Policy {
        flags: POLICY_ALLOW_INTERNAL,
        ..policy()
    };
    assert_eq!(judge(&lenient, &internal, bits::TCP, 443), Verdict::Pass);
}
