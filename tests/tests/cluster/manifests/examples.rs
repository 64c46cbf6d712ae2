//! The examples, and the pods of the end-to-end checks.

use std::collections::BTreeMap;

use egress_agent::config::Config;
use egress_policy::{self as policy, Annotations, Inputs};
use egress_tests::yaml::{self, identity};

use super::{objects::check_typed, pod_spec};

#[test]
fn the_annotations_of_the_examples_are_valid_and_cause_no_warning() {
    let settings = Config::default_config()
        .expect("defaults")
        .policy_settings();
    let mut read = 0;
    let files = ["cluster/shop.yaml", "pods/shop.yaml", "pods/others.yaml"];
    let objects = files.map(|file| yaml::objects(&format!("examples/{file}")));
    for object in objects.iter().flatten() {
        for metadata in [&object["metadata"], &object["spec"]["template"]["metadata"]] {
            let Ok(annotations) = serde_json::from_value(metadata["annotations"].clone()) else {
                continue;
            };
            let own = Annotations::from_map(&annotations);
            let described = policy::describe(
                Inputs::annotations(&own, &Annotations::default()),
                &settings,
            )
            .unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(described.warnings, Vec::<String>::new());
            read += 1;
        }
    }
    assert_eq!(read, 7);
}

/// The files of the examples in this directory.
fn examples(directory: &str) -> Vec<String> {
    let prefix = format!("examples/{directory}/");
    let files = yaml::files().into_iter();
    files.filter(|file| file.starts_with(&prefix)).collect()
}

#[test]
fn every_example_of_a_set_names_its_source_and_the_date() {
    let files = examples("sets");
    assert!(files.len() >= 10, "{files:?}");
    for file in files {
        let text = std::fs::read_to_string(yaml::directory().join(&file)).expect("read a set");
        let comments: Vec<&str> = text
            .lines()
            .take_while(|line| line.starts_with('#'))
            .collect();
        let has = |beginning: &str| comments.iter().any(|line| line.starts_with(beginning));
        assert!(has("# Source: ") && has("# Read on 20"), "{file}");
        let [set] = &yaml::objects(&file)[..] else {
            panic!("{file}: not one object");
        };
        let (_, _, name) = identity(set);
        assert_eq!(file, format!("examples/sets/{name}.yaml"));
    }
}

#[test]
fn the_examples_of_sets_and_policies_mean_something_and_cause_no_warning() {
    let mut command = std::process::Command::new(egress_tests::Agent::program());
    command.args(["check", "--strict"]);
    for directory in ["sets", "policies"] {
        command.arg(yaml::directory().join("examples").join(directory));
    }
    let output = command.output().expect("the agent's program runs");
    let printed = [output.stdout, output.stderr].concat();
    let printed = String::from_utf8_lossy(&printed);
    assert!(output.status.success() && printed.is_empty(), "{printed}");
}

/// The files that `tests/e2e/run` applies, relative to the manifests.
const END_TO_END: [&str; 3] = ["namespaces.yaml", "pods.yaml", "unreadable.yaml"];

#[test]
fn the_pods_of_the_end_to_end_checks_are_valid_for_the_api_server_and_the_agent() {
    let settings = Config::default_config()
        .expect("defaults")
        .policy_settings();
    let mut unreadable = Vec::new();
    for file in END_TO_END {
        for object in yaml::objects(&format!("../tests/e2e/{file}")) {
            check_typed(&object).unwrap_or_else(|error| panic!("{file}: {error}"));
            let (_, _, name) = identity(&object);
            let annotations = &object["metadata"]["annotations"];
            let annotations: BTreeMap<String, String> =
                serde_json::from_value(annotations.clone()).unwrap_or_default();
            let own = Annotations::from_map(&annotations);
            match policy::describe(
                Inputs::annotations(&own, &Annotations::default()),
                &settings,
            ) {
                Ok(_) => {}
                Err(error) => unreadable.push((name, error.to_string())),
            }
        }
    }
    let [(name, error)] = &unreadable[..] else {
        panic!("{unreadable:?}");
    };
    assert_eq!(name, "unreadable");
    assert!(error.contains("`https` is not a port"), "{error}");
}

/// The script replaces these texts.
#[test]
fn the_end_to_end_script_finds_the_texts_that_it_replaces() {
    let script = include_str!("../../../e2e/run");
    let pods = include_str!("../../../e2e/pods.yaml");
    for text in ["example.com", "*.kernel.org", "1.1.1.1", "busybox:1.37"] {
        assert!(pods.contains(text), "{text}");
        let pattern = text.replace('.', "\\.").replace('*', "\\*");
        assert!(script.contains(&format!("s|{pattern}|")), "{pattern}");
    }
    for (file, image) in [
        ("egress-agent.yaml", "registry.invalid/egress-agent:"),
        ("cleanup/daemonset.yaml", "registry.invalid/egress-agent:"),
    ] {
        let spec = pod_spec(&yaml::objects(file));
        let containers = spec
            .init_containers
            .iter()
            .flatten()
            .chain(&spec.containers);
        for container in containers {
            let named = container.image.as_deref().expect("an image");
            assert!(named.starts_with(image), "{file}: {named}");
        }
    }
    for file in END_TO_END {
        assert!(script.contains(&format!("$here/{file}")), "{file}");
    }
}
