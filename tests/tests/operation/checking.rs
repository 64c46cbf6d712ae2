//! `egress-agent check` as people and pipelines use it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use boon::{Compiler, Schemas};
use egress_tests::workspace;
use serde_json::{Value, json};

use crate::command_output::CommandOutput;

/// A workload of each kind in namespace `shop`, whose pods have the label `app: web`. `ANNOTATIONS` is replaced.
const DEPLOYMENT: &str = "\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata:
      labels: {app: web}
      annotations:
        egress-agent.dev/allow: |
          # What the shop needs.
          ENTRIES
    spec: {containers: [{name: main, image: example.com/main}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
";

const POLICIES: &str = "\
apiVersion: egress-agent.dev/v1alpha1
kind: EgressPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  allow: ['web.test:443', '@partners:443']
  deny: [192.0.2.66]
---
apiVersion: egress-agent.dev/v1alpha1
kind: EgressSet
metadata: {name: partners}
spec: {destinations: [partner.test]}
---
apiVersion: egress-agent.dev/v1alpha1
kind: ClusterEgressPolicy
metadata: {name: guard}
spec:
  tier: Admin
  priority: 1
  rules:
  - {name: no mail, action: Deny, entries: ['*:25/tcp']}
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: nodes}
spec:
  tier: Admin
  priority: 2
  subject: {namespaces: {}}
  egress:
  - {name: no nodes, action: Deny, to: [{nodes: {}}]}
";

#[track_caller]
fn check_in(directory: &Path, arguments: &[&str], input: &str) -> CommandOutput {
    CommandOutput::of("check", directory, arguments, input)
}

#[track_caller]
fn check(arguments: &[&str], input: &str) -> CommandOutput {
    check_in(Path::new("/"), arguments, input)
}

/// A directory with a file `a,b.yaml`: a Deployment with these entries in its annotation, and the policies.
fn directory(entries: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let text = DEPLOYMENT.replace("ENTRIES", entries);
    fs::write(directory.path().join("a,b.yaml"), text).expect("write a manifest");
    fs::write(directory.path().join("policies.yaml"), POLICIES).expect("write the policies");
    directory
}

#[test]
fn every_rule_of_a_workload_is_printed_in_the_order_of_evaluation_with_its_source() {
    let input = format!(
        "{}---\n{POLICIES}",
        DEPLOYMENT.replace("ENTRIES", "pod.test:443")
    );
    let result = check(&["-"], &input);
    assert_eq!(result.code, Some(0), "{}", result.errors);
    let lines: Vec<&str> = result.output.lines().map(str::trim).collect();
    let order = [
        "shop/deployment/web",
        "mode: enforce (denied packets are dropped); from: lists of EgressPolicy shop/web and pod",
        "first, in this order:",
        "deny  * (anywhere)  tcp port 25     (ClusterEgressPolicy guard, rule 1 `no mail`)",
        "deny  * (anywhere)  every protocol  (ClusterNetworkPolicy nodes, rule 1 `no nodes`)",
        "may not reach:",
        "192.0.2.66  every protocol  (EgressPolicy shop/web)",
        "may reach:",
        "pod.test      tcp and udp port 443  (pod)",
        "closed by EgressPolicy shop/web and pod: everything else that is external is denied",
        "not among the files, and may change this: Namespace shop, with its labels and annotations",
    ];
    let mut at = 0;
    for expected in order {
        let found = lines[at..].iter().position(|line| *line == expected);
        let found =
            found.unwrap_or_else(|| panic!("no {expected:?} from line {at} of\n{}", result.output));
        at += found + 1;
    }
    result.has("partner.test  tcp and udp port 443  (EgressPolicy shop/web)");
    // Only the cluster has nodes, and Services are not for this command. Neither is a mistake.
    assert!(
        result
            .errors
            .contains(": note: ClusterNetworkPolicy nodes: ")
            && result
                .errors
                .contains("these kinds are not read: Service (1)"),
        "{}",
        result.errors
    );
}

#[test]
fn every_kind_of_workload_is_read() {
    let template = "{metadata: {labels: {app: web}}, spec: {containers: []}}";
    let of_template = |version: &str, kind: &str| {
        format!(
            "---\napiVersion: {version}\nkind: {kind}\nmetadata: {{name: a, namespace: shop}}\n\
             spec: {{template: {template}}}\n"
        )
    };
    let workloads = [
        ("apps/v1", "Deployment"),
        ("apps/v1", "StatefulSet"),
        ("apps/v1", "DaemonSet"),
        ("apps/v1", "ReplicaSet"),
        ("v1", "ReplicationController"),
        ("batch/v1", "Job"),
    ];
    let workloads = workloads.map(|(version, kind)| of_template(version, kind));
    let others = format!(
        "---\napiVersion: batch/v1\nkind: CronJob\nmetadata: {{name: a, namespace: shop}}\n\
         spec: {{jobTemplate: {{spec: {{template: {template}}}}}}}\n\
         ---\napiVersion: v1\nkind: Pod\nmetadata: {{name: a, namespace: shop, labels: {{app: web}}}}\n\
         spec: {{hostNetwork: true}}\n"
    );
    let input = [POLICIES, &workloads.concat(), &others].concat();
    let result = check(&["--summary", "-"], &input);
    assert_eq!(result.code, Some(0), "{}", result.errors);
    assert_eq!(result.output.lines().count(), 8, "{}", result.output);
    let enforced = "  enforce, closed by EgressPolicy shop/web, 2 allowed, 3 denied";
    assert_eq!(
        result.output.matches(enforced).count(),
        7,
        "{}",
        result.output
    );
    let all = check(&["-o", "json", "-"], &input).json();
    let workloads = all["workloads"].as_array().expect("it is a list");
    let mut kinds: Vec<&str> = workloads
        .iter()
        .filter_map(|of| of["kind"].as_str())
        .collect();
    kinds.sort_unstable();
    assert_eq!(
        kinds,
        [
            "CronJob",
            "DaemonSet",
            "Deployment",
            "Job",
            "Pod",
            "ReplicaSet",
            "ReplicationController",
            "StatefulSet"
        ]
    );
    let pod = workloads.iter().find(|of| of["kind"] == "Pod");
    assert_eq!(pod.expect("it is there")["host_network"], true);
}

#[test]
fn the_json_report_has_every_rule_and_the_exact_place_of_each_finding() {
    let directory = directory("*.com pod.test:443");
    let result = check_in(directory.path(), &["--output", "json", "."], "");
    assert_eq!(result.code, Some(0), "{}", result.errors);
    assert_eq!(result.errors, "", "a report is on standard output alone");
    let report = result.json();
    assert_eq!(report["version"], 1);
    assert_eq!(report["success"], true);
    assert_eq!(
        report["summary"],
        json!({"workloads": 1, "errors": 0, "warnings": 1, "notes": 1})
    );
    assert_eq!(report["ignored"], json!({"Service": 1}));
    let workload = &report["workloads"][0];
    assert_eq!(
        (&workload["namespace"], &workload["name"], &workload["line"]),
        (&json!("shop"), &json!("web"), &json!(1))
    );
    let policy = &workload["policy"];
    assert_eq!(policy["mode"], "enforce");
    assert_eq!(policy["closed_by"], json!(["EgressPolicy shop/web", "pod"]));
    assert_eq!(
        policy["rules"][0],
        json!({
            "tier": "Admin",
            "action": "deny",
            "destination": "* (anywhere)",
            "packets": "tcp port 25",
            "entry": "*:25/tcp",
            "from": "ClusterEgressPolicy guard, rule 1 `no mail`",
            "path": "spec.rules[0].entries",
            "entry_line": 1,
            "entry_column": 1,
        })
    );
    let warning = report["findings"]
        .as_array()
        .and_then(|all| all.iter().find(|finding| finding["severity"] == "warning"))
        .expect("a warning");
    assert_eq!(
        (&warning["file"], &warning["line"], &warning["column"]),
        (&json!("./a,b.yaml"), &json!(12), &json!(11)),
        "{warning}"
    );
    let strict = check_in(directory.path(), &["-o", "json", "--strict", "."], "");
    assert_eq!(strict.code, Some(1));
    assert_eq!(strict.json()["success"], false);
}

#[test]
fn an_error_in_a_policy_object_is_reported_once_at_its_entry() {
    let workloads: String = (0..3)
        .map(|number| {
            let deployment = DEPLOYMENT.replace("ENTRIES", "pod.test");
            deployment.replace(
                "name: web, namespace: shop}\nspec",
                &format!("name: w{number}, namespace: shop}}\nspec"),
            ) + "---\n"
        })
        .collect();
    let input = workloads + &POLICIES.replace("web.test:443", "web.test:https");
    let report = check(&["-o", "json", "-"], &input).json();
    let findings = report["findings"].as_array().expect("it is a list");
    let errors: Vec<_> = findings
        .iter()
        .filter(|one| one["severity"] == "error")
        .collect();
    let [error] = errors[..] else {
        panic!("{errors:?}");
    };
    assert_eq!(error["further_workloads"], 2, "{error}");
    assert_eq!(error["topic"], "policy", "{error}");
    let line = error["line"].as_u64().expect("it has a line");
    let column = error["column"].as_u64().expect("it has a column");
    let text = input
        .lines()
        .nth(usize::try_from(line).unwrap() - 1)
        .unwrap();
    let found: String = text
        .chars()
        .skip(usize::try_from(column).unwrap() - 1)
        .take(5)
        .collect();
    assert_eq!(found, "https", "{error}");
}

/// The official schema of SARIF 2.1.0, from the package that holds it.
fn sarif_schema() -> Value {
    let manifest = workspace::root().join("Cargo.toml");
    // Without a platform, packages that are never compiled are there as well.
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "metadata",
            "--locked",
            "--format-version",
            "1",
            "--manifest-path",
        ])
        .arg(manifest)
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("it is JSON");
    let packages = metadata["packages"].as_array().expect("it is a list");
    let package = packages
        .iter()
        .find(|package| package["name"] == "serde-sarif");
    let manifest = package.expect("it is a dependency")["manifest_path"].as_str();
    let schema = PathBuf::from(manifest.expect("it is a path")).with_file_name("src/schema.json");
    let text = fs::read_to_string(schema).expect("the schema can be read");
    serde_json::from_str(&text).expect("it is JSON")
}

#[track_caller]
fn assert_is_sarif(report: &Value) {
    let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
    compiler
        .add_resource("sarif.json", sarif_schema())
        .expect("it is a schema");
    let schema = compiler
        .compile("sarif.json", &mut schemas)
        .expect("it is a schema");
    if let Err(error) = schemas.validate(report, schema) {
        panic!("{error:#}\n{report:#}");
    }
}

#[test]
fn the_sarif_report_is_valid_and_has_the_place_of_each_finding() {
    let directory = directory("pod.test:https *.com");
    let result = check_in(directory.path(), &["-o", "sarif", ".", "missing.yaml"], "");
    assert_eq!(result.code, Some(1), "{}", result.errors);
    let report = result.json();
    assert_is_sarif(&report);
    // The validation means something.
    let mut wrong = report.clone();
    wrong["runs"][0]["results"][0]["level"] = json!("bad");
    let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
    compiler
        .add_resource("sarif.json", sarif_schema())
        .expect("it is a schema");
    let schema = compiler
        .compile("sarif.json", &mut schemas)
        .expect("it is a schema");
    assert!(schemas.validate(&wrong, schema).is_err());

    let results = report["runs"][0]["results"]
        .as_array()
        .expect("it is a list");
    let error = results.iter().find(|result| result["ruleId"] == "policy");
    let error = error.expect("the entry is wrong");
    assert_eq!(
        error["locations"][0]["physicalLocation"],
        json!({
            "artifactLocation": { "uri": "./a%2Cb.yaml" },
            "region": { "startLine": 12, "startColumn": 20 },
        }),
        "{error}"
    );
    assert!(results.iter().any(|result| result["ruleId"] == "file"));
    // A report without findings is one, too.
    let good = check(
        &["-o", "sarif", "-"],
        &DEPLOYMENT.replace("ENTRIES", "pod.test"),
    );
    assert_eq!(good.code, Some(0), "{}", good.errors);
    assert_is_sarif(&good.json());
}

#[test]
fn github_shows_each_finding_at_its_line() {
    let directory = directory("pod.test:https");
    let result = check_in(directory.path(), &["-o", "github", "."], "");
    assert_eq!(result.code, Some(1), "{}", result.errors);
    result.has("::error file=./a%2Cb.yaml,line=12,col=20,title=egress-agent policy::shop/deployment/web: pod annotation");
    result.has("::notice file=./policies.yaml,");
    for line in result.output.lines() {
        assert!(
            line.starts_with("::") || line.starts_with("shop/deployment/web"),
            "{line}"
        );
    }
}

#[test]
fn policies_and_sets_without_workloads_are_read_too() {
    let result = check(&["--strict", "-"], POLICIES);
    assert_eq!(result.code, Some(0), "{}", result.errors);
    let wrong = POLICIES
        .replace("partner.test]", "partner.test, 'partner.test:443']")
        .replace("'*:25/tcp'", "'*:mail'");
    let report = check(&["-o", "json", "-"], &wrong).json();
    let findings = report["findings"].as_array().expect("it is a list");
    let errors: Vec<_> = findings
        .iter()
        .filter(|one| one["severity"] == "error")
        .map(|one| {
            (
                one["line"].as_u64().unwrap_or_default(),
                one["column"].as_u64(),
            )
        })
        .collect();
    let text = |(line, column): (u64, Option<u64>)| -> String {
        let line = wrong
            .lines()
            .nth(usize::try_from(line).unwrap() - 1)
            .unwrap();
        let column = usize::try_from(column.expect("a column")).unwrap();
        line.chars().skip(column - 1).take(4).collect()
    };
    let mut found: Vec<String> = errors.into_iter().map(text).collect();
    found.sort_unstable();
    found.dedup();
    // The entry that uses the set, the set's destination, and the port.
    assert_eq!(found, ["@par", "mail", "part"], "{report:#}");
}

#[test]
fn input_without_end_is_refused() {
    let result = check(&["/dev/zero"], "");
    assert_eq!(result.code, Some(1));
    assert!(
        result.errors.contains("/dev/zero: is longer than 16 MiB"),
        "{}",
        result.errors
    );
    let result = check(&["-"], &"# a comment\n".repeat(2 << 20));
    assert_eq!(result.code, Some(1));
    assert!(
        result
            .errors
            .contains("standard input: is longer than 16 MiB"),
        "{}",
        result.errors
    );
}
