//! The verdict of a policy on packets to one destination, from the function that the kernel program calls:
//! [`judge`].

use std::collections::BTreeSet;

use egress_common::{
    protocol::{DNS_PORT, ENCRYPTED_DNS_PORT, bits},
    reason::Reason,
    records::{Policy, TunnelKey},
    verdict::{Destination, Verdict, judge, passes_by_entry},
};

use super::protocol::PortsStatus;
use egress_policy::number_word;

/// The protocols of an explanation.
const PROTOCOLS: [(u8, &str); 5] = [
    (bits::TCP, "tcp"),
    (bits::UDP, "udp"),
    (bits::SCTP, "sctp"),
    (bits::ICMP_ECHO, "icmp"),
    (bits::OTHER, "other"),
];

/// From the most specific reason to the least.
const REASONS: [Reason; 11] = [
    Reason::PolicyUnreadable,
    Reason::UnenforcedInterface,
    Reason::Protected,
    Reason::Tunnel,
    Reason::DnsElsewhere,
    Reason::InternalAnswer,
    Reason::Expired,
    Reason::PortNotAllowed,
    Reason::AddressNotLearned,
    Reason::NoRule,
    Reason::DenyRule,
];

/// Packets of one protocol to a range of ports, both inclusive; for [`bits::OTHER`], of protocols with a range
/// of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ports {
    pub(super) protocol: u8,
    pub(super) first: u16,
    pub(super) last: u16,
}

impl Ports {
    /// Whether an entry lets these packets pass. Where they pass without one, the address is internal, or the
    /// policy is open.
    pub(super) fn pass_by_entry(
        self,
        policy: &Policy,
        destination: &Destination,
        tunnels: &[TunnelKey],
    ) -> bool {
        let destination = self.of(destination, tunnels);
        passes_by_entry(policy, &destination, self.protocol, self.first)
    }

    /// The destination for these packets, which are all tunnels or all not.
    pub(super) fn of(self, destination: &Destination, tunnels: &[TunnelKey]) -> Destination {
        let port = if self.protocol & bits::WITH_PORTS == 0 {
            0
        } else {
            self.first
        };
        Destination {
            tunnel: tunnels
                .contains(&TunnelKey::new(self.protocol, port))
                .into(),
            ..*destination
        }
    }
}

/// The verdicts on packets to a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reach {
    /// The requested ports whose packets pass.
    pub(super) open: Vec<Ports>,
    /// If none pass: the reason, the class and the ports that the reason is about.
    pub(super) denied: Option<(Reason, u8, Ports)>,
}

impl Reach {
    /// The verdicts for this protocol and port; for all protocols, or all ports, if there is none.
    pub(super) fn of(
        policy: &Policy,
        destination: &Destination,
        tunnels: &[TunnelKey],
        protocol: Option<u8>,
        port: Option<u16>,
    ) -> Self {
        let mut open: Vec<Ports> = Vec::new();
        let mut denied: Option<(Reason, u8, Ports)> = None;
        let rank = |reason| REASONS.iter().position(|&other| other == reason);
        for (bit, _) in PROTOCOLS {
            if protocol.is_some_and(|protocol| protocol != bit) {
                continue;
            }
            for ports in regions(policy, tunnels, bit, port) {
                let destination = ports.of(destination, tunnels);
                match judge(policy, &destination, bit, ports.first) {
                    Verdict::Pass => match open.last_mut() {
                        Some(last)
                            if last.protocol == bit
                                && u32::from(last.last) + 1 == u32::from(ports.first) =>
                        {
                            last.last = ports.last;
                        }
                        _ => open.push(ports),
                    },
                    // A request without a protocol does not mean protocols other than these.
                    Verdict::Deny { .. } if bit == bits::OTHER && protocol.is_none() => {}
                    Verdict::Deny { reason, class } => {
                        if denied.is_none_or(|(before, ..)| rank(reason) < rank(before)) {
                            denied = Some((reason, class, ports));
                        }
                    }
                }
            }
        }
        if !open.is_empty() {
            denied = None;
        }
        Self { open, denied }
    }
}

/// Ranges of ports within each of which the verdict is the same.
fn regions(policy: &Policy, tunnels: &[TunnelKey], protocol: u8, port: Option<u16>) -> Vec<Ports> {
    let ports = |first, last| Ports {
        protocol,
        first,
        last,
    };
    if protocol & (bits::WITH_PORTS | bits::OTHER) == 0 {
        return vec![ports(0, u16::MAX)];
    }
    if let Some(port) = port {
        return vec![ports(port, port)];
    }
    let mut starts: BTreeSet<u16> = [0].into();
    // Each DNS port is a range of its own: see `judge`.
    for port in [DNS_PORT, ENCRYPTED_DNS_PORT] {
        starts.extend([port, port + 1]);
    }
    for tunnel in tunnels.iter().filter(|tunnel| tunnel.protocol == protocol) {
        starts.insert(tunnel.port);
        starts.extend(tunnel.port.checked_add(1));
    }
    for class in &policy.classes {
        starts.insert(class.port_min);
        starts.extend(class.port_max.checked_add(1));
    }
    let ends = starts.iter().skip(1).map(|start| start - 1);
    let ends: Vec<u16> = ends.chain([u16::MAX]).collect();
    starts
        .into_iter()
        .zip(ends)
        .map(|(first, last)| ports(first, last))
        .collect()
}

impl From<&Ports> for PortsStatus {
    fn from(ports: &Ports) -> Self {
        let with_ports = ports.protocol & bits::WITH_PORTS != 0;
        let number = u8::try_from(ports.first).ok();
        let number = number.filter(|_| ports.protocol == bits::OTHER && ports.first == ports.last);
        let protocol = match number {
            Some(number) => number_word(number),
            None => {
                let word = PROTOCOLS.iter().find(|(bit, _)| *bit == ports.protocol);
                word.map_or("other", |(_, word)| word).into()
            }
        };
        Self {
            protocol: protocol.into_owned(),
            first: with_ports.then_some(ports.first),
            last: with_ports.then_some(ports.last),
        }
    }
}

#[cfg(test)]
mod tests {
    use egress_common::{
        classes::{ClassSet, PortTable},
        records::{POLICY_ALLOW_INTERNAL, PortClass, RANGE_INTERNAL},
    };

    use super::*;

    fn policy() -> Policy {
        let mut policy = Policy {
            deny: ClassSet::one(0),
            ..Policy::CLOSED
        };
        let class = |protocols, port_min, port_max| PortClass {
            port_min,
            port_max,
            protocols,
            pad: [0; 3],
        };
        policy.classes[0] = class(bits::ALL, 85, 85);
        policy.classes[1] = class(bits::TCP, 80, 90);
        policy.classes[2] = class(bits::TCP, 91, 100);
        policy.ports = PortTable::of(&policy.classes[..3]).unwrap();
        policy
    }

    #[test]
    fn the_open_ports_are_those_that_pass_when_judged_one_by_one() {
        let policy = policy();
        for cidr in 0..8 {
            let destination = Destination {
                cidr: ClassSet { words: [cidr, 0] },
                ..Destination::default()
            };
            let reach = Reach::of(&policy, &destination, &[], Some(bits::TCP), None);
            for port in 0..=u16::MAX {
                let passes = judge(&policy, &destination, bits::TCP, port) == Verdict::Pass;
                let open = |ports: &Ports| (ports.first..=ports.last).contains(&port);
                assert_eq!(reach.open.iter().any(open), passes, "{cidr} {port}");
            }
            assert_eq!(reach.denied.is_none(), !reach.open.is_empty());
        }
    }

    #[test]
    fn a_tunnel_port_is_a_range_of_its_own() {
        let destination = Destination {
            ranges: RANGE_INTERNAL,
            ..Destination::default()
        };
        let lenient = Policy {
            flags: POLICY_ALLOW_INTERNAL,
            ..Policy::CLOSED
        };
        let tunnels = [TunnelKey::new(bits::UDP, 4789)];
        let udp = |port| Reach::of(&lenient, &destination, &tunnels, Some(bits::UDP), port);
        let ports: Vec<(u16, u16)> = udp(None).open.iter().map(|p| (p.first, p.last)).collect();
        assert_eq!(ports, [(0, 52), (54, 852), (854, 4788), (4790, u16::MAX)]);
        assert!(matches!(udp(Some(4789)).denied, Some((Reason::Tunnel, ..))));
        let tcp = Reach::of(
            &lenient,
            &destination,
            &tunnels,
            Some(bits::TCP),
            Some(4789),
        );
        assert_eq!(tcp.denied, None);
    }

    #[test]
    fn adjacent_ranges_are_merged() {
        let destination = Destination {
            cidr: ClassSet { words: [7, 0] },
            ..Destination::default()
        };
        let open = Reach::of(&policy(), &destination, &[], None, None).open;
        let ports = |first, last| Ports {
            protocol: bits::TCP,
            first,
            last,
        };
        assert_eq!(open, [ports(80, 84), ports(86, 100)]);
    }
}
