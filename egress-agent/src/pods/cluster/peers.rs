//! The peers of rules: addresses of nodes and pods.

use std::{collections::HashMap, net::IpAddr};

use egress_api::{Labels, NamedPort, PeerPod, Peers, Selector};
use kube::core::{Object, ObjectMeta};
use serde::{Deserialize, Serialize};

use super::{facts::NodeFacts, namespace::Namespace, table::Table};
use crate::config::Nodes;

/// Labels in one allocation: there may be those of very many pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct CompactLabels(Box<str>);

impl CompactLabels {
    pub(super) fn of(labels: Option<Labels>) -> Self {
        let lines: Vec<String> = labels
            .unwrap_or_default()
            .into_iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        Self(lines.join("\n").into())
    }

    fn labels(&self) -> Labels {
        let pairs = self.0.lines().filter_map(|line| line.split_once('='));
        pairs
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect()
    }
}

/// A pod of the cluster, as far as rules need it.
pub(super) type SlimPod = Object<SlimSpec, SlimStatus>;

/// The part of a pod's specification that rules need.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct SlimSpec {
    host_network: bool,
    containers: Vec<SlimContainer>,
    init_containers: Vec<SlimContainer>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
struct SlimContainer {
    ports: Vec<SlimPort>,
    restart_policy: Option<String>,
}

impl SlimSpec {
    /// The ports of the containers that run as long as the pod: also those that are started before the others and go on
    /// (sidecars).
    fn ports(self) -> impl Iterator<Item = SlimPort> {
        let is_sidecar = |one: &SlimContainer| one.restart_policy.as_deref() == Some("Always");
        let sidecars = self.init_containers.into_iter().filter(is_sidecar);
        let containers = self.containers.into_iter().chain(sidecars);
        containers.flat_map(|one| one.ports)
    }
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
struct SlimPort {
    name: Option<String>,
    container_port: u16,
    protocol: Option<String>,
}

/// The part of a pod's status that rules need.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct SlimStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<SlimIp>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
struct SlimIp {
    ip: String,
}

/// A pod that can be a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PeerFacts {
    namespace: Box<str>,
    labels: CompactLabels,
    pod: PeerPod,
}

impl PeerFacts {
    /// Reduces a pod; `None` for one that is no peer: it has ended, or has no address of its own.
    pub(super) fn read(read: SlimPod) -> Option<Self> {
        let SlimStatus {
            phase,
            pod_ip,
            pod_ips,
        } = read.status?;
        if read.spec.host_network || matches!(phase.as_deref(), Some("Succeeded" | "Failed")) {
            return None;
        }
        let texts = pod_ips.into_iter().map(|ip| ip.ip).chain(pod_ip);
        let mut addresses: Vec<IpAddr> = texts.filter_map(|text| text.parse().ok()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        if addresses.is_empty() {
            return None;
        }
        let ports = read.spec.ports();
        let ObjectMeta {
            namespace, labels, ..
        } = read.metadata;
        Some(Self {
            namespace: namespace?.into(),
            labels: CompactLabels::of(labels),
            pod: PeerPod {
                addresses,
                ports: ports.filter_map(SlimPort::named).collect(),
            },
        })
    }
}

impl SlimPort {
    fn named(self) -> Option<NamedPort> {
        let protocol = match self.protocol.as_deref().unwrap_or("TCP") {
            "TCP" => "tcp",
            "UDP" => "udp",
            "SCTP" => "sctp",
            _ => return None,
        };
        Some(NamedPort {
            name: self.name?,
            protocol,
            port: Some(self.container_port).filter(|port| *port != 0)?,
        })
    }
}

/// The tables that peers are from, besides that of the pods.
#[derive(Clone, Copy)]
pub(super) struct PeersOf<'a> {
    pub(super) nodes: &'a Table<NodeFacts>,
    pub(super) which_nodes: Nodes,
    pub(super) namespaces: &'a Table<Namespace>,
}

/// The peers in the tables.
pub(super) struct ClusterPeers<'a> {
    pub(super) of: PeersOf<'a>,
    pub(super) pods: &'a Table<PeerFacts>,
}

impl Peers for ClusterPeers<'_> {
    fn nodes(&self, nodes: &Selector) -> Result<Vec<IpAddr>, String> {
        if self.of.which_nodes == Nodes::Own {
            return Err(
                "the addresses of other nodes are not known, because the configuration says cluster.nodes: own"
                    .to_owned(),
            );
        }
        if !self.of.nodes.is_complete() {
            return Err("the cluster's nodes are not known".to_owned());
        }
        let selected = self.of.nodes.values();
        let selected = selected.filter(|node| nodes.selects(&node.labels.labels()));
        Ok(selected
            .flat_map(|node| node.all_addresses.iter().copied())
            .collect())
    }

    fn pods(&self, namespaces: &Selector, pods: &Selector) -> Result<Vec<PeerPod>, String> {
        if !self.pods.is_complete() {
            return Err("the cluster's pods are not known".to_owned());
        }
        if let Some(limit) = self.pods.exceeded() {
            return Err(format!(
                "the cluster has more pods than the {limit} that rules about pods can have"
            ));
        }
        // Pods of one workload have the same labels.
        let mut decided: HashMap<(&str, &CompactLabels), bool> = HashMap::new();
        let mut selected = Vec::new();
        for peer in self.pods.values() {
            let is_selected = decided
                .entry((&peer.namespace, &peer.labels))
                .or_insert_with(|| {
                    let namespace = self.of.namespaces.get("", &peer.namespace);
                    let is_there =
                        namespace.is_some_and(|namespace| namespaces.selects(&namespace.labels));
                    is_there && pods.selects(&peer.labels.labels())
                });
            if *is_selected {
                selected.push(peer.pod.clone());
            }
        }
        Ok(selected)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(spec: &serde_json::Value, status: &serde_json::Value) -> Option<PeerFacts> {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "shop", "name": "cart", "labels": {"app": "cart", "x": ""}},
            "spec": spec, "status": status,
        });
        PeerFacts::read(serde_json::from_value(pod).expect("a pod"))
    }

    #[test]
    fn a_pod_is_reduced_to_its_addresses_and_named_ports() {
        let containers = json!([
            {"name": "a", "ports": [{"name": "http", "containerPort": 8080}, {"containerPort": 1}]},
            {"name": "b", "ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}]},
        ]);
        let status = json!({
            "phase": "Running",
            "podIP": "10.1.0.2",
            "podIPs": [{"ip": "10.1.0.2"}, {"ip": "fd00::2"}],
        });
        let init_containers = json!([
            {"name": "c", "ports": [{"name": "once", "containerPort": 1}]},
            {"name": "d", "restartPolicy": "Always", "ports": [{"name": "proxy", "containerPort": 15001}]},
        ]);
        let spec = json!({"containers": containers, "initContainers": init_containers});
        let peer = read(&spec, &status).expect("a peer");
        assert_eq!(peer.pod.addresses.len(), 2);
        let ports: Vec<_> = peer
            .pod
            .ports
            .iter()
            .map(|port| (&*port.name, port.protocol, port.port))
            .collect();
        let expected = [
            ("http", "tcp", 8080),
            ("dns", "udp", 53),
            ("proxy", "tcp", 15001),
        ];
        assert_eq!(ports, expected);
        let labels = Labels::from([("app".into(), "cart".into()), ("x".into(), String::new())]);
        assert_eq!(peer.labels.labels(), labels);
    }

    #[test]
    fn a_pod_without_an_address_of_its_own_is_no_peer() {
        let address = json!({"podIP": "10.1.0.2"});
        assert!(read(&json!({}), &address).is_some());
        assert!(read(&json!({"hostNetwork": true}), &address).is_none());
        assert!(read(&json!({}), &json!({})).is_none());
        let ended = json!({"phase": "Succeeded", "podIP": "10.1.0.2"});
        assert!(read(&json!({}), &ended).is_none());
    }
}
