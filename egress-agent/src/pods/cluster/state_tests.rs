use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::watcher::Event;
use serde_json::{Value, json};

use super::*;
use k8s_openapi::api::core::v1::{ConfigMap, Pod as ApiPod};

const NODE_UID: &str = "99999999-aaaa";

struct Cluster {
    state: State,
    health: Health,
    _directory: tempfile::TempDir,
}

/// A stand-in for any object: only its name matters to a table.
fn object(namespace: &str, name: &str) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta {
            namespace: Some(namespace.to_owned()).filter(|text| !text.is_empty()),
            name: Some(name.into()),
            ..ObjectMeta::default()
        },
        ..ConfigMap::default()
    }
}

fn put<R: PartialEq>(table: &mut Table<R>, namespace: &str, name: &str, reduced: R) {
    table.apply(Event::Apply(object(namespace, name)), |_, _| Some(reduced));
}

fn complete<R: PartialEq>(table: &mut Table<R>) {
    table.apply::<ConfigMap>(Event::Init, |_, _| None);
    table.apply::<ConfigMap>(Event::InitDone, |_, _| None);
}

impl Cluster {
    /// A cluster in which all facts are known, with only the node and the DNS Service.
    fn new() -> Self {
        let mut cluster = Self::silent();
        let state = &mut cluster.state;
        complete(&mut state.pods);
        complete(&mut state.namespaces);
        complete(&mut state.node);
        complete(&mut state.dns_service);
        complete(&mut state.dns_endpoints);
        complete(&mut state.api_service);
        complete(&mut state.api_endpoints);
        complete(&mut state.service_ranges);
        complete(&mut state.services.services);
        complete(&mut state.services.endpoints);
        complete(&mut state.policies.egress);
        complete(&mut state.policies.cluster_egress);
        complete(&mut state.policies.network);
        complete(&mut state.policies.sets);
        let node = NodeFacts {
            uid: NODE_UID.into(),
            pod_prefixes: vec![Prefix::parse("10.1.0.0/24").unwrap()],
            addresses: vec![ip("192.168.0.5")],
            ..NodeFacts::default()
        };
        put(&mut state.node, "", "node-1", node);
        put(
            &mut state.dns_service,
            "kube-system",
            "kube-dns",
            served(&["10.96.0.10"], &[("dns", 53), ("metrics", 9153)]),
        );
        cluster
    }

    /// A cluster that has sent nothing yet.
    fn silent() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kubelet = Kubelet::new(&directory.path().join("config.yaml"));
        let dns = ("kube-system".to_owned(), "kube-dns".to_owned());
        Self {
            state: State::new("node-1", Nodes::All, dns, kubelet),
            health: Health::default(),
            _directory: directory,
        }
    }

    fn namespace(&mut self, name: &str) {
        put(&mut self.state.namespaces, "", name, Namespace::default());
    }

    fn pod(&mut self, namespace: &str, name: &str, more: &Value) {
        let mut pod = json!({
            "metadata": { "namespace": namespace, "name": name, "uid": format!("uid-{name}") },
            "spec": { "containers": [] },
            "status": {},
        });
        for (part, fields) in more.as_object().unwrap() {
            for (key, value) in fields.as_object().unwrap() {
                pod[part][key] = value.clone();
            }
        }
        let read: ApiPod = serde_json::from_value(pod).unwrap();
        self.state
            .pods
            .apply(Event::Apply(read), |read, _| ClusterPod::read(read));
    }

    fn snapshot(&mut self) -> Snapshot {
        self.state.snapshot(&self.health)
    }
}

fn served(addresses: &[&str], ports: &[(&str, u16)]) -> Served {
    Served {
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        ports: ports
            .iter()
            .map(|&(name, port)| (name.into(), port))
            .collect(),
    }
}

fn resolver(text: &str) -> Resolver {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pod<'a>(snapshot: &'a Snapshot, namespace: &str, name: &str) -> &'a Pod {
    &snapshot.pods[&NamespacedName::new(namespace, name)]
}

fn messages(snapshot: &Snapshot) -> Vec<String> {
    snapshot.problems.iter().map(Problem::to_string).collect()
}

#[test]
fn no_pods_are_published_before_all_facts_are_known() {
    let mut cluster = Cluster::silent();
    cluster.pod("shop", "cart", &json!({}));
    complete(&mut cluster.state.pods);
    cluster.pod("shop", "cart", &json!({}));
    assert!(cluster.snapshot().unreadable && cluster.snapshot().pods.is_empty());
    complete(&mut cluster.state.namespaces);
    assert!(
        cluster.snapshot().unreadable,
        "the resolvers are still missing"
    );
    for watched in Watched::ALL {
        cluster
            .health
            .record_failure(watched, super::super::health::Failure::NotServed);
    }
    let snapshot = cluster.snapshot();
    assert!(!snapshot.unreadable && snapshot.pods.len() == 1);
    assert!(!snapshot.problems.is_empty());
}

#[test]
fn a_watch_that_has_failed_has_told_nothing() {
    use super::super::{super::FactSource, health::Failure};
    let mut cluster = Cluster::new();
    let known = cluster.snapshot().knowledge;
    assert!(known.has_resolvers() && known.has_addresses());
    assert!(known.has(FactSource::ServiceRanges));
    cluster.state.node = Table::default();
    let refused = || Failure::Refused("nodes is forbidden".into());
    cluster.health.record_failure(Watched::Node, refused());
    let snapshot = cluster.snapshot();
    assert!(!snapshot.unreadable);
    let known = snapshot.knowledge;
    assert!(known.has_resolvers() && !known.has_addresses());
    complete(&mut cluster.state.node);
    assert!(cluster.snapshot().knowledge.has_addresses());

    // Old servers have no ranges of Services.
    cluster.state.service_ranges = Table::default();
    let missing = Failure::NotServed;
    cluster
        .health
        .record_failure(Watched::ServiceRanges, missing);
    let known = cluster.snapshot().knowledge;
    assert!(known.has_addresses() && !known.has(FactSource::ServiceRanges));
    cluster.state.dns_endpoints = Table::default();
    cluster
        .health
        .record_failure(Watched::DnsEndpoints, refused());
    assert!(!cluster.snapshot().knowledge.has_resolvers());
}

#[test]
fn a_pod_is_marked_while_its_namespace_is_not_known() {
    let mut cluster = Cluster::new();
    cluster.pod("shop", "cart", &json!({}));
    assert!(!pod(&cluster.snapshot(), "shop", "cart").namespace_known);
    let annotations = BTreeMap::from([("egress-agent.dev/mode".to_owned(), "enforce".to_owned())]);
    put(
        &mut cluster.state.namespaces,
        "",
        "shop",
        Namespace {
            annotations: annotations.clone(),
            ..Namespace::default()
        },
    );
    let snapshot = cluster.snapshot();
    let cart = pod(&snapshot, "shop", "cart");
    assert!(cart.namespace_known);
    assert_eq!(cart.namespace_annotations, annotations);
}

#[test]
fn resolvers_come_from_the_clusters_own_objects() {
    let mut cluster = Cluster::new();
    cluster.namespace("kube-system");
    cluster.namespace("shop");
    put(
        &mut cluster.state.dns_endpoints,
        "kube-system",
        "kube-dns-x",
        served(&["10.1.0.2", "10.96.0.10"], &[("dns", 53)]),
    );
    let cache = |host: bool| {
        json!({
            "metadata": { "labels": { "k8s-app": "node-local-dns" } },
            "spec": { "hostNetwork": host, "containers": [{ "name": "a", "args": ["-localip", "169.254.20.10"] }] },
        })
    };
    // Any pod may look like the cache.
    cluster.pod("shop", "cache", &cache(true));
    cluster.pod("kube-system", "in-its-own-network", &cache(false));
    let found = cluster.snapshot().facts.resolvers;
    assert_eq!(
        found,
        BTreeMap::from([
            (
                resolver("10.96.0.10"),
                "service kube-system/kube-dns".to_owned()
            ),
            (
                resolver("10.1.0.2"),
                "endpoints of service kube-system/kube-dns".to_owned()
            ),
        ])
    );
    cluster.pod("kube-system", "cache", &cache(true));
    let found = cluster.snapshot().facts.resolvers;
    assert_eq!(
        found[&resolver("169.254.20.10")],
        "pod kube-system/cache, the node's DNS cache"
    );
}

#[test]
fn a_missing_dns_service_is_a_problem() {
    let mut cluster = Cluster::new();
    complete(&mut cluster.state.dns_service);
    let problems = messages(&cluster.snapshot());
    assert_eq!(problems.len(), 1);
    assert!(problems[0].starts_with("service kube-system/kube-dns: does not exist"));
}

#[test]
fn the_api_server_the_node_and_its_pods_are_internal() {
    let mut cluster = Cluster::new();
    put(
        &mut cluster.state.api_service,
        "default",
        "kubernetes",
        served(&["10.96.0.1"], &[]),
    );
    put(
        &mut cluster.state.api_endpoints,
        "default",
        "kubernetes",
        served(&["192.168.0.2"], &[]),
    );
    let ranges = vec![Prefix::parse("10.96.0.0/12").unwrap()];
    put(&mut cluster.state.service_ranges, "", "kubernetes", ranges);
    let facts = cluster.snapshot().facts;
    let internal: Vec<_> = facts.internal.keys().map(ToString::to_string).collect();
    for expected in [
        "10.1.0.0/24",
        "192.168.0.5",
        "10.96.0.1",
        "192.168.0.2",
        "10.96.0.10",
        "10.96.0.0/12",
    ] {
        let is_there = internal
            .iter()
            .any(|one| one.trim_end_matches("/32") == expected);
        assert!(is_there, "{expected} in {internal:?}");
    }
    assert_eq!(facts.resolvers.len(), 1, "the API server is not a resolver");
}

#[test]
fn a_mirror_gets_the_cgroup_of_its_static_pod() {
    const UID: &str = "0123456789abcdef0123456789abcdef";
    let mirror = json!({ "metadata": {
        "annotations": { "kubernetes.io/config.mirror": UID },
        "ownerReferences": [{ "apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": NODE_UID }],
    } });
    let mut cluster = Cluster::new();
    cluster.namespace("kube-system");
    cluster.pod("kube-system", "web-node-1", &mirror);
    let snapshot = cluster.snapshot();
    assert_eq!(
        pod(&snapshot, "kube-system", "web-node-1")
            .cgroup_uid
            .as_deref(),
        Some(UID)
    );
    // Two pods with this claim: neither can be trusted.
    cluster.pod("kube-system", "other", &mirror);
    let snapshot = cluster.snapshot();
    assert!(snapshot.pods.values().all(|pod| pod.cgroup_uid.is_none()));
    assert_eq!(messages(&snapshot).len(), 2);
}

#[test]
fn a_pod_cannot_claim_the_address_of_another() {
    let claims = [
        "192.0.2.7",
        "10.1.0.9",
        "192.168.0.5",
        "10.96.0.10",
        "10.1.0.77",
    ];
    let status = json!([{ "name": "net1", "ips": claims }]).to_string();
    let mut cluster = Cluster::new();
    cluster.namespace("shop");
    cluster.pod(
        "shop",
        "other",
        &json!({ "status": { "podIPs": [{ "ip": "10.1.0.9" }] } }),
    );
    cluster.pod(
        "shop",
        "cart",
        &json!({
            "metadata": { "annotations": { "k8s.v1.cni.cncf.io/network-status": status } },
            "status": { "podIPs": [{ "ip": "10.1.0.7" }] },
        }),
    );
    let snapshot = cluster.snapshot();
    let cart = pod(&snapshot, "shop", "cart");
    assert_eq!(cart.addresses, [ip("10.1.0.7")]);
    // Control decides which of them count.
    assert_eq!(cart.further, claims.map(ip));
}
