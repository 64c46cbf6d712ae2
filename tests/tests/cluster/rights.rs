//! The agent's rights in a cluster: the roles of `manifests/base` are sufficient, and grant nothing else.

use std::sync::Arc;

use egress_tests::{
    ApiServer, Cluster, Identity, Lab, SHORT,
    addresses::{RESOLVER, server},
    cluster::allow,
    eventually, holds, yaml,
};
use serde_json::{Value, json};

use crate::policies::install;

/// An API server with the manifests' namespace, account and roles.
fn with_roles() -> Arc<ApiServer> {
    let server = Arc::new(ApiServer::start());
    install(&server);
    for file in ["base/namespace.yaml", "base/rbac.yaml"] {
        for object in yaml::objects(file) {
            server.apply(&object);
        }
    }
    server
}

/// Waits for an Event of the agent about this pod.
fn wait_event(cluster: &Cluster, namespace: &str, pod: &str, reason: &str) -> Value {
    eventually(&format!("an Event {reason} on {namespace}/{pod}"), || {
        let mut events = cluster.events(namespace).into_iter();
        events.find(|event| {
            event["reason"] == reason
                && event["regarding"]["name"] == pod
                && event["reportingController"]
                    .as_str()
                    .is_some_and(|by| by.contains("egress-agent"))
        })
    })
}

#[test]
fn the_roles_of_the_manifests_are_sufficient() {
    let builder = Lab::builder().config("dns", json!({}));
    let cluster = Cluster::without_rights(with_roles(), builder);
    cluster.announce_resolver();
    let _web = cluster.lab.serve_tcp(443);
    cluster.lab.dns().addresses("shop.test", &[server(10)]);
    let annotations = allow("shop.test:443");
    let shop = cluster.namespace("shop", &Value::Null);
    let mut cart = cluster.run(&shop, "cart", &annotations);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    cluster.wait_resolver(RESOLVER);

    assert_eq!(cart.net().lookup("shop.test"), [server(10)]);
    cart.net().talks_tcp((server(10), 443));
    let elsewhere = cart.net().connect_tcp((server(99), 443), SHORT);
    assert!(elsewhere.is_err(), "the pod is open");
    wait_event(&cluster, &shop, "cart", "EgressDenied");
    // An existing Event is patched, which needs another right.
    eventually("an Event counts what is denied again", || {
        let again = cart.net().connect_tcp((server(99), 443), SHORT);
        assert!(again.is_err(), "the pod is open");
        let events = cluster.events(&shop);
        holds(events.iter().any(|event| event["series"].is_object()))
    });

    agent.applies_policy_after(cart.net(), || {
        let annotations = allow(&format!("{}:443", server(20)));
        cluster.server.namespace(&shop, &annotations);
    });
    cart.net().talks_tcp((server(20), 443));
    cluster.annotate(&mut cart, &allow("x.test:y"));
    wait_event(&cluster, &shop, "cart", "EgressPolicyProblem");

    eventually("the node's report is written", || {
        let report = json!({
            "apiVersion": "egress-agent.dev/v1alpha1",
            "kind": "EgressNodeReport",
            "metadata": {"name": cluster.node()},
        });
        let reports = cluster.server.list(&report);
        let mut names = reports.iter().map(|report| &report.metadata.name);
        holds(names.any(|name| name.as_deref() == Some(cluster.node())))
    });

    // Without the times, in which any number may stand.
    let log = agent.stderr().to_lowercase();
    let lines = log.lines().filter_map(|line| line.split_once(' '));
    let log: Vec<&str> = lines.map(|(_, text)| text).collect();
    let log = log.join("\n");
    for refused in ["forbidden", "403", "unauthorized"] {
        assert!(!log.contains(refused), "{refused}:\n{log}");
    }
}

#[test]
fn the_roles_of_the_manifests_allow_nothing_else() {
    const FORBIDDEN: u16 = 403;
    let server = with_roles();
    server.namespace("shop", &Value::Null);
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "namespace": "shop", "name": "cart" },
        "spec": { "nodeName": "n", "containers": [{ "name": "main", "image": "none" }] },
    });
    server.apply(&pod);
    let allowed = |method: &str, path: &str, body: &Value| {
        let status = server.asked_by(Identity::Agent, method, path, body);
        assert!(
            status == 200 || status == FORBIDDEN,
            "{method} {path}: {status}"
        );
        status == 200
    };
    let nothing = Value::Null;
    // The agent's own requests are allowed in exactly the form in which it sends them.
    let dns = "fieldSelector=metadata.name%3Dkube-dns";
    for path in [
        "/api/v1/pods?fieldSelector=spec.nodeName%3Dn",
        "/api/v1/namespaces",
        "/api/v1/nodes?fieldSelector=metadata.name%3Dn",
        "/api/v1/services",
        "/api/v1/endpoints",
        &format!("/api/v1/namespaces/kube-system/services?{dns}"),
        &format!("/api/v1/namespaces/kube-system/endpoints?{dns}"),
    ] {
        assert!(allowed("GET", path, &nothing), "GET {path}");
    }

    let mut another = pod.clone();
    another["metadata"]["name"] = json!("another");
    let annotation = json!({ "metadata": { "annotations": { "egress-agent.dev/allow": "*" } } });
    let root = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": { "name": "more" },
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin",
        },
        "subjects": [{
            "kind": "ServiceAccount", "namespace": "egress-agent", "name": "egress-agent",
        }],
    });
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let reports = "/apis/egress-agent.dev/v1alpha1/egressnodereports".to_owned();
    let policies = "/apis/egress-agent.dev/v1alpha1/namespaces/shop/egresspolicies";
    for (method, path, body) in [
        ("POST", "/api/v1/namespaces/shop/pods", &another),
        ("PATCH", "/api/v1/namespaces/shop/pods/cart", &annotation),
        (
            "PATCH",
            "/api/v1/namespaces/shop/pods/cart/status",
            &annotation,
        ),
        ("DELETE", "/api/v1/namespaces/shop/pods/cart", &nothing),
        ("GET", "/api/v1/namespaces/shop/pods/cart/log", &nothing),
        (
            "POST",
            "/api/v1/namespaces/shop/pods/cart/exec?command=id",
            &nothing,
        ),
        ("PATCH", "/api/v1/namespaces/shop", &annotation),
        ("GET", "/api/v1/secrets", &nothing),
        ("GET", "/api/v1/namespaces/shop/secrets/x", &nothing),
        ("GET", "/api/v1/namespaces/egress-agent/secrets", &nothing),
        ("GET", "/api/v1/configmaps", &nothing),
        (
            "GET",
            "/api/v1/namespaces/egress-agent/configmaps",
            &nothing,
        ),
        ("GET", "/api/v1/namespaces/shop/services/x", &nothing),
        ("PATCH", "/api/v1/namespaces/shop/services/x", &annotation),
        ("PATCH", "/api/v1/namespaces/shop/endpoints/x", &annotation),
        ("PATCH", "/api/v1/nodes/n", &annotation),
        ("GET", "/apis/apps/v1/daemonsets", &nothing),
        ("GET", "/apis/events.k8s.io/v1/events", &nothing),
        ("GET", &reports, &nothing),
        ("GET", &format!("{reports}/n"), &nothing),
        ("DELETE", &format!("{reports}/n"), &nothing),
        ("DELETE", &reports, &nothing),
        ("PATCH", &format!("{policies}/x"), &annotation),
        ("GET", &format!("{rbac}/clusterroles"), &nothing),
        ("POST", &format!("{rbac}/clusterrolebindings"), &root),
    ] {
        assert!(!allowed(method, path, body), "{method} {path} is allowed");
    }
}
