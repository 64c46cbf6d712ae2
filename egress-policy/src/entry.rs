//! One entry of a list.

use std::{borrow::Cow, fmt};

use egress_common::{
    address::Address,
    protocol::{self, bits},
    records::PortClass,
};

use super::{
    pattern::NamePattern,
    prefix::{Prefix, parse_decimal},
};

/// The destination of an entry.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Destination {
    /// `*`: anywhere.
    Any,
    /// An address or a CIDR.
    Addresses(Prefix),
    /// A name or a wildcard.
    Names(NamePattern),
}

impl Destination {
    /// Whether the destination contains the address itself.
    pub fn contains(&self, address: &Address) -> bool {
        match self {
            Self::Any => true,
            Self::Addresses(prefix) => prefix.contains(address),
            Self::Names(_) => false,
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Addresses(prefix) => write!(f, "{prefix}"),
            Self::Names(pattern) => write!(f, "{pattern}"),
        }
    }
}

/// The protocol at the end of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// `/tcp`
    Tcp,
    /// `/udp`
    Udp,
    /// `/sctp`
    Sctp,
    /// `/icmp`: every type, also of ICMPv6.
    Icmp,
    /// `/esp`, `/ip-50`: the protocol with this number, other than those above.
    Number(u8),
    /// `/any`: every protocol.
    Any,
}

/// Protocols without ports that have a word besides `ip-` and their number.
const WORDS: [(&str, u8); 4] = [("ah", 51), ("esp", 50), ("gre", 47), ("ipip", 4)];

impl Protocol {
    /// Reads a protocol: a word, or `ip-` and a number.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let text = text.to_ascii_lowercase();
        if let Some(number) = text.strip_prefix("ip-") {
            return Some(Self::from_number(
                u8::try_from(parse_decimal(number)?).ok()?,
            ));
        }
        match text.as_str() {
            "tcp" => Some(Self::Tcp),
            "udp" => Some(Self::Udp),
            "sctp" => Some(Self::Sctp),
            "icmp" => Some(Self::Icmp),
            "any" => Some(Self::Any),
            word => {
                let (_, number) = WORDS.iter().find(|(other, _)| *other == word)?;
                Some(Self::Number(*number))
            }
        }
    }

    const fn from_number(number: u8) -> Self {
        match number {
            protocol::TCP => Self::Tcp,
            protocol::UDP => Self::Udp,
            protocol::SCTP => Self::Sctp,
            protocol::ICMP | protocol::ICMPV6 => Self::Icmp,
            number => Self::Number(number),
        }
    }

    /// Whether an entry with this protocol may have ports.
    pub(super) const fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp | Self::Sctp)
    }
}

/// Whether no packet has this protocol: the number is that of an IPv6 extension header, and the
/// protocol follows after the header.
pub(super) const fn is_extension_header(number: u8) -> bool {
    matches!(
        number,
        protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::FRAGMENT
            | protocol::NO_NEXT_HEADER
            | protocol::DESTINATION_OPTIONS
    )
}

/// The number of the class's only protocol, if that protocol has no bit of its own.
pub(super) fn protocol_number(class: PortClass) -> Option<u8> {
    let is_one = class.protocols == bits::OTHER && class.port_min == class.port_max;
    u8::try_from(class.port_min).ok().filter(|_| is_one)
}

/// The word for a protocol without a bit of its own: `esp`, `ip-89`.
pub fn number_word(number: u8) -> Cow<'static, str> {
    match WORDS.iter().find(|(_, other)| *other == number) {
        Some((word, _)) => Cow::Borrowed(word),
        None => Cow::Owned(format!("ip-{number}")),
    }
}

/// Ports of an entry, both inclusive, in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports {
    /// The lowest.
    pub min: u16,
    /// The highest.
    pub max: u16,
}

/// Every port.
const ALL_PORTS: Ports = Ports {
    min: 0,
    max: u16::MAX,
};

/// One entry: `destination[:ports][/protocol]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Entry {
    /// The destination.
    pub destination: Destination,
    /// The ports it is limited to.
    pub ports: Option<Ports>,
    /// The protocol it is limited to.
    pub protocol: Option<Protocol>,
}

impl Entry {
    /// The packets that the entry allows under `allow`: without port and protocol TCP, UDP and
    /// ICMP echo, with a port alone TCP and UDP.
    pub fn allowed_class(&self) -> PortClass {
        self.class(bits::TCP | bits::UDP | bits::ICMP_ECHO)
    }

    /// The packets that the entry denies under `deny`: without port and protocol every
    /// protocol, because a denial must include protocols that its author did not think of.
    pub fn denied_class(&self) -> PortClass {
        self.class(bits::ALL)
    }

    fn class(&self, unlimited: u8) -> PortClass {
        let protocols = match (self.protocol, self.ports) {
            (Some(Protocol::Tcp), _) => bits::TCP,
            (Some(Protocol::Udp), _) => bits::UDP,
            (Some(Protocol::Sctp), _) => bits::SCTP,
            (Some(Protocol::Icmp), _) => bits::ICMP_ECHO | bits::ICMP_OTHER,
            (Some(Protocol::Number(_)), _) => bits::OTHER,
            (Some(Protocol::Any), _) => bits::ALL,
            (None, Some(_)) => bits::TCP | bits::UDP,
            (None, None) => unlimited,
        };
        let Ports { min, max } = match self.protocol {
            // The class has the number in place of the ports, see `PortClass`.
            Some(Protocol::Number(number)) => Ports {
                min: number.into(),
                max: number.into(),
            },
            _ => self.ports.unwrap_or(ALL_PORTS),
        };
        PortClass {
            port_min: min,
            port_max: max,
            protocols,
            ..PortClass::NONE
        }
    }
}

/// The packets that are in both classes.
pub fn class_intersection(a: &PortClass, b: &PortClass) -> Option<PortClass> {
    let both = PortClass {
        port_min: a.port_min.max(b.port_min),
        port_max: a.port_max.min(b.port_max),
        protocols: a.protocols & b.protocols,
        ..PortClass::NONE
    };
    (both.protocols != 0 && both.port_min <= both.port_max).then_some(both)
}

/// Whether the class matches every packet.
pub fn is_everything(class: &PortClass) -> bool {
    class.protocols == bits::ALL
        && class.port_min == ALL_PORTS.min
        && class.port_max == ALL_PORTS.max
}

/// A class in words: `tcp and udp port 443`.
pub fn class_words(class: &PortClass) -> String {
    const WORDS: [(u8, &str); 4] = [
        (bits::TCP, "tcp"),
        (bits::UDP, "udp"),
        (bits::SCTP, "sctp"),
        (bits::ICMP_ECHO | bits::ICMP_OTHER, "icmp"),
    ];
    if class.protocols == bits::ALL {
        return "every protocol".to_owned();
    }
    if let Some(number) = protocol_number(*class) {
        return number_word(number).into_owned();
    }
    let mut protocols: Vec<&str> = WORDS
        .iter()
        .filter(|(bits, _)| class.protocols & bits == *bits)
        .map(|(_, word)| *word)
        .collect();
    if class.protocols & (bits::ICMP_ECHO | bits::ICMP_OTHER) == bits::ICMP_ECHO {
        protocols.push("icmp echo");
    }
    let protocols = match protocols.as_slice() {
        [most @ .., last] if !most.is_empty() => format!("{} and {last}", most.join(", ")),
        all => all.concat(),
    };
    match (class.port_min, class.port_max) {
        (0, u16::MAX) => protocols,
        (min, max) if min == max => format!("{protocols} port {min}"),
        (min, max) => format!("{protocols} ports {min}-{max}"),
    }
}
