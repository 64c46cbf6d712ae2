//! The objects of the API server, and the snapshot that is built from them.

use std::{collections::BTreeMap, sync::Arc};

use egress_api::namespace_labels;

use super::{
    super::{FactSource, Knowledge, NamespacedName, Pod, Problem, Snapshot, SourcedFacts},
    facts::{NodeFacts, Served},
    health::{Health, Watched},
    kubelet::Kubelet,
    namespace::Namespace,
    nodes::OtherNodes,
    pod::ClusterPod,
    policies::{PeerRevisions, PeersOf, Policies},
    services::ServiceTables,
    table::Table,
};
use crate::config::Nodes;
use egress_policy::{Prefix, Resolver};

/// Namespace and name of the API server's own Service.
pub(super) const API_SERVICE: (&str, &str) = ("default", "kubernetes");

/// All objects that the API server has sent, and the kubelet's file.
#[derive(Debug)]
pub(super) struct State {
    pub(super) pods: Table<ClusterPod>,
    pub(super) namespaces: Table<Namespace>,
    pub(super) node: Table<NodeFacts>,
    pub(super) dns_service: Table<Served>,
    pub(super) dns_endpoints: Table<Served>,
    pub(super) api_service: Table<Served>,
    pub(super) api_endpoints: Table<Served>,
    pub(super) service_ranges: Table<Vec<Prefix>>,
    pub(super) kubelet: Kubelet,
    pub(super) policies: Policies,
    pub(super) services: ServiceTables,
    /// Name of the node.
    node_name: String,
    /// Which nodes are followed.
    which_nodes: Nodes,
    /// Whether everything was known once that a snapshot needs.
    was_ready: bool,
    /// Namespace and name of the Service of the cluster's DNS.
    dns: (String, String),
}

impl State {
    pub(super) fn new(
        node: &str,
        which_nodes: Nodes,
        dns: (String, String),
        kubelet: Kubelet,
    ) -> Self {
        Self {
            pods: Table::default(),
            namespaces: Table::default(),
            node: Table::default(),
            dns_service: Table::default(),
            dns_endpoints: Table::default(),
            api_service: Table::default(),
            api_endpoints: Table::default(),
            service_ranges: Table::default(),
            kubelet,
            policies: Policies::default(),
            services: ServiceTables::default(),
            node_name: node.to_owned(),
            which_nodes,
            was_ready: false,
            dns,
        }
    }

    /// The snapshot. It has problems only, and no pods, until the pods, the namespaces and all other facts
    /// are known or need not be awaited.
    pub(super) fn snapshot(&mut self, health: &Health) -> Snapshot {
        let mut problems = health.problems();
        problems.extend(self.kubelet.problem().cloned());
        // Later a kind of policies may come, or be out of reach: known objects stay.
        self.was_ready = self.was_ready || self.is_ready(health);
        if !self.was_ready {
            return Snapshot {
                problems,
                unreadable: true,
                ..Snapshot::default()
            };
        }
        problems.extend(self.missing());
        let others = OtherNodes::of(self.node.values_but("", &self.node_name));
        problems.extend(others.problem());
        let sources = self.facts(others);
        self.update_policies();
        problems.extend(self.policies.problems());
        let pods = self.resolved_pods(&mut problems);
        Snapshot {
            pods,
            policies: self.policies.objects(),
            of_unknown: self.policies.of_unknown(),
            problems,
            unreadable: false,
            facts: sources.merged(),
            sources,
            knowledge: self.knowledge(),
            node_uid: self
                .node
                .get("", &self.node_name)
                .map(|node| node.uid.clone()),
            kinds: self.policies.kinds(health),
            services: self.services.current(&self.node),
        }
    }

    /// Whether pods, namespaces and the policy objects that there are are complete, and each other watch is complete
    /// or has failed. Without the resolvers, responses would pass unheld for a moment.
    fn is_ready(&self, health: &Health) -> bool {
        self.pods.is_complete()
            && self.namespaces.is_complete()
            && self.policies.is_ready(health)
            && self.services.are_ready(health)
            && self
                .tables_of_facts()
                .iter()
                .all(|(watched, _, is_complete)| *is_complete || health.has_failed(*watched))
    }

    /// The sources of facts that are known: a watch that has failed has told nothing.
    fn knowledge(&self) -> Knowledge {
        let tables = self.tables_of_facts().into_iter();
        let known = tables.filter_map(|(_, source, is_complete)| is_complete.then_some(source));
        let kubelet = self.kubelet.problem().is_none();
        known
            .chain(self.pods.is_complete().then_some(FactSource::Pods))
            .chain(kubelet.then_some(FactSource::Kubelet))
            .collect()
    }

    /// The watches that the facts are from, besides that of the pods, with their sources, and whether each has been
    /// complete once.
    fn tables_of_facts(&self) -> [(Watched, FactSource, bool); 6] {
        use FactSource as Of;
        [
            (Watched::Node, Of::Node, self.node.is_complete()),
            (
                Watched::DnsService,
                Of::DnsService,
                self.dns_service.is_complete(),
            ),
            (
                Watched::DnsEndpoints,
                Of::DnsEndpoints,
                self.dns_endpoints.is_complete(),
            ),
            (
                Watched::ApiService,
                Of::ApiService,
                self.api_service.is_complete(),
            ),
            (
                Watched::ApiEndpoints,
                Of::ApiEndpoints,
                self.api_endpoints.is_complete(),
            ),
            (
                Watched::ServiceRanges,
                Of::ServiceRanges,
                self.service_ranges.is_complete(),
            ),
        ]
    }

    /// Problems for required objects that do not exist.
    fn missing(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let (namespace, name) = &self.dns;
        if self.dns_service.is_complete() && self.dns_service.get(namespace, name).is_none() {
            problems.push(Problem {
                origin: format!("service {namespace}/{name}"),
                message:
                    "does not exist, so the cluster's resolvers are not known from it; name the \
                          Service of the cluster's DNS in cluster.dnsService, or the resolvers in \
                          dns.resolvers"
                        .into(),
            });
        }
        if self.node.is_complete() && self.node.get("", &self.node_name).is_none() {
            problems.push(Problem {
                origin: format!("node {}", self.node_name),
                message:
                    "does not exist, so no pod is found; set the name of this machine's Node in \
                          $NODE_NAME, or in node of the configuration"
                        .into(),
            });
        }
        problems
    }

    /// The facts about the cluster; `others` are those of its other nodes.
    fn facts(&self, others: OtherNodes) -> SourcedFacts {
        let mut facts = SourcedFacts::default();
        let (namespace, name) = &self.dns;
        let service = format!("service {namespace}/{name}");
        let endpoints = format!("endpoints of {service}");
        let kubelet = format!("clusterDNS in {}", self.kubelet.path().display());
        // The default port of a resolver is 53.
        let served = self.dns_service.values();
        for address in served.flat_map(|served| &served.addresses) {
            let found = &mut facts.of(FactSource::DnsService).resolvers;
            note(found, (*address).into(), &service);
        }
        for address in self.kubelet.resolvers() {
            let found = &mut facts.of(FactSource::Kubelet).resolvers;
            note(found, (*address).into(), &kubelet);
        }
        // A load balancer at the socket layer sends to an endpoint with its own port.
        let names = self
            .dns_service
            .values()
            .flat_map(Served::dns_port_names)
            .collect();
        for served in self.dns_endpoints.values() {
            for port in served.dns_ports(&names) {
                for &address in &served.addresses {
                    let found = &mut facts.of(FactSource::DnsEndpoints).resolvers;
                    note(found, Resolver { address, port }, &endpoints);
                }
            }
        }
        // The label alone would make any pod a resolver.
        for pod in self.pods.values().filter(|pod| {
            pod.pod.namespace == *namespace && pod.pod.host_network && !pod.local_dns.is_empty()
        }) {
            let origin = format!("{}, the node's DNS cache", pod.pod.origin);
            for address in &pod.local_dns {
                let found = &mut facts.of(FactSource::Pods).resolvers;
                note(found, (*address).into(), &origin);
            }
        }

        let of_nodes = facts.of(FactSource::Node);
        let node = format!("node {}", self.node_name);
        if let Some(own) = self.node.get("", &self.node_name) {
            for prefix in &own.pod_prefixes {
                note(
                    &mut of_nodes.internal,
                    *prefix,
                    &format!("podCIDRs of {node}"),
                );
                of_nodes.pods.insert(*prefix);
            }
            for address in &own.addresses {
                note(&mut of_nodes.internal, Prefix::host(*address), &node);
            }
        }
        for (prefix, origin) in others.prefixes {
            note(&mut of_nodes.internal, prefix, origin);
        }
        let api = format!("service {}/{}", API_SERVICE.0, API_SERVICE.1);
        for (source, table, origin) in [
            (FactSource::DnsService, &self.dns_service, &service),
            (FactSource::ApiService, &self.api_service, &api),
            (
                FactSource::ApiEndpoints,
                &self.api_endpoints,
                &format!("endpoints of {api}"),
            ),
        ] {
            for address in table.values().flat_map(|served| &served.addresses) {
                let found = &mut facts.of(source).internal;
                note(found, Prefix::host(*address), origin);
            }
        }
        for prefix in self.service_ranges.values().flatten() {
            let of_services = facts.of(FactSource::ServiceRanges);
            note(&mut of_services.internal, *prefix, "service ranges");
            of_services.services.insert(*prefix);
        }
        facts
    }

    /// Brings the selection of policies up to date.
    fn update_policies(&mut self) {
        let revisions = PeerRevisions {
            nodes: self.node.revision(),
            namespaces: self.namespaces.revision(),
            ..PeerRevisions::default()
        };
        let peers = PeersOf {
            nodes: &self.node,
            which_nodes: self.which_nodes,
            namespaces: &self.namespaces,
        };
        self.policies.update(peers, revisions);
    }

    /// The pods, completed with data from their namespaces, the node and other pods.
    fn resolved_pods(&mut self, problems: &mut Vec<Problem>) -> BTreeMap<NamespacedName, Pod> {
        let node = self.node.get("", &self.node_name);
        let node_uid = node.map(|node| node.uid.as_str());
        let mut pods = BTreeMap::new();
        for known in self.pods.values() {
            let mut pod = known.pod.clone();
            let mut messages = known.messages.clone();
            let namespace = self.namespaces.get("", &pod.namespace);
            let namespace_labels = if let Some(namespace) = namespace {
                pod.namespace_annotations.clone_from(&namespace.annotations);
                Arc::clone(&namespace.labels)
            } else {
                pod.namespace_known = false;
                Arc::new(namespace_labels(&pod.namespace, None))
            };
            pod.objects = self.policies.of(&pod, &known.labels, &namespace_labels);
            match known.mirror.as_ref().map(|m| m.confirmed(node_uid)) {
                Some(Ok(uid)) => pod.cgroup_uid = Some(uid.to_owned()),
                Some(Err(message)) => messages.push(message),
                None => {}
            }
            let further = known.further.iter().copied();
            pod.further = further
                .filter(|address| !pod.addresses.contains(address))
                .collect();
            let origin = &pod.origin;
            problems.extend(messages.into_iter().map(|message| Problem {
                origin: origin.clone(),
                message,
            }));
            pods.insert(pod.key(), pod);
        }
        self.policies.retain(&pods);
        one_pod_per_cgroup(&mut pods, problems);
        pods
    }
}

/// Gives a cgroup that two pods claim to neither of them, so neither gets the interface.
fn one_pod_per_cgroup(pods: &mut BTreeMap<NamespacedName, Pod>, problems: &mut Vec<Problem>) {
    let mut claims = BTreeMap::<String, u32>::new();
    for uid in pods.values().filter_map(|pod| pod.cgroup_uid.clone()) {
        *claims.entry(uid).or_default() += 1;
    }
    for pod in pods.values_mut() {
        let is_shared = |uid: &String| claims.get(uid).is_some_and(|count| *count > 1);
        if let Some(uid) = pod.cgroup_uid.take_if(|uid| is_shared(uid)) {
            problems.push(Problem {
                origin: pod.origin.clone(),
                message: format!(
                    "more than one pod has the UID {uid} on this node, so none of them gets an \
                     interface; remove those that are not the kubelet's"
                ),
            });
        }
    }
}

fn note<K: Ord>(found: &mut BTreeMap<K, String>, what: K, origin: &str) {
    found.entry(what).or_insert_with(|| origin.to_owned());
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
