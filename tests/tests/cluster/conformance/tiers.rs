//! Priorities, `Pass` from tier to tier, and replies.

use std::net::{IpAddr, TcpStream};

use egress_tests::{DEADLINE, exchange};
use serde_json::{Value, json};

use super::{
    Names, Path, Scene,
    To::{Tcp, Udp},
    rule,
};
use crate::policies::put;

const TO_GREEN: [Path; 2] = [
    (("red", 0), Tcp(80), ("green", 0)),
    (("red", 1), Tcp(8080), ("green", 0)),
];

#[test]
fn a_lower_number_is_a_higher_priority() {
    let passing = |names: &Names, priority: u32| {
        let rules = [rule("Pass", &[names.pods("green")])];
        let mut policy = names.policy("Admin", priority, &names.pods("red"), &rules);
        policy["metadata"]["name"] = format!("{}-passing", names.0).into();
        policy
    };
    let scene = Scene::new(&["red"], |names| {
        let red = names.pods("red");
        let of = |action| [rule(action, &[names.pods("green")])];
        vec![
            names.policy("Admin", 50, &red, &of("Deny")),
            passing(names, 60),
            names.policy("Baseline", 10, &red, &of("Accept")),
        ]
    });
    scene.denied(&TO_GREEN);
    scene.edit("red", |server, names| put(server, &passing(names, 40)));
    scene.arrive(&TO_GREEN);
}

/// Upstream's test has a `NetworkPolicy` between the tiers. Here an `EgressPolicy` has that place.
#[test]
fn pass_leaves_a_packet_to_the_team_and_then_to_the_baseline_tier() {
    let admin = |names: &Names, action: &str| {
        let rules = [rule(action, &[names.by_team("green")])];
        names.policy("Admin", 10, &names.by_team("red"), &rules)
    };
    let team = |names: &Names, allow: &[String]| -> Value {
        json!({
            "apiVersion": "egress-agent.dev/v1alpha1",
            "kind": "EgressPolicy",
            "metadata": { "name": "to-green", "namespace": names.namespace("red") },
            "spec": { "allow": allow },
        })
    };
    let scene = Scene::new(&["red"], |names| {
        let deny = [rule("Deny", &[names.by_team("green")])];
        vec![
            admin(names, "Deny"),
            names.policy("Baseline", 10, &names.by_team("red"), &deny),
        ]
    });
    let green = scene.pod(("green", 0));
    let allow = [
        format!("{}/any", green.ipv4()),
        format!("[{}]/any", green.ipv6()),
    ];
    scene.edit("red", |server, names| put(server, &team(names, &allow)));
    scene.denied(&TO_GREEN);
    scene.edit("red", |server, names| put(server, &admin(names, "Pass")));
    scene.arrive(&TO_GREEN);
    scene.edit("red", |server, names| server.delete(&team(names, &allow)));
    scene.denied(&TO_GREEN);
}

/// Upstream expects that a policy's rules about ingress let a team in to whose pods the same policy denies egress.
#[test]
fn a_denial_of_egress_denies_no_replies() {
    let everywhere = json!({ "networks": ["0.0.0.0/0", "::/0"] });
    for tier in ["Admin", "Baseline"] {
        let scene = Scene::new(&["red"], |names| {
            let rules = [rule("Deny", std::slice::from_ref(&everywhere))];
            vec![names.policy(tier, 10, &names.by_name("red"), &rules)]
        });
        scene.denied(&TO_GREEN);
        let (client, server) = (("green", 0), ("red", 0));
        scene.arrive(&[(client, Tcp(80), server), (client, Udp(5353), server)]);
        let red = scene.pod(server);
        for address in [IpAddr::V4(red.ipv4()), IpAddr::V6(red.ipv6())] {
            let outside = scene.cluster.lab.outside();
            let connected =
                outside.run(|| TcpStream::connect_timeout(&(address, 80).into(), DEADLINE));
            let mut stream = connected.unwrap_or_else(|error| panic!("{tier}, {address}: {error}"));
            assert!(
                exchange(&mut stream, b"hello", DEADLINE),
                "{tier}, {address}"
            );
        }
    }
}
