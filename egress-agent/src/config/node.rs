//! The settings for the cluster and the machine.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Deserializer};

use super::{
    read::{self, Word},
    written::value,
};

/// The Unix socket, unless the configuration names another one.
pub const DEFAULT_SOCKET: &str = "/run/egress-agent/agent.sock";

/// Names of interfaces, or of the bridges they are in, that do not belong to pods: those of Docker, libvirt, LXD
/// and Podman, and Cilium's own endpoint.
const NOT_PODS: [&str; 7] = [
    "docker*",
    "br-*",
    "virbr*",
    "vnet*",
    "lxdbr*",
    "podman*",
    "lxc_health",
];

/// Where the agent finds facts of the cluster. Without a cluster these settings have no effect.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Cluster {
    /// Namespace and name of the Service of the cluster's DNS.
    #[serde(deserialize_with = "namespace_and_name")]
    pub dns_service: (String, String),
    /// The kubelet's configuration file, for its `clusterDNS`. It may be missing.
    #[serde(deserialize_with = "read::absolute_path")]
    pub kubelet_config: PathBuf,
    /// The nodes whose pods and addresses are internal.
    #[serde(deserialize_with = "read::word")]
    pub nodes: Nodes,
}

/// The nodes whose pods and addresses are internal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nodes {
    /// All nodes of the cluster.
    All,
    /// The agent's own node.
    Own,
}

impl Word for Nodes {
    const WORDS: &'static [(&'static str, Self)] = &[("all", Self::All), ("own", Self::Own)];
}

/// How an interface is treated whose pod is not known yet.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Quarantine {
    /// Whether it is closed to the outside.
    #[serde(deserialize_with = "read::boolean")]
    pub enabled: bool,
    /// Patterns (`*` stands for any text) of interfaces that do not belong to pods. They are compared with the
    /// interface's name and with the name of the bridge it is in.
    #[serde(deserialize_with = "read::texts")]
    pub exclude: Vec<String>,
}

/// Where the agent answers questions about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serve {
    /// Address and port of `/healthz`, `/readyz` and `/metrics`; `None` if they are not served.
    pub http: Option<SocketAddr>,
    /// The Unix socket of `egress-agent status` and `explain`.
    pub socket: PathBuf,
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            dns_service: ("kube-system".into(), "kube-dns".into()),
            kubelet_config: "/var/lib/kubelet/config.yaml".into(),
            nodes: Nodes::All,
        }
    }
}

impl Default for Quarantine {
    fn default() -> Self {
        Self {
            enabled: true,
            exclude: NOT_PODS.map(str::to_owned).to_vec(),
        }
    }
}

impl Default for Serve {
    fn default() -> Self {
        Self {
            http: None,
            socket: DEFAULT_SOCKET.into(),
        }
    }
}

fn namespace_and_name<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<(String, String), D::Error> {
    value(deserializer, |written| {
        match written.text()?.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
                Ok((namespace.to_owned(), name.to_owned()))
            }
            _ => Err(
                "is not a namespace and a name: expected, for example, kube-system/kube-dns".into(),
            ),
        }
    })
}
