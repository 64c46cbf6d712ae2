//! The agent's view of a cluster, from a real API server.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use egress_agent::{
    config::Config,
    pods::{
        NamespacedName, Pod, Snapshot,
        cluster::{Cluster, ClusterWatch, Options, PodEvent, Watched},
    },
};
use egress_tests::{
    ApiServer, DEADLINE, Identity, TcpProxy, apiserver, eventually, holds, newer::NewerApi,
};
use serde_json::{Value, json};
use tokio::{
    runtime::{Builder, Runtime},
    sync::watch,
};

/// The agent's watch of the cluster, and its snapshots.
pub(crate) struct Follower {
    runtime: Runtime,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    watch: Option<ClusterWatch>,
}

impl Follower {
    pub(crate) fn start(kubeconfig: PathBuf, node: &str) -> Self {
        Self::start_with(kubeconfig, node, |_| {})
    }

    fn start_with(kubeconfig: PathBuf, node: &str, change: impl FnOnce(&mut Options)) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let mut settings = Config::from_yaml("").unwrap().cluster;
        settings.kubelet_config = kubeconfig.with_extension("kubelet.yaml");
        let mut options = Options::new(Some(kubeconfig), node.to_owned(), settings);
        change(&mut options);
        let (snapshots, watch) = runtime.block_on(Cluster::watch(options)).unwrap();
        assert!(snapshots.borrow().unreadable && snapshots.borrow().pods.is_empty());
        Self {
            runtime,
            snapshots,
            watch: Some(watch),
        }
    }

    /// The first snapshot from now on that meets the condition.
    #[track_caller]
    pub(crate) fn until(
        &mut self,
        what: &str,
        holds: impl FnMut(&Snapshot) -> bool,
    ) -> Arc<Snapshot> {
        self.until_always(what, |_| true, holds)
    }

    /// The same, and asserts that `always` is true for every snapshot until then.
    #[track_caller]
    pub(crate) fn until_always(
        &mut self,
        what: &str,
        always: impl Fn(&Snapshot) -> bool,
        mut holds: impl FnMut(&Snapshot) -> bool,
    ) -> Arc<Snapshot> {
        let snapshots = &mut self.snapshots;
        let found = self.runtime.block_on(async {
            let waiting = snapshots.wait_for(|snapshot| {
                assert!(always(snapshot), "on the way to: {what}: {snapshot:#?}");
                holds(snapshot)
            });
            let found = tokio::time::timeout(DEADLINE, waiting).await.ok()?;
            Some(Arc::clone(&*found.unwrap()))
        });
        found.unwrap_or_else(|| panic!("not seen: {what}: {:#?}", self.snapshots.borrow()))
    }

    #[track_caller]
    pub(crate) fn known(&mut self) -> Arc<Snapshot> {
        self.until("everything", |snapshot| !snapshot.unreadable)
    }

    /// Runs the tasks until the condition is met.
    #[track_caller]
    fn eventually(&self, what: &str, mut probe: impl FnMut(&ClusterWatch) -> bool) {
        eventually(what, || {
            self.runtime
                .block_on(async { tokio::time::sleep(Duration::from_millis(10)).await });
            holds(probe(self.watch()))
        });
    }

    fn watch(&self) -> &ClusterWatch {
        self.watch.as_ref().unwrap()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if let Some(watch) = self.watch.take() {
            self.runtime.block_on(watch.close(true));
        }
    }
}

pub(crate) fn pod(namespace: &str, name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "namespace": namespace, "name": name },
        "spec": { "nodeName": node, "containers": [{ "name": "main", "image": "none" }] },
    })
}

fn with_allow(mut pod: Value, allow: &str) -> Value {
    pod["metadata"]["annotations"] = json!({ "egress-agent.dev/allow": allow });
    pod
}

pub(crate) fn names(snapshot: &Snapshot) -> Vec<&str> {
    snapshot.pods.keys().map(|pod| pod.name.as_str()).collect()
}

pub(crate) fn get<'a>(snapshot: &'a Snapshot, namespace: &str, name: &str) -> Option<&'a Pod> {
    snapshot.pods.get(&NamespacedName::new(namespace, name))
}

fn allow(snapshot: &Snapshot, namespace: &str, name: &str) -> Option<String> {
    let pod = get(snapshot, namespace, name)?;
    pod.annotations.get("egress-agent.dev/allow").cloned()
}

pub(crate) fn has_problem(snapshot: &Snapshot, text: &str) -> bool {
    snapshot
        .problems
        .iter()
        .any(|problem| problem.to_string().contains(text))
}

/// True if this address or range is internal because of the cluster.
fn is_internal(snapshot: &Snapshot, expected: &str) -> bool {
    let mut prefixes = snapshot.facts.internal.keys().map(ToString::to_string);
    prefixes.any(|prefix| prefix.trim_end_matches("/32") == expected)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Grants the agent all rights in its list, everywhere.
fn allow_all(server: &ApiServer) {
    server.allow_agent("agent", &rules(|_| true));
}

pub(crate) fn rules(wanted: impl Fn(&str) -> bool) -> Value {
    let rules = egress_agent::pods::cluster::ACCESS.iter();
    rules
        .filter(|access| wanted(access.resource))
        .map(|access| {
            let mut rule = json!({
                "apiGroups": [access.group],
                "resources": [access.resource],
                "verbs": access.verbs,
            });
            if !access.names.is_empty() {
                rule["resourceNames"] = json!(access.names);
            }
            rule
        })
        .collect()
}

#[test]
fn pods_of_the_node_appear_change_and_go() {
    let server = ApiServer::shared();
    allow_all(&server);
    server.namespace("appear", &json!({}));
    let mut agent = Follower::start(server.kubeconfig(Identity::Agent), "appear-1");
    assert!(agent.known().pods.is_empty());

    let cart = pod("appear", "cart", "appear-1");
    let created = server.apply(&with_allow(cart.clone(), "example.com"));
    server.apply(&pod("appear", "elsewhere", "appear-2"));
    let seen = agent.until("the pod", |s| !s.pods.is_empty());
    assert_eq!(names(&seen), ["cart"]);
    let uid = created.metadata.uid.unwrap();
    let first = get(&seen, "appear", "cart").unwrap();
    assert_eq!((&first.uid, first.cgroup_uid.as_ref()), (&uid, Some(&uid)));
    assert!(first.namespace_known && first.addresses.is_empty());
    assert_eq!(first.origin, "pod appear/cart");

    let ips = json!({ "phase": "Running", "podIP": "10.1.0.7",
                      "podIPs": [{ "ip": "10.1.0.7" }, { "ip": "fd00:1::7" }] });
    server.set_status(&cart, &ips);
    let seen = agent.until("its addresses", |s| {
        get(s, "appear", "cart").is_some_and(|pod| pod.addresses.len() == 2)
    });
    assert_eq!(
        get(&seen, "appear", "cart").unwrap().addresses,
        [ip("10.1.0.7"), ip("fd00:1::7")]
    );

    server.apply(&with_allow(cart.clone(), "example.org"));
    agent.until("its new annotation", |s| {
        allow(s, "appear", "cart").as_deref() == Some("example.org")
    });

    let done = pod("appear", "done", "appear-1");
    server.apply(&done);
    agent.until("a second pod", |s| names(s) == ["cart", "done"]);
    server.set_status(&done, &json!({ "phase": "Succeeded" }));
    agent.until("the second pod's end", |s| names(s) == ["cart"]);

    server.delete(&cart);
    agent.until("the pod's end", |s| s.pods.is_empty());
}

#[test]
fn a_namespaces_annotations_apply_to_its_pods() {
    let server = ApiServer::shared();
    allow_all(&server);
    server.namespace(
        "lends",
        &json!({ "egress-agent.dev/mode": "enforce", "other": "x" }),
    );
    server.apply(&pod("lends", "cart", "lends-1"));
    let mut agent = Follower::start(server.kubeconfig(Identity::Agent), "lends-1");
    let annotations = |s: &Snapshot| {
        get(s, "lends", "cart")
            .filter(|pod| pod.namespace_known)
            .map(|pod| pod.namespace_annotations.clone())
    };
    let seen = agent.known();
    let expected = BTreeMap::from([("egress-agent.dev/mode".to_owned(), "enforce".to_owned())]);
    assert_eq!(annotations(&seen), Some(expected));
    server.namespace("lends", &json!({ "egress-agent.dev/mode": "audit" }));
    let audit = BTreeMap::from([("egress-agent.dev/mode".to_owned(), "audit".to_owned())]);
    agent.until("the new mode", |s| annotations(s).as_ref() == Some(&audit));
}

#[test]
fn resolvers_and_internal_addresses_are_read_from_the_cluster() {
    let server = ApiServer::start();
    allow_all(&server);
    server.namespace("kube-system", &json!({}));
    server.apply(&json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": "node-1" },
        "spec": { "podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24"] },
    }));
    let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node-1" } });
    let addresses = json!([{ "type": "InternalIP", "address": "192.168.7.5" }]);
    server.set_status(&node, &json!({ "addresses": addresses }));
    let mut agent = Follower::start(server.kubeconfig(Identity::Agent), "node-1");
    let seen = agent.known();
    assert!(
        has_problem(&seen, "service kube-system/kube-dns: does not exist"),
        "{:?}",
        seen.problems
    );

    // Another node's addresses do not make public addresses internal.
    server.apply(&json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": "node-2" },
        "spec": { "podCIDR": "10.1.1.0/24", "podCIDRs": ["10.1.1.0/24"] },
    }));
    let other = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node-2" } });
    let addresses = json!([
        { "type": "InternalIP", "address": "192.168.9.9" },
        { "type": "InternalIP", "address": "203.0.113.7" },
    ]);
    server.set_status(&other, &json!({ "addresses": addresses }));
    let seen = agent.until("the other node", |seen| {
        has_problem(seen, "not for private use, such as 203.0.113.7")
    });
    assert!(!is_internal(&seen, "203.0.113.7"));

    for expected in [
        "10.1.0.0/24",
        "10.1.1.0/24",
        "192.168.7.5",
        "192.168.9.9",
        apiserver::API_SERVICE,
        apiserver::ADVERTISED,
    ] {
        assert!(
            is_internal(&seen, expected),
            "{expected} in {:?}",
            seen.facts
        );
    }

    server.apply(&json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "namespace": "kube-system", "name": "kube-dns" },
        "spec": { "clusterIP": "10.96.0.10", "ports": [{ "name": "dns", "port": 53, "protocol": "UDP" }] },
    }));
    let dns = json!({
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": { "namespace": "kube-system", "name": "kube-dns" },
        "subsets": [{
            "addresses": [{ "ip": "10.1.0.2" }],
            "notReadyAddresses": [{ "ip": "10.1.0.3" }],
            "ports": [{ "name": "dns", "port": 53, "protocol": "UDP" }],
        }],
    });
    server.apply(&dns);
    // A server with EndpointSlices of version v1 gets them from a controller, which does not run here.
    server.apply_slice("kube-system", "kube-dns", &["10.1.0.2", "10.1.0.3"]);
    let seen = agent.until("the resolvers", |s| s.facts.resolvers.len() == 3);
    let origins: Vec<_> = seen.facts.resolvers.iter().collect();
    let (service, endpoints) = (
        "service kube-system/kube-dns",
        "endpoints of service kube-system/kube-dns",
    );
    assert_eq!(
        origins,
        [
            (&ip("10.1.0.2").into(), &endpoints.to_owned()),
            (&ip("10.1.0.3").into(), &endpoints.to_owned()),
            (&ip("10.96.0.10").into(), &service.to_owned()),
        ]
    );
    let origins: Vec<_> = seen
        .problems
        .iter()
        .map(|problem| &*problem.origin)
        .collect();
    assert_eq!(origins, ["nodes"]);
    assert!(is_internal(&seen, "10.96.0.10"));
}

#[test]
fn endpoint_slices_take_precedence_over_endpoints() {
    let server = ApiServer::start();
    allow_all(&server);
    server.namespace("kube-system", &json!({}));
    server.apply(&json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "namespace": "kube-system", "name": "kube-dns" },
        "spec": { "clusterIP": "10.96.0.10", "ports": [{ "name": "dns", "port": 53, "protocol": "UDP" }] },
    }));
    // Where there are slices, nobody updates the Endpoints.
    server.apply(&json!({
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": { "namespace": "kube-system", "name": "kube-dns" },
        "subsets": [{ "addresses": [{ "ip": "10.1.0.99" }], "ports": [{ "port": 53, "protocol": "UDP" }] }],
    }));
    let dns = |name, addresses| NewerApi::slice("kube-system", "kube-dns", name, addresses);
    let second = dns("kube-dns-b", &["10.1.0.3"]);
    server.apply(&dns("kube-dns-a", &["10.1.0.2"]));
    server.apply(&second);
    server.apply(&NewerApi::slice(
        "kube-system",
        "metrics",
        "metrics-a",
        &["10.1.0.4"],
    ));
    let newer = NewerApi::start(&server);
    let mut agent = Follower::start(newer.kubeconfig(&server), "node-1");

    let resolvers = |s: &Snapshot| -> Vec<String> {
        s.facts.resolvers.keys().map(ToString::to_string).collect()
    };
    let seen = agent.known();
    assert_eq!(resolvers(&seen), ["10.1.0.2", "10.1.0.3", "10.96.0.10"]);
    assert!(
        is_internal(&seen, apiserver::ADVERTISED),
        "{:?}",
        seen.facts
    );

    server.apply(&dns("kube-dns-a", &["10.1.0.2", "10.1.0.5"]));
    server.delete(&second);
    agent.until("the slices' changes", |s| {
        resolvers(s) == ["10.1.0.2", "10.1.0.5", "10.96.0.10"]
    });
}

#[test]
fn an_outage_of_the_server_keeps_everything_and_changes_follow_later() {
    let server = ApiServer::start();
    allow_all(&server);
    server.namespace("away", &json!({}));
    for n in 0..20 {
        server.apply(&pod("away", &format!("p{n}"), "away-1"));
    }
    let mut agent = Follower::start(server.kubeconfig(Identity::Agent), "away-1");
    agent.until("all pods", |s| s.pods.len() == 20);

    server.kill();
    let seen = agent.until_always(
        "the outage",
        |s| s.pods.len() == 20 && !s.unreadable,
        |s| has_problem(s, "cannot be reached"),
    );
    assert_eq!(
        seen.problems
            .iter()
            .filter(|p| p.message.contains("cannot be reached"))
            .count(),
        1
    );
    assert!(!agent.watch().health().is_reachable());

    server.run();
    server.delete(&pod("away", "p0", "away-1"));
    server.apply(&with_allow(pod("away", "p1", "away-1"), "example.com"));
    let complete = |s: &Snapshot| s.pods.len() >= 19 && !s.unreadable;
    agent.until_always("the changes", complete, |s| {
        s.pods.len() == 19
            && allow(s, "away", "p1").is_some()
            && !has_problem(s, "cannot be reached")
    });
    assert!(agent.watch().health().is_reachable());
}

#[test]
fn an_expired_watch_is_replaced_by_a_complete_list() {
    let server = ApiServer::start();
    allow_all(&server);
    server.namespace("gone", &json!({}));
    for n in 0..20 {
        server.apply(&pod("gone", &format!("p{n}"), "gone-1"));
    }
    let proxy = TcpProxy::start(server.port());
    let user = json!({ "token": "token-of-agent" });
    let kubeconfig = server.kubeconfig_with("gone", proxy.port(), &user);
    let mut agent = Follower::start(kubeconfig, "gone-1");
    agent.until("all pods", |s| s.pods.len() == 20);
    let before = agent.watch().health().restarts(Watched::Pods);

    // The agent misses changes, and the server no longer has them.
    proxy.refuse();
    server.delete(&pod("gone", "p0", "gone-1"));
    server.apply(&with_allow(pod("gone", "p1", "gone-1"), "example.com"));
    server.kill();
    server.run();
    proxy.allow();
    let complete = |s: &Snapshot| s.pods.len() >= 19 && !s.unreadable;
    agent.until_always("the changes", complete, |s| {
        s.pods.len() == 19 && allow(s, "gone", "p1").is_some()
    });
    assert!(agent.watch().health().restarts(Watched::Pods) > before);
}

#[test]
fn a_silently_dead_connection_is_detected() {
    let server = ApiServer::shared();
    allow_all(&server);
    server.namespace("silent", &json!({}));
    let proxy = TcpProxy::start(server.port());
    let user = json!({ "token": "token-of-agent" });
    let kubeconfig = server.kubeconfig_with("silent", proxy.port(), &user);
    let mut agent = Follower::start_with(kubeconfig, "silent-1", |options| {
        options.silence = Duration::from_secs(3);
    });
    agent.known();
    assert_eq!(proxy.connections(), 1, "all watches share one connection");

    proxy.stall();
    server.apply(&pod("silent", "cart", "silent-1"));
    agent.until("the pod, over another connection", |s| names(s) == ["cart"]);
    assert_eq!(proxy.connections(), 2);
}

#[test]
fn a_replaced_token_is_used_at_once() {
    let server = ApiServer::start();
    allow_all(&server);
    server.namespace("token", &json!({}));
    let token = server.file("token");
    std::fs::write(&token, Identity::Agent.token()).unwrap();
    let kubeconfig =
        server.kubeconfig_with("rotating", server.port(), &json!({ "tokenFile": token }));
    let mut agent = Follower::start(kubeconfig, "token-1");
    agent.known();

    server.write_tokens(&[
        (Identity::Admin, "token-of-admin"),
        (Identity::Agent, "token-2"),
    ]);
    server.kill();
    server.run();
    agent.until("the refusal", |s| {
        has_problem(s, "does not accept the agent's credentials")
    });
    std::fs::write(&token, "token-2").unwrap();
    server.apply(&pod("token", "cart", "token-1"));
    agent.until("the pod, with the new token", |s| {
        names(s) == ["cart"] && !has_problem(s, "credentials")
    });
}

#[test]
fn a_missing_right_is_named_and_the_rest_goes_on() {
    let server = ApiServer::start();
    server.allow_agent(
        "agent",
        &rules(|resource| resource != "nodes" && resource != "namespaces"),
    );
    server.namespace("rights", &json!({}));
    server.apply(&pod("rights", "cart", "rights-1"));
    let mut agent = Follower::start(server.kubeconfig(Identity::Agent), "rights-1");
    let seen = agent.until_always(
        "what is missing",
        |s| s.pods.is_empty(),
        |s| {
            has_problem(s, "cannot list resource \"namespaces\"")
                && has_problem(s, "cannot list resource \"nodes\"")
        },
    );
    assert!(
        seen.unreadable,
        "an unknown namespace may have any annotation"
    );

    server.allow_agent("agent", &rules(|resource| resource != "nodes"));
    let seen = agent.until("the pod", |s| names(s) == ["cart"]);
    assert!(has_problem(&seen, "cannot list resource \"nodes\""));
    allow_all(&server);
    agent.until("no problem with a right", |s| {
        !has_problem(s, "cannot list")
    });
}

#[test]
fn events_are_written_on_a_pod_and_repetitions_are_counted() {
    let server = ApiServer::shared();
    allow_all(&server);
    server.namespace("events", &json!({}));
    let created = server.apply(&pod("events", "cart", "events-1"));
    let mut agent = Follower::start(server.kubeconfig(Identity::Agent), "events-1");
    agent.known();
    let event = |note: &str| PodEvent {
        namespace: "events".into(),
        name: "cart".into(),
        uid: created.metadata.uid.clone().unwrap(),
        reason: "EgressDenied",
        note: note.to_owned(),
        warning: true,
    };
    let events = agent.watch().events().clone();
    for _ in 0..3 {
        events.send(event("192.0.2.1:443/tcp is not allowed"));
    }
    events.send(event(&"ö".repeat(2000)));
    let like = json!({
        "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": { "namespace": "events" },
    });
    agent.eventually("two Events, and the first repeated", |_| {
        let listed = server.list(&like);
        let told = |object: &Value| {
            let regarding = &object["regarding"];
            assert_eq!(
                (&object["reason"], &object["type"]),
                (&json!("EgressDenied"), &json!("Warning"))
            );
            assert_eq!(
                (&regarding["kind"], &regarding["name"]),
                (&json!("Pod"), &json!("cart"))
            );
            let note = object["note"].as_str().unwrap_or_default().to_owned();
            (note.len(), object["series"]["count"].as_u64())
        };
        let mut all: Vec<_> = listed.iter().map(|event| told(&event.data)).collect();
        all.sort_unstable();
        all == [(32, Some(3)), (1024, None)]
    });
    let counters = events.counters();
    agent.eventually("they are counted", |_| {
        (counters.sent(), counters.dropped(), counters.failed()) == (3, 0, 0)
    });

    for n in 0..1000 {
        events.send(event(&format!("another note {n}")));
    }
    agent.eventually("too many are dropped", |_| counters.dropped() > 900);
    agent.eventually("some are written", |_| counters.sent() > 3);
    assert!(
        server.list(&like).len() <= 12,
        "more Events at once than one pod may have"
    );
}
