//! Everything that the namespace and the cluster say stays in force while a pod's annotation cannot be read.

use egress_tests::{
    Builder, Lab,
    addresses::{numbered, server},
};
use serde_json::{Value, json};

/// The settings under which a pod's own annotations can open nothing.
const RESTRICTED: [&str; 2] = ["narrow", "ignore"];

/// A laboratory in which `numbered(…)` are internal addresses, and internal addresses are open.
fn restricted(pod_annotations: &str) -> Builder {
    Lab::builder()
        .config("podAnnotations", pod_annotations)
        .config("ranges.internal", vec!["198.18.0.0/16"])
        .config("ranges.allowInternal", true)
}

fn policy(spec: &Value) -> Value {
    json!({
        "apiVersion": "egress-agent.dev/v1alpha1",
        "kind": "EgressPolicy",
        "metadata": { "name": "team", "namespace": "shop" },
        "spec": spec,
    })
}

#[test]
fn an_edit_of_the_namespace_takes_effect_while_the_pods_annotation_cannot_be_read() {
    for power in RESTRICTED {
        let lab = restricted(power).build();
        let _web = lab.serve_tcp(443);
        lab.write_namespace("shop", &[("allow", "203.0.113.0/24:443")]);
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("deny", "203.0.113.99")]);
        let agent = lab.start_agent(&[&pod]);
        pod.talks_tcp((server(20), 443));
        lab.write_pod(&pod, &[("deny", "203.0.113.99 !")]);
        agent.wait_log("that the annotation cannot be read", |line| {
            line.contains("`!`") && line.contains("stay")
        });

        let lists = [("allow", "203.0.113.0/24:443"), ("deny", "203.0.113.20")];
        agent.applies_policy_after(&pod, || lab.write_namespace("shop", &lists));
        agent.denies_tcp(&pod, (server(20), 443), "deny_rule");
        // The pod's own last readable denial stays, too.
        agent.denies_tcp(&pod, (server(99), 443), "deny_rule");
        pod.talks_tcp((server(10), 443));

        let denial = policy(&json!({ "deny": ["203.0.113.10"] }));
        agent.applies_policy_after(&pod, || lab.write_policy(&denial));
        agent.denies_tcp(&pod, (server(10), 443), "deny_rule");
        pod.talks_tcp((server(11), 443));
    }
}

#[test]
fn a_new_pod_whose_annotation_cannot_be_read_reaches_nothing_that_its_namespace_denies() {
    for power in RESTRICTED {
        let lab = restricted(power).build();
        let _web = lab.serve_tcp(443);
        lab.write_namespace("shop", &[("deny", "198.18.0.7")]);
        lab.write_policy(&policy(&json!({ "deny": ["198.18.0.8"] })));
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", "!")]);
        let agent = lab.start_agent(&[&pod]);
        agent.denies_tcp(&pod, (numbered(7), 443), "deny_rule");
        agent.denies_tcp(&pod, (numbered(8), 443), "deny_rule");
        pod.talks_tcp((numbered(1), 443));
        agent.denies_tcp(&pod, (server(20), 443), "policy_unreadable");
    }
}

#[test]
fn a_new_pod_whose_annotation_cannot_be_read_is_enforced_as_its_namespaces_policy_says() {
    for power in RESTRICTED {
        let lab = restricted(power).config("defaultMode", "audit").build();
        let _web = lab.serve_tcp(443);
        let enforced = json!({ "mode": "enforce", "allow": ["203.0.113.20:443"] });
        lab.write_policy(&policy(&enforced));
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("deny", "!")]);
        let agent = lab.start_agent(&[&pod]);
        agent.denies_tcp(&pod, (server(21), 443), "policy_unreadable");
    }
}
