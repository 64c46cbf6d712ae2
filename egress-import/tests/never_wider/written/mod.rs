//! A plain evaluation of written objects for one pod.

use std::net::Ipv4Addr;

use egress_api::{Action, ClusterEgressPolicySpec, EgressPolicySpec, Labels, Selector, Tier};
use egress_dns::Name;
use egress_policy::{Prefix, name_pattern, prefix::to_mapped};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::Deserialize;
use serde_json::Value;

/// A TCP packet.
#[derive(Debug)]
pub(crate) struct Packet {
    address: Option<Ipv4Addr>,
    name: Option<Name>,
    port: u16,
}

impl Packet {
    pub(crate) fn to(address: Ipv4Addr, port: u16) -> Self {
        Self {
            address: Some(address),
            name: None,
            port,
        }
    }

    /// To the address of a name that the pod has resolved.
    pub(crate) fn to_name(name: &str, port: u16) -> Self {
        Self {
            address: None,
            name: Some(Name::from_labels(name.split('.').map(str::as_bytes)).unwrap()),
            port,
        }
    }

    fn is_in(&self, entries: &[String]) -> bool {
        entries.iter().any(|entry| self.matches(entry))
    }

    fn matches(&self, entry: &str) -> bool {
        // The protocol is behind the last slash, unless that is the length of a prefix.
        let (rest, protocol) = match entry.rsplit_once('/') {
            Some((rest, word)) if word.starts_with(|c: char| c.is_ascii_alphabetic()) => {
                (rest, Some(word))
            }
            _ => (entry, None),
        };
        if protocol.is_some_and(|protocol| protocol != "tcp") {
            return false;
        }
        let (destination, ports) = match rest.rsplit_once(':') {
            Some((destination, ports)) => (destination, Some(ports)),
            None => (rest, None),
        };
        if let Some(ports) = ports {
            let (min, max) = ports.split_once('-').unwrap_or((ports, ports));
            if !(min.parse().unwrap()..=max.parse().unwrap()).contains(&self.port) {
                return false;
            }
        }
        if destination == "*" {
            return true;
        }
        if let Ok(prefix) = Prefix::parse(destination) {
            return self
                .address
                .is_some_and(|address| prefix.contains(&to_mapped(address.into())));
        }
        let pattern = name_pattern(destination).unwrap();
        self.name.as_ref().is_some_and(|name| pattern.matches(name))
    }
}

#[derive(Deserialize)]
struct Document {
    kind: String,
    metadata: Metadata,
    spec: Value,
}

#[derive(Deserialize)]
struct Metadata {
    namespace: Option<String>,
}

/// The written objects that select a pod.
#[derive(Debug, Default)]
pub(crate) struct Written {
    policies: Vec<EgressPolicySpec>,
    clusters: Vec<ClusterEgressPolicySpec>,
}

impl Written {
    /// All objects, whatever they select.
    pub(crate) fn read(yaml: &str) -> Self {
        Self::read_if(yaml, |_, _| true)
    }

    /// The objects that select a pod with these labels.
    pub(crate) fn of_pod(yaml: &str, namespace: &str, labels: &[(&str, &str)]) -> Self {
        let labels: Labels = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        Self::read_if(yaml, |of, pods| {
            of.is_none_or(|of| of == namespace)
                && Selector::read(pods).is_ok_and(|selector| selector.selects(&labels))
        })
    }

    fn read_if(yaml: &str, selects: impl Fn(Option<&str>, &LabelSelector) -> bool) -> Self {
        let mut written = Self::default();
        for document in serde_saphyr::from_multiple::<Document>(yaml).unwrap() {
            match document.kind.as_str() {
                "EgressPolicy" => {
                    let policy: EgressPolicySpec = serde_json::from_value(document.spec).unwrap();
                    let namespace = document.metadata.namespace.as_deref();
                    if selects(namespace, &policy.pod_selector) {
                        written.policies.push(policy);
                    }
                }
                "ClusterEgressPolicy" => written
                    .clusters
                    .push(serde_json::from_value(document.spec).unwrap()),
                // A set opens nothing by itself.
                "EgressSet" => {}
                other => panic!("kind {other}"),
            }
        }
        // Of equal priorities, those that deny come first.
        let denies = |cluster: &ClusterEgressPolicySpec| {
            cluster.rules.iter().any(|rule| rule.action == Action::Deny)
        };
        written
            .clusters
            .sort_by_key(|cluster| (cluster.priority, !denies(cluster)));
        written
    }

    pub(crate) fn allows(&self, packet: &Packet) -> bool {
        match self.of_tier(Tier::Admin, packet) {
            Some(Action::Allow) => return true,
            Some(Action::Deny) => return false,
            Some(Action::Pass) | None => {}
        }
        let is_in =
            |list: &Option<Vec<String>>| list.as_ref().is_some_and(|entries| packet.is_in(entries));
        if self.policies.iter().any(|policy| is_in(&policy.deny)) {
            return false;
        }
        if self.policies.iter().any(|policy| is_in(&policy.allow)) {
            return true;
        }
        if self.policies.iter().any(|policy| policy.allow.is_some()) {
            return false;
        }
        self.of_tier(Tier::Baseline, packet) != Some(Action::Deny)
    }

    /// The entries of all `EgressPolicy` objects.
    pub(crate) fn entries(&self) -> Vec<String> {
        let lists = self.policies.iter().flat_map(|policy| &policy.allow);
        lists.flatten().cloned().collect()
    }

    fn of_tier(&self, tier: Tier, packet: &Packet) -> Option<Action> {
        self.clusters
            .iter()
            .filter(|cluster| cluster.tier == tier)
            .flat_map(|cluster| &cluster.rules)
            .find(|rule| packet.is_in(&rule.entries))
            .map(|rule| rule.action)
    }
}
