//! The policy that lets an agent write the report of its own node only.

use egress_tests::yaml;
use serde_json::{Value, json};

use crate::policy::Policy;

const FILE: &str = "components/admission/reports.yaml";
const AGENT: &str = "system:serviceaccount:egress-agent:egress-agent";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

fn report(node: &str) -> Value {
    json!({
        "apiVersion": "egress-agent.dev/v1alpha1",
        "kind": "EgressNodeReport",
        "metadata": {"name": node},
        "status": {"agentVersion": "0.1.0"},
    })
}

/// Why this account may not create the report of a node, if it may not. Editing it must be judged alike.
fn refused(username: &str, extra: Option<&Value>, node: &str) -> Option<String> {
    let mut user = json!({"username": username});
    if let Some(extra) = extra {
        user["extra"] = extra.clone();
    }
    let policy = Policy::of(FILE);
    let report = report(node);
    let created = policy.judge_from(&user, &report, &Value::Null);
    let edited = policy.judge_from(&user, &report, &report);
    assert_eq!(created, edited, "{user} {node}");
    created
}

/// The fields that the API server adds to the account of a token that belongs to a pod on this node.
fn on(node: &str) -> Value {
    json!({
        "authentication.kubernetes.io/credential-id": ["JTI=8a9f5c7e"],
        NODE_NAME: [node],
        "authentication.kubernetes.io/node-uid": ["4f2b"],
        "authentication.kubernetes.io/pod-name": ["egress-agent-x"],
    })
}

#[test]
fn an_agent_writes_the_report_of_its_own_node_only() {
    assert_eq!(refused(AGENT, Some(&on("n1")), "n1"), None);
    let message = refused(AGENT, Some(&on("n1")), "n2").expect("refused");
    assert_eq!(
        message,
        "the agent on node n1 may not write the report of n2"
    );
    assert_eq!(refused(AGENT, Some(&on("a.example")), "a.example"), None);
    for (own, other) in [("n1", "n10"), ("n10", "n1"), ("a.example", "a")] {
        assert!(refused(AGENT, Some(&on(own)), other).is_some(), "{other}");
    }
}

#[test]
fn an_agent_whose_token_names_no_node_writes_no_report() {
    let without = json!({"authentication.kubernetes.io/pod-name": ["agent-x"]});
    let empty = json!({NODE_NAME: []});
    let two = json!({NODE_NAME: ["n1", "n2"]});
    for extra in [None, Some(&without), Some(&empty), Some(&two)] {
        let message = refused(AGENT, extra, "n1").expect("refused");
        assert!(message.contains("does not name a node"), "{message}");
    }
}

#[test]
fn administrators_write_any_report() {
    assert_eq!(refused("admin", None, "n1"), None);
}

#[test]
fn the_policy_concerns_no_other_account() {
    for account in [
        "system:serviceaccount:shop:egress-agent",
        "system:serviceaccount:egress-agent:egress-agent-cleanup",
    ] {
        assert_eq!(refused(account, Some(&on("n1")), "n2"), None, "{account}");
    }
}

/// The account and the kind are those of the other manifests.
#[test]
fn the_policy_is_about_the_agents_account_and_kind() {
    let objects = yaml::kustomized("base");
    let account = objects
        .iter()
        .find(|object| object["kind"] == "ServiceAccount");
    let metadata = &account.expect("an account")["metadata"];
    let text = |field: &str| metadata[field].as_str().expect(field).to_owned();
    assert_eq!(
        AGENT,
        format!(
            "system:serviceaccount:{}:{}",
            text("namespace"),
            text("name")
        )
    );
    let rule = &yaml::objects(FILE)[0]["spec"]["matchConstraints"]["resourceRules"][0];
    let definition = objects
        .iter()
        .find(|object| object["spec"]["names"]["kind"] == "EgressNodeReport");
    let definition = &definition.expect("a definition")["spec"];
    assert_eq!(rule["apiGroups"][0], definition["group"]);
    assert_eq!(rule["resources"][0], definition["names"]["plural"]);
}
