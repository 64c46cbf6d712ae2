//! Rules of all products in one form.

use egress_api::Action;
use egress_policy::Prefix;

use crate::{cidr, names::Wildcards, remark::Remark};

/// A rule: it matches packets to any of the peers on any of the ports that fulfil all conditions.
#[derive(Debug)]
pub(crate) struct Rule {
    pub(crate) name: Option<String>,
    pub(crate) action: Action,
    pub(crate) peers: Vec<Peer>,
    /// Every protocol and port if there are none.
    pub(crate) ports: Vec<Ports>,
    /// Further conditions, which no entry expresses.
    pub(crate) conditions: Vec<String>,
    pub(crate) remarks: Vec<Remark>,
}

impl Rule {
    pub(crate) fn new(action: Action) -> Self {
        Self {
            name: None,
            action,
            peers: Vec::new(),
            ports: Vec::new(),
            conditions: Vec::new(),
            remarks: Vec::new(),
        }
    }

    /// Whether it denies addresses, and so possibly some in the cluster.
    pub(crate) fn denies_addresses(&self) -> bool {
        let is_address = |peer: &Peer| {
            matches!(
                peer,
                Peer::Anywhere | Peer::World | Peer::Prefixes { .. } | Peer::Set(_)
            )
        };
        self.action == Action::Deny && self.peers.iter().any(is_address)
    }

    /// Whether it matches every packet.
    pub(crate) fn is_everything(&self) -> bool {
        self.ports.is_empty()
            && self.conditions.is_empty()
            && self.peers.iter().any(|peer| matches!(peer, Peer::Anywhere))
    }
}

/// A destination.
#[derive(Clone, Debug)]
pub(crate) enum Peer {
    /// Every address.
    Anywhere,
    /// Every address outside of the cluster.
    World,
    /// Addresses; `shown` is the original's text.
    Prefixes {
        shown: String,
        prefixes: Vec<Prefix>,
    },
    /// A name or a wildcard.
    Name { text: String, wildcards: Wildcards },
    /// An `EgressSet`.
    Set(String),
    /// Something in the cluster, such as pods; the text says what.
    Cluster(String),
    /// DNS in the cluster; the text says where.
    Dns(String),
    /// Something that no entry expresses; the text says what.
    Unsupported(String),
}

impl Peer {
    /// Something in the cluster; DNS, if all ports are port 53.
    pub(crate) fn in_cluster(what: String, ports: &[Ports]) -> Self {
        let is_dns = |ports: &Ports| {
            matches!(
                ports,
                Ports::Of {
                    range: Some((53, 53)),
                    ..
                }
            )
        };
        if !ports.is_empty() && ports.iter().all(is_dns) {
            Self::Dns(what)
        } else {
            Self::Cluster(what)
        }
    }

    /// A CIDR without its exceptions.
    pub(crate) fn cidr(cidr: &str, exceptions: &[String]) -> Self {
        let read = || {
            let whole = cidr::read(cidr)?;
            let exceptions = exceptions
                .iter()
                .map(|text| cidr::read(text))
                .collect::<Result<Vec<_>, _>>()?;
            cidr::without(whole, &exceptions).map_err(|cidr::TooMany| {
                format!(
                    "`{cidr}` with {} exceptions, which takes more than {} prefixes",
                    exceptions.len(),
                    cidr::MOST_PIECES
                )
            })
        };
        let shown = if exceptions.is_empty() {
            cidr.to_owned()
        } else {
            format!("{cidr} except {}", exceptions.join(", "))
        };
        match read() {
            Ok(prefixes) => Self::Prefixes { shown, prefixes },
            Err(error) => Self::Unsupported(error),
        }
    }
}

/// Protocols of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// TCP, UDP and SCTP with ports; every protocol without.
    All,
    Tcp,
    Udp,
    Sctp,
    /// ICMP with IPv4, ICMPv6 with IPv6, or both.
    Icmp {
        v4: bool,
        v6: bool,
    },
    Number(u8),
}

impl Protocol {
    /// Reads a protocol as most products write it, in any case.
    pub(crate) fn read(text: &str) -> Option<Self> {
        Some(match text.to_ascii_lowercase().as_str() {
            "tcp" | "6" => Self::Tcp,
            "udp" | "17" => Self::Udp,
            "sctp" | "132" => Self::Sctp,
            "icmp" | "1" => Self::Icmp {
                v4: true,
                v6: false,
            },
            "icmpv6" | "58" => Self::Icmp {
                v4: false,
                v6: true,
            },
            "any" | "all" | "*" => Self::All,
            number => Self::Number(number.parse().ok()?),
        })
    }
}

/// Ports of a rule.
#[derive(Clone, Debug)]
pub(crate) enum Ports {
    Of {
        protocol: Protocol,
        range: Option<(u16, u16)>,
    },
    /// Something that no entry expresses; `widest` includes it.
    Unsupported { what: String, widest: Protocol },
}

impl Ports {
    /// The ports of a protocol: a number or the name of a port, and the end of a range.
    pub(crate) fn read(protocol: Protocol, port: Option<&str>, end: Option<&str>) -> Self {
        let unsupported = |what: String| Self::Unsupported {
            what,
            widest: protocol,
        };
        let Some(port) = port else {
            return Self::Of {
                protocol,
                range: None,
            };
        };
        let Ok(min) = port.parse::<u16>() else {
            return unsupported(format!(
                "port `{port}`: a named port means what the destination's pod says"
            ));
        };
        let max = match end.map(str::parse::<u16>) {
            None | Some(Ok(0)) => min,
            Some(Ok(max)) => max,
            Some(Err(_)) => {
                return unsupported(format!("port range `{port}` to an unreadable end"));
            }
        };
        if min == 0 || min > max {
            return unsupported(format!("port range `{min}-{max}`"));
        }
        Self::Of {
            protocol,
            range: Some((min, max)),
        }
    }
}
