//! Random policies and packets from a small set of values, so that they match often.

use std::net::IpAddr;

use egress_common::protocol::bits;
use proptest::prelude::*;

use super::{
    plain::{Line, Packet, Where, Written},
    teams::Teams,
};
use crate::{Prefix, prefix::from_mapped};

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
        .prop_map(|(a, b, c, d)| IpAddr::from([a, b, c, d]))
        .boxed();
    let v6 = (prop_oneof![Just(0_u16), Just(0x2001)], 0..2_u16, 0..4_u16)
        .prop_map(|(a, b, c)| IpAddr::from([a, b, 0, 0, 0, 0, 1, c]));
    let through_nat64 = v4.clone().prop_map(|v4| match v4 {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets().map(u16::from);
            IpAddr::from([0x64, 0xff9b, 0, 0, 0, 0, a << 8 | b, c << 8 | d])
        }
        v6 @ IpAddr::V6(_) => v6,
    });
    prop_oneof![3 => v4, 1 => v6, 1 => through_nat64]
}

fn net() -> impl Strategy<Value = Where> {
    let length = prop_oneof![Just(0_u32), Just(8), Just(15), Just(24), Just(31), Just(32)];
    (address(), length, any::<bool>()).prop_map(|(address, length, long)| {
        let length = if address.is_ipv6() && long {
            length + 96
        } else {
            length
        };
        let prefix = Prefix::containing(address, length);
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

pub(super) fn line() -> impl Strategy<Value = Line> {
    let to = prop_oneof![1 => Just(Where::Anywhere), 3 => net(), 4 => names()];
    let protocol = prop::option::of(prop_oneof![
        Just("tcp"),
        Just("udp"),
        Just("sctp"),
        Just("icmp"),
        Just("esp"),
        Just("ip-47"),
        Just("any"),
    ]);
    (to, ports(), protocol).prop_map(|(to, ports, protocol)| {
        let has_ports = matches!(protocol, None | Some("tcp" | "udp" | "sctp"));
        let ports = ports.filter(|_| has_ports);
        Line {
            to,
            ports,
            protocol,
        }
    })
}

pub(super) fn denied_line() -> impl Strategy<Value = Line> {
    line().prop_map(|line| match line.to {
        Where::Names(_) => line.bare(),
        _ => line,
    })
}

fn resolved_line() -> impl Strategy<Value = Line> {
    let to = prop_oneof![1 => Just(Where::Anywhere), 6 => names()];
    to.prop_map(Line::to)
}

pub(super) fn written() -> impl Strategy<Value = Written> {
    let list = |line| prop::option::of(prop::collection::vec(line, 0..5));
    let mode = prop_oneof![
        6 => Just(None),
        2 => Just(Some("enforce")),
        1 => Just(Some("audit")),
        1 => Just(Some("off")),
    ];
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

/// Annotations of a pod and of its namespace, and up to three objects. Often the pod has an entry of its namespace, so
/// that one covers the other.
pub(super) fn teams() -> impl Strategy<Value = Teams> {
    let policies = prop::collection::vec(written(), 0..4);
    let shared = prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..4);
    let anywhere = prop::bool::weighted(0.3);
    (written(), written(), policies, shared, anywhere).prop_map(
        |(mut pod, mut namespace, policies, shared, anywhere)| {
            if let (Some(allow), true) = (&mut namespace.allow, anywhere) {
                allow.push(Line::to(Where::Anywhere));
            }
            let of_namespace = policies.iter().chain([&namespace]);
            let lines: Vec<&Line> = of_namespace
                .flat_map(|written| written.allow.iter().flatten())
                .collect();
            if let (Some(allow), false) = (&mut pod.allow, lines.is_empty()) {
                for (index, with_ports) in shared {
                    let line = (*index.get(&lines)).clone();
                    allow.push(if with_ports { line } else { line.bare() });
                }
            }
            Teams {
                pod,
                namespace,
                policies,
            }
        },
    )
}

/// Packets of which many go where an entry of the teams leads.
pub(super) fn packets_of(teams: &Teams) -> impl Strategy<Value = Vec<Packet>> + use<> {
    let lines: Vec<Line> = teams.all().cloned().collect();
    let aimed = (packet(), any::<prop::sample::Index>()).prop_map(move |(mut packet, index)| {
        if !lines.is_empty() {
            match &index.get(&lines).to {
                Where::Anywhere => {}
                Where::Net(net, _) => packet.to = *net,
                Where::Names(labels) => {
                    let label = |label: &&str| label.replace('*', "1").into_bytes();
                    packet.through = Some(labels.iter().map(label).collect());
                }
            }
        }
        packet
    });
    prop::collection::vec(prop_oneof![packet(), aimed], 16)
}

pub(super) fn queried() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let label = prop_oneof![
        Just(b"a".to_vec()),
        Just(b"b".to_vec()),
        Just(b"api-1".to_vec()),
        Just(b"API-2".to_vec()),
        Just(b"a.b".to_vec()),
        Just(b"1".to_vec()),
    ];
    let top = |labels: &[&str]| {
        labels
            .iter()
            .map(|label| label.as_bytes().to_vec())
            .collect()
    };
    let top = prop_oneof![
        4 => Just(top(&["com"])),
        4 => Just(top(&["b"])),
        1 => Just(top(&["cluster", "local"])),
    ];
    (prop::collection::vec(label, 0..4), top)
        .prop_map(|(labels, top): (Vec<_>, Vec<_>)| [labels, top].concat())
}

pub(super) fn packet() -> impl Strategy<Value = Packet> {
    let port = prop_oneof![
        Just(1_u16),
        Just(53),
        Just(853),
        Just(80),
        Just(443),
        Just(8001),
        Just(0),
        any::<u16>()
    ];
    (
        address(),
        prop::option::of(queried()),
        prop::bool::weighted(0.1),
        (0..6_u32).prop_map(|bit| 1_u8 << bit),
        port,
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
    )
        .prop_map(
            |(to, through, expired, protocol, port, protected, internal, tunnel)| Packet {
                to,
                through,
                expired,
                protocol,
                // Only these have ports; the header walk returns 0 for all others.
                port: match protocol {
                    bits::OTHER => 46 + port % 5,
                    _ if protocol & bits::WITH_PORTS == 0 => 0,
                    _ => port,
                },
                protected,
                internal,
                tunnel,
            },
        )
}
