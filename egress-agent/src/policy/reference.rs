//! The rules evaluated plainly, entry by entry and without bitmaps, and the check that the compiled
//! form says the same.

use std::net::IpAddr;

use egress_common::{
    protocol::bits,
    reason::Reason,
    records::{RANGE_INTERNAL, RANGE_PROTECTED},
    verdict::{Destination as Looked, Verdict, judge},
};
use proptest::prelude::*;

use super::{
    Annotations, Compiled, Mode, PodAnnotations, QuestionRule, Settings, compile,
    prefix::{from_mapped, to_mapped},
};
use crate::dns::Name;

/// Settings as the agent's defaults are.
pub(super) fn settings() -> Settings {
    Settings {
        default_mode: Mode::Off,
        pod_annotations: PodAnnotations::Grant,
        cluster_domain: Name::from_labels([b"cluster".as_slice(), b"local"]).unwrap(),
        guard: true,
        allow_internal: true,
        protected: vec![
            "169.254.0.0/16".parse_prefix(),
            "127.0.0.0/8".parse_prefix(),
        ],
    }
}

trait ParsePrefix {
    fn parse_prefix(&self) -> super::Prefix;
}

impl ParsePrefix for str {
    fn parse_prefix(&self) -> super::Prefix {
        super::Prefix::parse(self).unwrap()
    }
}

#[derive(Clone, Debug)]
enum Where {
    Anywhere,
    Net(IpAddr, u32),
    /// Labels, of which `*` as the first stands for one or more and `*` inside one for a part.
    Names(Vec<&'static str>),
}

#[derive(Clone, Debug)]
struct Line {
    to: Where,
    ports: Option<(u16, u16)>,
    protocol: Option<&'static str>,
}

impl Line {
    fn text(&self) -> String {
        let ports = match self.ports {
            None => String::new(),
            Some((min, max)) if min == max => format!(":{min}"),
            Some((min, max)) => format!(":{min}-{max}"),
        };
        let to = match &self.to {
            Where::Anywhere => "*".to_owned(),
            Where::Net(net @ IpAddr::V4(_), len) => format!("{net}/{len}"),
            Where::Net(net @ IpAddr::V6(_), len) => format!("[{net}/{len}]"),
            Where::Names(labels) => labels.join("."),
        };
        let protocol = self.protocol.map(|p| format!("/{p}")).unwrap_or_default();
        format!("{to}{ports}{protocol}")
    }

    fn speaks_of(&self, packet: &Packet, bare: u8) -> bool {
        let protocols = match (self.protocol, self.ports) {
            (Some("tcp"), _) => bits::TCP,
            (Some("udp"), _) => bits::UDP,
            (Some("sctp"), _) => bits::SCTP,
            (Some(_), _) => bits::ICMP_ECHO | bits::ICMP_OTHER,
            (None, Some(_)) => bits::TCP | bits::UDP,
            (None, None) => bare,
        };
        protocols & packet.protocol != 0
            && self
                .ports
                .is_none_or(|(min, max)| (min..=max).contains(&packet.port))
    }

    fn names(&self, name: &[Vec<u8>]) -> bool {
        let Where::Names(labels) = &self.to else {
            return false;
        };
        let (labels, rest) = match labels.split_first() {
            Some((&"*", labels)) if name.len() > labels.len() => {
                (labels, &name[name.len() - labels.len()..])
            }
            Some((&"*", _)) => return false,
            _ => (&labels[..], name),
        };
        labels.len() == rest.len()
            && labels
                .iter()
                .zip(rest)
                .all(|(glob, label)| match glob.split_once('*') {
                    None => glob.as_bytes().eq_ignore_ascii_case(label),
                    Some((head, tail)) => {
                        let label = label.to_ascii_lowercase();
                        label.len() >= head.len() + tail.len()
                            && label.starts_with(head.as_bytes())
                            && label.ends_with(tail.as_bytes())
                    }
                })
    }

    fn holds(&self, address: IpAddr) -> bool {
        match (&self.to, address) {
            (Where::Net(IpAddr::V4(net), len), IpAddr::V4(address)) => {
                net.to_bits().checked_shr(32 - len) == address.to_bits().checked_shr(32 - len)
            }
            (Where::Net(IpAddr::V6(net), len), IpAddr::V6(address)) => {
                net.to_bits().checked_shr(128 - len) == address.to_bits().checked_shr(128 - len)
            }
            _ => false,
        }
    }

    fn is_anywhere(&self) -> bool {
        matches!(self.to, Where::Anywhere)
    }
}

#[derive(Clone, Debug)]
struct Packet {
    to: IpAddr,
    /// The name whose answer gave the pod this address.
    through: Option<Vec<Vec<u8>>>,
    expired: bool,
    protocol: u8,
    port: u16,
    protected: bool,
    internal: bool,
}

#[derive(Clone, Debug, Default)]
struct Written {
    allow: Option<Vec<Line>>,
    deny: Option<Vec<Line>>,
    resolve: Option<Vec<Line>>,
    mode: Option<&'static str>,
}

impl Written {
    fn annotations(&self) -> Annotations {
        let text = |lines: &Option<Vec<Line>>| {
            let lines = lines.as_ref()?;
            Some(lines.iter().map(Line::text).collect::<Vec<_>>().join("\n"))
        };
        Annotations {
            allow: text(&self.allow),
            deny: text(&self.deny),
            resolve: text(&self.resolve),
            mode: self.mode.map(str::to_owned),
            ..Annotations::default()
        }
    }
}

/// Whether the packet passes, and whether a `deny` entry was the reason when it does not.
fn plainly(
    pod: &Written,
    namespace: &Written,
    settings: &Settings,
    packet: &Packet,
) -> (bool, bool) {
    let both = |list: fn(&Written) -> &Option<Vec<Line>>| -> Vec<Line> {
        [pod, namespace]
            .into_iter()
            .filter_map(|w| list(w).clone())
            .flatten()
            .collect()
    };
    let (allow, deny) = (both(|w| &w.allow), both(|w| &w.deny));
    let denied = deny.iter().any(|line| {
        (line.is_anywhere() || line.holds(packet.to)) && line.speaks_of(packet, bits::ALL)
    });
    if denied {
        return (false, true);
    }
    let name_denied = |name: &[Vec<u8>]| deny.iter().any(|line| line.names(name));
    let allowed = allow.iter().any(|line| {
        let reaches = line.holds(packet.to)
            || (line.is_anywhere() && !packet.protected)
            || packet.through.as_ref().is_some_and(|name| {
                line.names(name) && !name_denied(name) && !packet.expired && !packet.protected
            });
        reaches && line.speaks_of(packet, bits::TCP | bits::UDP | bits::ICMP_ECHO)
    });
    let any_allow = pod.allow.is_some() || namespace.allow.is_some();
    let any_deny = pod.deny.is_some() || namespace.deny.is_some();
    let open = any_deny && !any_allow;
    let passes =
        allowed || (!packet.protected && ((packet.internal && settings.allow_internal) || open));
    (passes, false)
}

fn to_name(labels: &[Vec<u8>]) -> Name {
    Name::from_labels(labels.iter().map(Vec::as_slice)).unwrap()
}

/// What the kernel would find in the maps, and judge.
fn compiled_verdict(compiled: &Compiled, packet: &Packet) -> Verdict {
    let address = to_mapped(packet.to);
    let in_prefix = |network: [u8; 16], prefix_len: u32| {
        let differing = u128::from_be_bytes(network) ^ u128::from_be_bytes(address);
        differing.leading_zeros() >= prefix_len
    };
    let cidr = compiled
        .cidrs
        .iter()
        .filter(|cidr| in_prefix(cidr.network, cidr.prefix_len))
        .max_by_key(|cidr| cidr.prefix_len)
        .map_or(0, |cidr| cidr.classes);
    let looked = Looked {
        learned: packet
            .through
            .as_ref()
            .map_or(0, |name| compiled.names.classes(&to_name(name))),
        expired: u64::from(packet.expired),
        cidr,
        ranges: if packet.protected { RANGE_PROTECTED } else { 0 }
            | if packet.internal { RANGE_INTERNAL } else { 0 },
    };
    judge(&compiled.record, &looked, packet.protocol, packet.port)
}

fn ports() -> impl Strategy<Value = Option<(u16, u16)>> {
    let port = prop_oneof![
        Just(1_u16),
        Just(80),
        Just(443),
        Just(8000),
        Just(8080),
        Just(65535)
    ];
    prop::option::of((port.clone(), port).prop_map(|(a, b)| (a.min(b), a.max(b))))
}

fn address() -> impl Strategy<Value = IpAddr> {
    let v4 = (
        prop_oneof![Just(10_u8), Just(203)],
        0..2_u8,
        0..2_u8,
        0..4_u8,
    )
        .prop_map(|(a, b, c, d)| IpAddr::from([a, b, c, d]));
    let v6 = (prop_oneof![Just(0_u16), Just(0x2001)], 0..2_u16, 0..4_u16)
        .prop_map(|(a, b, c)| IpAddr::from([a, b, 0, 0, 0, 0, 1, c]));
    prop_oneof![3 => v4, 1 => v6]
}

fn net() -> impl Strategy<Value = Where> {
    let length = prop_oneof![Just(0_u32), Just(8), Just(15), Just(24), Just(31), Just(32)];
    (address(), length, any::<bool>()).prop_map(|(address, length, long)| {
        let length = if address.is_ipv6() && long {
            length + 96
        } else {
            length
        };
        let prefix = super::Prefix::containing(address, length);
        Where::Net(from_mapped(&prefix.network()), length)
    })
}

fn names() -> impl Strategy<Value = Where> {
    let label = prop_oneof![
        Just("a"),
        Just("b"),
        Just("api-1"),
        Just("api-*"),
        Just("*1"),
        Just("A")
    ];
    let top = prop_oneof![Just("com"), Just("b")];
    (any::<bool>(), prop::collection::vec(label, 0..3), top).prop_map(|(below, labels, top)| {
        let first = below.then_some("*");
        Where::Names(first.into_iter().chain(labels).chain([top]).collect())
    })
}

fn line() -> impl Strategy<Value = Line> {
    let to = prop_oneof![1 => Just(Where::Anywhere), 3 => net(), 4 => names()];
    let protocol = prop::option::of(prop_oneof![
        Just("tcp"),
        Just("udp"),
        Just("sctp"),
        Just("icmp")
    ]);
    (to, ports(), protocol).prop_map(|(to, ports, protocol)| {
        let ports = if protocol == Some("icmp") {
            None
        } else {
            ports
        };
        Line {
            to,
            ports,
            protocol,
        }
    })
}

fn denied_line() -> impl Strategy<Value = Line> {
    line().prop_map(|line| match line.to {
        Where::Names(_) => Line {
            ports: None,
            protocol: None,
            ..line
        },
        _ => line,
    })
}

fn resolved_line() -> impl Strategy<Value = Line> {
    let to = prop_oneof![1 => Just(Where::Anywhere), 6 => names()];
    to.prop_map(|to| Line {
        to,
        ports: None,
        protocol: None,
    })
}

fn written() -> impl Strategy<Value = Written> {
    let list = |line| prop::option::of(prop::collection::vec(line, 0..5));
    let mode = prop_oneof![3 => Just(None), 1 => Just(Some("enforce")), 1 => Just(Some("audit"))];
    (
        list(line().boxed()),
        list(denied_line().boxed()),
        list(resolved_line().boxed()),
        mode,
    )
        .prop_map(|(allow, deny, resolve, mode)| Written {
            allow,
            deny,
            resolve,
            mode,
        })
}

fn asked() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let label = prop_oneof![
        Just(b"a".to_vec()),
        Just(b"b".to_vec()),
        Just(b"api-1".to_vec()),
        Just(b"API-2".to_vec()),
        Just(b"a.b".to_vec()),
        Just(b"1".to_vec()),
    ];
    let top = prop_oneof![Just(b"com".to_vec()), Just(b"b".to_vec())];
    (prop::collection::vec(label, 0..4), top).prop_map(|(mut labels, top)| {
        labels.push(top);
        labels
    })
}

fn packet() -> impl Strategy<Value = Packet> {
    let port = prop_oneof![
        Just(1_u16),
        Just(80),
        Just(443),
        Just(8001),
        Just(0),
        any::<u16>()
    ];
    (
        address(),
        prop::option::of(asked()),
        prop::bool::weighted(0.1),
        (0..6_u32).prop_map(|bit| 1_u8 << bit),
        port,
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
    )
        .prop_map(
            |(to, through, expired, protocol, port, protected, internal)| Packet {
                to,
                through,
                expired,
                protocol,
                // Only these carry ports; the walk gives 0 for all others.
                port: if protocol & bits::WITH_PORTS == 0 {
                    0
                } else {
                    port
                },
                protected,
                internal,
            },
        )
}

/// Ports of lines are about protocols with ports only; the plain evaluation never looks at the
/// port of another.
fn has_portless_ports(lines: &Option<Vec<Line>>) -> bool {
    lines
        .iter()
        .flatten()
        .any(|line| line.ports.is_some() && line.protocol == Some("icmp"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_compiled_policy_judges_as_its_entries_say(
        pod in written(),
        namespace in written(),
        packets in prop::collection::vec(packet(), 16),
        allow_internal: bool,
    ) {
        prop_assert!(!has_portless_ports(&pod.allow));
        let settings = Settings { allow_internal, default_mode: Mode::Enforce, ..settings() };
        let compiled = compile(&pod.annotations(), &namespace.annotations(), &settings).unwrap();
        for packet in &packets {
            let (passes, by_deny) = plainly(&pod, &namespace, &settings, packet);
            let verdict = compiled_verdict(&compiled, packet);
            prop_assert_eq!(verdict == Verdict::Pass, passes, "{:?}: {:?}", packet, verdict);
            if let Verdict::Deny { reason, class } = verdict {
                prop_assert_eq!(reason == Reason::DenyRule, by_deny);
                let text = compiled.explain_deny(&to_mapped(packet.to), class);
                prop_assert_eq!(text.is_some(), by_deny);
                prop_assert_eq!(
                    reason == Reason::Protected,
                    packet.protected && !by_deny,
                );
            }
        }
    }

    #[test]
    fn the_order_of_entries_changes_nothing(pod in written(), namespace in written()) {
        let mut turned = pod.clone();
        for list in [&mut turned.allow, &mut turned.deny, &mut turned.resolve] {
            if let Some(list) = list {
                list.extend(list.clone());
                list.reverse();
            }
        }
        let settings = settings();
        let one = compile(&pod.annotations(), &namespace.annotations(), &settings).unwrap();
        let other = compile(&turned.annotations(), &namespace.annotations(), &settings).unwrap();
        prop_assert_eq!(one.record, other.record);
        prop_assert_eq!(one.cidrs, other.cidrs);
    }

    #[test]
    fn under_narrow_and_ignore_a_pod_reaches_nothing_its_namespace_does_not(
        pod in written(),
        namespace in written(),
        packets in prop::collection::vec(packet(), 16),
        ignore: bool,
        locked_down: bool,
    ) {
        let settings = Settings {
            pod_annotations: if ignore { PodAnnotations::Ignore } else { PodAnnotations::Narrow },
            default_mode: if locked_down { Mode::Enforce } else { Mode::Off },
            ..settings()
        };
        let namespace = namespace.annotations();
        let without = compile(&Annotations::default(), &namespace, &settings).unwrap();
        let with = compile(&pod.annotations(), &namespace, &settings).unwrap();
        prop_assert!(with.mode >= without.mode);
        if without.mode != Mode::Enforce {
            return Ok(());
        }
        for packet in &packets {
            // What the namespace allows by a prefix may be protected; `protected` here is free, so
            // only real prefixes of the settings are consistent with it.
            let packet = Packet { protected: false, ..packet.clone() };
            if compiled_verdict(&with, &packet) == Verdict::Pass {
                prop_assert_eq!(compiled_verdict(&without, &packet), Verdict::Pass, "{:?}", packet);
            }
            if let Some(name) = &packet.through {
                let name = to_name(name);
                if with.names.question(&name) == QuestionRule::Allowed {
                    prop_assert_eq!(without.names.question(&name), QuestionRule::Allowed, "{:?}", name);
                }
            }
        }
    }

    #[test]
    fn no_text_makes_the_reader_panic(allow in "\\PC*", deny in "[\\[\\]a-f0-9:./*%@\\-, \n#ü。]*") {
        let annotations = Annotations {
            allow: Some(allow),
            deny: Some(deny),
            ..Annotations::default()
        };
        if let Err(error) = compile(&annotations, &Annotations::default(), &settings()) {
            prop_assert!(!error.problems().is_empty());
        }
    }
}
