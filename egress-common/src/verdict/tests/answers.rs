//! Answers on connections that the other side opened.

use super::*;

#[test]
fn an_answer_passes_where_an_exception_precedes_the_denial() {
    let policy = tiers();
    let answer = |classes: ClassSet| judge_answer(&policy, &in_prefix(classes), bits::TCP, 50_000);
    assert_eq!(answer(ADMIN_ALLOW.or(ADMIN_DENY)), Verdict::Pass);
    assert_eq!(answer(ADMIN_PASS.or(ADMIN_LAST)), Verdict::Pass);
    for denying in [ADMIN_LAST, TEAM_DENY, BASE_DENY, ADMIN_PASS.or(TEAM_DENY)] {
        assert_ne!(answer(denying), Verdict::Pass);
    }
}

#[test]
fn a_denial_of_connections_spares_answers_and_no_other_denial_does() {
    let policy = Policy {
        spares_answers: ADMIN_DENY.or(BASE_DENY),
        ..tiers()
    };
    let verdict = |judge: fn(&Policy, &Destination, u8, u16) -> Verdict, classes: ClassSet| {
        judge(&policy, &in_prefix(classes), bits::TCP, 50_000)
    };
    for denying in [ADMIN_DENY, BASE_DENY, ADMIN_DENY.or(BASE_DENY)] {
        assert_eq!(verdict(judge_answer, denying), Verdict::Pass);
        // Connections that the pod opens, or opened before it was enforced, are denied.
        assert_ne!(verdict(judge, denying), Verdict::Pass);
        assert_ne!(verdict(judge_kept, denying), Verdict::Pass);
    }
    for denying in [ADMIN_LAST, TEAM_DENY] {
        assert_ne!(verdict(judge_answer, denying), Verdict::Pass);
        assert_ne!(verdict(judge_answer, ADMIN_DENY.or(denying)), Verdict::Pass);
    }
}

#[test]
fn an_exception_that_opens_nothing_lets_no_reply_pass() {
    let policy = tiers();
    let denied = Verdict::Deny {
        reason: Reason::DenyRule,
        class: ADMIN_LAST.first(),
    };
    let answer = |policy: &Policy, destination: &Destination| {
        judge_answer(policy, destination, bits::TCP, 50_000)
    };
    let internal = Destination {
        ranges: RANGE_INTERNAL,
        ..in_prefix(ADMIN_LAST)
    };
    for exception in [ADMIN_ALLOW, ADMIN_PASS] {
        // A name that may not lead to an internal address, and one whose time is over.
        let guarded = Destination {
            learned: exception,
            ..internal
        };
        let expired = Destination {
            learned: exception,
            expired: 1,
            ..in_prefix(ADMIN_LAST)
        };
        for destination in [guarded, expired] {
            assert_eq!(answer(&policy, &destination), denied);
        }
        let may_lead_there = Destination {
            learned_internal: exception,
            ..guarded
        };
        assert_eq!(answer(&policy, &may_lead_there), Verdict::Pass);
    }
    // An exception for any destination is none for a protected one.
    let excepting = Policy {
        any: ADMIN_ALLOW,
        ..policy
    };
    let protected = Destination {
        ranges: RANGE_PROTECTED,
        ..in_prefix(ADMIN_LAST)
    };
    assert_eq!(answer(&excepting, &protected), denied);
    assert_eq!(answer(&excepting, &in_prefix(ADMIN_LAST)), Verdict::Pass);
}

#[test]
fn an_answer_needs_no_rule_and_heeds_a_denial() {
    fn answer(policy: &Policy, destination: &Destination) -> Verdict {
        judge_answer(policy, destination, bits::TCP, 50_000)
    }
    let denied = Verdict::Deny {
        reason: Reason::DenyRule,
        class: 0,
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
    mail.classes[0] = class(bits::TCP, 25, 25);
    let mail = with_ports(&mail);
    assert_eq!(answer(&mail, &in_prefix(HOLE)), Verdict::Pass);
    assert_eq!(judge_answer(&mail, &in_prefix(HOLE), bits::TCP, 25), denied);
}
