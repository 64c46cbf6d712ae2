//! The policy that lets an agent write the report of its own node only.

use std::collections::HashMap;

use cel::{Context, Program, Value as Cel};
use egress_tests::yaml;
use serde_json::{Value, json};

const FILE: &str = "components/admission/reports.yaml";
const AGENT: &str = "system:serviceaccount:egress-agent:egress-agent";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

fn evaluate(context: &Context<'_, '_>, expression: &Value) -> Cel {
    let text = expression.as_str().expect("an expression");
    let program = Program::compile(text).unwrap_or_else(|error| panic!("{text}\n{error}"));
    let value = program.execute(context);
    value.unwrap_or_else(|error| panic!("{text}\n{error}"))
}

/// Why this account may not write the report of a node, if it may not.
fn refused(username: &str, extra: Option<&Value>, node: &str) -> Option<String> {
    let policy = &yaml::objects(FILE)[0]["spec"];
    let mut request = json!({"userInfo": {"username": username}});
    if let Some(extra) = extra {
        request["userInfo"]["extra"] = extra.clone();
    }
    let object = json!({"metadata": {"name": node}});
    let mut context = Context::default();
    context.add_variable("request", &request).expect("request");
    context.add_variable("object", &object).expect("object");
    let list = |field: &str| policy[field].as_array().expect(field).clone();
    for condition in list("matchConditions") {
        if evaluate(&context, &condition["expression"]) != Cel::Bool(true) {
            return None;
        }
    }
    let mut variables = HashMap::new();
    for variable in list("variables") {
        let name = variable["name"].as_str().expect("a name").to_owned();
        variables.insert(name, evaluate(&context, &variable["expression"]));
    }
    context.add_variable_from_value("variables", variables);
    for validation in list("validations") {
        if evaluate(&context, &validation["expression"]) == Cel::Bool(true) {
            continue;
        }
        let message = validation.get("messageExpression");
        return Some(match message.map(|message| evaluate(&context, message)) {
            Some(Cel::String(text)) => text.to_string(),
            _ => validation["message"]
                .as_str()
                .expect("a message")
                .to_owned(),
        });
    }
    None
}

#[test]
fn an_agent_writes_the_report_of_its_own_node_only() {
    let on =
        |node: &str| json!({NODE_NAME: [node], "authentication.kubernetes.io/node-uid": ["u"]});
    assert_eq!(refused(AGENT, Some(&on("n1")), "n1"), None);
    let message = refused(AGENT, Some(&on("n1")), "n2").expect("refused");
    assert_eq!(
        message,
        "the agent on node n1 may not write the report of n2"
    );
}

#[test]
fn an_agent_whose_token_names_no_node_writes_no_report() {
    let without = json!({"authentication.kubernetes.io/pod-name": ["agent-x"]});
    for extra in [None, Some(&without), Some(&json!({NODE_NAME: []}))] {
        let message = refused(AGENT, extra, "n1").expect("refused");
        assert!(message.contains("does not name a node"), "{message}");
    }
}

#[test]
fn administrators_write_any_report() {
    assert_eq!(refused("admin", None, "n1"), None);
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
