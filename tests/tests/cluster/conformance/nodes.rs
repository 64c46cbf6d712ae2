//! Destinations as nodes: the agent's own, and another one.

use std::net::IpAddr;

use egress_tests::{Namespace, TcpEcho, UdpEcho};
use serde_json::{Value, json};

use super::{
    Names, OTHER_NODE, OWN_NODE, Scene,
    To::{self, Sctp, Tcp, Udp},
    rule, rule_at,
};

/// Ports of a pod in the host's network.
const TCP: [u16; 2] = [34_345, 34_346];
const UDP: [u16; 2] = [34_347, 34_349];
const SCTP: u16 = 34_351;

/// Everything outside, as networks.
fn everywhere() -> Value {
    json!({ "networks": ["0.0.0.0/0", "::/0"] })
}

/// Asserts which packets of a pod of `red` reach the nodes.
#[track_caller]
fn expect(policy: impl Fn(&Names) -> Value, arrive: &[To], denied: &[To]) {
    let scene = Scene::new(&["red"], |names| vec![policy(names)]);
    let lab = &scene.cluster.lab;
    let nodes: [(&Namespace, [&str; 2]); 2] = [(lab.node(), OWN_NODE), (lab.outside(), OTHER_NODE)];
    let mut servers = Vec::new();
    for (netns, _) in nodes {
        for (tcp, udp) in TCP.into_iter().zip(UDP) {
            servers.push((TcpEcho::start(netns, tcp), UdpEcho::start(netns, udp)));
        }
    }
    let from = scene.pod(("red", 1));
    for (netns, addresses) in nodes {
        for address in addresses {
            let address: IpAddr = address.parse().expect("an address");
            for to in arrive {
                scene.arrives(from, (*to, address), netns);
            }
            for to in denied {
                scene.is_denied(from, (*to, address), netns);
            }
        }
    }
}

#[test]
fn labels_of_nodes_decide_in_the_admin_tier() {
    expect(
        |names| {
            let nodes = [names.nodes()];
            let rest = [names.pods("green"), names.nodes(), everywhere()];
            let rules = [
                rule_at("Accept", &nodes, &[Tcp(TCP[0])]),
                rule_at("Pass", &nodes, &[Udp(UDP[0])]),
                rule("Deny", &rest),
            ];
            names.policy("Admin", 75, &names.pods("red"), &rules)
        },
        &[Tcp(TCP[0]), Udp(UDP[0])],
        &[Tcp(TCP[1]), Udp(UDP[1]), Sctp(SCTP)],
    );
}

#[test]
fn labels_of_nodes_decide_in_the_baseline_tier() {
    expect(
        |names| {
            let nodes = [names.nodes()];
            let mut range = rule("Accept", &nodes);
            let ports = json!({ "start": TCP[0], "end": TCP[1] });
            range["protocols"] = json!([{ "tcp": { "destinationPort": { "range": ports } } }]);
            let rules = [range, rule("Deny", &[names.nodes(), everywhere()])];
            names.policy("Baseline", 10, &names.by_name("red"), &rules)
        },
        &[Tcp(TCP[0]), Tcp(TCP[1])],
        &[Udp(UDP[1]), Sctp(SCTP)],
    );
}
