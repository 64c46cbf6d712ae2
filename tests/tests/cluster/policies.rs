//! Policy objects in a real API server: their definitions come and go, and pods follow selectors and labels.

use std::sync::Arc;

use egress_agent::pods::Snapshot;
use egress_tests::{
    ApiServer, Cluster, Identity, Lab, SHORT,
    addresses::server as address,
    definitions::{path_of_objects, upstream_definition},
    eventually, holds, yaml,
};
use serde_json::{Value, json};

use crate::source::{Follower, get, has_problem, pod, rules};

/// The collection of a kind at the API server.
const EGRESS_POLICIES: &str = "/apis/egress-agent.dev/v1alpha1/egresspolicies";
const NETWORK_POLICIES: &str = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies";
pub(crate) const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

/// An API server on which the agent has all its rights.
pub(crate) fn server() -> Arc<ApiServer> {
    let server = Arc::new(ApiServer::start());
    server.allow_agent("agent", &rules(|_| true));
    server
}

fn post(server: &ApiServer, definition: &Value) {
    let status = server.asked_by(Identity::Admin, "POST", DEFINITIONS, definition);
    assert_eq!(status, 200, "{definition}");
}

/// Waits until the server serves a kind.
pub(crate) fn wait_served(server: &ApiServer, path: &str) {
    eventually(&format!("{path} is served"), || {
        holds(server.asked_by(Identity::Admin, "GET", path, &Value::Null) == 200)
    });
}

/// Installs the definitions of the manifests.
pub(crate) fn install(server: &ApiServer) {
    for definition in yaml::objects("base/crds.yaml") {
        post(server, &definition);
        let plural = definition["spec"]["names"]["plural"].as_str();
        let plural = plural.expect("a plural");
        wait_served(server, &format!("/apis/egress-agent.dev/v1alpha1/{plural}"));
    }
}

/// A definition of the upstream kind that accepts every object.
pub(crate) fn install_upstream(server: &ApiServer) {
    install_upstream_version(server, "v1alpha2");
}

/// The same in another version.
fn install_upstream_version(server: &ApiServer, version: &str) {
    let definition = upstream_definition(version);
    post(server, &definition);
    wait_served(server, &path_of_objects(&definition));
}

/// Creates a policy object, or edits it to this state.
pub(crate) fn put(server: &ApiServer, object: &Value) {
    let collection = match (&object["kind"], &object["metadata"]["namespace"]) {
        (kind, Value::String(namespace)) if kind == "EgressPolicy" => {
            format!("/apis/egress-agent.dev/v1alpha1/namespaces/{namespace}/egresspolicies")
        }
        (kind, _) if kind == "ClusterNetworkPolicy" => NETWORK_POLICIES.to_owned(),
        (kind, _) if kind == "EgressSet" => "/apis/egress-agent.dev/v1alpha1/egresssets".to_owned(),
        _ => "/apis/egress-agent.dev/v1alpha1/clusteregresspolicies".to_owned(),
    };
    let status = server.asked_by(Identity::Admin, "POST", &collection, object);
    if status == 409 {
        let name = object["metadata"]["name"].as_str().expect("a name");
        let path = format!("{collection}/{name}");
        let status = server.asked_by(Identity::Admin, "PATCH", &path, object);
        assert_eq!(status, 200, "{object}");
    } else {
        assert_eq!(status, 200, "{object}");
    }
}

pub(crate) fn egress_policy(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "egress-agent.dev/v1alpha1",
        "kind": "EgressPolicy",
        "metadata": {"namespace": namespace, "name": name},
        "spec": spec,
    })
}

pub(crate) fn network_policy(name: &str, egress: &Value) -> Value {
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name},
        "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "egress": egress},
    })
}

fn for_app(app: &str) -> Value {
    json!({"podSelector": {"matchLabels": {"app": app}}, "allow": ["github.com:443"]})
}

/// The pod with the label `app`.
fn labelled(namespace: &str, name: &str, node: &str, app: &str) -> Value {
    let mut pod = pod(namespace, name, node);
    pod["metadata"]["labels"] = json!({"app": app});
    pod
}

/// The names of the policies that select a pod.
fn selecting(snapshot: &Snapshot, namespace: &str, name: &str) -> Vec<String> {
    let Some(pod) = get(snapshot, namespace, name) else {
        return Vec::new();
    };
    let namespace = pod.objects.namespace.iter().map(|policy| &policy.name);
    let tiers = pod.objects.tiers.iter().map(|policy| &policy.name);
    namespace.chain(tiers).map(ToString::to_string).collect()
}

/// The entries of the first rule of the first policy with ordered rules that selects a pod.
fn entries(snapshot: &Snapshot, namespace: &str, name: &str) -> Option<Vec<String>> {
    let tier = get(snapshot, namespace, name)?.objects.tiers.first()?;
    Some(tier.rules.first()?.entries.clone())
}

#[test]
fn policy_objects_decide_what_a_pod_reaches() {
    let server = server();
    install(&server);
    install_upstream(&server);
    let cluster = Cluster::on(Arc::clone(&server), Lab::builder());
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &Value::Null);
    let web = json!({"allow": [format!("{}:443", address(10)), format!("{}:443", address(20))]});
    put(&server, &egress_policy(&shop, "web", &web));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    cart.net().talks_tcp((address(10), 443));
    let elsewhere = cart.net().connect_tcp((address(99), 443), SHORT);
    assert!(elsewhere.is_err(), "the pod is open");

    // The platform's word comes before the team's.
    let rule = json!([{"action": "Deny", "to": [{"networks": [format!("{}/32", address(10))]}]}]);
    let guardrail = network_policy("guardrail", &rule);
    agent.applies_policy_after(cart.net(), || put(&server, &guardrail));
    let denied = cart.net().connect_tcp((address(10), 443), SHORT);
    assert!(denied.is_err(), "a denied address is reached");
    cart.net().talks_tcp((address(20), 443));
    agent.applies_policy_after(cart.net(), || server.delete(&guardrail));
    cart.net().talks_tcp((address(10), 443));
}

#[test]
fn a_kind_that_is_installed_later_is_noticed() {
    let server = server();
    server.namespace("shop", &json!({}));
    server.apply(&labelled("shop", "cart", "n1", "cart"));
    let mut agent = Follower::start(server.kubeconfig(Identity::Agent), "n1");
    let first = agent.known();
    assert_eq!(first.pods.len(), 1);
    assert!(!has_problem(&first, "Policy"), "{:?}", first.problems);

    install(&server);
    put(&server, &egress_policy("shop", "of-cart", &for_app("cart")));
    let selected = |s: &Snapshot| selecting(s, "shop", "cart");
    agent.until("the policy", |s| {
        selected(s) == ["EgressPolicy shop/of-cart"]
    });
    install_upstream(&server);
    put(&server, &network_policy("upstream", &json!([])));
    agent.until("the upstream policy", |s| {
        selected(s) == ["EgressPolicy shop/of-cart", "ClusterNetworkPolicy upstream"]
    });
}

#[test]
fn pods_follow_edits_of_labels_policies_and_sets() {
    let server = server();
    install(&server);
    server.namespace("shop", &json!({}));
    server.apply(&labelled("shop", "cart", "n1", "cart"));
    put(&server, &egress_policy("shop", "of-cart", &for_app("cart")));
    put(
        &server,
        &json!({
            "apiVersion": "egress-agent.dev/v1alpha1",
            "kind": "ClusterEgressPolicy",
            "metadata": {"name": "guardrails"},
            "spec": {
                "tier": "Admin",
                "priority": 7,
                "namespaceSelector": {"matchLabels": {"team": "shop"}},
                "rules": [{"name": "git", "action": "Deny", "entries": ["@git"]}],
            },
        }),
    );
    let mut agent = Follower::start(server.kubeconfig(Identity::Agent), "n1");
    let selected = |s: &Snapshot| selecting(s, "shop", "cart");
    // The first snapshot with pods has the policies already.
    let first = agent.until_always(
        "the first pods",
        |s| s.pods.is_empty() || !selected(s).is_empty(),
        |s| !s.pods.is_empty(),
    );
    assert_eq!(selected(&first), ["EgressPolicy shop/of-cart"]);

    server.apply(&labelled("shop", "cart", "n1", "other"));
    agent.until("another label of the pod", |s| selected(s).is_empty());
    let policy = egress_policy("shop", "of-cart", &for_app("other"));
    put(&server, &policy);
    agent.until("another selector", |s| {
        selected(s) == ["EgressPolicy shop/of-cart"]
    });
    server.delete(&policy);
    agent.until("the policy's end", |s| selected(s).is_empty());

    server.apply(&json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "shop", "labels": {"team": "shop"}},
    }));
    let seen = agent.until("a label of the namespace", |s| {
        selected(s) == ["ClusterEgressPolicy guardrails"]
    });
    let policy = &get(&seen, "shop", "cart").expect("the pod").objects.tiers[0];
    assert_eq!(
        (policy.priority, policy.rules[0].name.as_deref()),
        (7, Some("git"))
    );

    let set = |destination: &str| {
        put(
            &server,
            &json!({
                "apiVersion": "egress-agent.dev/v1alpha1", "kind": "EgressSet",
                "metadata": {"name": "git"}, "spec": {"destinations": [destination]},
            }),
        );
    };
    let has = |s: &Snapshot, destination: &str| {
        let pod = get(s, "shop", "cart").expect("the pod");
        pod.objects
            .sets
            .get("git")
            .is_some_and(|all| all == &[destination])
    };
    set("github.com");
    agent.until("the set", |s| has(s, "github.com"));
    set("gitlab.com");
    agent.until("an edit of the set", |s| has(s, "gitlab.com"));
}

#[test]
fn policies_stay_in_force_when_their_definition_is_removed() {
    let server = server();
    install(&server);
    server.namespace("shop", &json!({}));
    server.apply(&labelled("shop", "cart", "n1", "cart"));
    let policy = egress_policy("shop", "of-cart", &for_app("cart"));
    put(&server, &policy);
    let mut agent = Follower::start(server.kubeconfig(Identity::Agent), "n1");
    let selected = |s: &Snapshot| selecting(s, "shop", "cart");
    agent.until("the policy", |s| !selected(s).is_empty());

    let path = format!("{DEFINITIONS}/egresspolicies.egress-agent.dev");
    let deleted = server.asked_by(Identity::Admin, "DELETE", &path, &Value::Null);
    assert_eq!(deleted, 200);
    let removed = "the definition of EgressPolicy has been removed: its 1 objects stay in force";
    agent.until("a problem", |s| has_problem(s, removed));
    eventually("the kind is gone", || {
        holds(server.asked_by(Identity::Admin, "GET", EGRESS_POLICIES, &Value::Null) == 404)
    });
    // Another change, which is seen after everything above.
    server.apply(&labelled("shop", "second", "n1", "cart"));
    let seen = agent.until("another pod", |s| s.pods.len() == 2);
    assert_eq!(selected(&seen), ["EgressPolicy shop/of-cart"]);
    assert!(has_problem(&seen, removed));

    for definition in yaml::objects("base/crds.yaml") {
        if definition["metadata"]["name"] == "egresspolicies.egress-agent.dev" {
            post(&server, &definition);
        }
    }
    wait_served(&server, EGRESS_POLICIES);
    put(&server, &egress_policy("shop", "again", &for_app("cart")));
    let seen = agent.until("the server's list counts again", |s| {
        selected(s) == ["EgressPolicy shop/again"]
    });
    assert!(!has_problem(&seen, removed));
}

#[test]
fn a_kind_that_is_installed_in_another_version_is_reported() {
    let server = server();
    install(&server);
    install_upstream_version(&server, "v1beta7");
    server.namespace("shop", &json!({}));
    server.apply(&labelled("shop", "cart", "n1", "cart"));
    put(&server, &egress_policy("shop", "of-cart", &for_app("cart")));
    let mut agent = Follower::start(server.kubeconfig(Identity::Agent), "n1");
    let wrong = "are not read: the API server has them in other versions than the agent reads";
    let seen = agent.until("a problem", |s| has_problem(s, wrong));
    // Other kinds are not affected.
    assert_eq!(
        selecting(&seen, "shop", "cart"),
        ["EgressPolicy shop/of-cart"]
    );

    let name = "clusternetworkpolicies.policy.networking.k8s.io";
    let path = format!("{DEFINITIONS}/{name}");
    let deleted = server.asked_by(Identity::Admin, "DELETE", &path, &Value::Null);
    assert_eq!(deleted, 200);
    agent.until("no problem", |s| !has_problem(s, wrong));
    eventually("the definition is gone", || {
        holds(server.asked_by(Identity::Admin, "GET", &path, &Value::Null) == 404)
    });
    install_upstream(&server);
    put(&server, &network_policy("upstream", &json!([])));
    agent.until("the policy", |s| {
        selecting(s, "shop", "cart").len() == 2 && !has_problem(s, wrong)
    });
}

#[test]
fn the_api_server_accepts_the_examples_and_the_agent_reads_them() {
    let server = Arc::new(ApiServer::start());
    install(&server);
    install_upstream(&server);
    server.allow_agent("agent", &rules(|_| true));
    server.namespace("shop", &json!({}));
    let files = yaml::files();
    let is_example = |file: &&String| {
        file.starts_with("examples/sets/") || file.starts_with("examples/policies/")
    };
    let mut policies = 0;
    for file in files.iter().filter(is_example) {
        for object in yaml::objects(file) {
            put(&server, &object);
            policies += 1;
        }
    }
    assert!(policies > 15, "{policies}");
    server.apply(&labelled("shop", "cart", "n1", "cart"));
    let mut agent = Follower::start(server.kubeconfig(Identity::Agent), "n1");
    let seen = agent.until("the policies select the pod", |s| {
        let selecting = selecting(s, "shop", "cart");
        selecting
            .iter()
            .any(|name| name == "EgressPolicy shop/cart")
            && selecting
                .iter()
                .any(|name| name == "EgressPolicy shop/closed")
            && get(s, "shop", "cart").is_some_and(|pod| pod.objects.sets.len() > 10)
    });
    let problems: Vec<String> = seen.problems.iter().map(ToString::to_string).collect();
    assert!(
        !problems
            .iter()
            .any(|problem| problem.contains("Policy") || problem.contains("Set")),
        "{problems:?}"
    );
}

#[test]
fn without_the_right_to_list_policies_annotations_go_on() {
    let server = Arc::new(ApiServer::start());
    install(&server);
    server.allow_agent("agent", &rules(|resource| !resource.contains("polic")));
    server.namespace("shop", &json!({"egress-agent.dev/allow": "github.com"}));
    server.apply(&labelled("shop", "cart", "n1", "cart"));
    put(&server, &egress_policy("shop", "of-cart", &for_app("cart")));
    let mut agent = Follower::start(server.kubeconfig(Identity::Agent), "n1");
    let seen = agent.until("the pod", |s| !s.pods.is_empty());
    let cart = get(&seen, "shop", "cart").expect("the pod");
    assert_eq!(cart.namespace_annotations.len(), 1);
    agent.until("a problem", |s| {
        has_problem(s, "the EgressPolicy objects cannot be watched")
            && has_problem(s, "egresspolicies.egress-agent.dev is forbidden")
    });
    server.allow_agent("agent", &rules(|_| true));
    agent.until("the policy", |s| {
        selecting(s, "shop", "cart") == ["EgressPolicy shop/of-cart"]
            && !has_problem(s, "cannot be watched")
    });
}

#[test]
fn an_object_of_another_form_harms_no_other() {
    let server = server();
    install_upstream(&server);
    server.namespace("shop", &json!({}));
    server.apply(&labelled("shop", "cart", "n1", "cart"));
    let good = json!([{"action": "Accept", "to": [{"networks": ["10.0.0.0/8"]}]}]);
    let mut strange = network_policy("strange", &json!({"everything": true}));
    strange["spec"]["tier"] = json!("Middle");
    strange["spec"]["subject"] = json!({"namespaces": {"matchLabels": {"no": "pod"}}});
    put(&server, &strange);
    put(&server, &network_policy("good", &good));
    let mut agent = Follower::start(server.kubeconfig(Identity::Agent), "n1");
    let seen = agent.until("the pod", |s| !s.pods.is_empty());
    assert_eq!(
        selecting(&seen, "shop", "cart"),
        ["ClusterNetworkPolicy good"]
    );
    assert_eq!(
        entries(&seen, "shop", "cart").expect("entries"),
        ["10.0.0.0/8/any"]
    );
    assert!(has_problem(
        &seen,
        "ClusterNetworkPolicy strange: spec.tier"
    ));
    // An edit that cannot be read leaves the last form in force.
    let mut broken = network_policy("good", &good);
    broken["spec"]["priority"] = json!("first");
    put(&server, &broken);
    let seen = agent.until("a problem", |s| {
        has_problem(s, "ClusterNetworkPolicy good: spec.priority cannot be read")
    });
    assert_eq!(
        entries(&seen, "shop", "cart").expect("entries"),
        ["10.0.0.0/8/any"]
    );
}

#[test]
fn a_rule_about_pods_follows_those_of_every_node() {
    let server = server();
    install_upstream(&server);
    server.namespace("shop", &json!({}));
    server.apply(&labelled("shop", "cart", "n1", "cart"));
    let db = labelled("shop", "db", "n2", "db");
    server.apply(&db);
    server.set_status(
        &db,
        &json!({"phase": "Running", "podIP": "10.1.0.7", "podIPs": [{"ip": "10.1.0.7"}]}),
    );
    let to_db = json!([{
        "action": "Accept",
        "to": [{"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "db"}}}}],
        "protocols": [{"tcp": {"destinationPort": {"number": 5432}}}],
    }]);
    put(&server, &network_policy("db", &to_db));
    let mut agent = Follower::start(server.kubeconfig(Identity::Agent), "n1");
    let of_cart = |s: &Snapshot| entries(s, "shop", "cart");
    // A start waits for the pods that the rule names.
    let first = agent.until("the pod", |s| !s.pods.is_empty());
    assert_eq!(of_cart(&first).expect("entries"), ["10.1.0.7:5432/tcp"]);
    server.set_status(
        &db,
        &json!({"podIP": "10.1.0.9", "podIPs": [{"ip": "10.1.0.9"}]}),
    );
    agent.until("another address", |s| {
        of_cart(s).is_some_and(|entries| entries == ["10.1.0.9:5432/tcp"])
    });
    server.delete(&db);
    agent.until("the pod's end", |s| {
        of_cart(s).is_some_and(|entries| entries.is_empty())
    });
}
