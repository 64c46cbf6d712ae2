//! What one entry of a list says.

use std::fmt;

use egress_common::{address::Address, protocol::bits, records::PortClass};

use super::{pattern::NamePattern, prefix::Prefix};

/// Where an entry points.
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
    /// Whether the address is one that the destination names by itself.
    pub fn holds(&self, address: &Address) -> bool {
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

/// The protocol an entry may end with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// `/tcp`
    Tcp,
    /// `/udp`
    Udp,
    /// `/sctp`
    Sctp,
    /// `/icmp`: every type, of IPv6 too.
    Icmp,
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
    /// Where it points.
    pub destination: Destination,
    /// The ports it is limited to.
    pub ports: Option<Ports>,
    /// The protocol it is limited to.
    pub protocol: Option<Protocol>,
}

impl Entry {
    /// What the entry allows when it stands under `allow`: without port and protocol TCP, UDP and
    /// ICMP echo, with a port alone TCP and UDP.
    pub fn allowed_class(&self) -> PortClass {
        self.class(bits::TCP | bits::UDP | bits::ICMP_ECHO)
    }

    /// What the entry denies when it stands under `deny`. Without port and protocol that is every
    /// protocol: a denial should not leave out what its author did not think of.
    pub fn denied_class(&self) -> PortClass {
        self.class(bits::ALL)
    }

    fn class(&self, unlimited: u8) -> PortClass {
        let protocols = match (self.protocol, self.ports) {
            (Some(Protocol::Tcp), _) => bits::TCP,
            (Some(Protocol::Udp), _) => bits::UDP,
            (Some(Protocol::Sctp), _) => bits::SCTP,
            (Some(Protocol::Icmp), _) => bits::ICMP_ECHO | bits::ICMP_OTHER,
            (None, Some(_)) => bits::TCP | bits::UDP,
            (None, None) => unlimited,
        };
        let Ports { min, max } = self.ports.unwrap_or(ALL_PORTS);
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
