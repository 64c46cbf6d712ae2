//! A pod of the cluster, reduced to what enforcement needs.

use std::{net::IpAddr, sync::Arc};

use egress_api::Labels;
use k8s_openapi::api::core::v1;
use serde::Deserialize;

use super::{
    super::{INTERFACE_ANNOTATION, Pod, object::Common},
    facts::machine_address,
};

/// Annotation of the mirror of a static pod: the UID that the kubelet gave the static pod.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";
/// Annotation in which Multus lists the networks of a pod.
const NETWORKS_ANNOTATION: &str = "k8s.v1.cni.cncf.io/network-status";
/// Most addresses that are read from that annotation.
const NETWORK_ADDRESSES_MAX: usize = 16;
/// Length of the UID that a kubelet generates for a static pod, in hexadecimal digits.
const STATIC_UID_DIGITS: usize = 32;
/// Label of the pods of the node-local DNS cache, and its value.
const LOCAL_DNS_LABEL: (&str, &str) = ("k8s-app", "node-local-dns");
/// The cache's argument that lists the addresses it serves.
const LOCAL_DNS_ARGUMENT: &str = "localip";

/// A pod that may run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ClusterPod {
    /// The pod. [`Pod::cgroup_uid`] is set unless it is a mirror; fields that depend on other objects are not
    /// set yet.
    pub(super) pod: Pod,
    pub(super) labels: Arc<Labels>,
    /// Its problems.
    pub(super) messages: Vec<String>,
    /// The static pod that it claims to mirror.
    pub(super) mirror: Option<Mirror>,
    /// The addresses of its further networks, from its annotation.
    pub(super) further: Vec<IpAddr>,
    /// The addresses at which it serves DNS, if it claims to be the node's DNS cache.
    pub(super) local_dns: Vec<IpAddr>,
}

/// The claim of a pod to mirror a static pod. Anyone who may create pods can write it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mirror {
    /// The UID of the static pod.
    pub(super) uid: String,
    /// The UID of the Node that owns it, as the kubelet writes it.
    pub(super) node_uid: Option<String>,
}

impl ClusterPod {
    /// Reduces a pod; `None` for one that has ended, or that has no name.
    pub(super) fn read(mut read: v1::Pod) -> Option<Self> {
        let phase = read.status.as_ref().and_then(|s| s.phase.as_deref());
        if matches!(phase, Some("Succeeded" | "Failed")) {
            return None;
        }
        let is_pending = phase == Some("Pending");
        let mut messages = Vec::new();
        let networks = annotation(&read, NETWORKS_ANNOTATION);
        let further = match networks.map(further_addresses) {
            None => Vec::new(),
            Some(Ok(addresses)) => addresses,
            Some(Err(message)) => {
                messages.push(message);
                Vec::new()
            }
        };
        let mirror = annotation(&read, MIRROR_ANNOTATION).map(|uid| Mirror {
            uid: uid.to_owned(),
            node_uid: owning_node(&read),
        });
        let local_dns = local_dns(&read);
        let origin = format!(
            "pod {}/{}",
            read.metadata.namespace.as_deref().unwrap_or_default(),
            read.metadata.name.as_deref().unwrap_or_default(),
        );
        // Drop them at once: only the fields that `Common` reads are kept.
        read.metadata.managed_fields = None;
        let Common {
            mut pod,
            labels,
            messages: common,
            ..
        } = Common::read(&origin, read)
            .inspect_err(|problem| tracing::error!(%problem, "a pod cannot be read"))
            .ok()?;
        messages.extend(common);
        pod.is_pending = is_pending && pod.addresses.is_empty();
        if pod.annotations.remove(INTERFACE_ANNOTATION).is_some() {
            messages.push(format!(
                "{INTERFACE_ANNOTATION} does not count in a cluster: the agent finds the pod's \
                 interfaces itself"
            ));
        }
        if mirror.is_none() {
            pod.cgroup_uid = Some(pod.uid.clone());
        }
        Some(Self {
            pod,
            labels,
            messages,
            mirror,
            further,
            local_dns,
        })
    }
}

impl Mirror {
    /// The UID of the static pod, if this is a mirror that the kubelet of this node created.
    ///
    /// Without this check, any pod could take over another pod's interface by naming its UID, because the API
    /// server lets every author of pods write the annotation. The Node owns the kubelet's own mirrors, and
    /// tenants do not learn the Node's UID. The UID of a static pod never looks like one that the API server
    /// assigns.
    pub(super) fn confirmed(&self, node_uid: Option<&str>) -> Result<&str, String> {
        let Some(node_uid) = node_uid else {
            return Err(
                "is the mirror of a static pod, and the Node that must own it is not known".into(),
            );
        };
        if self.node_uid.as_deref() != Some(node_uid) {
            return Err(format!(
                "has the annotation {MIRROR_ANNOTATION} but is not owned by this node: it does not \
                 count as a static pod, and gets no interface"
            ));
        }
        let is_hash = self.uid.len() == STATIC_UID_DIGITS
            && self.uid.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_hash {
            return Err(format!(
                "{:?} in {MIRROR_ANNOTATION} is not the UID of a static pod \
                 ({STATIC_UID_DIGITS} hexadecimal digits); remove metadata.uid from its manifest",
                self.uid
            ));
        }
        Ok(&self.uid)
    }
}

fn annotation<'a>(pod: &'a v1::Pod, key: &str) -> Option<&'a str> {
    pod.metadata
        .annotations
        .as_ref()?
        .get(key)
        .map(String::as_str)
}

fn owning_node(pod: &v1::Pod) -> Option<String> {
    let owners = pod.metadata.owner_references.as_deref()?;
    let node = owners.iter().find(|owner| owner.kind == "Node")?;
    Some(node.uid.clone())
}

#[derive(Deserialize)]
struct Network {
    #[serde(default)]
    default: bool,
    #[serde(default)]
    ips: Vec<String>,
}

/// The addresses in Multus's annotation, without those of the default network, which the kubelet
/// reports.
fn further_addresses(text: &str) -> Result<Vec<IpAddr>, String> {
    let networks: Vec<Network> = serde_json::from_str(text)
        .map_err(|error| format!("{NETWORKS_ANNOTATION} cannot be read: {error}"))?;
    let mut addresses = Vec::new();
    for network in networks.iter().filter(|network| !network.default) {
        for text in &network.ips {
            let Some(address) = text.parse().ok().filter(machine_address) else {
                return Err(format!(
                    "{text:?} in {NETWORKS_ANNOTATION} is not the address of a machine"
                ));
            };
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
    }
    if addresses.len() > NETWORK_ADDRESSES_MAX {
        return Err(format!(
            "{NETWORKS_ANNOTATION} has {} addresses of further networks; the limit is \
             {NETWORK_ADDRESSES_MAX}, and none counts",
            addresses.len()
        ));
    }
    Ok(addresses)
}

/// The addresses at which the pod serves DNS, if it has the label of the node's DNS cache. Its namespace
/// decides whether the label can be trusted.
fn local_dns(pod: &v1::Pod) -> Vec<IpAddr> {
    let (label, value) = LOCAL_DNS_LABEL;
    let labels = pod.metadata.labels.as_ref();
    if labels
        .and_then(|labels| labels.get(label))
        .map(String::as_str)
        != Some(value)
    {
        return Vec::new();
    }
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    containers
        .flat_map(|container| {
            let command = container.command.iter().flatten();
            let words: Vec<&str> = command
                .chain(container.args.iter().flatten())
                .map(String::as_str)
                .collect();
            local_ip_argument(&words)
        })
        .collect()
}

/// The addresses in `-localip a,b`, `--localip a,b` or `-localip=a,b`.
fn local_ip_argument(words: &[&str]) -> Vec<IpAddr> {
    let value = words.iter().enumerate().find_map(|(at, word)| {
        let name = word.strip_prefix("--").or_else(|| word.strip_prefix('-'))?;
        let rest = name.strip_prefix(LOCAL_DNS_ARGUMENT)?;
        match rest.strip_prefix('=') {
            Some(value) => Some(value),
            None if rest.is_empty() => words.get(at + 1).copied(),
            None => None,
        }
    });
    value
        .unwrap_or_default()
        .split(',')
        .filter_map(|text| text.trim().parse().ok())
        .filter(machine_address)
        .collect()
}

#[cfg(test)]
#[path = "pod_tests.rs"]
mod tests;
