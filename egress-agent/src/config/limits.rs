//! Sizes and times that bound what a pod can have: `limits`.

use std::time::Duration;

use egress_common::{
    flow::UDP_NS,
    limits::{ALLOW_ENTRIES, FLOW_ENTRIES},
};

use super::{
    ConfigError, or, read,
    value::{Node, Section},
};

/// Most addresses of one pod that can be configured.
const ADDRESSES_PER_POD_MAX: u32 = 1 << 20;

/// Bounds of `limits.flowsPerPod`: the kernel allots 16 bytes and more for each at once.
const FLOWS_PER_POD_MIN: u32 = 64;
const FLOWS_PER_POD_MAX: u32 = 1 << 20;

/// Bounds of `limits.udpIdle`.
const UDP_IDLE_MIN: Duration = Duration::from_secs(60);
const UDP_IDLE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Sizes and times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most addresses that one pod's allow map holds.
    pub addresses_per_pod: u32,
    /// Most established flows that one pod opens, and that others open to it.
    pub flows_per_pod: u32,
    /// How long a UDP flow that a pod opened may be idle before it is forgotten.
    pub udp_idle: Duration,
}

impl Limits {
    pub(super) fn read(section: Section) -> Result<Self, ConfigError> {
        let [addresses_per_pod, flows_per_pod, udp_idle] =
            section.take(["addressesPerPod", "flowsPerPod", "udpIdle"])?;
        Ok(Self {
            addresses_per_pod: or(addresses_per_pod, ALLOW_ENTRIES, |node| {
                read::count(node, 1, ADDRESSES_PER_POD_MAX)
            })?,
            flows_per_pod: or(flows_per_pod, FLOW_ENTRIES, |node| {
                read::count(node, FLOWS_PER_POD_MIN, FLOWS_PER_POD_MAX)
            })?,
            udp_idle: or(udp_idle, Duration::from_nanos(UDP_NS), udp_idle_of)?,
        })
    }
}

fn udp_idle_of(node: &Node) -> Result<Duration, ConfigError> {
    let idle = read::duration(node)?;
    if (UDP_IDLE_MIN..=UDP_IDLE_MAX).contains(&idle) {
        return Ok(idle);
    }
    Err(node.error("is not a duration from 1m to 24h"))
}
