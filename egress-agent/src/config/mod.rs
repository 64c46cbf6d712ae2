//! The agent's configuration file.
//!
//! Everything has a default; without a cluster that says them, all but the resolvers:
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
//!   guard: true                 # refuse questions for names that no entry could allow
//!   autopath: auto              # auto | on | off: whether resolvers walk search lists
//!   refusal: nxdomain           # nxdomain | refused
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
//! A resolver may lie in a protected range, as a node-local cache at 169.254.20.10 does: questions
//! to a resolver are judged by the name they ask for, before ranges are looked at. Protection then
//! still holds for its other ports, and for its address as the answer to a question.

mod error;
mod limits;
mod node;
mod protected;
mod read;
mod tunnels;
mod value;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;

use egress_common::{
    address::Address,
    limits::{DNS_PORTS, RANGE_ENTRIES, RESOLVER_PORTS, TUNNELS as TUNNELS_MAX},
    records::{RANGE_INTERNAL, RANGE_PROTECTED, RANGE_RESOLVER, Range, TunnelKey},
    translation::range_kind,
};

pub use error::{ConfigError, Place};
pub use limits::Limits;
pub use node::{Cluster, Nodes, Quarantine, Serve};
pub use protected::PROTECTED;
use read::or;
pub use tunnels::{TUNNELS, Tunnel};
use value::{Node, Section};

use egress_dns::Name;
use egress_policy::{
    Autopath, DNS_PORT, InternalAnswers, Mode, PodAnnotations, Prefix, Resolver, Settings,
    Translators, exact_name, prefix::inherit,
};

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
    /// What becomes of a pod with an interface that cannot be enforced.
    pub unenforced_interfaces: UnenforcedInterfaces,
    /// What becomes of connections that pods have opened before they were enforced.
    pub existing_connections: ExistingConnections,
    /// Where the agent keeps what has to survive a reboot.
    pub state_dir: PathBuf,
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
    /// What needs an address entry to internal addresses, because somebody there may unpack it.
    pub tunnels: Vec<Tunnel>,
    /// Protected prefixes besides [`PROTECTED`].
    pub protected: Vec<Prefix>,
    /// Prefixes of translators.
    pub translators: Translators,
}

/// Resolvers and what is made of their answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dns {
    /// The resolvers that pods may ask, besides those that the cluster names; without a cluster
    /// never empty (see [`Config::check_resolvers`]).
    pub resolvers: Vec<Resolver>,
    /// Names at or below it may always be asked for.
    pub cluster_domain: Name,
    /// A shorter TTL counts as this.
    pub min_ttl: Duration,
    /// A longer TTL counts as this.
    pub max_ttl: Duration,
    /// How long an address is allowed beyond its TTL.
    pub grace: Duration,
    /// Which names may lead to internal addresses, besides those of the cluster.
    pub internal_answers: Arc<InternalAnswers>,
    /// Whether questions for names that no entry could allow are refused.
    pub guard: bool,
    /// Whether resolvers walk search lists.
    pub autopath: Autopath,
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

/// What becomes of a pod with an interface that cannot be enforced, beside those that are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnenforcedInterfaces {
    /// It is reported.
    Report,
    /// It is reported, and nothing leaves by the interfaces that are enforced.
    Refuse,
}

/// What becomes of connections from before a pod was enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExistingConnections {
    /// The pod's policy judges those that the pod has opened; those that others have opened go on.
    Judge,
    /// All go on, once on each node.
    Trust,
    /// The pod's policy judges all of them.
    End,
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
            unenforced_interfaces,
            existing_connections,
            state_dir,
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
            "unenforcedInterfaces",
            "existingConnections",
            "stateDir",
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
            unenforced_interfaces: or(
                unenforced_interfaces,
                UnenforcedInterfaces::Report,
                |node| {
                    node.word(&[
                        ("report", UnenforcedInterfaces::Report),
                        ("refuse", UnenforcedInterfaces::Refuse),
                    ])
                },
            )?,
            existing_connections: or(existing_connections, ExistingConnections::Judge, |node| {
                node.word(&[
                    ("judge", ExistingConnections::Judge),
                    ("trust", ExistingConnections::Trust),
                    ("end", ExistingConnections::End),
                ])
            })?,
            state_dir: or(
                state_dir,
                PathBuf::from("/var/lib/egress-agent"),
                read::absolute_path,
            )?,
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
            internal_answers: Arc::clone(&self.dns.internal_answers),
            guard: self.dns.guard,
            allow_internal: self.ranges.allow_internal,
            protected: self.protected().collect(),
            translators: self.ranges.translators.clone(),
        }
    }

    /// The entries of the kernel's `ranges` map: network (IPv4 in mapped form), prefix length in
    /// bits of the 128-bit form, and what holds for the prefix, and what of it for all that contain it.
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

    /// Every protected prefix. What translators make of the IPv4 ones is protected too.
    fn protected(&self) -> impl Iterator<Item = Prefix> {
        protected::built_in().chain(self.ranges.protected.iter().copied())
    }
}

impl Ranges {
    fn read(section: Section) -> Result<Self, ConfigError> {
        let [internal, allow_internal, tunnels, protected, nat64] =
            section.take(["internal", "allowInternal", "tunnels", "protected", "nat64"])?;
        let tunnels = read_tunnels(tunnels)?;
        let mut translators = Translators::well_known();
        for node in nat64.map_or_else(|| Ok(Vec::new()), Node::list)? {
            let added = translators.add(read::nat64(&node)?);
            added
                .map_err(|other| node.error(format!("overlaps {other}, which leads elsewhere")))?;
        }
        Ok(Self {
            internal: read::list(internal, read::prefix)?,
            allow_internal: or(allow_internal, true, Node::truth)?,
            tunnels,
            protected: read::list(protected, read::prefix)?,
            translators,
        })
    }
}

/// The tunnels listed, or those of [`TUNNELS`].
fn read_tunnels(node: Option<Node>) -> Result<Vec<Tunnel>, ConfigError> {
    let Some(node) = node else {
        return Ok(TUNNELS.iter().map(|(tunnel, _)| *tunnel).collect());
    };
    let mut tunnels: Vec<Tunnel> = Vec::new();
    for node in node.list()? {
        let tunnel = Tunnel::read(&node)?;
        if !tunnels.contains(&tunnel) {
            tunnels.push(tunnel);
        }
        if tunnels.len() > TUNNELS_MAX as usize {
            return Err(node.error(format!("is one too many: the limit is {TUNNELS_MAX}")));
        }
    }
    Ok(tunnels)
}

impl Dns {
    fn read_resolvers(list: Option<Node>) -> Result<Vec<Resolver>, ConfigError> {
        let mut resolvers = Vec::new();
        let mut ports = BTreeSet::new();
        for node in list.map_or_else(|| Ok(Vec::new()), Node::list)? {
            let resolver = read::resolver(&node)?;
            ports.insert(resolver.port);
            if ports.len() > DNS_PORTS {
                return Err(node.error(format!(
                    "is one port too many: resolvers can be asked on {DNS_PORTS} different ports"
                )));
            }
            resolvers.push(resolver);
        }
        resolvers.sort_unstable();
        resolvers.dedup();
        Ok(resolvers)
    }

    /// Adds resolvers, and returns those that cannot be added: their ports would be too many.
    pub fn add_resolvers(&mut self, more: impl IntoIterator<Item = Resolver>) -> Vec<Resolver> {
        let mut ports: BTreeSet<u16> = self.resolvers.iter().map(|known| known.port).collect();
        let mut left_out = Vec::new();
        let mut more: Vec<Resolver> = more.into_iter().collect();
        // The port that all know comes before others.
        more.sort_by_key(|resolver| resolver.port != DNS_PORT);
        for resolver in more {
            if ports.len() >= DNS_PORTS && !ports.contains(&resolver.port) {
                left_out.push(resolver);
            } else {
                ports.insert(resolver.port);
                self.resolvers.push(resolver);
            }
        }
        self.resolvers.sort_unstable();
        self.resolvers.dedup();
        left_out
    }

    fn read(section: Section) -> Result<Self, ConfigError> {
        let [
            resolvers,
            cluster_domain,
            min_ttl,
            max_ttl,
            grace,
            internal_answers,
            guard,
            autopath,
            refusal,
        ] = section.take([
            "resolvers",
            "clusterDomain",
            "minTtl",
            "maxTtl",
            "grace",
            "internalAnswers",
            "guard",
            "autopath",
            "refusal",
        ])?;
        let resolvers = Self::read_resolvers(resolvers)?;
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
            internal_answers: Arc::new(read::internal_answers(internal_answers)?),
            guard: or(guard, true, Node::truth)?,
            autopath: or(autopath, Autopath::Auto, |node| {
                node.word(&[
                    ("auto", Autopath::Auto),
                    ("on", Autopath::On),
                    ("off", Autopath::Off),
                ])
            })?,
            refusal: or(refusal, Refusal::NxDomain, |node| {
                node.word(&[
                    ("nxdomain", Refusal::NxDomain),
                    ("refused", Refusal::Refused),
                ])
            })?,
        })
    }
}

#[cfg(test)]
mod tests;
