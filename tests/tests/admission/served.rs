//! The definitions of policy objects (manifests/base/crds.yaml) at a server of a current Kubernetes release: it accepts
//! them within its budgets, refuses what cannot be read with its place, and publishes what clients ask for.

use std::{collections::BTreeSet, fs};

use egress_tests::{
    DefinitionServer,
    definitions::{DEFINITIONS, Response, Types},
    workspace, yaml,
};
use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};
use serde_json::{Value, json};

use crate::{
    READABLE, UNREADABLE, almost_entries,
    definitions::{Entries, LISTS, entries_of, is_readable},
};

const GROUP: &str = "/apis/egress-agent.dev/v1alpha1";
const API_VERSION: &str = "egress-agent.dev/v1alpha1";

/// Creates an object. With `dryRun=All` the server checks everything and stores nothing.
#[track_caller]
fn dry_run(server: &DefinitionServer, kind: &str, spec: &Value) -> Response {
    let path = format!("{}?dryRun=All&fieldValidation=Strict", collection(kind));
    server.ask("POST", &path, Types::JSON, &object(kind, "x", spec))
}

/// The path of a kind's objects, of the namespace `shop` if the kind has namespaces.
fn collection(kind: &str) -> String {
    match kind {
        "EgressPolicy" => format!("{GROUP}/namespaces/shop/egresspolicies"),
        "EgressSet" => format!("{GROUP}/egresssets"),
        "ClusterEgressPolicy" => format!("{GROUP}/clusteregresspolicies"),
        "EgressNodeReport" => format!("{GROUP}/egressnodereports"),
        _ => panic!("{kind}"),
    }
}

fn object(kind: &str, name: &str, spec: &Value) -> Value {
    let mut object = json!({
        "apiVersion": API_VERSION, "kind": kind, "metadata": { "name": name }, "spec": spec,
    });
    if kind == "EgressPolicy" {
        object["metadata"]["namespace"] = json!("shop");
    }
    object
}

/// The entries of a list that the server refuses, by their places, which must be the fields of its response.
#[track_caller]
fn refused_places(response: &Response, list: &str, entries: &[&str]) -> BTreeSet<usize> {
    let causes = response.causes();
    assert_eq!(response.status == 201, causes.is_empty(), "{response:#?}");
    let place = |(field, message): &(&str, &str)| {
        let place = field.strip_prefix(&format!("spec.{list}["));
        let place = place.and_then(|place| place.strip_suffix(']')?.parse().ok());
        let place: usize = place.unwrap_or_else(|| panic!("{field}: {message}"));
        // The server shows a message on one line, and quotes other text.
        let is_plain = entries[place].chars().all(|c| c.is_ascii_graphic());
        assert!(
            !is_plain || message.contains(entries[place]),
            "{field}: {message}"
        );
        place
    };
    causes.iter().map(place).collect()
}

#[test]
fn every_definition_is_established() {
    let server = DefinitionServer::shared();
    for definition in yaml::objects("base/crds.yaml") {
        let name = definition["metadata"]["name"].as_str().expect("a name");
        let stored = server.get(&format!("{DEFINITIONS}/{name}")).ok();
        let conditions = stored["status"]["conditions"].as_array();
        let conditions: Vec<(&str, &str)> = conditions
            .into_iter()
            .flatten()
            .map(|one| {
                let text = |field: &str| one[field].as_str().unwrap_or_default();
                (text("type"), text("status"))
            })
            .collect();
        // A schema that is not structural would add a condition.
        assert_eq!(
            conditions,
            [("NamesAccepted", "True"), ("Established", "True")],
            "{name}"
        );
        assert_eq!(stored["status"]["storedVersions"], json!(["v1alpha1"]));
        assert_eq!(stored["spec"]["conversion"], json!({ "strategy": "None" }));
        // Nothing of the schema was dropped as unknown.
        for part in ["schema", "additionalPrinterColumns"] {
            let [ours, theirs] =
                [&definition, &stored].map(|one| with_floats(&one["spec"]["versions"][0][part]));
            assert_eq!(ours, theirs, "{name}: {part}");
        }
    }
}

/// The value with every number as a floating one: the server writes `0` for `0.0`.
fn with_floats(value: &Value) -> Value {
    match value {
        Value::Number(number) => json!(number.as_f64()),
        Value::Array(items) => items.iter().map(with_floats).collect(),
        Value::Object(fields) => fields
            .iter()
            .map(|(name, field)| (name.clone(), with_floats(field)))
            .collect(),
        other => other.clone(),
    }
}

#[test]
fn the_server_accepts_the_entries_that_the_agent_reads_and_no_others() {
    let server = DefinitionServer::shared();
    let readable = READABLE.iter().copied().flat_map(entries_of);
    let entries: Vec<&str> = readable.chain(UNREADABLE.iter().copied()).collect();
    for list in LISTS {
        let response = dry_run(&server, "EgressPolicy", &json!({ list: entries }));
        let refused = refused_places(&response, list, &entries);
        let expected = entries.iter().enumerate();
        let expected: BTreeSet<usize> = expected
            .filter(|(_, entry)| !is_readable(list, entry))
            .map(|(place, _)| place)
            .collect();
        assert_eq!(refused, expected, "{list}: {entries:#?}");
    }
}

#[test]
fn the_server_evaluates_the_expressions_as_the_other_tests_do() {
    const EACH: usize = 200;
    let server = DefinitionServer::shared();
    let mut runner = TestRunner::deterministic();
    let mut is_mixed = false;
    for list in LISTS {
        let schema = Entries::of("EgressPolicy", list);
        // An entry that is too long or empty hides what the expressions say about the others.
        let entries: Vec<String> = std::iter::repeat_with(|| {
            almost_entries()
                .new_tree(&mut runner)
                .expect("an entry")
                .current()
        })
        .filter(|entry| (1..280).contains(&entry.chars().count()))
        .take(EACH)
        .collect();
        let entries: Vec<&str> = entries.iter().map(String::as_str).collect();
        let response = dry_run(&server, "EgressPolicy", &json!({ list: entries }));
        let refused = refused_places(&response, list, &entries);
        for (place, entry) in entries.iter().enumerate() {
            let is_refused = refused.contains(&place);
            assert_eq!(is_refused, schema.refused(entry).is_some(), "{entry:?}");
            assert!(
                !is_refused || entries_of(entry) != [*entry] || !is_readable(list, entry),
                "{list}: {entry:?}"
            );
        }
        is_mixed |= (1..EACH).contains(&refused.len());
    }
    assert!(is_mixed, "the entries are all of one kind");
}

#[test]
fn a_mistake_is_refused_with_its_place() {
    let server = DefinitionServer::shared();
    let rules = json!([
        { "action": "Allow", "entries": ["github.com:443"] },
        { "name": "no mail", "action": "Deny", "entries": ["*:25/tcp", "203.0.113.7", "10.1.2.3/16"] },
    ]);
    let good = json!({ "action": "Pass", "entries": ["*"] });
    let cluster = |field: &str, value: Value| {
        let mut spec = json!({ "tier": "Admin", "priority": 10, "rules": [good] });
        spec[field] = value;
        ("ClusterEgressPolicy", spec)
    };
    let team = |spec: Value| ("EgressPolicy", spec);
    let selector = |expression: Value| json!({ "matchExpressions": [expression] });
    for ((kind, spec), place) in [
        (cluster("rules", rules), "spec.rules[1].entries[2]"),
        (cluster("rules", json!([])), "spec.rules"),
        (
            cluster("rules", json!([{ "entries": ["*"] }])),
            "spec.rules[0].action",
        ),
        (
            cluster("rules", json!([{ "action": "Accept", "entries": ["*"] }])),
            "spec.rules[0].action",
        ),
        (cluster("tier", json!("Middle")), "spec.tier"),
        (cluster("priority", json!(1001)), "spec.priority"),
        (cluster("priority", json!(-1)), "spec.priority"),
        (
            cluster("podSelector", json!({ "matchLabels": { "app": "a b" } })),
            "spec.podSelector.matchLabels.app",
        ),
        (
            cluster(
                "namespaceSelector",
                json!({ "matchLabels": { "a b": "app" } }),
            ),
            "spec.namespaceSelector.matchLabels",
        ),
        (team(json!({ "mode": "Enforce" })), "spec.mode"),
        (team(json!({ "deny": ["github.com:443"] })), "spec.deny[0]"),
        (
            team(json!({ "resolve": ["*.example", "203.0.113.7"] })),
            "spec.resolve[1]",
        ),
        (
            team(json!({ "podSelector": selector(json!({ "key": "app", "operator": "In" })) })),
            "spec.podSelector.matchExpressions[0]",
        ),
        (
            team(json!({ "podSelector": selector(json!({ "key": "app", "operator": "Is" })) })),
            "spec.podSelector.matchExpressions[0].operator",
        ),
        (team(json!({ "allow": [""] })), "spec.allow[0]"),
        (team(json!({ "allow": ["a".repeat(281)] })), "spec.allow[0]"),
        (
            team(json!({ "allow": vec!["a.example"; 401] })),
            "spec.allow",
        ),
        (
            (
                "EgressSet",
                json!({ "destinations": ["github.com", "github.com:443"] }),
            ),
            "spec.destinations[1]",
        ),
        (("EgressSet", json!({})), "spec.destinations"),
    ] {
        let response = dry_run(&server, kind, &spec);
        assert_eq!(response.status, 422, "{kind} {spec}");
        let fields: Vec<&str> = response.causes().iter().map(|(field, _)| *field).collect();
        assert_eq!(fields.first(), Some(&place), "{kind} {spec}: {fields:?}");
    }
    // What kubectl asks for: a field that is not known is an error, and not dropped.
    let response = dry_run(&server, "EgressPolicy", &json!({ "alow": ["github.com"] }));
    let message = response.body["message"].as_str().unwrap_or_default();
    assert_eq!(response.status, 400, "{response:?}");
    assert!(message.contains("unknown field \"spec.alow\""), "{message}");
}

#[test]
fn the_largest_objects_are_within_the_servers_budgets() {
    let server = DefinitionServer::shared();
    let name = |number: usize| {
        let label = "abcdefgh-".repeat(6);
        format!("*.service-{number}.{label}a.{label}b.{label}c.example.com")
    };
    let network = |number: usize| format!("[2001:0db8:0000:0000:0000:ffff:{number:x}:0/112]");
    let with_ports = |text: String| format!("{text}:8000-08100/udp");
    let list =
        |make: &dyn Fn(usize) -> String, length| -> Vec<String> { (0..length).map(make).collect() };
    let names = |length| list(&|number| with_ports(name(number)), length);
    let networks = |length| list(&|number| with_ports(network(number)), length);
    for allow in [names(400), networks(400)] {
        let spec = json!({ "allow": allow, "deny": networks(400), "resolve": list(&name, 400) });
        dry_run(&server, "EgressPolicy", &spec).ok();
    }
    for entries in [names(25), networks(25)] {
        let rule = json!({ "name": "r".repeat(100), "action": "Allow", "entries": entries });
        let spec = json!({ "tier": "Admin", "priority": 1000, "rules": vec![rule; 25] });
        dry_run(&server, "ClusterEgressPolicy", &spec).ok();
    }
    let spec = json!({ "destinations": list(&name, 400) });
    dry_run(&server, "EgressSet", &spec).ok();
}

#[test]
fn the_examples_in_the_documentation_are_accepted() {
    let server = DefinitionServer::shared();
    let mut examples = 0;
    for file in [
        "README.md",
        "docs/objects.md",
        "docs/policy.md",
        "docs/import.md",
    ] {
        let text = fs::read_to_string(workspace::root().join(file)).expect("a page");
        for block in text.split("```yaml\n").skip(1) {
            let block = block.split("```").next().unwrap_or_default();
            let objects: Vec<Value> = serde_saphyr::from_multiple(block).unwrap_or_default();
            for mut object in objects {
                if object["apiVersion"] != API_VERSION {
                    continue;
                }
                let kind = object["kind"].as_str().expect("a kind").to_owned();
                if kind == "EgressPolicy" {
                    object["metadata"]["namespace"] = json!("shop");
                }
                let path = format!("{}?dryRun=All&fieldValidation=Strict", collection(&kind));
                let response = server.ask("POST", &path, Types::JSON, &object);
                assert_eq!(response.status, 201, "{file}: {object}: {response:#?}");
                examples += 1;
            }
        }
    }
    assert!(examples >= 3, "{examples}");
}

#[test]
fn two_managers_apply_parts_of_one_object() {
    let server = DefinitionServer::shared();
    let path = |manager: &str, more: &str| {
        let policies = collection("EgressPolicy");
        format!("{policies}/parts?fieldManager={manager}{more}")
    };
    let apply = |manager: &str, more: &str, spec: Value| {
        let object = object("EgressPolicy", "parts", &spec);
        server.ask("PATCH", &path(manager, more), Types::APPLY, &object)
    };
    apply("one", "", json!({ "allow": ["github.com:443"] })).ok();
    let both = apply("two", "", json!({ "deny": ["gist.github.com"] })).ok();
    assert_eq!(
        both["spec"],
        json!({ "allow": ["github.com:443"], "deny": ["gist.github.com"], "podSelector": {} })
    );

    // A list belongs to one of them as a whole.
    let other = json!({ "allow": ["example.com"], "deny": ["gist.github.com"] });
    let refused = apply("two", "", other.clone());
    assert_eq!(refused.status, 409, "{refused:?}");
    assert_eq!(refused.causes()[0].0, ".spec.allow");
    assert!(refused.causes()[0].1.contains("\"one\""), "{refused:?}");
    let taken = apply("two", "&force=true", other).ok();
    assert_eq!(taken["spec"]["allow"], json!(["example.com"]));
    // An entry that cannot be read is refused here, too.
    let refused = apply("two", "", json!({ "allow": ["https://example.com"] }));
    assert_eq!(refused.causes()[0].0, "spec.allow[0]", "{refused:?}");
    // Who gives up a field takes it out of the object.
    let rest = apply("two", "", json!({ "allow": ["example.com"] })).ok();
    assert_eq!(rest["spec"].get("deny"), None, "{rest}");
}

#[test]
fn the_kinds_are_listed_with_short_names_and_columns() {
    let server = DefinitionServer::shared();
    let resources = server.get(GROUP).ok();
    let resources = resources["resources"]
        .as_array()
        .expect("resources")
        .clone();
    let mut short_names: Vec<_> = resources
        .iter()
        .map(|one| {
            assert_eq!(one["categories"], json!(["egress"]), "{one}");
            (one["kind"].as_str(), one["shortNames"][0].as_str())
        })
        .collect();
    short_names.sort_unstable();
    assert_eq!(
        short_names,
        [
            (Some("ClusterEgressPolicy"), Some("cegp")),
            (Some("EgressNodeReport"), Some("enr")),
            (Some("EgressPolicy"), Some("egp")),
            (Some("EgressSet"), Some("egs")),
        ]
    );

    for (kind, spec, columns, cells) in [
        (
            "EgressPolicy",
            json!({ "mode": "audit", "allow": ["*"] }),
            vec!["Name", "Mode", "Age"],
            vec!["listed", "audit"],
        ),
        (
            "ClusterEgressPolicy",
            json!({
                "tier": "Baseline", "priority": 7,
                "rules": [{ "action": "Deny", "entries": ["*"] }],
            }),
            vec!["Name", "Tier", "Priority", "Age"],
            vec!["listed", "Baseline", "7"],
        ),
        (
            "EgressSet",
            json!({ "destinations": ["github.com"] }),
            vec!["Name", "Age"],
            vec!["listed"],
        ),
        (
            "EgressNodeReport",
            json!({
                "agentVersion": "0.1.0", "policies": [], "problems": [],
                "pods": { "selected": 41, "enforced": 40, "audited": 0 },
                "policyCounts": { "selecting": 3, "applied": 2, "notSelecting": 0, "leftOut": 0 },
                "problemCount": 1,
            }),
            vec![
                "Name", "Policies", "Applied", "Pods", "Enforced", "Problems", "Age",
            ],
            vec!["listed", "3", "2", "41", "40", "1"],
        ),
    ] {
        let collection = collection(kind);
        let mut object = object(kind, "listed", &spec);
        if kind == "EgressNodeReport" {
            // It has a status and no spec.
            object["status"] = object["spec"].take();
            object.as_object_mut().expect("an object").remove("spec");
        }
        server.ask("POST", &collection, Types::JSON, &object).ok();
        let path = format!("{collection}/listed");
        let table = server.ask("GET", &path, Types::TABLE, &Value::Null).ok();
        let names = table["columnDefinitions"].as_array().expect("columns");
        let names: Vec<_> = names.iter().map(|column| &column["name"]).collect();
        assert_eq!(names, columns);
        let row = table["rows"][0]["cells"].as_array().expect("cells");
        let row: Vec<String> = row
            .iter()
            .map(|cell| {
                cell.as_str()
                    .map_or_else(|| cell.to_string(), str::to_owned)
            })
            .collect();
        assert_eq!(row[..cells.len()], cells, "{kind}");
    }
}

/// `kubectl explain` prints these texts.
#[test]
fn every_field_has_a_text_in_the_published_schema() {
    let server = DefinitionServer::shared();
    let published = server
        .get("/openapi/v3/apis/egress-agent.dev/v1alpha1")
        .ok();
    let schemas = published["components"]["schemas"].as_object();
    let schemas = schemas.expect("schemas");
    let ours: Vec<_> = schemas
        .iter()
        .filter(|(_, schema)| {
            let kinds = schema["x-kubernetes-group-version-kind"].as_array();
            kinds
                .into_iter()
                .flatten()
                .any(|one| one["group"] == "egress-agent.dev")
        })
        .filter_map(|(name, schema)| {
            // A list has items, and a report has a status alone.
            let parts = ["spec", "status"].map(|part| (part, &schema["properties"][part]));
            let part = parts.into_iter().find(|(_, of)| of.is_object())?;
            Some((name, schema, part))
        })
        .collect();
    assert_eq!(ours.len(), 4, "{:?}", schemas.keys());
    for (name, schema, (part, of)) in ours {
        assert!(schema["description"].is_string(), "{name}");
        assert_described(&format!("{name}.{part}"), of);
    }
}

fn assert_described(path: &str, schema: &Value) {
    assert!(
        schema["description"]
            .as_str()
            .is_some_and(|text| text.len() > 10),
        "{path} has no text: {schema}"
    );
    let items = schema["items"]["properties"].as_object();
    let own = schema["properties"].as_object();
    for (name, property) in own.into_iter().chain(items).flatten() {
        assert_described(&format!("{path}.{name}"), property);
    }
}

/// A definition with the fields of upstream's object that the agent reads. Upstream's own is not part of this project.
#[test]
fn an_object_of_upstreams_form_is_served_as_it_was_written() {
    let server = DefinitionServer::shared();
    let open = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
    let rules = json!({ "type": "array", "maxItems": 25, "items": open });
    let spec = json!({
        "type": "object",
        "required": ["tier", "priority", "subject"],
        "properties": {
            "tier": { "type": "string", "enum": ["Admin", "Baseline"] },
            "priority": { "type": "integer", "format": "int32", "minimum": 0, "maximum": 1000 },
            "subject": open,
            "ingress": rules,
            "egress": rules,
        },
    });
    let group = "policy.networking.k8s.io";
    let name = format!("clusternetworkpolicies.{group}");
    server.install(&json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": name,
            "annotations": { "api-approved.kubernetes.io": "unapproved, for tests" },
        },
        "spec": {
            "group": group,
            "scope": "Cluster",
            "names": { "kind": "ClusterNetworkPolicy", "plural": "clusternetworkpolicies" },
            "versions": [{
                "name": "v1alpha2", "served": true, "storage": true,
                "schema": { "openAPIV3Schema": { "type": "object", "properties": { "spec": spec } } },
            }],
        },
    }));
    let policy = json!({
        "apiVersion": format!("{group}/v1alpha2"),
        "kind": "ClusterNetworkPolicy",
        "metadata": { "name": "names" },
        "spec": {
            "tier": "Admin",
            "priority": 55,
            "subject": { "namespaces": {} },
            "egress": [
                {
                    "action": "Accept",
                    "to": [{ "domainNames": ["*.example.com"] }],
                    "protocols": [{ "tcp": { "destinationPort": { "number": 443 } } }],
                },
                { "action": "Deny", "to": [{ "networks": ["0.0.0.0/0", "::/0"] }] },
            ],
        },
    });
    let collection = format!("/apis/{group}/v1alpha2/clusternetworkpolicies");
    server.ask("POST", &collection, Types::JSON, &policy).ok();
    let stored = server.get(&format!("{collection}/names")).ok();
    assert_eq!(stored["spec"], policy["spec"]);
    let read: egress_api::ClusterNetworkPolicy =
        serde_json::from_value(stored).expect("the agent's form");
    assert_eq!(read.spec.egress.len(), 2);
}
