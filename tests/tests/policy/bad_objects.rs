//! Policy objects with mistakes: how they affect the pods that they select, and others.

use std::net::IpAddr;

use egress_tests::{Agent, DEADLINE, Lab, Pod, SHORT, TcpEcho, addresses::server, exchange};
use serde_json::{Value, json};

const GROUP: &str = "egress-agent.dev/v1alpha1";

fn egress_policy(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": GROUP,
        "kind": "EgressPolicy",
        "metadata": { "name": name, "namespace": "shop" },
        "spec": spec,
    })
}

fn cluster_policy(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": GROUP,
        "kind": "ClusterEgressPolicy",
        "metadata": { "name": name },
        "spec": spec,
    })
}

fn to(address: IpAddr) -> String {
    format!("{address}:443")
}

/// Two pods: `cart` with the label `app: cart`, which policies select; `till`, which may reach `server(10)` by its own
/// annotation, and which the tests check to stay so.
struct Scene {
    cart: Pod,
    till: Pod,
    _web: TcpEcho,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::new();
        let web = lab.serve_tcp(443);
        let (cart, till) = (lab.pod("shop", "cart"), lab.pod("bank", "till"));
        lab.write_labelled_pod(&cart, &[("app", "cart")], &[]);
        lab.write_pod(&till, &[("allow", &to(server(10)))]);
        Self {
            cart,
            till,
            _web: web,
            lab,
        }
    }

    #[track_caller]
    fn start(&self) -> Agent {
        self.lab.start_agent(&[&self.cart, &self.till])
    }

    #[track_caller]
    fn assert_till_as_before(&self) {
        self.till.talks_tcp((server(10), 443));
        assert!(!self.till.reaches(server(99)), "another pod is open");
    }
}

/// Waits for a line of the log about the change that has all of these texts.
#[track_caller]
fn logs_after(agent: &Agent, change: impl FnOnce(), texts: &[&str]) {
    agent.logs_after("the problem", change, |line| {
        texts.iter().all(|text| line.contains(text))
    });
}

#[test]
fn a_policy_whose_selector_cannot_be_read_stays_as_it_was() {
    let scene = Scene::new();
    let web = |operator: &str, address: IpAddr| {
        let one = json!({ "key": "app", "operator": operator, "values": ["cart"] });
        let selector = json!({ "matchExpressions": [one] });
        egress_policy(
            "web",
            &json!({ "podSelector": selector, "allow": [to(address)] }),
        )
    };
    scene.lab.write_policy(&web("In", server(10)));
    let agent = scene.start();
    let mut open = scene.cart.talks_tcp((server(10), 443));
    let broken = || scene.lab.write_policy(&web("Like", server(20)));
    logs_after(
        &agent,
        broken,
        &[
            "EgressPolicy shop/web",
            "spec.podSelector",
            "\"Like\" is not known",
        ],
    );
    assert!(exchange(&mut open, b"after", DEADLINE), "a connection ends");
    scene.cart.talks_tcp((server(10), 443));
    assert!(!scene.cart.reaches(server(20)));
    scene.assert_till_as_before();

    agent.applies_policy_after(&scene.cart, || {
        scene.lab.write_policy(&web("In", server(20)));
    });
    scene.cart.talks_tcp((server(20), 443));
    assert!(!scene.cart.reaches(server(10)));
}

#[test]
fn a_new_policy_whose_selector_cannot_be_read_only_takes_away() {
    let scene = Scene::new();
    let allow = format!("{} {}", to(server(10)), to(server(20)));
    let labels = [("app", "cart")];
    scene
        .lab
        .write_labelled_pod(&scene.cart, &labels, &[("allow", &allow)]);
    let agent = scene.start();
    let selector = json!({ "matchLabels": { "app": "not a label's value" } });
    let web = egress_policy(
        "web",
        &json!({ "podSelector": selector, "allow": [to(server(30))], "deny": [server(20)] }),
    );
    agent.applies_policy_after(&scene.cart, || scene.lab.write_policy(&web));
    scene.cart.talks_tcp((server(10), 443));
    agent.denies_tcp(&scene.cart, (server(20), 443), "deny_rule");
    assert!(!scene.cart.reaches(server(30)), "what it allows counts");
    // It is about pods of its namespace.
    scene.assert_till_as_before();
    let (_, status) = scene.lab.ask_json(&["status"]);
    let problems = status["problems"].to_string();
    assert!(
        problems.contains("EgressPolicy shop/web: spec.podSelector"),
        "{problems}"
    );
}

#[test]
fn a_policy_over_a_limit_is_named_and_the_last_good_one_stays() {
    let scene = Scene::new();
    let guard = |ports: u16, last: IpAddr| {
        // Each pair of an address and a port is a class of its own; an object has at most 25 entries in a rule.
        let entries: Vec<String> = (0..ports)
            .map(|n| format!("{}:{}", server(40), 5000 + 2 * n))
            .collect();
        let mut rules: Vec<Value> = entries
            .chunks(25)
            .map(|entries| json!({ "action": "Deny", "entries": entries }))
            .collect();
        rules.push(json!({ "action": "Allow", "entries": [to(last)] }));
        rules.push(json!({ "action": "Deny", "entries": ["*"] }));
        cluster_policy(
            "guard",
            &json!({
                "tier": "Admin",
                "priority": 5,
                "podSelector": { "matchLabels": { "app": "cart" } },
                "rules": rules,
            }),
        )
    };
    scene.lab.write_policy(&guard(100, server(10)));
    let agent = scene.start();
    scene.cart.talks_tcp((server(10), 443));
    let over = || scene.lab.write_policy(&guard(130, server(20)));
    logs_after(
        &agent,
        over,
        &[
            "shop/cart",
            "the limit is 128",
            "ClusterEgressPolicy guard (132)",
            "the last good ordered rules stay",
        ],
    );
    scene.cart.talks_tcp((server(10), 443));
    assert!(!scene.cart.reaches(server(20)));
    scene.assert_till_as_before();
    let status = scene.lab.status_of(&scene.cart);
    let problem = status["problem"].as_str().unwrap_or_default();
    assert!(problem.contains("ClusterEgressPolicy guard"), "{status}");

    // A pod that has no good policy yet is closed.
    let late = scene.lab.pod("shop", "late");
    scene.lab.write_labelled_pod(&late, &[("app", "cart")], &[]);
    agent.wait_enforcing(&late);
    agent.denies_tcp(&late, (server(20), 443), "policy_unreadable");
}

#[test]
fn two_policies_of_one_priority_are_reported_and_denials_come_first() {
    let scene = Scene::new();
    for (name, action) in [("a", "Allow"), ("b", "Deny")] {
        let rules = json!([{ "action": action, "entries": [server(10)] }]);
        let spec = json!({ "tier": "Admin", "priority": 5, "rules": rules });
        scene.lab.write_policy(&cluster_policy(name, &spec));
    }
    let agent = scene.start();
    let denial = agent.denies_tcp(&scene.cart, (server(10), 443), "deny_rule");
    assert_eq!(denial.line["policy"]["name"], "b", "{}", denial.text);
    let status = scene.lab.status_of(&scene.cart);
    let problem = status["problem"].as_str().unwrap_or_default();
    for text in [
        "ClusterEgressPolicy a and ClusterEgressPolicy b have the same tier and priority (5)",
        "give them different priorities",
    ] {
        assert!(problem.contains(text), "{status}");
    }
}

#[test]
fn a_policy_of_an_unknown_version_is_reported_and_the_known_one_stays() {
    let scene = Scene::new();
    let web = |version: &str, address: IpAddr| {
        let mut web = egress_policy("web", &json!({ "allow": [to(address)] }));
        web["apiVersion"] = json!(format!("egress-agent.dev/{version}"));
        web
    };
    scene.lab.write_policy(&web("v1alpha1", server(10)));
    let agent = scene.start();
    scene.cart.talks_tcp((server(10), 443));
    let later = || scene.lab.write_policy(&web("v9", server(20)));
    logs_after(
        &agent,
        later,
        &[
            "EgressPolicy",
            "egress-agent.dev/v9",
            "expected",
            "v1alpha1",
        ],
    );
    scene.cart.talks_tcp((server(10), 443));
    assert!(!scene.cart.reaches(server(20)));
    assert!(scene.cart.connect_tcp((server(99), 443), SHORT).is_err());
    scene.assert_till_as_before();
}

#[test]
fn ten_thousand_policies_leave_those_that_select_a_pod_in_force() {
    let scene = Scene::new();
    let file = |part: u32| {
        let items: Vec<Value> = (0..2_500)
            .map(|n| {
                let name = format!("none-{part}-{n}");
                let selector = json!({ "matchLabels": { "app": name } });
                if n % 4 == 0 {
                    let rules = json!([{ "action": "Deny", "entries": ["*"] }]);
                    let spec = json!({
                        "tier": "Admin",
                        "priority": n % 1000,
                        "podSelector": selector,
                        "rules": rules,
                    });
                    cluster_policy(&name, &spec)
                } else {
                    let allow = json!([format!("host{n}.test:443")]);
                    egress_policy(&name, &json!({ "podSelector": selector, "allow": allow }))
                }
            })
            .collect();
        json!({ "apiVersion": "v1", "kind": "List", "items": items })
    };
    for part in 0..4 {
        let name = format!("many-{part}.json");
        scene
            .lab
            .write_file(&name, file(part).to_string().as_bytes());
    }
    let web = |address| {
        let selector = json!({ "matchLabels": { "app": "cart" } });
        egress_policy(
            "web",
            &json!({ "podSelector": selector, "allow": [to(address)] }),
        )
    };
    scene.lab.write_policy(&web(server(10)));
    let agent = scene.start();
    scene.cart.talks_tcp((server(10), 443));
    assert!(!scene.cart.reaches(server(20)));
    agent.applies_policy_after(&scene.cart, || scene.lab.write_policy(&web(server(20))));
    scene.cart.talks_tcp((server(20), 443));
    assert!(!scene.cart.reaches(server(10)));
    scene.assert_till_as_before();
    let (_, status) = scene.lab.ask_json(&["status"]);
    assert_eq!(status["problems"], json!([]), "{status}");
    // One of them selects the pod from now on, and denies it everything.
    agent.applies_policy_after(&scene.cart, || {
        let labels = [("app", "none-3-0")];
        scene.lab.write_labelled_pod(&scene.cart, &labels, &[]);
    });
    let denial = agent.denies_tcp(&scene.cart, (server(20), 443), "deny_rule");
    assert_eq!(denial.line["policy"]["name"], "none-3-0", "{}", denial.text);
}
