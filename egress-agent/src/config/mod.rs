//! The agent's configuration file.
//!
//! Everything has a default; without a cluster that says them, all but the resolvers:
//!
//! ```yaml
//! node: node-1                  # default: $NODE_NAME, or the machine's name
//! defaultMode: off              # off | audit | enforce: pods without annotations
//! podAnnotations: grant         # grant | narrow | ignore: what a pod's own annotations may do
//! onDeny: drop                  # drop | reject
//! bpffs: /sys/fs/bpf
//! ranges:
//!   internal: [10.0.0.0/8]      # pod, service and node addresses; default: none
//!   allowInternal: true         # internal addresses pass unless denied
//!   protected: [192.0.2.0/24]   # besides the built-in ones; default: none
//! dns:
//!   resolvers: [10.96.0.10]     # addresses; no default
//!   clusterDomain: cluster.local
//!   minTtl: 60                  # seconds, or 90s, 5m, 24h, 7d
//!   maxTtl: 24h
//!   grace: 30s
//!   guard: true                 # refuse questions for names that no entry could allow
//!   refusal: nxdomain           # nxdomain | refused
//! limits:
//!   addressesPerPod: 4096
//!   flowsPerPod: 16384
//! cluster:                      # where Kubernetes has what the agent asks it for
//!   dnsService: kube-system/kube-dns
//!   kubeletConfig: /var/lib/kubelet/config.yaml
//! quarantine:                   # interfaces whose pods are not known yet; only in a cluster
//!   enabled: true
//!   exclude: [docker*, br-*]
//! http: 127.0.0.1:9465          # /healthz, /readyz, /metrics; default: not served
//! socket: /run/egress-agent/agent.sock
//! ```
//!
//! A resolver may lie in a protected range, as a node-local cache at 169.254.20.10 does: questions
//! to a resolver are judged by the name they ask for, before ranges are looked at. Protection then
//! still holds for its other ports, and for its address as the answer to a question.

mod error;
mod node;
mod protected;
mod read;
mod value;

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;

use egress_common::{
    address::Address,
    limits::{ALLOW_ENTRIES, FLOW_ENTRIES, RANGE_ENTRIES},
    records::{RANGE_INTERNAL, RANGE_PROTECTED, RANGE_RESOLVER},
};

pub use error::{ConfigError, Place};
pub use node::{Cluster, Quarantine, Serve};
pub use protected::PROTECTED;
use read::or;
use value::{Node, Section};

use crate::{
    dns::Name,
    policy::{Mode, PodAnnotations, Prefix, Settings, exact_name, prefix::inherit},
};

/// Most addresses of one pod that can be configured.
const ADDRESSES_PER_POD_MAX: u32 = 1 << 20;

/// Bounds of `limits.flowsPerPod`: the kernel allots 16 bytes and more for each at once.
const FLOWS_PER_POD_MIN: u32 = 64;
const FLOWS_PER_POD_MAX: u32 = 1 << 20;

/// The configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Name of this node: in denial lines, and in the cluster.
    pub node: String,
    /// Mode of pods without annotations.
    pub default_mode: Mode,
    /// What a pod's own annotations may do.
    pub pod_annotations: PodAnnotations,
    /// Kinds of addresses.
    pub ranges: Ranges,
    /// Resolvers and what is made of their answers.
    pub dns: Dns,
    /// What a denied packet gets.
    pub on_deny: OnDeny,
    /// Where the BPF file system is, or is to be, mounted.
    pub bpffs: PathBuf,
    /// Sizes.
    pub limits: Limits,
    /// Where the cluster's own facts are found.
    pub cluster: Cluster,
    /// What becomes of an interface whose pod is not known yet.
    pub quarantine: Quarantine,
    /// Where the agent answers questions about itself.
    pub serve: Serve,
}

/// Kinds of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranges {
    /// Pod, service and node addresses.
    pub internal: Vec<Prefix>,
    /// Whether they pass unless denied.
    pub allow_internal: bool,
    /// Protected prefixes besides [`PROTECTED`].
    pub protected: Vec<Prefix>,
}

/// Resolvers and what is made of their answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dns {
    /// The resolvers that pods may ask, besides those that the cluster names; without a cluster
    /// never empty (see [`Config::check_resolvers`]).
    pub resolvers: Vec<IpAddr>,
    /// Names at or below it may always be asked for.
    pub cluster_domain: Name,
    /// A shorter TTL counts as this.
    pub min_ttl: Duration,
    /// A longer TTL counts as this.
    pub max_ttl: Duration,
    /// How long an address is allowed beyond its TTL.
    pub grace: Duration,
    /// Whether questions for names that no entry could allow are refused.
    pub guard: bool,
    /// How they are refused.
    pub refusal: Refusal,
}

/// The answer to a refused question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// NXDOMAIN: search lists go on to the next name, on glibc and musl alike.
    NxDomain,
    /// REFUSED.
    Refused,
}

/// What a denied packet gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDeny {
    /// Nothing: the program waits for its time-out.
    Drop,
    /// A TCP RST, or ICMP administratively prohibited: the program fails at once.
    Reject,
}

/// Sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most addresses that one pod's allow map holds.
    pub addresses_per_pod: u32,
    /// Most established flows that one pod opens, and that others open to it.
    pub flows_per_pod: u32,
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    ///
    /// When there is none, or see [`Self::from_yaml`]. The file is named.
    pub fn from_file(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the configuration {}", path.display()))?;
        Self::from_yaml(&text).with_context(|| path.display().to_string())
    }

    /// Reads a configuration file's text.
    ///
    /// # Errors
    ///
    /// When it is not YAML, a key is unknown or missing, or a value is not what its key takes. All
    /// but a missing key name their line and column.
    pub fn from_yaml(text: &str) -> Result<Self, ConfigError> {
        let [
            node,
            default_mode,
            pod_annotations,
            ranges,
            dns,
            on_deny,
            bpffs,
            limits,
            cluster,
            quarantine,
            http,
            socket,
        ] = Node::document(text)?.section()?.take([
            "node",
            "defaultMode",
            "podAnnotations",
            "ranges",
            "dns",
            "onDeny",
            "bpffs",
            "limits",
            "cluster",
            "quarantine",
            "http",
            "socket",
        ])?;
        let config = Self {
            node: node.map_or_else(read::node_name, |node| read::filled_text(&node))?,
            default_mode: or(default_mode, Mode::Off, |node| {
                node.word(&[
                    ("off", Mode::Off),
                    ("audit", Mode::Audit),
                    ("enforce", Mode::Enforce),
                ])
            })?,
            pod_annotations: or(pod_annotations, PodAnnotations::Grant, |node| {
                node.word(&[
                    ("grant", PodAnnotations::Grant),
                    ("narrow", PodAnnotations::Narrow),
                    ("ignore", PodAnnotations::Ignore),
                ])
            })?,
            ranges: Ranges::read(read::section(ranges)?)?,
            dns: Dns::read(read::section(dns)?)?,
            on_deny: or(on_deny, OnDeny::Drop, |node| {
                node.word(&[("drop", OnDeny::Drop), ("reject", OnDeny::Reject)])
            })?,
            bpffs: or(bpffs, PathBuf::from("/sys/fs/bpf"), read::absolute_path)?,
            limits: Limits::read(read::section(limits)?)?,
            cluster: Cluster::read(read::section(cluster)?)?,
            quarantine: Quarantine::read(read::section(quarantine)?)?,
            serve: Serve::read(http.as_ref(), socket)?,
        };
        let (count, limit) = (config.ranges().len(), RANGE_ENTRIES as usize);
        if count > limit {
            return Err(ConfigError::Ranges { count, limit });
        }
        Ok(config)
    }

    /// The configuration in which everything has its default.
    ///
    /// # Errors
    ///
    /// When the machine's name, the default of `node`, cannot be found out.
    pub fn default_config() -> Result<Self, ConfigError> {
        Self::from_yaml("")
    }

    /// Checks that there are resolvers: where no cluster names them, the configuration must.
    ///
    /// # Errors
    ///
    /// When there are none.
    pub fn check_resolvers(&self) -> Result<(), ConfigError> {
        if self.dns.resolvers.is_empty() {
            return Err(ConfigError::Missing {
                key: "dns.resolvers",
                message: "a pod learns addresses only from the answers of the resolvers listed \
                          here; list the addresses in the pods' /etc/resolv.conf, such as the \
                          cluster IP of kube-dns",
            });
        }
        Ok(())
    }

    /// What the configuration says about every policy.
    pub fn policy_settings(&self) -> Settings {
        Settings {
            default_mode: self.default_mode,
            pod_annotations: self.pod_annotations,
            cluster_domain: self.dns.cluster_domain.clone(),
            guard: self.dns.guard,
            allow_internal: self.ranges.allow_internal,
            protected: self.protected().collect(),
        }
    }

    /// The entries of the kernel's `ranges` map: network (IPv4 in mapped form), prefix length in
    /// bits of the 128-bit form, and the `RANGE_*` bits of the prefix and of all that contain it.
    pub fn ranges(&self) -> Vec<(Address, u32, u64)> {
        let own = self
            .protected()
            .map(|prefix| (prefix, RANGE_PROTECTED))
            .chain(
                self.ranges
                    .internal
                    .iter()
                    .map(|prefix| (*prefix, RANGE_INTERNAL)),
            )
            .chain(
                self.dns
                    .resolvers
                    .iter()
                    .map(|ip| (Prefix::host(*ip), RANGE_RESOLVER)),
            );
        inherit(own)
            .into_iter()
            .map(|(prefix, kinds)| (prefix.network(), prefix.prefix_len(), kinds))
            .collect()
    }

    /// Every protected prefix, with what a NAT64 translator would make of the IPv4 ones.
    fn protected(&self) -> impl Iterator<Item = Prefix> {
        protected::built_in()
            .chain(self.ranges.protected.iter().copied())
            .flat_map(|prefix| [Some(prefix), protected::nat64_image(&prefix)])
            .flatten()
    }
}

impl Ranges {
    fn read(section: Section) -> Result<Self, ConfigError> {
        let [internal, allow_internal, protected] =
            section.take(["internal", "allowInternal", "protected"])?;
        Ok(Self {
            internal: read::list(internal, read::prefix)?,
            allow_internal: or(allow_internal, true, Node::truth)?,
            protected: read::list(protected, read::prefix)?,
        })
    }
}

impl Dns {
    fn read(section: Section) -> Result<Self, ConfigError> {
        let [
            resolvers,
            cluster_domain,
            min_ttl,
            max_ttl,
            grace,
            guard,
            refusal,
        ] = section.take([
            "resolvers",
            "clusterDomain",
            "minTtl",
            "maxTtl",
            "grace",
            "guard",
            "refusal",
        ])?;
        let mut resolvers = read::list(resolvers, read::resolver)?;
        resolvers.sort_unstable();
        resolvers.dedup();
        let cluster_domain = match cluster_domain {
            None => exact_name("cluster.local").expect("the default is a name"),
            Some(node) => exact_name(node.text()?).map_err(|message| node.error(message))?,
        };
        let min = min_ttl
            .as_ref()
            .map_or(Ok(Duration::from_secs(60)), read::duration)?;
        let max = max_ttl
            .as_ref()
            .map_or(Ok(Duration::from_secs(24 * 3600)), read::duration)?;
        if min > max {
            return Err(match min_ttl.or(max_ttl) {
                Some(node) => node.error(format!(
                    "leaves dns.minTtl, {} s, above dns.maxTtl, {} s",
                    min.as_secs(),
                    max.as_secs()
                )),
                None => unreachable!("the defaults are in order"),
            });
        }
        Ok(Self {
            resolvers,
            cluster_domain,
            min_ttl: min,
            max_ttl: max,
            grace: or(grace, Duration::from_secs(30), read::duration)?,
            guard: or(guard, true, Node::truth)?,
            refusal: or(refusal, Refusal::NxDomain, |node| {
                node.word(&[
                    ("nxdomain", Refusal::NxDomain),
                    ("refused", Refusal::Refused),
                ])
            })?,
        })
    }
}

impl Limits {
    fn read(section: Section) -> Result<Self, ConfigError> {
        let [addresses_per_pod, flows_per_pod] =
            section.take(["addressesPerPod", "flowsPerPod"])?;
        let addresses_per_pod = or(addresses_per_pod, ALLOW_ENTRIES, |node| {
            read::count(node, 1, ADDRESSES_PER_POD_MAX)
        })?;
        let flows_per_pod = or(flows_per_pod, FLOW_ENTRIES, |node| {
            read::count(node, FLOWS_PER_POD_MIN, FLOWS_PER_POD_MAX)
        })?;
        Ok(Self {
            addresses_per_pod,
            flows_per_pod,
        })
    }
}

#[cfg(test)]
mod tests;
