//! The checked-in definitions are those of the types.

use std::fs;

use serde_json::Value;

#[test]
fn the_manifests_have_the_definitions_of_the_types() {
    // Cargo runs tests in the directory of their package.
    let text = fs::read_to_string("../manifests/base/crds.yaml").expect("manifests/base/crds.yaml");
    let written: Vec<Value> = serde_saphyr::from_multiple(&text).expect("YAML");
    let generated = egress_api::definitions().into_iter();
    let generated: Vec<Value> = generated
        .map(|definition| serde_json::to_value(definition).expect("JSON"))
        .collect();
    assert_eq!(
        written, generated,
        "manifests/base/crds.yaml is out of date: run `cargo xtask crds`"
    );
}
