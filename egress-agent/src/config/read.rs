//! Readers of single values.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use serde::Deserializer;

use super::{
    ConfigError, ExistingConnections, OnDeny, UnenforcedInterfaces,
    written::{Written, list, value},
};
use egress_policy::{Mode, PodAnnotations, Prefix};

/// Longest duration in seconds: that of a TTL (RFC 2181, section 8).
const SECONDS_MAX: u32 = i32::MAX as u32;

/// A choice between words.
pub(super) trait Word: Copy + 'static {
    /// The words, and what each means.
    const WORDS: &'static [(&'static str, Self)];
}

impl Word for Mode {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("off", Self::Off),
        ("audit", Self::Audit),
        ("enforce", Self::Enforce),
    ];
}

impl Word for PodAnnotations {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("grant", Self::Grant),
        ("narrow", Self::Narrow),
        ("ignore", Self::Ignore),
    ];
}

impl Word for OnDeny {
    const WORDS: &'static [(&'static str, Self)] =
        &[("drop", Self::Drop), ("reject", Self::Reject)];
}

impl Word for UnenforcedInterfaces {
    const WORDS: &'static [(&'static str, Self)] =
        &[("report", Self::Report), ("refuse", Self::Refuse)];
}

impl Word for ExistingConnections {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("judge", Self::Judge),
        ("trust", Self::Trust),
        ("end", Self::End),
    ];
}

/// One of the words of a choice.
pub(super) fn word<'de, D: Deserializer<'de>, T: Word>(deserializer: D) -> Result<T, D::Error> {
    value(deserializer, |written| {
        let found = match written {
            Written::Text(text) => T::WORDS.iter().find(|(word, _)| word == text),
            _ => None,
        };
        found.map(|(_, meaning)| *meaning).ok_or_else(|| {
            let words: Vec<&str> = T::WORDS.iter().map(|(word, _)| *word).collect();
            format!("is not one of {}", words.join(", "))
        })
    })
}

/// `true` or `false`.
pub(super) fn boolean<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    value(deserializer, |written| match written {
        Written::Bool(value) => Ok(*value),
        _ => Err("is neither true nor false".into()),
    })
}

/// A text that is not empty.
pub(super) fn filled_text(written: &Written) -> Result<String, String> {
    let text = written.text()?;
    if text.trim().is_empty() {
        return Err("is empty".into());
    }
    Ok(text.to_owned())
}

/// The same, for a key without a default.
pub(super) fn some_text<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    value(deserializer, filled_text).map(Some)
}

/// A list of texts that are not empty.
pub(super) fn texts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    list(deserializer, filled_text)
}

/// A path that begins with `/`.
pub(super) fn absolute_path<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<PathBuf, D::Error> {
    value(deserializer, |written| {
        let path = PathBuf::from(written.text()?);
        if !path.is_absolute() {
            return Err("is not an absolute path".into());
        }
        Ok(path)
    })
}

/// An address and a port, for a key without a default.
pub(super) fn some_socket_address<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<SocketAddr>, D::Error> {
    value(deserializer, |written| {
        written.text()?.parse().map(Some).map_err(|_| {
            "is not an address and a port: expected, for example, 127.0.0.1:9465 or '[::]:9465'"
                .into()
        })
    })
}

/// An IP prefix or a single address.
pub(super) fn prefix(written: &Written) -> Result<Prefix, String> {
    Prefix::parse(written.text()?).map_err(|error| error.to_string())
}

/// A list of prefixes.
pub(super) fn prefixes<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<Prefix>, D::Error> {
    list(deserializer, prefix)
}

/// Seconds, or a number with a unit: `60`, `60s`, `5m`, `24h`, `7d`.
pub(super) fn duration(written: &Written) -> Result<Duration, String> {
    let seconds = match written {
        Written::Integer(seconds) => u32::try_from(*seconds).ok(),
        Written::Text(text) => seconds(text),
        _ => None,
    };
    match seconds {
        Some(seconds) if seconds <= SECONDS_MAX => Ok(Duration::from_secs(seconds.into())),
        _ => Err(format!(
            "is not a duration: expected seconds, or a number with s, m, h or d, of at most {SECONDS_MAX} seconds"
        )),
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
pub(super) fn count<'de, D: Deserializer<'de>>(
    deserializer: D,
    min: u32,
    max: u32,
) -> Result<u32, D::Error> {
    value(deserializer, |written| {
        let count = match written {
            Written::Integer(count) => u32::try_from(*count).ok(),
            _ => None,
        };
        count
            .filter(|count| (min..=max).contains(count))
            .ok_or_else(|| format!("is not a number from {min} to {max}"))
    })
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
