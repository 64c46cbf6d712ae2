//! Properties of every policy.

use egress_common::{
    classes::ClassSet,
    reason::Reason,
    records::{RANGE_INTERNAL, RANGE_PROTECTED},
    translation::{embedded_v4, range_kind},
    verdict::{Destination, Translated, Verdict, judge, judge_answer},
};
use proptest::prelude::*;

use super::{
    plain::{Packet, plain_question, plain_verdict, to_name},
    random::{packet, written},
    settings,
};
use crate::{
    Annotations, Compiled, Inputs, Mode, PodAnnotations, QuestionRule, Settings, compile,
    prefix::to_mapped,
};

/// The verdict of the kernel on what it finds in the maps.
pub(super) fn compiled_verdict(compiled: &Compiled, packet: &Packet) -> Verdict {
    let looked = looked_up(compiled, packet);
    judge(&compiled.record, &looked, packet.protocol, packet.port)
}

/// The verdict of the kernel on the same packet, if it answers a flow that the other side opened.
pub(super) fn compiled_answer(compiled: &Compiled, packet: &Packet) -> Verdict {
    let looked = looked_up(compiled, packet);
    judge_answer(&compiled.record, &looked, packet.protocol, packet.port)
}

/// The entries of the maps for the packet's destination.
fn looked_up(compiled: &Compiled, packet: &Packet) -> Destination {
    let address = to_mapped(packet.to);
    let prefix_classes = |address: [u8; 16]| {
        let in_prefix = |network: [u8; 16], prefix_len: u32| {
            let differing = u128::from_be_bytes(network) ^ u128::from_be_bytes(address);
            differing.leading_zeros() >= prefix_len
        };
        let holding = compiled
            .cidrs
            .iter()
            .filter(|cidr| in_prefix(cidr.network, cidr.prefix_len));
        holding
            .max_by_key(|cidr| cidr.prefix_len)
            .map_or(ClassSet::EMPTY, |cidr| cidr.classes)
    };
    let mut looked = Destination {
        learned: packet.through.as_ref().map_or(ClassSet::EMPTY, |name| {
            compiled.names.classes(&to_name(name))
        }),
        learned_internal: ClassSet::EMPTY,
        expired: u64::from(packet.expired),
        cidr: prefix_classes(address),
        ranges: if packet.protected { RANGE_PROTECTED } else { 0 }
            | if packet.internal { RANGE_INTERNAL } else { 0 },
        tunnel: packet.tunnel.into(),
    };
    if address.starts_with(&[0, 0x64, 0xff, 0x9b]) {
        looked.ranges |= range_kind(96);
    }
    if let Some(v4) = embedded_v4(&address, looked.ranges) {
        let translated = Translated {
            cidr: prefix_classes(v4),
            ranges: 0,
        };
        looked.add_translated(&compiled.record, translated);
    }
    looked
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_compiled_policy_judges_according_to_its_entries(
        pod in written(),
        namespace in written(),
        packets in prop::collection::vec(packet(), 16),
        allow_internal: bool,
        guard in prop::bool::weighted(0.8),
    ) {
        let settings = Settings { allow_internal, guard, default_mode: Mode::Enforce, ..settings() };
        let compiled = compile(Inputs::annotations(&pod.annotations(), &namespace.annotations()), &settings).unwrap();
        for packet in &packets {
            if let Some(name) = &packet.through {
                prop_assert_eq!(
                    compiled.names.question(&to_name(name), false),
                    plain_question(&pod, &namespace, &settings, name),
                    "{:?}",
                    name
                );
            }
            let (passes, by_deny) = plain_verdict(&pod, &namespace, &settings, packet);
            let verdict = compiled_verdict(&compiled, packet);
            prop_assert_eq!(verdict == Verdict::Pass, passes, "{:?}: {:?}", packet, verdict);
            if let Verdict::Deny { reason, class } = verdict {
                prop_assert_eq!(reason == Reason::DenyRule, by_deny);
                let entry = compiled.deciding_entry(&to_mapped(packet.to), class);
                prop_assert_eq!(entry.is_some(), by_deny);
                prop_assert_eq!(
                    reason == Reason::Protected,
                    packet.protected && !by_deny,
                );
                prop_assert_eq!(
                    reason == Reason::Tunnel,
                    packet.tunnel && packet.internal && !packet.protected && !by_deny,
                );
            }
        }
    }

    #[test]
    fn the_order_of_entries_changes_nothing(pod in written(), namespace in written()) {
        let mut turned = pod.clone();
        let lists = [&mut turned.allow, &mut turned.deny, &mut turned.resolve];
        for list in lists.into_iter().flatten() {
            list.extend(list.clone());
            list.reverse();
        }
        let settings = settings();
        let one = compile(Inputs::annotations(&pod.annotations(), &namespace.annotations()), &settings).unwrap();
        let other = compile(Inputs::annotations(&turned.annotations(), &namespace.annotations()), &settings).unwrap();
        prop_assert_eq!(one.record, other.record);
        prop_assert_eq!(one.cidrs, other.cidrs);
    }

    #[test]
    fn under_narrow_and_ignore_a_pod_reaches_nothing_its_namespace_does_not(
        pod in written(),
        namespace in written(),
        packets in prop::collection::vec(packet(), 16),
        ignore: bool,
        default_mode in prop_oneof![Just(Mode::Off), Just(Mode::Audit), Just(Mode::Enforce)],
    ) {
        let settings = Settings {
            pod_annotations: if ignore { PodAnnotations::Ignore } else { PodAnnotations::Narrow },
            default_mode,
            ..settings()
        };
        let namespace = namespace.annotations();
        let without = compile(Inputs::annotations(&Annotations::default(), &namespace), &settings).unwrap();
        let with = compile(Inputs::annotations(&pod.annotations(), &namespace), &settings).unwrap();
        prop_assert!(with.mode >= without.mode);
        if without.mode == Mode::Off {
            return Ok(());
        }
        for packet in &packets {
            // A prefix that the namespace allows may be protected. The field `protected` is random here, so
            // it is consistent only with the settings' real prefixes.
            let packet = Packet { protected: false, ..packet.clone() };
            if compiled_verdict(&with, &packet) == Verdict::Pass {
                prop_assert_eq!(compiled_verdict(&without, &packet), Verdict::Pass, "{:?}", packet);
            }
            if let Some(name) = &packet.through {
                let name = to_name(name);
                if with.names.question(&name, false) == QuestionRule::Allowed {
                    prop_assert_eq!(without.names.question(&name, false), QuestionRule::Allowed, "{:?}", name);
                }
            }
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic(allow in "\\PC*", deny in "[\\[\\]a-f0-9:./*%@\\-, \n#ü。]*") {
        let annotations = Annotations {
            allow: Some(allow),
            deny: Some(deny),
            ..Annotations::default()
        };
        if let Err(error) = compile(Inputs::annotations(&annotations, &Annotations::default()), &settings()) {
            prop_assert!(!error.problems().is_empty());
        }
    }
}
