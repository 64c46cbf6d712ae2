//! The agent's configuration file.
//!
//! Every key has a default, but for `dns.resolvers` where no cluster names resolvers:
//!
//! ```yaml
//! node: node-1                  # default: $NODE_NAME, or the machine's name
//! defaultMode: off              # off | audit | enforce: pods without annotations
//! podAnnotations: grant         # grant | narrow | ignore: what a pod's own annotations may do
//! onDeny: drop                  # drop | reject
//! unenforcedInterfaces: report  # report | refuse: pods with an interface that nothing can enforce
//! existingConnections: judge    # judge | trust | end: connections from before a pod was enforced
//! stateDir: /var/lib/egress-agent
//! bpffs: /sys/fs/bpf
//! ranges:
//!   internal: [10.0.0.0/8]      # pod, service and node addresses; default: none
//!   allowInternal: true         # internal addresses pass unless denied
//!   tunnels: [other, 4789/udp]  # denied to internal addresses without an address entry
//!   protected: [192.0.2.0/24]   # besides the built-in ones; default: none
//!   nat64: ["2001:db8:64::/96"] # besides 64:ff9b::/96; default: none
//! dns:
//!   resolvers: [10.96.0.10]     # 10.1.0.2:5353 with another port than 53; no default
//!   clusterDomain: cluster.local
//!   minTtl: 60                  # seconds, or 90s, 5m, 24h, 7d
//!   maxTtl: 24h
//!   grace: 30s
//!   internalAnswers: []         # names that may lead to internal addresses, or all
//!   guard: true                 # refuse queries for names that no entry could allow
//!   autopath: auto              # auto | on | off: whether resolvers walk search lists
//!   learn: kernel               # kernel | agent: who reads responses to names that are decided
//!   refusal: nxdomain           # nxdomain | refused
//! whenAgentDown:                # DNS while no agent runs
//!   resolveFor: 24h             # names that are decided resolve for this long
//!   undecided: hold             # hold | deliver: all other DNS
//! limits:
//!   addressesPerPod: 4096
//!   flowsPerPod: 16384
//!   udpIdle: 5m                 # 1m to 24h: a UDP flow that a pod opened is forgotten after
//! cluster:                      # where Kubernetes has what the agent asks it for
//!   dnsService: kube-system/kube-dns
//!   kubeletConfig: /var/lib/kubelet/config.yaml
//!   nodes: all                     # all | own: whose pods and addresses are internal
//! quarantine:                   # interfaces whose pods are not known yet; only in a cluster
//!   enabled: true
//!   exclude: [docker*, br-*]
//! http: 127.0.0.1:9465          # /healthz, /readyz, /metrics; default: not served
//! socket: /run/egress-agent/agent.sock
//! ```
//!
//! A resolver may be in a protected range, such as a node-local cache at 169.254.20.10: a query is judged by its
//! name, before ranges are looked up. The resolver's other ports stay protected, and so does its address in a
//! response.
//!
//! `file` has the keys, and turns serde's errors into [`ConfigError`]. `written` and `read` read single values. Each
//! section of the file has a module.

mod dns;
mod error;
mod file;
mod limits;
mod node;
mod protected;
mod ranges;
mod read;
mod tunnels;
mod when_agent_down;
mod written;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;

use egress_common::{
    address::Address,
    limits::{RANGE_ENTRIES, RESOLVER_PORTS},
    records::{RANGE_INTERNAL, RANGE_PROTECTED, RANGE_RESOLVER, RANGE_SERVICES, Range, TunnelKey},
    translation::range_kind,
};

pub use dns::{Dns, Learn, Refusal};
pub use error::{ConfigError, Place};
use file::File;
pub use limits::Limits;
pub use node::{Cluster, DEFAULT_SOCKET, Nodes, Quarantine, Serve};
pub use protected::PROTECTED;
pub use ranges::Ranges;
pub use tunnels::{TUNNELS, Tunnel};
pub use when_agent_down::{Undecided, WhenAgentDown};

use egress_policy::{Mode, PodAnnotations, Prefix, Settings, prefix::inherit, services::Places};

/// The configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Name of this node: in denial lines, and in the cluster.
    pub node: String,
    /// Mode of pods without annotations.
    pub default_mode: Mode,
    /// The power of a pod's own annotations.
    pub pod_annotations: PodAnnotations,
    /// Kinds of addresses.
    pub ranges: Ranges,
    /// Resolvers, and how their responses are handled.
    pub dns: Dns,
    /// How DNS is treated while no agent runs.
    pub when_agent_down: WhenAgentDown,
    /// How a denied packet is answered.
    pub on_deny: OnDeny,
    /// How a pod is treated that has an interface which cannot be enforced.
    pub unenforced_interfaces: UnenforcedInterfaces,
    /// How connections are treated that pods opened before they were enforced.
    pub existing_connections: ExistingConnections,
    /// Where the agent keeps state that has to survive a reboot.
    pub state_dir: PathBuf,
    /// Where the BPF file system is mounted, or where the agent mounts it.
    pub bpffs: PathBuf,
    /// Sizes.
    pub limits: Limits,
    /// Where the agent finds facts of the cluster.
    pub cluster: Cluster,
    /// How an interface is treated whose pod is not known yet.
    pub quarantine: Quarantine,
    /// Where the agent answers questions about itself.
    pub serve: Serve,
}

/// How a denied packet is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDeny {
    /// Nothing: the program waits until its own time-out.
    Drop,
    /// A TCP RST, or ICMP administratively prohibited: the program fails at once.
    Reject,
}

/// How a pod is treated that has, besides enforced interfaces, one that cannot be enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnenforcedInterfaces {
    /// It is reported.
    Report,
    /// It is reported, and nothing leaves by the interfaces that are enforced.
    Refuse,
}

/// How connections are treated that were open before a pod was enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExistingConnections {
    /// The pod's policy judges those that the pod opened; those that others opened are kept.
    Judge,
    /// All are kept, once on each node.
    Trust,
    /// The pod's policy judges all of them.
    End,
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or see [`Self::from_yaml`]. The error names the file.
    pub fn from_file(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the configuration {}", path.display()))?;
        Self::from_yaml(&text).with_context(|| path.display().to_string())
    }

    /// Reads the text of a configuration file.
    ///
    /// # Errors
    ///
    /// When the text is not YAML, a key is unknown, or a value is not what its key takes. The error names line
    /// and column. When there are too many ranges, or the machine's name, the default of `node`, cannot be read.
    pub fn from_yaml(text: &str) -> Result<Self, ConfigError> {
        let file = File::parse(text)?;
        let config = Self {
            node: file.node.map_or_else(read::node_name, Ok)?,
            default_mode: file.default_mode,
            pod_annotations: file.pod_annotations,
            ranges: file.ranges,
            dns: file.dns.try_into()?,
            when_agent_down: file.when_agent_down,
            on_deny: file.on_deny,
            unenforced_interfaces: file.unenforced_interfaces,
            existing_connections: file.existing_connections,
            state_dir: file.state_dir,
            bpffs: file.bpffs,
            limits: file.limits,
            cluster: file.cluster,
            quarantine: file.quarantine,
            serve: Serve {
                http: file.http,
                socket: file.socket,
            },
        };
        let (count, limit) = (config.ranges().len(), RANGE_ENTRIES as usize);
        if count > limit {
            return Err(ConfigError::Ranges { count, limit });
        }
        Ok(config)
    }

    /// The configuration in which every key has its default.
    ///
    /// # Errors
    ///
    /// When the machine's name, the default of `node`, cannot be read.
    pub fn default_config() -> Result<Self, ConfigError> {
        Self::from_yaml("")
    }

    /// Checks that there are resolvers. Where no cluster names them, the configuration must.
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

    /// The settings that every policy is compiled with.
    pub fn policy_settings(&self) -> Settings {
        Settings {
            default_mode: self.default_mode,
            pod_annotations: self.pod_annotations,
            cluster_domain: self.dns.cluster_domain.clone(),
            internal_answers: Arc::clone(&self.dns.internal_answers),
            guard: self.dns.guard,
            allow_internal: self.ranges.allow_internal,
            protected: self.protected().collect(),
            translators: self.ranges.translators.clone(),
        }
    }

    /// The entries of the kernel's `ranges` map: the network (IPv4 in mapped form), the prefix length in bits of
    /// the 128-bit form, and the kinds of the prefix, with those that it inherits from wider prefixes.
    pub fn ranges(&self) -> Vec<(Address, u32, Range)> {
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
                self.ranges
                    .services
                    .iter()
                    .map(|prefix| (*prefix, RANGE_INTERNAL | RANGE_SERVICES)),
            )
            .chain(
                self.dns
                    .resolvers
                    .iter()
                    .map(|resolver| (Prefix::host(resolver.address), RANGE_RESOLVER)),
            )
            .chain(
                self.ranges
                    .translators
                    .prefixes()
                    .iter()
                    .map(|prefix| (*prefix, range_kind(prefix.prefix_len()))),
            );
        inherit(own)
            .into_iter()
            .map(|(prefix, kinds)| {
                let resolver_ports = self.ports_of(&prefix);
                let range = Range {
                    kinds,
                    resolver_ports,
                };
                (prefix.network(), prefix.prefix_len(), range)
            })
            .collect()
    }

    /// The ranges without the entries of resolvers.
    pub fn ranges_without_resolvers(&self) -> Vec<(Address, u32, Range)> {
        let mut config = self.clone();
        config.dns.resolvers.clear();
        config.ranges()
    }

    /// The ports on which the resolver with this address is asked.
    fn ports_of(&self, host: &Prefix) -> [u16; RESOLVER_PORTS] {
        let mut ports = [0; RESOLVER_PORTS];
        let resolvers = self.dns.resolvers.iter();
        let of_host = resolvers.filter(|resolver| Prefix::host(resolver.address) == *host);
        for (slot, resolver) in ports.iter_mut().zip(of_host) {
            *slot = resolver.port;
        }
        ports
    }

    /// The entries of the kernel's `tunnels` map.
    pub fn tunnels(&self) -> Vec<TunnelKey> {
        let tunnels = self.ranges.tunnels.iter();
        tunnels.map(|tunnel| tunnel.key()).collect()
    }

    /// The kinds of addresses, for what policies say of Services.
    pub fn places(&self) -> Places {
        let of_services = &self.ranges.services;
        let is_of_services =
            |prefix: &&Prefix| of_services.iter().any(|services| services.covers(prefix));
        let internal = self.ranges.internal.iter();
        let others = internal.filter(|prefix| !is_of_services(prefix));
        Places::new(self.ranges(), self.tunnels(), others.copied().collect())
    }

    /// Every protected prefix. NAT64 addresses of the IPv4 ones are protected too.
    fn protected(&self) -> impl Iterator<Item = Prefix> {
        protected::built_in().chain(self.ranges.protected.iter().copied())
    }
}

#[cfg(test)]
mod tests;
