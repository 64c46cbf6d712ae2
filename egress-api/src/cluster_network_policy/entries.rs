//! The destinations of a rule, as entries of docs/policy.md.
//!
//! A rule whose destinations cannot all be expressed fails closed as a whole, as the API's comment on peers asks for.
//! So every function here returns the reason.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use egress_policy::{Prefix, name_pattern, prefix, prefix::PrefixError};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use super::{EgressPeer, EgressRule, Port, Ports, Protocol, RuleAction, read::is_unknown};
use crate::selector::Selector;

/// Most entries of one rule. Adjacent addresses of nodes and pods are one entry.
pub const ENTRIES_MAX: usize = 4096;

/// Most numbers that the named ports of one rule stand for.
pub(super) const NUMBERS_MAX: usize = 8;

/// The addresses and ports of the peers of rules.
pub trait Peers {
    /// The addresses of these nodes.
    ///
    /// # Errors
    ///
    /// Why they are not known.
    fn nodes(&self, nodes: &Selector) -> Result<Vec<IpAddr>, String>;

    /// These pods of these namespaces, without those in the host's network.
    ///
    /// # Errors
    ///
    /// Why they are not known.
    fn pods(&self, namespaces: &Selector, pods: &Selector) -> Result<Vec<PeerPod>, String>;
}

/// A pod that is a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerPod {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its ports that have names.
    pub ports: Vec<NamedPort>,
}

/// A port of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPort {
    /// Its name.
    pub name: String,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: &'static str,
    /// Its number.
    pub port: u16,
}

/// The destinations of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Destinations {
    peers: Vec<Peer>,
    /// The ends of entries, such as `:443/tcp`.
    ends: Vec<String>,
    named_ports: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Peer {
    /// Prefixes and names, as they are before the port.
    Written(Vec<String>),
    Nodes(Selector),
    Pods {
        namespaces: Selector,
        pods: Selector,
    },
}

/// Reads the destinations of a rule.
pub(super) fn destinations(rule: &EgressRule) -> Result<Destinations, String> {
    if rule.to.is_empty() {
        return Err("it has no destination".to_owned());
    }
    let peers: Result<Vec<Peer>, String> = rule.to.iter().map(|to| peer(to, rule.action)).collect();
    let peers = peers?;
    let mut ends = Vec::new();
    let mut named_ports = Vec::new();
    match &rule.protocols {
        None => ends.push("/any".to_owned()),
        Some(protocols) if protocols.is_empty() => {
            return Err("its list of protocols is empty".to_owned());
        }
        Some(protocols) => {
            for protocol in protocols {
                match end(protocol)? {
                    End::Text(text) => ends.push(text),
                    End::Named(name) => named_ports.push(name),
                }
            }
        }
    }
    let is_pods = |peer: &Peer| matches!(peer, Peer::Pods { .. });
    if !named_ports.is_empty() && !peers.iter().all(is_pods) {
        return Err("only pods have named ports".to_owned());
    }
    Ok(Destinations {
        peers,
        ends,
        named_ports,
    })
}

impl Destinations {
    /// Whether the entries change with the cluster.
    pub(super) fn is_of_cluster(&self) -> bool {
        self.has_nodes() || self.has_pods()
    }

    pub(super) fn has_nodes(&self) -> bool {
        let is = |peer: &Peer| matches!(peer, Peer::Nodes(_));
        self.peers.iter().any(is)
    }

    pub(super) fn has_pods(&self) -> bool {
        let is = |peer: &Peer| matches!(peer, Peer::Pods { .. });
        self.peers.iter().any(is)
    }

    /// The entries of a rule with this action.
    pub(super) fn entries(
        &self,
        action: RuleAction,
        peers: &dyn Peers,
    ) -> Result<Vec<String>, String> {
        let mut entries = Vec::new();
        for peer in &self.peers {
            match peer {
                Peer::Written(written) => self.add(&mut entries, written),
                Peer::Nodes(nodes) => {
                    let addresses = peers.nodes(nodes)?;
                    self.add(&mut entries, &merged(addresses.into_iter()));
                }
                Peer::Pods { namespaces, pods } => {
                    let found = peers.pods(namespaces, pods)?;
                    let addresses = found.iter().flat_map(|pod| pod.addresses.iter().copied());
                    self.add(&mut entries, &merged(addresses));
                    self.add_named_ports(&mut entries, action, &found)?;
                }
            }
            if entries.len() > ENTRIES_MAX {
                return Err(format!(
                    "it stands for {} destinations or more; the limit is {ENTRIES_MAX}",
                    entries.len()
                ));
            }
        }
        Ok(entries)
    }

    fn add(&self, entries: &mut Vec<String>, destinations: &[String]) {
        for destination in destinations {
            entries.extend(self.ends.iter().map(|end| format!("{destination}{end}")));
        }
    }

    /// Adds the ports of pods that have one of the names.
    ///
    /// The creator of a peer chooses the numbers behind its port names. These must not decide how many classes the
    /// policy has, so only the [`NUMBERS_MAX`] numbers that most pods have count. For a pod with another number, a
    /// rule that accepts leaves out that port, and a rule that denies takes every port.
    ///
    /// # Errors
    ///
    /// When a rule that passes on needs more numbers: to apply it to more or fewer ports would not be stricter.
    fn add_named_ports(
        &self,
        entries: &mut Vec<String>,
        action: RuleAction,
        pods: &[PeerPod],
    ) -> Result<(), String> {
        let mut found: BTreeMap<(u16, &str), BTreeSet<IpAddr>> = BTreeMap::new();
        for pod in pods {
            let mut seen = BTreeSet::new();
            let ports = pod.ports.iter();
            for port in ports.filter(|port| self.named_ports.contains(&port.name)) {
                // A name is unique in a pod (Kubernetes API, ContainerPort.name).
                if seen.insert((&port.name, port.protocol)) {
                    let addresses = found.entry((port.port, port.protocol)).or_default();
                    addresses.extend(&pod.addresses);
                }
            }
        }
        let mut found: Vec<_> = found.into_iter().collect();
        found.sort_by_key(|(_, addresses)| Reverse(addresses.len()));
        let rest = found.split_off(found.len().min(NUMBERS_MAX));
        for ((port, protocol), addresses) in found {
            let destinations = merged(addresses.into_iter()).into_iter();
            entries.extend(destinations.map(|to| format!("{to}:{port}/{protocol}")));
        }
        match action {
            RuleAction::Pass if !rest.is_empty() => {
                return Err(format!(
                    "its named ports have more than {NUMBERS_MAX} different numbers"
                ));
            }
            RuleAction::Accept | RuleAction::Pass => {}
            RuleAction::Deny => {
                let addresses = rest.into_iter().flat_map(|(_, addresses)| addresses);
                let destinations = merged(addresses).into_iter();
                entries.extend(destinations.map(|to| format!("{to}/any")));
            }
        }
        Ok(())
    }
}

fn peer(peer: &EgressPeer, action: RuleAction) -> Result<Peer, String> {
    let EgressPeer {
        namespaces,
        pods,
        nodes,
        networks,
        domain_names,
    } = peer;
    if is_unknown(peer) {
        return Err("it has a kind of destination that egress-agent does not know".to_owned());
    }
    match (namespaces, pods, nodes, networks, domain_names) {
        (Some(namespaces), None, None, None, None) => Ok(Peer::Pods {
            namespaces: read(namespaces)?,
            pods: Selector::default(),
        }),
        (None, Some(both), None, None, None) => Ok(Peer::Pods {
            namespaces: read(&both.namespace_selector)?,
            pods: read(&both.pod_selector)?,
        }),
        (None, None, Some(nodes), None, None) => Ok(Peer::Nodes(read(nodes)?)),
        (None, None, None, Some(networks), None) => {
            let written: Result<_, String> = networks.iter().map(|text| network(text)).collect();
            Ok(Peer::Written(written?))
        }
        (None, None, None, None, Some(names)) => {
            if action != RuleAction::Accept {
                return Err("domainNames are for rules that accept".to_owned());
            }
            let written: Result<_, String> = names.iter().map(|text| domain_name(text)).collect();
            Ok(Peer::Written(written?))
        }
        _ => Err("a destination has more than one kind".to_owned()),
    }
}

fn read(selector: &LabelSelector) -> Result<Selector, String> {
    Selector::read(selector).map_err(|error| error.to_string())
}

/// A CIDR. Bits outside the prefix do not count, as in Kubernetes.
fn network(text: &str) -> Result<String, String> {
    if !text.contains('/') {
        return Err(format!("{text:?} is not a CIDR"));
    }
    match Prefix::parse(text) {
        Ok(network) | Err(PrefixError::HostBits { network }) => Ok(destination(&network)),
        Err(error) => Err(format!("{text:?} {error}")),
    }
}

/// A name, or `*.` and a name. Entries allow more wildcards, and addresses.
fn domain_name(text: &str) -> Result<String, String> {
    let name = text.strip_prefix("*.").unwrap_or(text);
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_name = name.contains('.')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        && name.parse::<IpAddr>().is_err();
    if !is_name {
        return Err(format!(
            "{text:?} is not a domain name: expected two labels or more, perhaps after `*.`"
        ));
    }
    name_pattern(text).map_err(|error| format!("{text:?} {error}"))?;
    Ok(text.to_owned())
}

enum End {
    Text(String),
    Named(String),
}

fn end(protocol: &Protocol) -> Result<End, String> {
    let Protocol {
        tcp,
        udp,
        sctp,
        destination_named_port,
    } = protocol;
    let (word, ports) = match (tcp, udp, sctp, destination_named_port) {
        (Some(ports), None, None, None) => ("tcp", ports),
        (None, Some(ports), None, None) => ("udp", ports),
        (None, None, Some(ports), None) => ("sctp", ports),
        (None, None, None, Some(name)) if !name.is_empty() => {
            return Ok(End::Named(name.clone()));
        }
        (None, None, None, None) => {
            return Err("it has a protocol that egress-agent does not know".to_owned());
        }
        _ => return Err("one of its protocols is several at once".to_owned()),
    };
    Ok(End::Text(format!("{}/{word}", ports_text(ports)?)))
}

fn ports_text(ports: &Ports) -> Result<String, String> {
    // The API asks for a field. What is in an unknown one may be narrower than every port.
    let Some(Port { number, range }) = &ports.destination_port else {
        return Err("a protocol has a field that egress-agent does not know".to_owned());
    };
    match (number, range) {
        (Some(number @ 1..), None) => Ok(format!(":{number}")),
        (None, Some(range)) if range.start >= 1 && range.start <= range.end => {
            Ok(format!(":{}-{}", range.start, range.end))
        }
        _ => Err("a port is neither a number from 1 to 65535 nor a range of them".to_owned()),
    }
}

/// The prefixes of these addresses, as they are before the port.
fn merged(addresses: impl Iterator<Item = IpAddr>) -> Vec<String> {
    let hosts: Vec<Prefix> = addresses.map(Prefix::host).collect();
    prefix::merge(&hosts).iter().map(destination).collect()
}

/// A prefix as it is before a port.
fn destination(prefix: &Prefix) -> String {
    if prefix.is_v4() {
        prefix.to_string()
    } else {
        format!("[{prefix}]")
    }
}
