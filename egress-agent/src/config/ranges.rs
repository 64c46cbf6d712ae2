//! Kinds of addresses: `ranges`.

use egress_common::{limits::TUNNELS as TUNNELS_MAX, translation};
use serde::{Deserialize, Deserializer};

use super::{
    TUNNELS, Tunnel, read,
    written::{Written, list},
};
use egress_policy::{Prefix, Translators};

/// Kinds of addresses.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Ranges {
    /// Pod, service and node addresses.
    #[serde(deserialize_with = "read::prefixes")]
    pub internal: Vec<Prefix>,
    /// Those of them that are ranges of Services. The cluster names them, and no configuration.
    #[serde(skip)]
    pub services: Vec<Prefix>,
    /// Whether they pass unless denied.
    #[serde(deserialize_with = "read::boolean")]
    pub allow_internal: bool,
    /// What needs an address entry to internal addresses, because a machine there may unpack it.
    #[serde(deserialize_with = "tunnels")]
    pub tunnels: Vec<Tunnel>,
    /// Protected prefixes besides [`super::PROTECTED`].
    #[serde(deserialize_with = "read::prefixes")]
    pub protected: Vec<Prefix>,
    /// Prefixes of NAT64 translators.
    #[serde(rename = "nat64", deserialize_with = "translators")]
    pub translators: Translators,
}

impl Default for Ranges {
    fn default() -> Self {
        Self {
            internal: Vec::new(),
            services: Vec::new(),
            allow_internal: true,
            tunnels: TUNNELS.iter().map(|(tunnel, _)| *tunnel).collect(),
            protected: Vec::new(),
            translators: Translators::well_known(),
        }
    }
}

fn tunnels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Tunnel>, D::Error> {
    let mut tunnels: Vec<Tunnel> = Vec::new();
    list(deserializer, |written| {
        let tunnel = Tunnel::read(written)?;
        if !tunnels.contains(&tunnel) {
            tunnels.push(tunnel);
        }
        if tunnels.len() > TUNNELS_MAX as usize {
            return Err(format!("is one too many: the limit is {TUNNELS_MAX}"));
        }
        Ok(())
    })?;
    Ok(tunnels)
}

fn translators<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Translators, D::Error> {
    let mut translators = Translators::well_known();
    list(deserializer, |written| {
        let added = translators.add(nat64(written)?);
        added.map_err(|other| format!("overlaps {other}, the prefix of another translator"))
    })?;
    Ok(translators)
}

/// A NAT64 prefix.
fn nat64(written: &Written) -> Result<Prefix, String> {
    let prefix = read::prefix(written)?;
    if prefix.is_v4() || !translation::NAT64.contains(&prefix.prefix_len()) {
        return Err(
            "is not a NAT64 prefix: expected an IPv6 prefix of 32, 40, 48, 56, 64 or 96 bits \
             (RFC 6052, section 2.2)"
                .into(),
        );
    }
    if prefix.network()[8] != 0 {
        return Err(
            "is not a NAT64 prefix: bits 64 to 71 must be zero (RFC 6052, section 2.2)".into(),
        );
    }
    Ok(prefix)
}
