//! Destinations as networks, beside pods found by labels.

use serde_json::{Value, json};

use super::{
    Names, Path, Scene,
    To::{Sctp, Tcp, Udp},
    Who, rule, set_team,
};
use crate::policies::put;

const CLIENT: Who = ("red", 1);

/// TCP, UDP and SCTP to each of these pods.
fn all_protocols(to: &[Who]) -> Vec<Path> {
    let paths = to
        .iter()
        .flat_map(|who| [Tcp(80), Udp(53), Sctp(9003)].map(|protocol| (CLIENT, protocol, *who)));
    paths.collect()
}

fn rules(names: &Names) -> Vec<Value> {
    vec![
        rule("Accept", &[names.pods("green")]),
        rule("Deny", &[json!({ "networks": ["0.0.0.0/0", "::/0"] })]),
    ]
}

#[test]
fn networks_and_labels_decide_in_the_admin_tier() {
    networks_and_labels_decide(|names, rules| names.policy("Admin", 85, &names.pods("red"), rules));
}

#[test]
fn networks_and_labels_decide_in_the_baseline_tier() {
    networks_and_labels_decide(|names, rules| {
        names.policy("Baseline", 10, &names.by_name("red"), rules)
    });
}

#[track_caller]
fn networks_and_labels_decide(policy: impl Fn(&Names, &[Value]) -> Value) {
    let scene = Scene::new(&["red"], |names| vec![policy(names, &rules(names))]);
    let green = all_protocols(&[("green", 0)]);
    scene.arrive(&green);
    scene.denied(&all_protocols(&[("blue", 0), ("yellow", 0)]));

    // The rule follows the label of the namespace.
    scene.edit("red", |server, names| {
        set_team(server, &names.namespace("green"), "other");
    });
    scene.denied(&green);
    scene.edit("red", |server, names| {
        set_team(server, &names.namespace("green"), &names.label("green"));
    });
    scene.arrive(&green);

    let allowed = [("blue", 0), ("yellow", 0)];
    let networks: Vec<String> = allowed
        .iter()
        .map(|who| scene.pod(*who))
        .flat_map(|pod| [format!("{}/32", pod.ipv4()), format!("{}/128", pod.ipv6())])
        .collect();
    scene.edit("red", |server, names| {
        let mut rules = rules(names);
        rules.insert(0, rule("Accept", &[json!({ "networks": networks })]));
        put(server, &policy(names, &rules));
    });
    scene.arrive(&all_protocols(&allowed));
    scene.denied(&all_protocols(&[("blue", 1), ("yellow", 1)]));
}
