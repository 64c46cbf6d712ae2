use std::collections::BTreeSet;

use k8s_openapi::api::core::v1;
use kube::{core::PartialObjectMeta, runtime::watcher::Event};
use serde_json::{Value, json};

use super::{
    super::{
        facts::NodeFacts, health::Failure, kubelet::Kubelet, namespace::Namespace, peers::SlimPod,
        pod::ClusterPod, state::State,
    },
    *,
};
use crate::{config::Nodes, pods::Snapshot};

struct Cluster {
    state: State,
    health: Health,
    _directory: tempfile::TempDir,
}

type Reduce = fn(DynamicObject, Option<&KeptPolicy>) -> Option<KeptPolicy>;
type TableOf = fn(&mut Policies) -> &mut Table<KeptPolicy>;

const EGRESS: (TableOf, Reduce) = (|policies| &mut policies.egress, egress_kind);
const NETWORK: (TableOf, Reduce) = (
    |policies| &mut policies.network,
    |read, former| {
        Some(KeptPolicy::read(
            ObjectKind::ClusterNetworkPolicy,
            &read,
            former,
        ))
    },
);

#[expect(
    clippy::unnecessary_wraps,
    clippy::needless_pass_by_value,
    reason = "the form that tables need"
)]
fn egress_kind(read: DynamicObject, former: Option<&KeptPolicy>) -> Option<KeptPolicy> {
    Some(KeptPolicy::read(ObjectKind::EgressPolicy, &read, former))
}

fn object(value: Value) -> DynamicObject {
    serde_json::from_value(value).expect("an object")
}

fn list<K: kube::Resource, R: PartialEq>(
    table: &mut Table<R>,
    objects: Vec<K>,
    reduce: fn(K, Option<&R>) -> Option<R>,
) {
    table.apply::<K>(Event::Init, reduce);
    for object in objects {
        table.apply(Event::InitApply(object), reduce);
    }
    table.apply::<K>(Event::InitDone, reduce);
}

fn egress_policy(name: &str, spec: &Value) -> DynamicObject {
    object(json!({
        "apiVersion": "egress-agent.dev/v1alpha1", "kind": "EgressPolicy",
        "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-{name}")},
        "spec": spec,
    }))
}

fn network_policy(egress: &Value) -> DynamicObject {
    object(json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "up", "uid": "uid-up"},
        "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "egress": egress},
    }))
}

impl Cluster {
    /// A cluster with the pods `web` and `db` of the namespace `shop`, in which nothing is known about policies yet.
    fn silent() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let kubelet = Kubelet::new(&directory.path().join("config.yaml"));
        let dns = ("kube-system".to_owned(), "kube-dns".to_owned());
        let mut cluster = Self {
            state: State::new("node-1", Nodes::All, dns, kubelet),
            health: Health::default(),
            _directory: directory,
        };
        let state = &mut cluster.state;
        list::<v1::Pod, _>(&mut state.pods, Vec::new(), |read, _| {
            ClusterPod::read(read)
        });
        let shop: PartialObjectMeta<v1::Namespace> =
            serde_json::from_value(json!({"metadata": {"name": "shop"}})).expect("a namespace");
        list(&mut state.namespaces, vec![shop], |read, _| {
            Namespace::read(read)
        });
        let node: v1::Node = serde_json::from_value(json!({
            "metadata": {"name": "node-1", "labels": {"zone": "a"}},
            "status": {"addresses": [
                {"type": "InternalIP", "address": "192.168.7.1"},
                {"type": "Hostname", "address": "node-1"},
            ]},
        }))
        .expect("a node");
        list(&mut state.node, vec![node], |read, _| {
            Some(NodeFacts::read(read))
        });
        let services = &mut state.services;
        list::<v1::Service, _>(&mut services.services, Vec::new(), |_, _| None);
        list::<v1::Service, _>(&mut services.endpoints, Vec::new(), |_, _| None);
        for watched in [
            Watched::DnsService,
            Watched::DnsEndpoints,
            Watched::ApiService,
            Watched::ApiEndpoints,
            Watched::ServiceRanges,
        ] {
            let interrupted = Failure::Unreachable("x".into());
            cluster.health.record_failure(watched, interrupted);
        }
        cluster.label("web", "web");
        cluster.label("db", "db");
        cluster
    }

    /// The same, with a complete list of every kind, which is empty.
    fn new() -> Self {
        let mut cluster = Self::silent();
        let policies = &mut cluster.state.policies;
        for table in [
            &mut policies.egress,
            &mut policies.cluster_egress,
            &mut policies.network,
        ] {
            list::<DynamicObject, _>(table, Vec::new(), |_, _| None);
        }
        list::<DynamicObject, _>(&mut policies.sets, Vec::new(), |_, _| None);
        cluster
    }

    fn label(&mut self, pod: &str, app: &str) {
        let pod: v1::Pod = serde_json::from_value(json!({
            "metadata": {"namespace": "shop", "name": pod, "uid": pod, "labels": {"app": app}},
            "spec": {"containers": []},
        }))
        .expect("a pod");
        let pods = &mut self.state.pods;
        pods.apply(Event::Apply(pod), |read, _| ClusterPod::read(read));
    }

    fn apply(&mut self, (table, reduce): (TableOf, Reduce), object: DynamicObject) {
        table(&mut self.state.policies).apply(Event::Apply(object), reduce);
    }

    fn define(&mut self, kind: PolicyKind, is_there: bool) -> Signals {
        let name = super::super::definitions::name_of(kind);
        let definition = object(json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": name},
        }));
        let policies = &mut self.state.policies;
        let read = |read: DynamicObject, _: Option<&Definition>| {
            let partial = json!({"metadata": read.metadata});
            Definition::read(serde_json::from_value(partial).expect("metadata"))
        };
        list(&mut policies.definitions, Vec::new(), read);
        if is_there {
            policies.definitions.apply(Event::Apply(definition), read);
        }
        let mut signals = Signals::default();
        policies.note_definitions(&mut signals);
        signals
    }

    fn snapshot(&mut self) -> Snapshot {
        self.state.snapshot(&self.health)
    }

    /// The names of the `EgressPolicy` objects that select a pod.
    fn selecting(&mut self, pod: &str) -> Vec<String> {
        let snapshot = self.snapshot();
        let pod = &snapshot.pods[&NamespacedName::new("shop", pod)];
        let policies = pod.objects.namespace.iter();
        policies.map(|policy| policy.name.name.clone()).collect()
    }

    /// The entries of the only rule of the only policy with ordered rules.
    fn entries(&mut self) -> Vec<String> {
        let snapshot = self.snapshot();
        let pod = &snapshot.pods[&NamespacedName::new("shop", "web")];
        let tiers: Vec<_> = pod.objects.tiers.iter().collect();
        assert_eq!(tiers.len(), 1, "{tiers:?}");
        tiers[0].rules[0].entries.clone()
    }

    fn problems(&mut self) -> String {
        let snapshot = self.snapshot();
        let problems: Vec<_> = snapshot.problems.iter().map(ToString::to_string).collect();
        problems.join("\n")
    }
}

fn selecting(app: &str) -> Value {
    json!({"podSelector": {"matchLabels": {"app": app}}, "allow": ["a.test"]})
}

#[test]
fn pods_wait_for_each_kind_that_the_server_has() {
    let mut cluster = Cluster::silent();
    assert!(cluster.snapshot().unreadable);
    let policies = &mut cluster.state.policies;
    list::<DynamicObject, _>(&mut policies.egress, Vec::new(), |_, _| None);
    list::<DynamicObject, _>(&mut policies.cluster_egress, Vec::new(), |_, _| None);
    let not_served = Failure::NotServed;
    cluster
        .health
        .record_failure(Watched::ClusterNetworkPolicies, not_served);
    // No definition: the kind does not exist.
    cluster.define(PolicyKind::Set, true);
    // An error is no reason not to wait.
    let failure = Failure::Unreachable("x".into());
    cluster.health.record_failure(Watched::EgressSets, failure);
    assert!(cluster.snapshot().unreadable);
    let refused = Failure::Refused("egresssets is forbidden".into());
    cluster.health.record_failure(Watched::EgressSets, refused);
    let problems = cluster.problems();
    assert!(!cluster.snapshot().unreadable);
    assert!(problems.contains("egresssets is forbidden"), "{problems}");
    assert!(!problems.contains("ClusterNetworkPolicy"), "{problems}");
}

#[test]
fn pods_stay_while_a_kind_of_policies_is_out_of_reach() {
    let mut cluster = Cluster::new();
    assert!(!cluster.snapshot().unreadable);
    let rule = json!([{"action": "Accept", "to": [{"namespaces": {}}]}]);
    cluster.apply(NETWORK, network_policy(&rule));
    assert!(
        !cluster.snapshot().unreadable,
        "the pods that the rule names are not known yet"
    );
    let mut cluster = Cluster::silent();
    cluster.define(PolicyKind::Set, false);
    for kind in PolicyKind::ALL {
        let watched = kind_states::watched(kind);
        cluster.health.record_failure(watched, Failure::NotServed);
    }
    assert_eq!(cluster.snapshot().pods.len(), 2);
    for kind in PolicyKind::ALL {
        let watched = kind_states::watched(kind);
        let failure = Failure::Unreachable("x".into());
        cluster.health.record_failure(watched, failure);
    }
    assert_eq!(cluster.snapshot().pods.len(), 2);
}

#[test]
fn pods_follow_labels_and_policies() {
    let mut cluster = Cluster::new();
    cluster.apply(EGRESS, egress_policy("of-web", &selecting("web")));
    assert_eq!(cluster.selecting("web"), ["of-web"]);
    assert!(cluster.selecting("db").is_empty());
    cluster.label("db", "web");
    assert_eq!(cluster.selecting("db"), ["of-web"]);
    cluster.apply(EGRESS, egress_policy("of-web", &selecting("db")));
    assert!(cluster.selecting("web").is_empty());
    let table = &mut cluster.state.policies.egress;
    let gone = egress_policy("of-web", &json!({}));
    table.apply(Event::Delete(gone), egress_kind);
    assert!(cluster.selecting("db").is_empty());
}

#[test]
fn a_policy_that_cannot_be_read_any_more_stays_and_is_reported() {
    let mut cluster = Cluster::new();
    cluster.apply(EGRESS, egress_policy("of-web", &selecting("web")));
    let before = cluster.snapshot();
    let mut broken = selecting("web");
    broken["allow"] = json!("a.test");
    cluster.apply(EGRESS, egress_policy("of-web", &broken));
    let after = cluster.snapshot();
    assert_eq!(before.pods, after.pods);
    let problems = cluster.problems();
    assert!(
        problems.contains("EgressPolicy shop/of-web: spec.allow cannot be read"),
        "{problems}"
    );
    assert!(problems.contains(KEPT), "{problems}");

    // Another object of the same name has no earlier form.
    let mut another = egress_policy("of-web", &broken);
    another.metadata.uid = Some("another".into());
    cluster.apply(EGRESS, another);
    let snapshot = cluster.snapshot();
    let web = &snapshot.pods[&NamespacedName::new("shop", "web")];
    assert_eq!(web.objects.namespace[0].allow, Some(Vec::new()));
}

#[test]
fn a_list_of_the_same_objects_changes_nothing() {
    let mut cluster = Cluster::new();
    let policy = || egress_policy("of-web", &selecting("web"));
    cluster.apply(EGRESS, policy());
    let before = cluster.snapshot();
    let table = &mut cluster.state.policies.egress;
    let revision = table.revision();
    list(table, vec![policy()], egress_kind);
    assert_eq!(table.revision(), revision);
    let after = cluster.snapshot();
    let of = |snapshot: &Snapshot| {
        let web = &snapshot.pods[&NamespacedName::new("shop", "web")];
        Arc::clone(&web.objects.namespace[0])
    };
    assert!(Arc::ptr_eq(&of(&before), &of(&after)));
}

#[test]
fn sets_are_shared_and_keep_their_last_readable_form() {
    let mut cluster = Cluster::new();
    let mut apply = |spec: Value| {
        let set = object(json!({
            "apiVersion": "egress-agent.dev/v1alpha1", "kind": "EgressSet",
            "metadata": {"name": "git", "uid": "x"}, "spec": spec,
        }));
        let sets = &mut cluster.state.policies.sets;
        sets.apply(Event::Apply(set), |read, former| {
            Some(KeptSet::read(&read, former))
        });
        let snapshot = cluster.snapshot();
        let sets: Vec<_> = snapshot
            .pods
            .values()
            .map(|pod| &pod.objects.sets)
            .collect();
        assert!(Arc::ptr_eq(sets[0], sets[1]));
        (sets[0].get("git").cloned(), cluster.problems())
    };
    let (set, problems) = apply(json!({"destinations": 1}));
    assert_eq!(set, None);
    assert!(
        problems.contains("EgressSet git: spec.destinations"),
        "{problems}"
    );
    let good = Some(vec!["github.com".to_owned()]);
    let (set, problems) = apply(json!({"destinations": ["github.com"]}));
    assert_eq!((&set, &*problems), (&good, ""));
    let (set, problems) = apply(json!({"destinations": 1}));
    assert_eq!(set, good);
    assert!(problems.contains(KEPT), "{problems}");
}

#[test]
fn policies_stay_when_their_definition_is_removed() {
    let kind = PolicyKind::Policy(ObjectKind::EgressPolicy);
    let mut cluster = Cluster::new();
    cluster.define(kind, true);
    cluster.apply(EGRESS, egress_policy("of-web", &selecting("web")));
    cluster.apply(EGRESS, egress_policy("more", &selecting("web")));
    // The objects are deleted first.
    let gone = || egress_policy("more", &json!({}));
    let table = &mut cluster.state.policies.egress;
    table.apply(Event::Delete(gone()), egress_kind);
    cluster.define(kind, false);
    let table = &mut cluster.state.policies.egress;
    let gone = egress_policy("of-web", &json!({}));
    table.apply(Event::Delete(gone), egress_kind);
    assert_eq!(cluster.selecting("web"), ["more", "of-web"]);
    let problems = cluster.problems();
    assert!(
        problems.contains("the definition of EgressPolicy has been removed: its 2 objects stay"),
        "{problems}"
    );
    // When it is there again, the server's list counts.
    let signals = cluster.define(kind, true);
    assert_eq!(signals.lists, [1, 0, 0, 0]);
    let table = &mut cluster.state.policies.egress;
    list(table, Vec::new(), egress_kind);
    assert!(cluster.selecting("web").is_empty());
    assert_eq!(cluster.problems(), "");
}

#[test]
fn a_kind_without_a_definition_is_followed() {
    let mut cluster = Cluster::new();
    cluster.define(PolicyKind::Policy(ObjectKind::EgressPolicy), false);
    cluster.apply(EGRESS, egress_policy("of-web", &selecting("web")));
    assert_eq!(cluster.selecting("web"), ["of-web"]);
}

#[test]
fn a_rule_about_nodes_follows_their_labels_and_addresses() {
    let mut cluster = Cluster::new();
    let rule = json!([{"action": "Accept", "to": [{"nodes": {"matchLabels": {"zone": "a"}}}]}]);
    cluster.apply(NETWORK, network_policy(&rule));
    assert_eq!(cluster.entries(), ["192.168.7.1/any"]);
    let node: v1::Node = serde_json::from_value(json!({
        "metadata": {"name": "node-2", "labels": {"zone": "a"}},
        "status": {"addresses": [{"type": "ExternalIP", "address": "203.0.113.9"}]},
    }))
    .expect("a node");
    let nodes = &mut cluster.state.node;
    nodes.apply(Event::Apply(node), |read, _| Some(NodeFacts::read(read)));
    assert_eq!(cluster.entries(), ["192.168.7.1/any", "203.0.113.9/any"]);
}

#[test]
fn a_rule_about_pods_follows_them_at_most_once_in_a_while() {
    let mut cluster = Cluster::new();
    let rule = json!([{"action": "Accept", "to": [{"namespaces": {}}]}]);
    assert!(!cluster.state.policies.needs_pods());
    cluster.apply(NETWORK, network_policy(&rule));
    assert!(cluster.state.policies.needs_pods());
    // The list of pods has been asked for.
    assert!(cluster.snapshot().unreadable, "a start waits for the pods");
    let peer = |name: &str, address: &str| -> SlimPod {
        serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "shop", "name": name},
            "spec": {}, "status": {"podIP": address},
        }))
        .expect("a pod")
    };
    let pods = &mut cluster.state.policies.peer_pods;
    list(pods, vec![peer("a", "10.1.0.2")], |read, _| {
        PeerFacts::read(read)
    });
    assert_eq!(cluster.entries(), ["10.1.0.2/any"]);
    let pods = &mut cluster.state.policies.peer_pods;
    pods.apply(Event::Apply(peer("b", "10.1.0.9")), |read, _| {
        PeerFacts::read(read)
    });
    assert_eq!(
        cluster.entries(),
        ["10.1.0.2/any"],
        "the addresses are renewed later"
    );
    cluster.state.policies.renew_peers();
    assert_eq!(cluster.entries(), ["10.1.0.2/any", "10.1.0.9/any"]);
}

#[test]
fn a_rule_about_pods_fails_closed_if_they_may_not_be_listed() {
    let mut cluster = Cluster::new();
    let rule = json!([{"action": "Pass", "to": [{"namespaces": {}}]}]);
    cluster.apply(NETWORK, network_policy(&rule));
    let refused = Failure::Refused("pods is forbidden".into());
    cluster.health.record_failure(Watched::PeerPods, refused);
    cluster.state.policies.pods_needed = Instant::now().checked_sub(PEERS_WAIT);
    assert_eq!(cluster.entries(), ["*"]);
    let problems = cluster.problems();
    assert!(
        problems
            .contains("ClusterNetworkPolicy up: spec.egress[0]: the cluster's pods are not known"),
        "{problems}"
    );
}

#[test]
fn ten_thousand_broken_policies_are_a_hundred_problems() {
    let mut cluster = Cluster::new();
    let broken =
        (0..10_000).map(|number| egress_policy(&format!("p{number}"), &json!({"allow": 1})));
    let table = &mut cluster.state.policies.egress;
    list(table, broken.collect(), egress_kind);
    let snapshot = cluster.snapshot();
    let origins: BTreeSet<_> = snapshot.problems.iter().map(|one| &one.origin).collect();
    assert_eq!(origins.len(), PROBLEMS_MAX + 1);
    let last = snapshot.problems.last().expect("a problem").to_string();
    assert_eq!(
        last,
        "policies: 9900 more policy objects have problems, which are not listed"
    );
}
