//! What the configuration says about the cluster and the machine.

use std::{net::SocketAddr, path::PathBuf};

use super::{
    error::ConfigError,
    read::{self, or},
    value::{Node, Section},
};

/// Interfaces that are not pods', by their own name or that of the bridge they are in: Docker's,
/// libvirt's, LXD's and Podman's, and Cilium's own endpoint.
const NOT_PODS: [&str; 7] = [
    "docker*",
    "br-*",
    "virbr*",
    "vnet*",
    "lxdbr*",
    "podman*",
    "lxc_health",
];

/// Where the cluster's own facts are found; without a cluster it means nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Namespace and name of the Service of the cluster's DNS.
    pub dns_service: (String, String),
    /// The kubelet's configuration file, for its `clusterDNS`; it need not be there.
    pub kubelet_config: PathBuf,
    /// Of which nodes pods and addresses are internal.
    pub nodes: Nodes,
}

/// Of which nodes pods and addresses are internal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nodes {
    /// Of all nodes of the cluster.
    All,
    /// Of the agent's own node.
    Own,
}

/// What becomes of an interface whose pod is not known yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quarantine {
    /// Whether it is closed to the outside.
    pub enabled: bool,
    /// Patterns (`*` stands for any text) of interfaces that are not pods', compared with the
    /// interface's name and with the name of the bridge it is in.
    pub exclude: Vec<String>,
}

/// Where the agent answers questions about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serve {
    /// Address and port of `/healthz`, `/readyz` and `/metrics`; none when they are not served.
    pub http: Option<SocketAddr>,
    /// The Unix socket of `egress-agent status` and `explain`.
    pub socket: PathBuf,
}

impl Cluster {
    pub(super) fn read(section: Section) -> Result<Self, ConfigError> {
        let [dns_service, kubelet_config, nodes] =
            section.take(["dnsService", "kubeletConfig", "nodes"])?;
        Ok(Self {
            dns_service: or(
                dns_service,
                ("kube-system".into(), "kube-dns".into()),
                namespace_and_name,
            )?,
            kubelet_config: or(
                kubelet_config,
                PathBuf::from("/var/lib/kubelet/config.yaml"),
                read::absolute_path,
            )?,
            nodes: or(nodes, Nodes::All, |node| {
                node.word(&[("all", Nodes::All), ("own", Nodes::Own)])
            })?,
        })
    }
}

impl Quarantine {
    pub(super) fn read(section: Section) -> Result<Self, ConfigError> {
        let [enabled, exclude] = section.take(["enabled", "exclude"])?;
        let exclude = match exclude {
            None => NOT_PODS.map(str::to_owned).to_vec(),
            given => read::list(given, read::filled_text)?,
        };
        Ok(Self {
            enabled: or(enabled, true, Node::truth)?,
            exclude,
        })
    }
}

impl Serve {
    pub(super) fn read(http: Option<&Node>, socket: Option<Node>) -> Result<Self, ConfigError> {
        Ok(Self {
            http: http.map(socket_address).transpose()?,
            socket: or(
                socket,
                PathBuf::from(crate::serve::DEFAULT_PATH),
                read::absolute_path,
            )?,
        })
    }
}

fn namespace_and_name(node: &Node) -> Result<(String, String), ConfigError> {
    match node.text()?.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err(node.error(
            "is not a namespace and a name: expected, for example, \
                             kube-system/kube-dns",
        )),
    }
}

fn socket_address(node: &Node) -> Result<SocketAddr, ConfigError> {
    node.text()?.parse().map_err(|_| {
        node.error(
            "is not an address and a port: expected, for example, \
                                 127.0.0.1:9465 or '[::]:9465'",
        )
    })
}
