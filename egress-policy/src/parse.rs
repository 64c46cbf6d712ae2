//! The grammar of one entry: `destination[:ports][/protocol]`.

use super::{
    entry::{Destination, Entry, Ports, Protocol},
    name_text::read_name,
    prefix::{Prefix, PrefixError, parse_decimal},
};

/// A part of an entry and its offset in it, in bytes.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    pub(super) text: &'a str,
    pub(super) at: usize,
}

impl Part<'_> {
    fn split_at(self, middle: usize, skip: usize) -> (Self, Self) {
        let (before, after) = (&self.text[..middle], &self.text[middle + skip..]);
        (
            Self {
                text: before,
                at: self.at,
            },
            Self {
                text: after,
                at: self.at + middle + skip,
            },
        )
    }

    fn split_once(self, separator: char) -> Option<(Self, Self)> {
        let middle = self.text.find(separator)?;
        Some(self.split_at(middle, separator.len_utf8()))
    }

    pub(super) fn error(self, message: impl Into<String>) -> EntryError {
        EntryError {
            at: self.at,
            found: self.text.to_owned(),
            message: message.into(),
        }
    }
}

/// An error in an entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct EntryError {
    /// The offset in the entry, in bytes.
    pub(super) at: usize,
    /// The invalid part.
    pub(super) found: String,
    /// What the part is, and what was expected. The message continues the part.
    pub(super) message: String,
}

/// Checks that a text is one entry: `destination[:ports][/protocol]`.
///
/// # Errors
///
/// The message has the invalid part, what is wrong with it, and what was expected.
pub fn check_entry(text: &str) -> Result<(), String> {
    read_entry(text)
        .map(drop)
        .map_err(|EntryError { found, message, .. }| {
            let found = if found.is_empty() { text } else { &found };
            format!("`{found}` {message}")
        })
}

/// Parses one entry, a text without separators and comments.
pub(super) fn read_entry(text: &str) -> Result<Entry, EntryError> {
    let whole = Part { text, at: 0 };
    if text.contains("://") {
        return Err(whole.error(
            "is a URL: expected only the host name, with its port after a colon, such as \
             `example.com:443`",
        ));
    }
    if parse_decimal(text).is_some() {
        return Err(whole.error(
            "is a number without a destination: expected `destination:port`, with one port or range in \
             each entry",
        ));
    }
    if text.starts_with('[') {
        return read_bracketed(whole);
    }
    let (head, rest) = match whole.split_once('/') {
        Some((head, rest)) => (head, Some(rest)),
        None => (whole, None),
    };
    if head.text.matches(':').count() > 1 {
        return read_bare_ipv6(head, rest);
    }
    let (host, ports) = match head.split_once(':') {
        Some((host, ports)) => (host, Some(ports)),
        None => (head, None),
    };
    if host.text.is_empty() {
        return Err(whole.error("has no destination: write `*` for anywhere"));
    }
    // A digit after the slash begins the length of a CIDR; protocols are words.
    let (length, ports, protocol) = match rest {
        Some(rest) if rest.text.starts_with(|c: char| c.is_ascii_digit()) => {
            if let Some(ports) = ports {
                return Err(rest.error(format!(
                    "is after the port: in a CIDR the prefix length comes first, as in \
                     `{}/{}:{}`",
                    host.text, rest.text, ports.text
                )));
            }
            let (length, ports, protocol) = split_tail(rest);
            (Some(length), ports, protocol)
        }
        rest => (None, ports, rest),
    };
    let destination = match (host.text, length) {
        ("*", None) => Destination::Any,
        (_, Some(length)) => {
            let address = Part {
                text: &whole.text[..length.at + length.text.len()],
                at: 0,
            };
            match Prefix::from_parts(host.text, Some(length.text)) {
                Err(PrefixError::NotAnAddress) => {
                    return Err(length.error(
                        "follows something that is not an IP address: expected a CIDR such as \
                         `10.20.0.0/16`, or a protocol (tcp, udp, sctp, icmp)",
                    ));
                }
                read => {
                    Destination::Addresses(read.map_err(|error| address.error(error.to_string()))?)
                }
            }
        }
        (_, None) => match Prefix::from_parts(host.text, None) {
            Err(PrefixError::NotAnAddress) => Destination::Names(read_name(host)?),
            read => Destination::Addresses(read.map_err(|error| host.error(error.to_string()))?),
        },
    };
    finish(destination, ports, protocol)
}

/// Splits the text after a CIDR's slash: `16:5432/tcp`.
fn split_tail(rest: Part<'_>) -> (Part<'_>, Option<Part<'_>>, Option<Part<'_>>) {
    let (rest, protocol) = match rest.split_once('/') {
        Some((rest, protocol)) => (rest, Some(protocol)),
        None => (rest, None),
    };
    match rest.split_once(':') {
        Some((length, ports)) => (length, Some(ports), protocol),
        None => (rest, None, protocol),
    }
}

/// Parses `[2001:db8::7]:443`, `[2001:db8::/32]:443` and `[2001:db8::]/32:443`.
fn read_bracketed(whole: Part<'_>) -> Result<Entry, EntryError> {
    let Some((open, tail)) = whole.split_once(']') else {
        return Err(whole.error("has no closing bracket: expected `[IPv6 address]:port`"));
    };
    let (_, inside) = open.split_at(1, 0);
    let (address, length) = match inside.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (inside, None),
    };
    let outer = tail
        .text
        .strip_prefix('/')
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    let (length, ports, protocol) = if outer && length.is_none() {
        let (length, ports, protocol) = split_tail(tail.split_at(0, 1).1);
        (Some(length), ports, protocol)
    } else {
        let (ports, protocol) = match tail.split_once('/') {
            Some((ports, protocol)) => (ports, Some(protocol)),
            None => (tail, None),
        };
        match (ports.text.is_empty(), ports.text.starts_with(':')) {
            (true, _) => (length, None, protocol),
            (false, true) => (length, Some(ports.split_at(0, 1).1), protocol),
            (false, false) => {
                return Err(ports.error("follows a bracket: expected `:port` or `/protocol`"));
            }
        }
    };
    if !address.text.contains(':') {
        return Err(inside.error("is not an IPv6 address: brackets are for IPv6 addresses only"));
    }
    finish(read_ipv6(address, length, inside)?, ports, protocol)
}

/// Parses an IPv6 address or CIDR without brackets, which cannot have a port.
fn read_bare_ipv6(head: Part<'_>, rest: Option<Part<'_>>) -> Result<Entry, EntryError> {
    let (length, protocol) = match rest {
        Some(rest) if rest.text.starts_with(|c: char| c.is_ascii_digit()) => {
            let (length, ports, protocol) = split_tail(rest);
            if let Some(ports) = ports {
                return Err(ports.error(format!(
                    "is a port after an IPv6 CIDR without brackets: expected `[{}/{}]:{}`",
                    head.text, length.text, ports.text
                )));
            }
            (Some(length), protocol)
        }
        rest => (None, rest),
    };
    finish(read_ipv6(head, length, head)?, None, protocol)
}

fn read_ipv6(
    address: Part<'_>,
    length: Option<Part<'_>>,
    shown: Part<'_>,
) -> Result<Destination, EntryError> {
    Prefix::from_parts(address.text, length.map(|length| length.text))
        .map(Destination::Addresses)
        .map_err(|error| match error {
            PrefixError::NotAnAddress => address.error(
                "is not an IPv6 address: expected one such as `2001:db8::7`, in brackets when a \
                 port follows (a name or an IPv4 address takes one port or range)",
            ),
            PrefixError::Length { .. } => length.unwrap_or(shown).error(error.to_string()),
            PrefixError::HostBits { .. } | PrefixError::Mapped | PrefixError::Zone => {
                shown.error(error.to_string())
            }
        })
}

fn finish(
    destination: Destination,
    ports: Option<Part<'_>>,
    protocol: Option<Part<'_>>,
) -> Result<Entry, EntryError> {
    let range = ports.map(read_ports).transpose()?;
    let protocol = match protocol {
        None => None,
        Some(part) => Some((read_protocol(part)?, part)),
    };
    if let (Some((read, written)), Some(ports)) = (protocol, ports)
        && !read.has_ports()
    {
        return Err(ports.error(format!(
            "is a port, and {} has no ports: omit one of them",
            written.text
        )));
    }
    Ok(Entry {
        destination,
        ports: range,
        protocol: protocol.map(|(protocol, _)| protocol),
    })
}

fn read_ports(part: Part<'_>) -> Result<Ports, EntryError> {
    let read = |text| {
        let number = u16::try_from(parse_decimal(text)?).ok()?;
        (number > 0).then_some(number)
    };
    let (min, max) = part.text.split_once('-').unwrap_or((part.text, part.text));
    let (Some(min), Some(max)) = (read(min), read(max)) else {
        return Err(part.error(
            "is not a port: expected a number from 1 to 65535, or a range such as 8000-8100",
        ));
    };
    if min > max {
        return Err(part.error(format!(
            "is a range that ends before it begins: expected {max}-{min}"
        )));
    }
    Ok(Ports { min, max })
}

fn read_protocol(part: Part<'_>) -> Result<Protocol, EntryError> {
    Protocol::parse(part.text).ok_or_else(|| {
        part.error(
            "is not a protocol: expected tcp, udp, sctp, icmp, ah, esp, gre, ipip, any, or ip- and a number \
             from 0 to 255, such as ip-89",
        )
    })
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
