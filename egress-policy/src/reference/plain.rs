//! The verdicts of entries on packets and queries, by definition.

use std::net::{IpAddr, Ipv4Addr};

use egress_common::protocol::bits;

use egress_dns::Name;

use crate::{Annotations, QuestionRule, Settings};

#[derive(Clone, Debug)]
pub(super) enum Where {
    Anywhere,
    Net(IpAddr, u32),
    /// Labels, of which a leading `*` stands for one or more labels and a `*` inside a label for a part of
    /// it.
    Names(Vec<&'static str>),
}

#[derive(Clone, Debug)]
pub(super) struct Line {
    pub(super) to: Where,
    pub(super) ports: Option<(u16, u16)>,
    pub(super) protocol: Option<&'static str>,
}

impl Line {
    /// An entry without ports and protocol.
    pub(super) fn to(to: Where) -> Self {
        Self {
            to,
            ports: None,
            protocol: None,
        }
    }

    /// Its destination alone.
    pub(super) fn bare(self) -> Self {
        Self::to(self.to)
    }

    pub(super) fn text(&self) -> String {
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

    pub(super) fn matches_packet(&self, packet: &Packet, bare: u8) -> bool {
        let protocols = match (self.protocol, self.ports) {
            (Some("tcp"), _) => bits::TCP,
            (Some("udp"), _) => bits::UDP,
            (Some("sctp"), _) => bits::SCTP,
            (Some("any"), _) => bits::ALL,
            (Some("esp"), _) => return packet.protocol == bits::OTHER && packet.port == 50,
            (Some("ip-47"), _) => return packet.protocol == bits::OTHER && packet.port == 47,
            (Some(_), _) => bits::ICMP_ECHO | bits::ICMP_OTHER,
            (None, Some(_)) => bits::TCP | bits::UDP,
            (None, None) => bare,
        };
        protocols & packet.protocol != 0
            && self
                .ports
                .is_none_or(|(min, max)| (min..=max).contains(&packet.port))
    }

    pub(super) fn names(&self, name: &[Vec<u8>]) -> bool {
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

    /// Whether it contains the host that the address leads to, also through NAT64's well-known prefix.
    pub(super) fn contains(&self, address: IpAddr) -> bool {
        self.names_address(address)
            || through_nat64(address).is_some_and(|v4| self.names_address(v4))
    }

    /// Whether it is a prefix that has all addresses of this one.
    pub(super) fn holds(&self, network: IpAddr, length: u32) -> bool {
        matches!(self.to, Where::Net(_, own) if own <= length) && self.names_address(network)
    }

    fn names_address(&self, address: IpAddr) -> bool {
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

    pub(super) fn is_anywhere(&self) -> bool {
        matches!(self.to, Where::Anywhere)
    }

    /// Whether every packet matches it where it denies.
    pub(super) fn is_everything(&self) -> bool {
        self.is_anywhere()
            && self.ports.is_none()
            && self.protocol.is_none_or(|protocol| protocol == "any")
    }
}

fn through_nat64(address: IpAddr) -> Option<IpAddr> {
    let IpAddr::V6(address) = address else {
        return None;
    };
    match address.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            Some(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)).into())
        }
        _ => None,
    }
}

#[derive(Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact of its own about the packet"
)]
pub(super) struct Packet {
    pub(super) to: IpAddr,
    /// The name whose response gave the pod this address.
    pub(super) through: Option<Vec<Vec<u8>>>,
    pub(super) expired: bool,
    pub(super) protocol: u8,
    /// The protocol's number if `protocol` is [`bits::OTHER`].
    pub(super) port: u16,
    pub(super) protected: bool,
    pub(super) internal: bool,
    /// Whether somebody may unpack the packet and forward its contents.
    pub(super) tunnel: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Written {
    pub(super) allow: Option<Vec<Line>>,
    pub(super) deny: Option<Vec<Line>>,
    pub(super) resolve: Option<Vec<Line>>,
    pub(super) mode: Option<&'static str>,
}

impl Written {
    pub(super) fn annotations(&self) -> Annotations {
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

/// Whether the packet passes, and if not, whether a `deny` entry was the reason.
pub(super) fn plain_verdict(
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
        (line.is_anywhere() || line.contains(packet.to)) && line.matches_packet(packet, bits::ALL)
    });
    if denied {
        return (false, true);
    }
    let name_denied = |name: &[Vec<u8>]| deny.iter().any(|line| line.names(name));
    let dns =
        (packet.port == 53 || packet.port == 853) && packet.protocol & (bits::TCP | bits::UDP) != 0;
    let unlisted = [b"unlisted".to_vec()];
    let elsewhere = dns
        && (deny.iter().any(|line| matches!(line.to, Where::Names(_)))
            || plain_question(pod, namespace, settings, &unlisted) == QuestionRule::NotListed);
    let by_address = packet.protected || (packet.tunnel && packet.internal);
    let allowed = allow.iter().any(|line| {
        let reaches = line.contains(packet.to)
            || (line.is_anywhere() && !by_address && !elsewhere)
            || packet.through.as_ref().is_some_and(|name| {
                line.names(name)
                    && !name_denied(name)
                    && !packet.expired
                    && !by_address
                    && !elsewhere
                    && (settings.allow_internal || !packet.internal)
            });
        reaches && line.matches_packet(packet, bits::TCP | bits::UDP | bits::ICMP_ECHO)
    });
    let any_allow = pod.allow.is_some() || namespace.allow.is_some();
    let any_deny = pod.deny.is_some() || namespace.deny.is_some();
    let open = any_deny && !any_allow;
    let internal = packet.internal && settings.allow_internal && !dns;
    let passes = allowed || (!by_address && (internal || (open && !elsewhere)));
    (passes, false)
}

pub(super) fn to_name(labels: &[Vec<u8>]) -> Name {
    Name::from_labels(labels.iter().map(Vec::as_slice)).unwrap()
}

/// The rule for a query.
pub(super) fn plain_question(
    pod: &Written,
    namespace: &Written,
    settings: &Settings,
    name: &[Vec<u8>],
) -> QuestionRule {
    let lines = |list: fn(&Written) -> &Option<Vec<Line>>| {
        [pod, namespace]
            .into_iter()
            .filter_map(move |w| list(w).as_ref())
            .flatten()
    };
    if lines(|w| &w.deny).any(|line| line.names(name)) {
        return QuestionRule::Denied;
    }
    let in_cluster = name.ends_with(&[b"cluster".to_vec(), b"local".to_vec()]);
    let listed = lines(|w| &w.allow)
        .chain(lines(|w| &w.resolve))
        .any(|line| line.names(name));
    let nothing_reached = lines(|w| &w.deny).any(Line::is_everything);
    let allow = pod.allow.is_some() || namespace.allow.is_some();
    let deny = pod.deny.is_some() || namespace.deny.is_some();
    let anywhere = (deny && !allow) || lines(|w| &w.allow).any(Line::is_anywhere);
    if in_cluster
        || listed
        || !settings.guard
        || lines(|w| &w.resolve).any(Line::is_anywhere)
        || (anywhere && !nothing_reached)
    {
        QuestionRule::Allowed
    } else {
        QuestionRule::NotListed
    }
}
