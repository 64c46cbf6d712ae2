//! Every denial by a policy names the policy, also where a list lacks an entry.

use egress_tests::{Lab, addresses::server, eventually};
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

/// Kind and name of the object that closes the pod, according to a denial line.
fn closers(line: &Value) -> Vec<(&str, &str)> {
    let closers = line["closed_by"].as_array().expect("it is a list");
    closers
        .iter()
        .map(|closer| {
            let kind = closer["kind"].as_str().expect("it has a kind");
            let name = closer["name"].as_str().expect("it has a name");
            (kind, name)
        })
        .collect()
}

#[test]
fn a_denial_without_a_matching_entry_names_everything_that_closes_the_pod() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("shop.test", &[server(10)]);
    let pod = lab.pod("shop", "cart");
    lab.write_labelled_pod(&pod, &[("app", "cart")], &[("allow", "203.0.113.20:443")]);
    lab.write_policy(&egress_policy(
        "web",
        &json!({ "podSelector": { "matchLabels": { "app": "cart" } }, "allow": ["shop.test:443"] }),
    ));
    // Selects the pod, and does not close it.
    lab.write_policy(&egress_policy(
        "denies",
        &json!({ "deny": ["203.0.113.66"] }),
    ));
    // Selects another pod.
    lab.write_policy(&egress_policy(
        "other",
        &json!({ "podSelector": { "matchLabels": { "app": "till" } } }),
    ));
    let agent = lab.start_agent(&[&pod]);
    pod.talks_tcp((server(20), 443));

    let expected = vec![("EgressPolicy", "web"), ("Pod", "cart")];
    let denial = agent.denies_tcp(&pod, (server(20), 80), "port_not_allowed");
    assert_eq!(closers(&denial.line), expected, "{}", denial.text);
    assert_eq!(
        denial.line["policy"],
        json!({"kind": "EgressPolicy", "namespace": "shop", "name": "web", "rule": null, "entry": null}),
        "{}",
        denial.text
    );
    assert_eq!(denial.line["rule"], Value::Null, "{}", denial.text);
    let (_, denial) = agent.denies_name(&pod, "evil.test");
    assert_eq!(closers(&denial.line), expected, "{}", denial.text);
    // A denial by an entry names that entry alone.
    let denial = agent.denies_tcp(&pod, (server(66), 443), "deny_rule");
    assert_eq!(closers(&denial.line), [], "{}", denial.text);
    assert_eq!(denial.line["policy"]["name"], "denies", "{}", denial.text);

    let (code, explained) = lab.explain(&pod, "203.0.113.99:443");
    assert_eq!(code, 1, "{explained}");
    assert_eq!(
        explained["closed_by"],
        json!(["EgressPolicy shop/web", "pod"]),
        "{explained}"
    );
    let (_, explained) = lab.explain(&pod, "203.0.113.66:443");
    assert_eq!(explained["closed_by"], json!([]), "{explained}");
    let output = lab.ask(&["explain", "shop/cart", "evil.test"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("  closed by: EgressPolicy shop/web, pod\n"),
        "{text}"
    );
}

#[test]
fn a_pod_that_is_closed_by_default_says_so() {
    let lab = Lab::builder().config("defaultMode", "enforce").build();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[]);
    let agent = lab.start_agent(&[&pod]);
    let denial = agent.denies_tcp(&pod, (server(10), 443), "no_rule");
    assert_eq!(
        closers(&denial.line),
        [("Configuration", "defaultMode")],
        "{}",
        denial.text
    );
    assert_eq!(
        denial.line["policy"]["name"], "defaultMode",
        "{}",
        denial.text
    );
}

#[test]
fn denials_are_counted_by_the_policy_that_decided() {
    let lab = Lab::builder()
        .config("http", egress_tests::observed::HTTP)
        .build();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "203.0.113.20:443")]);
    lab.write_policy(&egress_policy(
        "web",
        &json!({ "allow": ["203.0.113.21:443"], "deny": ["203.0.113.66"] }),
    ));
    lab.write_policy(&json!({
        "apiVersion": GROUP,
        "kind": "ClusterEgressPolicy",
        "metadata": { "name": "guard" },
        "spec": { "tier": "Admin", "priority": 1, "rules": [{ "action": "Deny", "entries": ["*:25/tcp"] }] },
    }));
    let agent = lab.start_agent(&[&pod]);
    pod.talks_tcp((server(20), 443));
    agent.denies_tcp(&pod, (server(99), 443), "no_rule");
    agent.denies_tcp(&pod, (server(66), 443), "deny_rule");
    agent.denies_tcp(&pod, (server(20), 25), "deny_rule");
    let of = |kind: &str, policy: &str| {
        format!(
            "egress_agent_policy_denials_total\
             {{event=\"denied\",kind=\"{kind}\",namespace=\"shop\",policy=\"{policy}\"}}"
        )
    };
    let metrics = eventually("the denials are counted by policy", || {
        let metrics = lab.metrics();
        let is_there = |series: &str| metrics.series().any(|known| known == series);
        let all =
            is_there(&of("EgressPolicy", "web")) && is_there(&of("ClusterEgressPolicy", "guard"));
        all.then_some(metrics)
    });
    // A SYN may have been sent again.
    assert!(metrics.get(&of("EgressPolicy", "web")) >= 2.0);
    assert!(metrics.get(&of("ClusterEgressPolicy", "guard")) >= 1.0);
    // Packets that are allowed are not counted.
    let series = metrics.series();
    let policies = series.filter(|series| series.starts_with("egress_agent_policy_denials"));
    assert_eq!(policies.count(), 2);
}
