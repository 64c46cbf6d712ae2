//! The agent's status, metrics and readiness in a cluster.
#![expect(
    clippy::float_cmp,
    reason = "metrics are floating-point numbers, and counts among them are exact"
)]

use std::sync::Arc;

use egress_tests::{
    ApiServer, Cluster, Lab, SHORT,
    addresses::{RESOLVER, RESOLVER6, server},
    cluster::allow,
    eventually, holds,
    observed::HTTP,
};
use serde_json::{Value, json};

/// A cluster whose agent serves HTTP, on an API server that other tests use too.
#[track_caller]
fn served() -> Cluster {
    Cluster::on(ApiServer::shared(), Lab::builder().config("http", HTTP))
}

/// The metric of pods in this mode.
fn in_mode(mode: &str) -> String {
    format!("egress_agent_pods{{mode=\"{mode}\"}}")
}

const REACHABLE: &str = "egress_agent_api_server_reachable";
const OK: (u16, &str) = (200, "ok\n");

#[test]
fn the_agent_is_ready_once_it_has_the_pods_from_the_api_server() {
    let cluster = served();
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("shop.test:443"));
    cluster.proxy.refuse();
    let agent = cluster.spawn_agent(&[]);
    agent.wait_log("that the API server is away", |line| {
        line.contains("API server")
    });
    agent.wait_log("that it serves", |line| line.contains("serving /healthz"));
    let (status, missing) = cluster.lab.http("/readyz");
    assert_eq!(status, 503, "{missing}");
    // The agent is healthy; a restart would not help.
    let (status, unwell) = cluster.lab.http("/healthz");
    assert_eq!((status, unwell.as_str()), OK);
    // The log line comes before the end of the reconciliation that publishes the metric.
    eventually("the metric says that the API server is away", || {
        holds(cluster.lab.metrics().get(REACHABLE) == 0.0)
    });
    let (code, status) = cluster.lab.ask_json(&["status"]);
    assert_eq!(code, Some(0), "{status}");
    assert_eq!(status["agent"]["ready"], false);
    assert_eq!(status["pods"], json!([]));

    cluster.proxy.allow();
    agent.wait_enforcing(cart.net());
    eventually("the agent is ready", || {
        let (status, body) = cluster.lab.http("/readyz");
        holds((status, body.as_str()) == OK)
    });
    let metrics = cluster.lab.metrics();
    assert_eq!(metrics.get(REACHABLE), 1.0);
    assert!(metrics.get("egress_agent_watch_errors_total{watch=\"pods\"}") >= 1.0);
    assert_eq!(cluster.lab.status_of(cart.net())["enforced"], true);
}

#[test]
fn a_pod_that_cannot_start_leaves_the_agent_ready() {
    let cluster = served();
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("shop.test:443"));
    // No kubelet ever starts this pod, as when one of its Secrets is missing.
    let (secretless, _) = cluster.create(&shop, "secretless", &allow("shop.test:443"));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    // Longer than the time within which a pod must be found.
    std::thread::sleep(std::time::Duration::from_secs(12));
    let (status, body) = cluster.lab.http("/readyz");
    assert_eq!((status, body.as_str()), OK);
    let (_, status) = cluster
        .lab
        .ask_json(&["status", &format!("{shop}/secretless")]);
    assert_eq!(status["pods"][0]["problem"], Value::Null, "{status}");
    assert!(!agent.stderr().contains("secretless"), "a line about it");

    // Once it is started, it counts as missing until it is found.
    cluster.set_running(&secretless);
    eventually("the agent is not ready", || {
        let (status, body) = cluster.lab.http("/readyz");
        holds(status == 503 && body.contains("secretless"))
    });
}

#[test]
fn status_lists_every_pod_of_the_node() {
    let cluster = served();
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow(&format!("{}:443", server(10))));
    let mut annotations = allow("shop.test:443");
    annotations["egress-agent.dev/mode"] = json!("audit");
    let audited = cluster.run(&shop, "audited", &annotations);
    let free = cluster.run(&shop, "free", &Value::Null);
    cluster.create_on_host(&shop, "host", &allow("shop.test:443"));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    agent.wait_enforcing(audited.net());

    let status = eventually("all pods are known", || {
        let (code, status) = cluster.lab.ask_json(&["status"]);
        assert_eq!(code, Some(0), "{status}");
        let pods = status["pods"].as_array()?;
        let enforced = pods.iter().filter(|pod| pod["enforced"] == true).count();
        (pods.len() == 4 && enforced == 2 && status["agent"]["ready"] == true).then_some(status)
    });
    assert_eq!(status["agent"]["node"], cluster.node());
    let of = |name: &str| {
        let pods = status["pods"].as_array().expect("a list");
        let mut found = pods.iter().filter(|pod| pod["pod"] == name);
        found
            .next()
            .unwrap_or_else(|| panic!("no {name}: {status}"))
    };
    for (name, mode, enforced) in [
        ("cart", "enforce", true),
        ("audited", "audit", true),
        ("free", "off", false),
        ("host", "host_network", false),
    ] {
        assert_eq!(of(name)["mode"], mode, "{name}");
        assert_eq!(of(name)["enforced"], enforced, "{name}");
        assert_eq!(of(name)["namespace"], shop, "{name}");
    }
    assert_eq!(of("cart")["interfaces"][0]["name"], cart.net().interface());
    let why = of("host")["problem"].as_str().unwrap_or_default();
    assert!(why.contains("hostNetwork"), "{why}");
    let output = cluster.lab.ask(&["status"]);
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text
        .lines()
        .find(|line| line.contains(&format!("{shop}/host")));
    let line = line.unwrap_or_else(|| panic!("{text}"));
    assert!(line.contains("hostNetwork"), "{line}");

    let metrics = cluster.lab.metrics();
    for mode in ["enforce", "audit", "off", "host_network"] {
        assert_eq!(metrics.get(&in_mode(mode)), 1.0, "{mode}");
    }
    for mode in ["missing", "waiting", "quarantined"] {
        assert_eq!(metrics.get(&in_mode(mode)), 0.0, "{mode}");
    }
    free.net().talks_tcp((server(99), 443));
}

#[test]
fn explain_agrees_with_the_verdict_on_a_clusters_pod() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace(
        "shop",
        &json!({ "egress-agent.dev/deny": server(11).to_string() }),
    );
    let cart = cluster.run(&shop, "cart", &allow("203.0.113.0/24:443"));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());

    // The log line comes before the end of the reconcile that publishes the pod.
    let (code, explanation) = eventually("the pod is known", || {
        let target = format!("{}:443", server(10));
        let (code, explanation) = cluster.lab.explain(cart.net(), &target);
        (explanation["decision"] != "unknown").then_some((code, explanation))
    });
    assert_eq!((code, &explanation["decision"]), (0, &"allowed".into()));
    assert_eq!(explanation["entries"][0]["of"], "pod");
    assert_eq!(explanation["entries"][0]["entry"], "203.0.113.0/24:443");
    cart.net().talks_tcp((server(10), 443));

    let (code, explanation) = cluster
        .lab
        .explain(cart.net(), &format!("{}:443", server(11)));
    assert_eq!((code, &explanation["decision"]), (1, &"denied".into()));
    assert_eq!(explanation["entries"][0]["of"], "namespace");
    let reason = explanation["reason"].as_str().expect("a reason").to_owned();
    let attempt = cart.net().connect_tcp((server(11), 443), SHORT);
    assert!(attempt.is_err(), "it was reached");
    agent.wait_denial(&reason, |denial| {
        denial.is(cart.net(), &reason, server(11), 443)
    });
}

#[test]
fn status_shows_the_source_of_each_resolver() {
    let of_its_own = Arc::new(ApiServer::start());
    let builder = Lab::builder()
        .config("http", HTTP)
        .config("dns", json!({ "resolvers": [RESOLVER6] }));
    let cluster = Cluster::on(of_its_own, builder);
    cluster.announce_resolver();
    let _agent = cluster.start_agent();
    let resolvers = eventually("both resolvers", || {
        let (_, status) = cluster.lab.ask_json(&["status"]);
        let resolvers = status["resolvers"].as_array()?.clone();
        (resolvers.len() == 2).then_some(resolvers)
    });
    let source = |address: std::net::IpAddr| {
        let mut found = resolvers
            .iter()
            .filter(|it| it["address"] == address.to_string());
        let found = found
            .next()
            .unwrap_or_else(|| panic!("no {address}: {resolvers:?}"));
        found["source"].as_str().expect("a source").to_owned()
    };
    assert_eq!(
        source(RESOLVER),
        "endpoints of service kube-system/kube-dns"
    );
    assert_eq!(source(RESOLVER6), "configuration (dns.resolvers)");
}

#[test]
fn an_interface_is_shown_as_quarantined_until_its_pod_is_known() {
    let cluster = served();
    let shop = cluster.namespace("shop", &Value::Null);
    let agent = cluster.start_agent();
    let net = cluster.lab.pod(&shop, "cart");
    let interface = net.interface().to_owned();
    let shown = eventually("the interface is shown", || {
        let (_, status) = cluster.lab.ask_json(&["status"]);
        let shown = status["pods"].as_array()?.first()?.clone();
        (shown["mode"] == "quarantined" && shown["enforced"] == true).then_some(shown)
    });
    assert_eq!(shown["namespace"], "");
    assert_eq!(shown["pod"], interface);
    assert_eq!(shown["interfaces"][0]["name"], interface);
    assert_eq!(cluster.lab.metrics().get(&in_mode("quarantined")), 1.0);

    let (object, uid) = cluster.create(&shop, "cart", &allow("shop.test:443"));
    let mut cart = cluster.pod_without_processes(object, &uid, net);
    cart.running().start_container();
    agent.wait_enforcing(cart.net());
    eventually("the interface belongs to the pod", || {
        let metrics = cluster.lab.metrics();
        holds(
            metrics.get(&in_mode("quarantined")) == 0.0 && metrics.get(&in_mode("enforce")) == 1.0,
        )
    });
    let status = cluster.lab.status_of(cart.net());
    assert_eq!(status["interfaces"][0]["name"], interface);
}
