//! How single values are written.

use std::{fs, net::IpAddr, path::PathBuf, time::Duration};

use super::{
    error::ConfigError,
    value::{Node, Section},
};
use egress_common::translation;
use egress_policy::{InternalAnswers, Prefix, Resolver, name_pattern};

/// Most names that may lead to internal addresses: each answer is compared with all of them.
const INTERNAL_ANSWERS: usize = 256;

/// Longest duration in seconds: that of a TTL (RFC 2181, section 8).
const SECONDS_MAX: u32 = i32::MAX as u32;

/// The value, or its default when the key is not there.
pub(super) fn or<T>(
    node: Option<Node>,
    default: T,
    read: impl FnOnce(&Node) -> Result<T, ConfigError>,
) -> Result<T, ConfigError> {
    node.map_or(Ok(default), |node| read(&node))
}

pub(super) fn section(node: Option<Node>) -> Result<Section, ConfigError> {
    node.map_or_else(|| Ok(Section::absent()), Node::section)
}

pub(super) fn list<T>(
    node: Option<Node>,
    read: impl Fn(&Node) -> Result<T, ConfigError>,
) -> Result<Vec<T>, ConfigError> {
    let Some(node) = node else {
        return Ok(Vec::new());
    };
    node.list()?.iter().map(read).collect()
}

/// A text that is not empty.
pub(super) fn filled_text(node: &Node) -> Result<String, ConfigError> {
    let text = node.text()?;
    if text.trim().is_empty() {
        return Err(node.error("is empty"));
    }
    Ok(text.to_owned())
}

pub(super) fn absolute_path(node: &Node) -> Result<PathBuf, ConfigError> {
    let path = PathBuf::from(node.text()?);
    if !path.is_absolute() {
        return Err(node.error("is not an absolute path"));
    }
    Ok(path)
}

pub(super) fn prefix(node: &Node) -> Result<Prefix, ConfigError> {
    Prefix::parse(node.text()?).map_err(|error| node.error(error))
}

/// A NAT64 prefix.
pub(super) fn nat64(node: &Node) -> Result<Prefix, ConfigError> {
    let prefix = prefix(node)?;
    if prefix.is_v4() || !translation::NAT64.contains(&prefix.prefix_len()) {
        return Err(node.error(
            "is not a NAT64 prefix: expected an IPv6 prefix of 32, 40, 48, 56, 64 or 96 bits \
             (RFC 6052, section 2.2)",
        ));
    }
    if prefix.network()[8] != 0 {
        return Err(
            node.error("is not a NAT64 prefix: bits 64 to 71 must be zero (RFC 6052, section 2.2)")
        );
    }
    Ok(prefix)
}

pub(super) fn resolver(node: &Node) -> Result<Resolver, ConfigError> {
    let Ok(resolver) = node.text()?.parse::<Resolver>() else {
        return Err(node.error(
            "is not an IP address: expected one, alone or with a port, such as 10.1.0.2:5353 or \
             '[fd00::1]:5353', and no name",
        ));
    };
    let address = resolver.address;
    if matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some()) {
        return Err(node.error("is an IPv4-mapped IPv6 address: write the IPv4 address"));
    }
    if address.is_unspecified() || address.is_multicast() {
        return Err(node.error("is not the address of a machine"));
    }
    if address.is_loopback() {
        return Err(node.error(
            "is a loopback address, which is each pod's own: expected the address that the pods' \
             resolv.conf has",
        ));
    }
    if matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
        return Err(node.error(
            "is a link-local address, which pods cannot ask from their own addresses: expected one that is \
             routed",
        ));
    }
    Ok(resolver)
}

/// `all`, or names and wildcards.
pub(super) fn internal_answers(node: Option<Node>) -> Result<InternalAnswers, ConfigError> {
    let Some(node) = node else {
        return Ok(InternalAnswers::Names(Vec::new()));
    };
    if node.text().is_ok_and(|text| text == "all") {
        return Ok(InternalAnswers::All);
    }
    let list = node
        .list_or("expected `all`, or a list of names such as [corp.example, '*.corp.example']")?;
    if list.len() > INTERNAL_ANSWERS {
        return Err(list[INTERNAL_ANSWERS].error(format!(
            "is one name too many: the limit is {INTERNAL_ANSWERS}"
        )));
    }
    let pattern = |node: &Node| name_pattern(node.text()?).map_err(|message| node.error(message));
    let mut patterns = list.iter().map(pattern).collect::<Result<Vec<_>, _>>()?;
    patterns.sort_unstable();
    patterns.dedup();
    Ok(InternalAnswers::Names(patterns))
}

/// Seconds, or a number with a unit: `60`, `60s`, `5m`, `24h`, `7d`.
pub(super) fn duration(node: &Node) -> Result<Duration, ConfigError> {
    let seconds = match node.integer() {
        Some(seconds) => u32::try_from(seconds).ok(),
        None => node.text().ok().and_then(seconds),
    };
    match seconds {
        Some(seconds) if seconds <= SECONDS_MAX => Ok(Duration::from_secs(seconds.into())),
        _ => Err(node.error(format!(
            "is not a duration: expected seconds, or a number with s, m, h or d, of at most \
             {SECONDS_MAX} seconds"
        ))),
    }
}

fn seconds(text: &str) -> Option<u32> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let unit = match &text[digits..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return None,
    };
    text[..digits].parse::<u32>().ok()?.checked_mul(unit)
}

/// An integer within bounds, both inclusive.
pub(super) fn count(node: &Node, min: u32, max: u32) -> Result<u32, ConfigError> {
    node.integer()
        .and_then(|count| u32::try_from(count).ok())
        .filter(|count| (min..=max).contains(count))
        .ok_or_else(|| node.error(format!("is not a number from {min} to {max}")))
}

/// The node's name: what a `DaemonSet` passes in `NODE_NAME` (from `spec.nodeName`), or the machine's.
pub(super) fn node_name() -> Result<String, ConfigError> {
    match std::env::var("NODE_NAME") {
        Ok(name) if !name.trim().is_empty() => Ok(name.trim().to_owned()),
        _ => hostname(),
    }
}

fn hostname() -> Result<String, ConfigError> {
    let name =
        fs::read_to_string("/proc/sys/kernel/hostname").map_err(|error| ConfigError::Hostname {
            message: error.to_string(),
        })?;
    Ok(name.trim().to_owned())
}
