//! The report of a node at the API server: what is in force, and who writes it.
#![expect(
    clippy::float_cmp,
    reason = "metrics are floating-point numbers, and counts among them are exact"
)]

use std::{sync::Arc, thread, time::Duration};

use egress_tests::{
    ApiServer, Cluster, Lab, SHORT, addresses::server as address, cluster::allow, eventually,
    holds, observed::HTTP,
};
use serde_json::{Value, json};

use crate::{
    policies::{egress_policy, install, install_upstream, network_policy, put, server},
    source::rules,
};

const WRITTEN: &str = "egress_agent_node_reports_total";
const FAILED: &str = "egress_agent_node_report_errors_total";
const RECONCILES: &str = "egress_agent_reconcile_seconds_count";

/// A cluster with the definitions of the manifests.
fn cluster() -> Cluster {
    let server = server();
    install(&server);
    let cluster = Cluster::on(server, Lab::builder().config("http", HTTP));
    // Its absence is a problem.
    cluster.announce_resolver();
    cluster
}

fn report_of(node: &str) -> Value {
    json!({
        "apiVersion": "egress-agent.dev/v1alpha1",
        "kind": "EgressNodeReport",
        "metadata": {"name": node},
    })
}

/// The node's report, with its metadata.
fn read(server: &ApiServer, node: &str) -> Option<Value> {
    let reports = server.list(&report_of(node)).into_iter();
    let mut reports = reports.map(|report| serde_json::to_value(report).expect("JSON"));
    reports.find(|report| report["metadata"]["name"] == node)
}

/// Waits for a report whose status meets the condition.
#[track_caller]
fn wait_report(cluster: &Cluster, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    eventually(what, || {
        let report = read(&cluster.server, cluster.node())?;
        let status = report["status"].clone();
        is(&status).then_some(status)
    })
}

/// The generation, the applied generation, and the pods selected and enforced of a policy in a report.
fn policy(status: &Value, name: &str) -> [Option<i64>; 4] {
    let policies = status["policies"].as_array().expect("policies");
    let found = policies.iter().find(|policy| policy["name"] == name);
    ["generation", "appliedGeneration", "selected", "enforced"]
        .map(|field| found.and_then(|found| found[field].as_i64()))
}

fn allowing(number: u8) -> Value {
    json!({"allow": [format!("{}:443", address(number))]})
}

#[test]
fn a_report_has_the_generation_that_is_in_force_of_each_policy() {
    let cluster = cluster();
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let idle = cluster.namespace("idle", &Value::Null);
    let cart = cluster.run(&shop, "cart", &Value::Null);
    put(&cluster.server, &egress_policy(&shop, "web", &allowing(10)));
    put(
        &cluster.server,
        &egress_policy(&idle, "other", &allowing(10)),
    );
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    let status = wait_report(&cluster, "the first generation", |status| {
        policy(status, "web") == [Some(1), Some(1), Some(1), Some(1)]
    });
    let counts = &status["policyCounts"];
    assert_eq!(
        *counts,
        json!({"selecting": 1, "applied": 1, "notSelecting": 1, "leftOut": 0}),
        "{status}"
    );
    assert_eq!(
        status["pods"],
        json!({"selected": 1, "enforced": 1, "audited": 0})
    );
    assert_eq!(status["policies"][0]["kind"], "EgressPolicy");
    assert_eq!(status["policies"][0]["namespace"], shop);
    assert_eq!(status["problems"], json!([]), "{status}");
    cart.net().talks_tcp((address(10), 443));

    agent.applies_policy_after(cart.net(), || {
        put(&cluster.server, &egress_policy(&shop, "web", &allowing(20)));
    });
    wait_report(&cluster, "the second generation", |status| {
        policy(status, "web") == [Some(2), Some(2), Some(1), Some(1)]
    });
    cart.net().talks_tcp((address(20), 443));

    // The command has the same numbers.
    let (_, status) = cluster.lab.ask_json(&["status"]);
    let web = status["policies"].as_array().expect("policies");
    let web = web.iter().find(|policy| policy["name"] == "web");
    let web = web.expect("the policy");
    assert_eq!(
        (&web["generation"], &web["applied_generation"]),
        (&json!(2), &json!(2))
    );
    assert_eq!((&web["selected"], &web["enforced"]), (&json!(1), &json!(1)));
    let text = String::from_utf8(cluster.lab.ask(&["status"]).stdout).expect("UTF-8");
    assert!(text.contains(&format!("EgressPolicy {shop}/web")), "{text}");
    assert!(
        text.contains("1 policies select no pod of this node"),
        "{text}"
    );

    // The report goes with the node.
    let report = read(&cluster.server, cluster.node()).expect("the report");
    let owner = &report["metadata"]["ownerReferences"][0];
    assert_eq!(
        (&owner["kind"], &owner["name"]),
        (&json!("Node"), &json!(cluster.node()))
    );

    cluster.delete(cart);
    wait_report(&cluster, "a policy without pods", |status| {
        status["policies"] == json!([]) && status["policyCounts"]["notSelecting"] == 2
    });
}

#[test]
fn an_edit_that_cannot_be_applied_leaves_the_applied_generation() {
    let cluster = cluster();
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &Value::Null);
    put(&cluster.server, &egress_policy(&shop, "web", &allowing(10)));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    wait_report(&cluster, "the first generation", |status| {
        policy(status, "web") == [Some(1), Some(1), Some(1), Some(1)]
    });
    // The API server of the tests does not evaluate the expressions that refuse this entry.
    let unreadable = json!({"allow": ["github.com:x"]});
    put(&cluster.server, &egress_policy(&shop, "web", &unreadable));
    let status = wait_report(&cluster, "an unreadable generation", |status| {
        policy(status, "web") == [Some(2), Some(1), Some(1), Some(0)]
    });
    assert_eq!(status["policyCounts"]["applied"], 0);
    assert!(status["problemCount"].as_i64() > Some(0), "{status}");
    let (_, told) = cluster.lab.ask_json(&["status"]);
    assert_eq!(told["policies"][0]["applied"], false, "{told}");

    // Ordered rules are in force meanwhile.
    let guardrail = json!({
        "apiVersion": "egress-agent.dev/v1alpha1",
        "kind": "ClusterEgressPolicy",
        "metadata": {"name": "guardrail"},
        "spec": {
            "tier": "Admin",
            "priority": 1,
            "rules": [{"action": "Deny", "entries": [address(30).to_string()]}],
        },
    });
    put(&cluster.server, &guardrail);
    let status = wait_report(&cluster, "a new object with ordered rules", |status| {
        policy(status, "guardrail") == [Some(1), Some(1), Some(1), Some(1)]
    });
    assert_eq!(policy(&status, "web"), [Some(2), Some(1), Some(1), Some(0)]);

    put(&cluster.server, &egress_policy(&shop, "web", &allowing(20)));
    let status = wait_report(&cluster, "a readable generation", |status| {
        policy(status, "web") == [Some(3), Some(3), Some(1), Some(1)]
    });
    assert_eq!(status["problemCount"], 0, "{status}");
}

#[test]
fn an_object_that_cannot_be_read_has_its_problem_and_its_last_readable_generation() {
    let cluster = cluster();
    install_upstream(&cluster.server);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("shop.test:443"));
    let mut guardrail = network_policy("guardrail", &json!([]));
    put(&cluster.server, &guardrail);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    wait_report(&cluster, "the first generation", |status| {
        policy(status, "guardrail") == [Some(1), Some(1), Some(1), Some(1)]
    });
    guardrail["spec"]["priority"] = json!("first");
    put(&cluster.server, &guardrail);
    let status = wait_report(&cluster, "an unreadable generation", |status| {
        policy(status, "guardrail") == [Some(2), Some(1), Some(1), Some(0)]
    });
    let told = status["policies"][0]["problem"].as_str();
    assert!(
        told.is_some_and(|told| told.contains("spec.priority")),
        "{status}"
    );
    // It is reported once.
    assert_eq!(status["problems"], json!([]), "{status}");
    assert_eq!(status["problemCount"], 1);
}

#[test]
fn a_pod_that_is_not_enforced_is_counted_as_such() {
    let cluster = cluster();
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &Value::Null);
    // Nothing of it runs, so no interface is found.
    let (lost, _) = cluster.create(&shop, "lost", &Value::Null);
    cluster.set_running(&lost);
    put(&cluster.server, &egress_policy(&shop, "web", &allowing(10)));
    let agent = cluster.spawn_agent(&[]);
    agent.wait_enforcing(cart.net());
    let status = wait_report(&cluster, "one of two pods", |status| {
        policy(status, "web") == [Some(1), Some(1), Some(2), Some(1)]
    });
    assert_eq!(
        status["pods"],
        json!({"selected": 2, "enforced": 1, "audited": 0})
    );
    assert_eq!(status["policyCounts"]["applied"], 0);
}

#[test]
fn a_report_is_written_when_it_changes_and_not_otherwise() {
    let cluster = cluster();
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &Value::Null);
    put(&cluster.server, &egress_policy(&shop, "web", &allowing(10)));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    let version = || {
        let report = read(&cluster.server, cluster.node())?;
        report["metadata"]["resourceVersion"]
            .as_str()
            .map(str::to_owned)
    };
    wait_report(&cluster, "the policy", |status| {
        policy(status, "web") == [Some(1), Some(1), Some(1), Some(1)]
    });
    // The page shows the state at the end of a reconcile. The agent has written the report once or twice by now.
    let ended = || cluster.lab.metrics().get(RECONCILES);
    let before = ended();
    let written = eventually("the metric counts the report", || {
        let written = cluster.lab.metrics().get(WRITTEN);
        (written > 0.0 && ended() >= before + 2.0).then_some(written)
    });
    let before = version();
    // Reconciles that change nothing in the report, for longer than two writes are apart.
    for number in 0..6 {
        agent.applies_policy_after(cart.net(), || {
            let entries = format!("{}:{}", address(30), 1000 + number);
            cluster
                .server
                .namespace(&shop, &json!({"egress-agent.dev/allow": entries}));
        });
        thread::sleep(Duration::from_secs(2));
    }
    assert_eq!(version(), before);
    assert_eq!(cluster.lab.metrics().get(WRITTEN), written);

    // Somebody deletes it: the next change creates it again.
    cluster.server.delete(&report_of(cluster.node()));
    put(&cluster.server, &egress_policy(&shop, "web", &allowing(20)));
    wait_report(&cluster, "the report is there again", |status| {
        policy(status, "web") == [Some(2), Some(2), Some(1), Some(1)]
    });
    assert_eq!(cluster.lab.metrics().get(FAILED), 0.0);
}

#[test]
fn agents_write_their_own_reports_only() {
    let server = server();
    install(&server);
    let clusters = [0, 1].map(|_| Cluster::on(Arc::clone(&server), Lab::builder()));
    let shops = clusters
        .each_ref()
        .map(|cluster| cluster.namespace("shop", &Value::Null));
    let carts = [0, 1].map(|at| clusters[at].run(&shops[at], "cart", &Value::Null));
    for shop in &shops {
        put(&server, &egress_policy(shop, "web", &allowing(10)));
    }
    let agents = clusters.each_ref().map(Cluster::start_agent);
    for at in [0, 1] {
        agents[at].wait_enforcing(carts[at].net());
        let status = wait_report(&clusters[at], "the policy", |status| {
            policy(status, "web") == [Some(1), Some(1), Some(1), Some(1)]
        });
        // The other node's policy selects no pod here.
        assert_eq!(status["policyCounts"]["notSelecting"], 1, "{status}");
        assert_eq!(status["policies"][0]["namespace"], shops[at]);
    }
    let other = read(&server, clusters[1].node()).expect("a report");
    put(&server, &egress_policy(&shops[0], "web", &allowing(20)));
    wait_report(&clusters[0], "an edit", |status| {
        policy(status, "web") == [Some(2), Some(2), Some(1), Some(1)]
    });
    let now = read(&server, clusters[1].node()).expect("a report");
    assert_eq!(
        now["metadata"]["resourceVersion"],
        other["metadata"]["resourceVersion"]
    );
}

#[test]
fn without_the_right_to_write_reports_everything_else_goes_on() {
    let server = Arc::new(ApiServer::start());
    install(&server);
    server.allow_agent("agent", &rules(|resource| resource != "egressnodereports"));
    let cluster = Cluster::without_rights(Arc::clone(&server), Lab::builder().config("http", HTTP));
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &Value::Null);
    put(&server, &egress_policy(&shop, "web", &allowing(10)));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    // The second failure is only counted by the metric.
    eventually("two failures", || {
        holds(cluster.lab.metrics().get(FAILED) >= 2.0)
    });
    let told = agent.stderr();
    let lines = told
        .lines()
        .filter(|line| line.contains("EgressNodeReport"));
    let lines: Vec<&str> = lines.collect();
    assert_eq!(lines.len(), 1, "{told}");
    assert!(lines[0].contains("forbidden"), "{lines:?}");
    assert_eq!(cluster.lab.metrics().get(WRITTEN), 0.0);
    // Enforcement continues, and so do policies.
    cart.net().talks_tcp((address(10), 443));
    assert!(
        cart.net().connect_tcp((address(99), 443), SHORT).is_err(),
        "the pod is open"
    );
    agent.applies_policy_after(cart.net(), || {
        put(&server, &egress_policy(&shop, "web", &allowing(20)));
    });
    let (status, body) = cluster.lab.http("/readyz");
    assert_eq!((status, body.as_str()), (200, "ok\n"));
    assert_eq!(read(&server, cluster.node()), None);
}

#[test]
fn an_agent_that_removes_its_programs_says_so_in_its_report() {
    let cluster = cluster();
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &Value::Null);
    put(&cluster.server, &egress_policy(&shop, "web", &allowing(10)));
    let mut agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    wait_report(&cluster, "the policy", |status| {
        policy(status, "web") == [Some(1), Some(1), Some(1), Some(1)]
    });
    assert!(agent.stop().success());
    let report = read(&cluster.server, cluster.node()).expect("a report");
    let status = &report["status"];
    assert_eq!(policy(status, "web"), [Some(1), None, Some(1), Some(0)]);
    assert_eq!(status["pods"]["enforced"], 0, "{status}");

    // With --keep-enforcing the report stays true.
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    agent.wait_enforcing(cart.net());
    let in_force = wait_report(&cluster, "the policy again", |status| {
        policy(status, "web") == [Some(1), Some(1), Some(1), Some(1)]
    });
    assert!(agent.stop().success());
    let report = read(&cluster.server, cluster.node()).expect("a report");
    assert_eq!(report["status"], in_force);
}
