//! Warnings about entries whose meaning may surprise their author, for `check` and the log.

use std::net::Ipv6Addr;

use egress_common::protocol::bits;

use super::{
    effective::Rule,
    entry::{Destination, is_extension_header, number_word, protocol_number},
    pattern::NamePattern,
};
use egress_dns::Name;

/// The warning about an entry under `allow`.
pub(super) fn of_allowed(rule: &Rule) -> Option<String> {
    let (origin, text) = (&rule.origin, &rule.text);
    match &rule.destination {
        Destination::Addresses(prefix) if prefix.is_whole_family() => Some(format!(
            "the {origin}'s allow entry `{text}` opens protected addresses too, such as the metadata \
             service; `*` does not"
        )),
        Destination::Names(NamePattern::Below(name)) if is_public_suffix(name) => Some(format!(
            "the {origin}'s allow entry `{text}` opens every name below `{name}`, where anybody can register \
             one: `{name}` is a public suffix (publicsuffix.org)"
        )),
        _ => None,
    }
}

/// Protocols whose packets carry others: IP in IP, 6in4, GRE, ESP, AH, `EtherIP`, `L2TPv3`, MPLS in IP.
const CARRIERS: [u16; 8] = [4, 41, 47, 50, 51, 97, 115, 137];

/// The warning about an entry under `allow` that opens tunnels: other packets can leave inside those that it
/// allows.
pub(super) fn of_tunnel(rule: &Rule) -> Option<String> {
    let (origin, text, class) = (&rule.origin, &rule.text, rule.class);
    let ports = class.port_min..=class.port_max;
    let carries =
        class.protocols & bits::OTHER != 0 && CARRIERS.iter().any(|one| ports.contains(one));
    if !carries {
        return None;
    }
    let what = match protocol_number(class) {
        Some(number) => format!("a tunnel ({})", number_word(number)),
        None => "tunnels (gre, esp, ipip and others)".to_owned(),
    };
    let but = if matches!(rule.destination, Destination::Addresses(_)) && !rule.under_any {
        ""
    } else {
        ". To internal addresses and the node it opens none: that takes an entry with the address"
    };
    Some(format!(
        "the {origin}'s allow entry `{text}` opens {what}: who unpacks it may send what is in it to anywhere, and \
         no policy judges that{but}"
    ))
}

/// The warning about an entry of any list.
pub(super) fn of_entry(rule: &Rule) -> Option<String> {
    let (origin, text) = (&rule.origin, &rule.text);
    if let Some(number) = protocol_number(rule.class)
        && is_extension_header(number)
    {
        return Some(format!(
            "the {origin}'s entry `{text}` matches nothing: {number} is an IPv6 extension header, and the \
             packet's protocol follows after it"
        ));
    }
    match &rule.destination {
        Destination::Names(pattern) => {
            let pattern = pattern.to_string();
            if let Some(name) = is_meant_as_suffix(&pattern) {
                return Some(format!(
                    "the {origin}'s entry `{text}` is not a suffix: it matches `{name}` and, with anything \
                     before it in the same label, names such as `x{name}`; for the names below `{name}` \
                     write `*.{name}`"
                ));
            }
            let label = pattern
                .split('.')
                .find(|label| label.starts_with('-') || label.ends_with('-'))?;
            Some(format!(
                "the {origin}'s entry `{text}` is not a host name: `{label}` begins or ends with `-`, and \
                 programs refuse to look it up (RFC 1123, section 2.1)"
            ))
        }
        Destination::Addresses(_) => {
            let (address, port) = looks_like_port(text)?;
            Some(format!(
                "the {origin}'s entry `{text}` is an address without a port; for port {port} of {address} write \
                 `[{address}]:{port}`"
            ))
        }
        Destination::Any => None,
    }
}

/// The name after the `*` of `*example.com`. In other products this means `example.com` and all names below
/// it.
fn is_meant_as_suffix(pattern: &str) -> Option<&str> {
    let name = pattern.strip_prefix('*')?;
    (!name.starts_with('.') && !name.contains('*')).then_some(name)
}

fn is_public_suffix(name: &Name) -> bool {
    let name = name.to_string();
    psl::suffix(name.as_bytes()).is_some_and(|suffix| suffix.is_known() && suffix == name.as_str())
}

/// For an IPv6 address without brackets whose last group may be meant as a port: the address before it, and
/// the port.
fn looks_like_port(text: &str) -> Option<(Ipv6Addr, u16)> {
    let (address, port) = text.rsplit_once(':')?;
    let is_port = (2..=5).contains(&port.len())
        && !port.starts_with('0')
        && port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|_| is_port)?;
    Some((address.parse().ok()?, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_after_an_address_without_brackets_is_noticed() {
        let read = |text| looks_like_port(text).map(|(address, port)| (address.to_string(), port));
        assert_eq!(read("2001:db8::7:443"), Some(("2001:db8::7".into(), 443)));
        for text in [
            "2001:db8::443",
            "2001:db8::7:1",
            "2001:db8::7:abc",
            "[2001:db8::7]:443",
            "::1",
            "192.0.2.1",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn a_suffix_under_which_anybody_can_register_is_public() {
        let is_public = |text: &str| {
            is_public_suffix(&Name::from_labels(text.split('.').map(str::as_bytes)).unwrap())
        };
        for name in ["com", "co.uk", "github.io"] {
            assert!(is_public(name), "{name}");
        }
        for name in ["example.com", "bbc.co.uk", "cluster.local", "corp"] {
            assert!(!is_public(name), "{name}");
        }
    }
}
