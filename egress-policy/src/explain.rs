//! Finds the entries that match a name or an address, for `egress-agent explain`.
//!
//! The enforcing code makes the decision; this only finds the place of the entries.

use std::{net::IpAddr, ops::RangeInclusive};

use egress_common::{address::Address, protocol::bits, records::PortClass};

use super::{
    Inputs, PolicyError, Settings,
    annotations::At,
    effective::{self, Rule},
    entry::{Destination, Entry, Ports, Protocol, number_word},
    error::Origin,
    objects::TierAction,
    parse::read_entry,
    pattern::NamePattern,
    prefix::from_mapped,
    tiers::Run,
    translators::Translators,
};
use egress_dns::Name;

/// The target of an explanation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The destination.
    pub to: To,
    /// The port, if the target has one; for [`bits::OTHER`] the protocol's number.
    pub port: Option<u16>,
    /// One bit of [`bits`], if the target has a protocol.
    pub protocol: Option<u8>,
}

/// The destination of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum To {
    /// A name.
    Name(Name),
    /// An address.
    Address(Address),
}

impl Target {
    /// Parses `name-or-address[:port][/protocol]`, in the grammar of an entry. A port without a protocol
    /// means TCP; without both, the target is everything.
    ///
    /// # Errors
    ///
    /// The message says what is wrong with the text.
    pub fn read(text: &str) -> Result<Self, String> {
        let entry =
            read_entry(text).map_err(|error| format!("`{}` {}", error.found, error.message))?;
        let Entry {
            destination,
            ports,
            protocol,
        } = entry;
        let to = match destination {
            Destination::Names(NamePattern::Exactly(name)) => To::Name(name),
            Destination::Addresses(prefix) if prefix.prefix_len() == 128 => {
                To::Address(prefix.network())
            }
            other => {
                return Err(format!(
                    "`{other}` is a wildcard or a range: expected one name or address"
                ));
            }
        };
        let port = match ports {
            None => None,
            Some(Ports { min, max }) if min == max => Some(min),
            Some(_) => return Err(format!("`{text}` has a range of ports: expected one port")),
        };
        let port = match protocol {
            Some(Protocol::Number(number)) => Some(number.into()),
            _ => port,
        };
        let protocol = match (protocol, port) {
            (None, None) | (Some(Protocol::Any), _) => None,
            (None | Some(Protocol::Tcp), _) => Some(bits::TCP),
            (Some(Protocol::Udp), _) => Some(bits::UDP),
            (Some(Protocol::Sctp), _) => Some(bits::SCTP),
            (Some(Protocol::Icmp), _) => Some(bits::ICMP_ECHO),
            (Some(Protocol::Number(_)), _) => Some(bits::OTHER),
        };
        Ok(Self { to, port, protocol })
    }

    /// An entry that would allow the target.
    pub fn entry(&self) -> String {
        // For other protocols the port is the protocol's number.
        let port = self.port.filter(|_| self.protocol != Some(bits::OTHER));
        let with_port = |to: String| match port {
            Some(port) => format!("{to}:{port}"),
            None => to,
        };
        let to = match &self.to {
            To::Name(name) => with_port(name.to_string()),
            To::Address(address) => match from_mapped(address) {
                IpAddr::V6(ip) if port.is_some() => with_port(format!("[{ip}]")),
                ip => with_port(ip.to_string()),
            },
        };
        match self.protocol {
            Some(bits::UDP) => format!("{to}/udp"),
            Some(bits::SCTP) => format!("{to}/sctp"),
            Some(bits::TCP) => format!("{to}/tcp"),
            Some(bits::OTHER) => {
                let number = self.port.and_then(|number| u8::try_from(number).ok());
                format!("{to}/{}", number_word(number.unwrap_or_default()))
            }
            Some(_) => format!("{to}/icmp"),
            None => to,
        }
    }
}

/// The list of an entry, or the action of its rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// `allow`
    Allow,
    /// `deny`
    Deny,
    /// `resolve`
    Resolve,
    /// The next tier decides.
    Pass,
}

impl List {
    /// The annotation's key without its prefix, or the action in lower case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Resolve => "resolve",
            Self::Pass => "pass",
        }
    }
}

/// An entry in effect that matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryMatch {
    /// The list.
    pub list: List,
    /// The object with the list.
    pub origin: Origin,
    /// The text of the entry.
    pub text: String,
    /// The place of the entry in its annotation.
    pub at: At,
    /// The packets that it matches; all of them for names that are denied or only resolved.
    pub class: PortClass,
    /// Whether its destination is a name or wildcard.
    pub is_name: bool,
    /// Whether its destination is `*`.
    pub is_any: bool,
}

/// The entries in effect for a pod, with their texts, in the order of evaluation.
#[derive(Debug)]
pub struct Entries {
    rules: Vec<(List, Rule)>,
    translators: Translators,
}

impl Entries {
    /// Parses all that concerns the pod.
    ///
    /// # Errors
    ///
    /// As [`super::compile()`].
    pub fn read(inputs: Inputs<'_>, settings: &Settings) -> Result<Self, PolicyError> {
        let effective = effective::resolve(inputs, settings)?;
        let listed = |list, rules: Vec<Rule>| rules.into_iter().map(move |rule| (list, rule));
        let ordered = |runs: Vec<Run>| {
            runs.into_iter().flat_map(move |run| {
                let list = match run.effect.action {
                    TierAction::Allow => List::Allow,
                    TierAction::Deny => List::Deny,
                    TierAction::Pass => List::Pass,
                };
                listed(list, run.rules)
            })
        };
        Ok(Self {
            rules: ordered(effective.tiers.admin)
                .chain(listed(List::Deny, effective.deny))
                .chain(listed(List::Allow, effective.allow))
                .chain(listed(List::Resolve, effective.resolve))
                .chain(ordered(effective.tiers.baseline))
                .collect(),
            translators: settings.translators.clone(),
        })
    }

    /// The entries that match a name: as a name, or with `*`.
    pub fn matching_name(&self, name: &Name) -> Vec<EntryMatch> {
        self.matching(|destination| match destination {
            Destination::Names(pattern) => pattern.matches(name),
            Destination::Any => true,
            Destination::Addresses(_) => false,
        })
    }

    /// The entries that match an address itself, or with `*`.
    pub fn matching_address(&self, address: &Address) -> Vec<EntryMatch> {
        let behind = self.translators.v4_behind(address);
        self.matching(|destination| {
            destination.contains(address) || behind.is_some_and(|v4| destination.contains(&v4))
        })
    }

    fn matching(&self, of: impl Fn(&Destination) -> bool) -> Vec<EntryMatch> {
        self.rules
            .iter()
            .filter(|(_, rule)| of(&rule.destination))
            .map(|(list, rule)| EntryMatch {
                list: *list,
                origin: rule.origin.clone(),
                text: rule.text.clone(),
                at: rule.at,
                class: rule.class,
                is_name: matches!(rule.destination, Destination::Names(_)),
                is_any: rule.destination == Destination::Any,
            })
            .collect()
    }
}

impl EntryMatch {
    /// Whether it matches packets of this protocol to this port.
    pub fn covers_port(&self, protocol: u8, port: u16) -> bool {
        let class = &self.class;
        class.protocols & protocol != 0
            && (protocol & bits::WITH_PORTS == 0
                || (class.port_min..=class.port_max).contains(&port))
    }

    /// Whether it matches packets of this protocol to one of these ports.
    pub fn covers_any_port(&self, protocol: u8, ports: RangeInclusive<u16>) -> bool {
        self.covers_port(protocol, *ports.start())
            || self.covers_port(protocol, *ports.end())
            || (self.class.protocols & protocol != 0 && ports.contains(&self.class.port_min))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Annotations, exact_name, reference::settings};

    fn target(text: &str) -> Result<(Option<u8>, Option<u16>, String), String> {
        Target::read(text).map(|target| (target.protocol, target.port, target.entry()))
    }

    #[test]
    fn a_target_has_the_grammar_of_an_entry() {
        let all = |entry: &str| Ok((None, None, entry.to_owned()));
        assert_eq!(target("a.test"), all("a.test"));
        assert_eq!(target("2001:db8::7"), all("2001:db8::7"));
        assert_eq!(
            target("a.test:443"),
            Ok((Some(bits::TCP), Some(443), "a.test:443/tcp".to_owned()))
        );
        assert_eq!(
            target("[2001:db8::7]:53/udp"),
            Ok((Some(bits::UDP), Some(53), "[2001:db8::7]:53/udp".to_owned()))
        );
        assert_eq!(
            target("192.0.2.1/icmp"),
            Ok((Some(bits::ICMP_ECHO), None, "192.0.2.1/icmp".to_owned()))
        );
        for wrong in [
            "",
            "*",
            "*.a.test",
            "192.0.2.0/24",
            "a.test:1-2",
            "a.test:x",
            "a b",
        ] {
            assert!(target(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn matching_entries_are_found_with_their_places() {
        let pod = Annotations {
            allow: Some("a.test:443,\n  *.b.test:80-90/tcp # c.test\n192.0.2.0/24".to_owned()),
            ..Annotations::default()
        };
        let namespace = Annotations {
            deny: Some("x.b.test".to_owned()),
            ..Annotations::default()
        };
        let entries = Entries::read(Inputs::annotations(&pod, &namespace), &settings()).unwrap();
        let matches = entries.matching_name(&exact_name("x.b.test").unwrap());
        let places: Vec<_> = matches
            .iter()
            .map(|entry| {
                (
                    entry.list,
                    entry.origin.clone(),
                    entry.text.as_str(),
                    entry.at,
                )
            })
            .collect();
        let at = |line, column| At { line, column };
        assert_eq!(
            places,
            [
                (List::Deny, Origin::Namespace, "x.b.test", at(1, 1)),
                (List::Allow, Origin::Pod, "*.b.test:80-90/tcp", at(2, 3)),
            ]
        );
        assert!(matches[1].covers_port(bits::TCP, 90));
        assert!(!matches[1].covers_port(bits::UDP, 90));
        assert!(!matches[1].covers_port(bits::TCP, 91));
        assert_eq!(entries.matching_name(&exact_name("c.test").unwrap()), []);
        let address = super::super::Prefix::parse("192.0.2.9").unwrap().network();
        assert_eq!(entries.matching_address(&address)[0].at, at(3, 1));
    }
}
