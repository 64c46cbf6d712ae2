//! Limits of a pod: `limits`.

use std::time::Duration;

use egress_common::{
    flow::UDP_NS,
    limits::{ALLOW_ENTRIES, FLOW_ENTRIES},
};
use serde::{Deserialize, Deserializer};

use super::{read, written::value};

/// Most addresses of one pod that can be configured.
const ADDRESSES_PER_POD_MAX: u32 = 1 << 20;

/// Bounds of `limits.flowsPerPod`: the kernel allots 16 bytes and more for each at once.
const FLOWS_PER_POD_MIN: u32 = 64;
const FLOWS_PER_POD_MAX: u32 = 1 << 20;

/// Bounds of `limits.udpIdle`.
const UDP_IDLE_MIN: Duration = Duration::from_secs(60);
const UDP_IDLE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Sizes and times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Limits {
    /// Most addresses that one pod's allow map holds.
    #[serde(deserialize_with = "addresses_per_pod")]
    pub addresses_per_pod: u32,
    /// Most established flows that one pod opens, and that others open to it.
    #[serde(deserialize_with = "flows_per_pod")]
    pub flows_per_pod: u32,
    /// How long a UDP flow that a pod opened may be idle before it is forgotten.
    #[serde(deserialize_with = "udp_idle")]
    pub udp_idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            addresses_per_pod: ALLOW_ENTRIES,
            flows_per_pod: FLOW_ENTRIES,
            udp_idle: Duration::from_nanos(UDP_NS),
        }
    }
}

fn addresses_per_pod<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    read::count(deserializer, 1, ADDRESSES_PER_POD_MAX)
}

fn flows_per_pod<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    read::count(deserializer, FLOWS_PER_POD_MIN, FLOWS_PER_POD_MAX)
}

fn udp_idle<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    value(deserializer, |written| {
        let idle = read::duration(written)?;
        if (UDP_IDLE_MIN..=UDP_IDLE_MAX).contains(&idle) {
            return Ok(idle);
        }
        Err("is not a duration from 1m to 24h".into())
    })
}
