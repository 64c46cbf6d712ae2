//! One protocol a policy, all of them in one policy, and ports by their names.

use serde_json::Value;

use super::{
    Names, Scene,
    To::{self, Sctp, Tcp, Udp},
    rule, rule_at, rule_at_named,
};
use crate::policies::put;

/// Which pods a policy is about, which ports its rules name, and whose pods they are about.
struct Facts {
    priority: u32,
    subject: &'static str,
    /// Everything to this team is accepted, then denied, then passed on.
    ordered: &'static str,
    /// These ports of this team are denied, then passed on.
    denied: (&'static str, &'static [To]),
    /// These ports of this team are accepted, and the rest is denied.
    accepted: (&'static str, &'static [To]),
}

const OF_TCP: Facts = Facts {
    priority: 6,
    subject: "red",
    ordered: "blue",
    denied: ("green", &[Tcp(80)]),
    accepted: ("yellow", &[Tcp(8080)]),
};
const OF_UDP: Facts = Facts {
    priority: 7,
    subject: "yellow",
    ordered: "blue",
    denied: ("green", &[Udp(5353)]),
    accepted: ("red", &[Udp(53)]),
};
const OF_SCTP: Facts = Facts {
    priority: 8,
    subject: "blue",
    ordered: "red",
    denied: ("green", &[Sctp(9003)]),
    accepted: ("yellow", &[Sctp(9003)]),
};
const OF_ALL: Facts = Facts {
    priority: 15,
    subject: "red",
    ordered: "blue",
    denied: ("green", &[Tcp(80), Udp(53), Sctp(9003)]),
    accepted: ("yellow", &[Tcp(8080), Udp(5353), Sctp(9003)]),
};

impl Facts {
    fn admin(&self, names: &Names) -> Vec<Value> {
        let [ordered, denied, accepted] =
            [self.ordered, self.denied.0, self.accepted.0].map(|team| [names.by_name(team)]);
        vec![
            rule("Accept", &ordered),
            rule("Deny", &ordered),
            rule("Pass", &ordered),
            rule_at("Deny", &denied, self.denied.1),
            rule_at("Pass", &denied, self.denied.1),
            rule_at("Accept", &accepted, self.accepted.1),
            rule("Deny", &accepted),
        ]
    }

    /// Upstream has no `Pass` among the rules of this tier.
    fn baseline(&self, names: &Names) -> Vec<Value> {
        let mut rules = self.admin(names);
        rules.retain(|rule| rule["action"] != "Pass");
        rules
    }

    fn in_admin(&self, names: &Names, rules: &[Value]) -> Value {
        names.policy("Admin", self.priority, &names.by_name(self.subject), rules)
    }

    fn in_baseline(&self, names: &Names, rules: &[Value]) -> Value {
        names.policy("Baseline", 10, &names.by_name(self.subject), rules)
    }
}

/// The rules with two of them in each other's place.
fn swapped(mut rules: Vec<Value>, one: usize, other: usize) -> Vec<Value> {
    rules.swap(one, other);
    rules
}

#[test]
fn rules_about_tcp_decide_in_their_order_in_the_admin_tier() {
    let facts = OF_TCP;
    let scene = Scene::new(&["red"], |names| {
        vec![facts.in_admin(names, &facts.admin(names))]
    });
    let (a, b) = (("red", 0), ("red", 1));
    scene.arrive(&[
        (a, Tcp(80), ("blue", 0)),
        (b, Tcp(8080), ("blue", 0)),
        (a, Tcp(8080), ("yellow", 1)),
        (b, Tcp(8080), ("green", 0)),
    ]);
    scene.denied(&[(b, Tcp(80), ("yellow", 1)), (a, Tcp(80), ("green", 0))]);

    scene.edit("red", |server, names| {
        let denied_first = swapped(facts.admin(names), 0, 1);
        put(server, &facts.in_admin(names, &denied_first));
    });
    scene.denied(&[(a, Tcp(80), ("blue", 1)), (b, Tcp(8080), ("blue", 1))]);

    scene.edit("red", |server, names| {
        let rules = swapped(facts.admin(names), 0, 1);
        let passed_first = swapped(swapped(rules, 0, 2), 3, 4);
        put(server, &facts.in_admin(names, &passed_first));
    });
    scene.arrive(&[
        (a, Tcp(80), ("blue", 0)),
        (b, Tcp(8080), ("blue", 0)),
        (a, Tcp(80), ("green", 0)),
        (b, Tcp(8080), ("green", 0)),
    ]);
}

#[test]
fn rules_about_udp_decide_in_their_order_in_the_admin_tier() {
    let facts = OF_UDP;
    let scene = Scene::new(&["yellow"], |names| {
        vec![facts.in_admin(names, &facts.admin(names))]
    });
    let (a, b) = (("yellow", 0), ("yellow", 1));
    scene.arrive(&[
        (a, Udp(53), ("blue", 0)),
        (b, Udp(5353), ("blue", 0)),
        (a, Udp(53), ("red", 1)),
        (b, Udp(53), ("green", 0)),
    ]);
    scene.denied(&[(b, Udp(5353), ("red", 1)), (a, Udp(5353), ("green", 0))]);

    scene.edit("yellow", |server, names| {
        let denied_first = swapped(facts.admin(names), 0, 1);
        put(server, &facts.in_admin(names, &denied_first));
    });
    scene.denied(&[(a, Udp(53), ("blue", 1)), (b, Udp(5353), ("blue", 1))]);

    scene.edit("yellow", |server, names| {
        let rules = swapped(facts.admin(names), 0, 1);
        let passed_first = swapped(swapped(rules, 0, 2), 3, 4);
        put(server, &facts.in_admin(names, &passed_first));
    });
    scene.arrive(&[
        (a, Udp(5353), ("blue", 1)),
        (b, Udp(53), ("blue", 1)),
        (a, Udp(5353), ("green", 0)),
        (b, Udp(53), ("green", 0)),
    ]);
}

#[test]
fn rules_about_sctp_decide_in_their_order_in_the_admin_tier() {
    let facts = OF_SCTP;
    let scene = Scene::new(&["blue"], |names| {
        vec![facts.in_admin(names, &facts.admin(names))]
    });
    let (a, b) = (("blue", 0), ("blue", 1));
    scene.arrive(&[
        (a, Sctp(9003), ("red", 0)),
        (b, Sctp(9005), ("red", 0)),
        (a, Sctp(9003), ("yellow", 1)),
        (b, Sctp(9005), ("green", 0)),
    ]);
    scene.denied(&[
        (b, Sctp(9005), ("yellow", 1)),
        (a, Sctp(9003), ("green", 0)),
    ]);

    scene.edit("blue", |server, names| {
        let denied_first = swapped(facts.admin(names), 0, 1);
        put(server, &facts.in_admin(names, &denied_first));
    });
    scene.denied(&[(a, Sctp(9003), ("red", 1)), (b, Sctp(9005), ("red", 1))]);

    scene.edit("blue", |server, names| {
        let rules = swapped(facts.admin(names), 0, 1);
        let passed_first = swapped(swapped(rules, 0, 2), 3, 4);
        put(server, &facts.in_admin(names, &passed_first));
    });
    scene.arrive(&[
        (a, Sctp(9003), ("red", 1)),
        (b, Sctp(9005), ("red", 1)),
        (a, Sctp(9003), ("green", 0)),
        (b, Sctp(9005), ("green", 0)),
    ]);
}

#[test]
fn rules_about_all_protocols_decide_in_their_order_in_the_admin_tier() {
    let facts = OF_ALL;
    let scene = Scene::new(&["red"], |names| {
        vec![facts.in_admin(names, &facts.admin(names))]
    });
    expect_of_all(&scene);

    let (a, b) = (("red", 0), ("red", 1));
    scene.edit("red", |server, names| {
        let denied_first = swapped(facts.admin(names), 0, 1);
        put(server, &facts.in_admin(names, &denied_first));
    });
    scene.denied(&[
        (a, Tcp(80), ("blue", 1)),
        (b, Udp(53), ("blue", 1)),
        (a, Sctp(9003), ("blue", 1)),
    ]);

    scene.edit("red", |server, names| {
        let rules = swapped(facts.admin(names), 0, 1);
        let passed_first = swapped(swapped(rules, 0, 2), 3, 4);
        put(server, &facts.in_admin(names, &passed_first));
    });
    scene.arrive(&[
        (a, Tcp(80), ("blue", 0)),
        (a, Udp(5353), ("blue", 0)),
        (a, Sctp(9003), ("blue", 0)),
        (a, Tcp(80), ("green", 0)),
        (b, Tcp(8080), ("green", 0)),
        (a, Udp(53), ("green", 0)),
        (b, Udp(5353), ("green", 0)),
        (a, Sctp(9003), ("green", 0)),
        (b, Sctp(9005), ("green", 0)),
    ]);
}

/// The connections that the combined rules of either tier let through at first.
#[track_caller]
fn expect_of_all(scene: &Scene) {
    let (a, b) = (("red", 0), ("red", 1));
    scene.arrive(&[
        (a, Tcp(80), ("blue", 0)),
        (b, Udp(53), ("blue", 0)),
        (a, Sctp(9003), ("blue", 0)),
        (a, Tcp(8080), ("yellow", 1)),
        (a, Udp(5353), ("yellow", 1)),
        (a, Sctp(9003), ("yellow", 1)),
        (b, Tcp(8080), ("green", 0)),
        (b, Udp(5353), ("green", 0)),
        (b, Sctp(9005), ("green", 0)),
    ]);
    scene.denied(&[
        (b, Tcp(80), ("yellow", 1)),
        (b, Udp(53), ("yellow", 1)),
        (b, Sctp(9005), ("yellow", 1)),
        (a, Tcp(80), ("green", 0)),
        (a, Udp(53), ("green", 0)),
        (a, Sctp(9003), ("green", 0)),
    ]);
}

#[test]
fn rules_about_one_protocol_decide_in_their_order_in_the_baseline_tier() {
    let all = [OF_TCP, OF_UDP, OF_SCTP];
    let scene = Scene::new(&["red", "yellow", "blue"], |names| {
        let policies = all.iter().map(|facts| {
            let mut policy = facts.in_baseline(names, &facts.baseline(names));
            policy["metadata"]["name"] = format!("{}-{}", names.0, facts.subject).into();
            policy
        });
        policies.collect()
    });
    scene.arrive(&[
        (("red", 0), Tcp(80), ("blue", 0)),
        (("red", 1), Tcp(8080), ("blue", 0)),
        (("red", 0), Tcp(8080), ("yellow", 1)),
        (("red", 1), Tcp(8080), ("green", 0)),
        (("yellow", 0), Udp(53), ("blue", 0)),
        (("yellow", 1), Udp(5353), ("blue", 0)),
        (("yellow", 0), Udp(53), ("red", 1)),
        (("yellow", 1), Udp(53), ("green", 0)),
        (("blue", 0), Sctp(9003), ("red", 0)),
        (("blue", 1), Sctp(9005), ("red", 0)),
        (("blue", 0), Sctp(9003), ("yellow", 1)),
        (("blue", 1), Sctp(9005), ("green", 0)),
    ]);
    scene.denied(&[
        (("red", 1), Tcp(80), ("yellow", 1)),
        (("red", 0), Tcp(80), ("green", 0)),
        (("yellow", 1), Udp(5353), ("red", 1)),
        (("yellow", 0), Udp(5353), ("green", 0)),
        (("blue", 1), Sctp(9005), ("yellow", 1)),
        (("blue", 0), Sctp(9003), ("green", 0)),
    ]);

    for facts in all {
        scene.edit(facts.subject, |server, names| {
            let denied_first = swapped(facts.baseline(names), 0, 1);
            let mut policy = facts.in_baseline(names, &denied_first);
            policy["metadata"]["name"] = format!("{}-{}", names.0, facts.subject).into();
            put(server, &policy);
        });
    }
    scene.denied(&[
        (("red", 0), Tcp(80), ("blue", 1)),
        (("red", 1), Tcp(8080), ("blue", 1)),
        (("yellow", 0), Udp(53), ("blue", 1)),
        (("yellow", 1), Udp(5353), ("blue", 1)),
        (("blue", 0), Sctp(9003), ("red", 1)),
        (("blue", 1), Sctp(9005), ("red", 1)),
    ]);
}

#[test]
fn rules_about_all_protocols_decide_in_their_order_in_the_baseline_tier() {
    let facts = OF_ALL;
    let scene = Scene::new(&["red"], |names| {
        vec![facts.in_baseline(names, &facts.baseline(names))]
    });
    expect_of_all(&scene);
    scene.edit("red", |server, names| {
        let denied_first = swapped(facts.baseline(names), 0, 1);
        put(server, &facts.in_baseline(names, &denied_first));
    });
    scene.denied(&[
        (("red", 0), Tcp(80), ("blue", 1)),
        (("red", 1), Udp(53), ("blue", 1)),
        (("red", 0), Sctp(9003), ("blue", 1)),
    ]);
}

#[test]
fn a_port_is_found_by_the_name_that_the_destination_gives_it() {
    let scene = Scene::new(&["red", "yellow"], |names| {
        let mut admin = OF_TCP.admin(names);
        admin[5] = rule_at_named("Accept", &[names.by_name("yellow")], "web");
        let mut baseline = OF_UDP.baseline(names);
        baseline[3] = rule_at_named("Accept", &[names.by_name("red")], "dns");
        vec![
            OF_TCP.in_admin(names, &admin),
            OF_UDP.in_baseline(names, &baseline),
        ]
    });
    scene.arrive(&[
        (("red", 0), Tcp(80), ("yellow", 1)),
        (("yellow", 0), Udp(53), ("red", 1)),
    ]);
    scene.denied(&[
        (("red", 1), Tcp(8080), ("yellow", 1)),
        (("yellow", 1), Udp(5353), ("red", 1)),
    ]);
}
