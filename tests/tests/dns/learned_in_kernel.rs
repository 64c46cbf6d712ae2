//! Names that the agent has decided: the programs pass their queries and learn from their responses.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use egress_common::records::{INTERFACE_LEARNS, InterfaceValue};
use egress_tests::{
    Agent, DEADLINE, Lab, Pod, SHORT,
    addresses::{RESOLVER, server},
    dns::RecordType,
    eventually, exchange, holds,
    observed::HTTP,
};

struct Scene {
    lab: Lab,
    pod: Pod,
    agent: Agent,
}

impl Scene {
    #[track_caller]
    fn new(allow: &str) -> Self {
        let lab = Lab::builder()
            .config("dns.learn", "kernel")
            .config("http", HTTP)
            .build();
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", allow)]);
        let agent = lab.start_agent(&[&pod]);
        Self { lab, pod, agent }
    }

    /// How many queries and responses the programs have passed without the agent.
    fn passed(&self) -> (f64, f64) {
        let metrics = self.lab.metrics();
        let passed = |direction: &str| {
            let series = format!("egress_agent_dns_passed_total{{direction=\"{direction}\"}}");
            metrics.get(&series)
        };
        (passed("question"), passed("answer"))
    }
}

#[test]
fn the_programs_pass_messages_about_decided_names() {
    let scene = Scene::new("shop.test:443");
    let _web = scene.lab.serve_tcp(443);
    scene.lab.dns().addresses("shop.test", &[server(10)]);
    for n in 1..5 {
        assert_eq!(scene.pod.lookup("shop.test"), [server(10)]);
        assert_eq!(scene.passed(), (f64::from(n), f64::from(n)));
        scene.pod.talks_tcp((server(10), 443));
    }
    let held = scene.lab.metrics();
    let held = held.get("egress_agent_dns_held_total{direction=\"question\"}");
    assert!(held < 2.0, "{held} queries visited the agent");
}

#[test]
fn a_new_address_of_a_decided_name_is_reached_on_the_first_syn() {
    let scene = Scene::new("shop.test:443");
    let _web = scene.lab.serve_tcp(443);
    for n in 10..30 {
        scene.lab.dns().addresses("shop.test", &[server(n)]);
        assert_eq!(scene.pod.lookup("shop.test"), [server(n)]);
        scene.pod.talks_tcp((server(n), 443));
    }
    assert_eq!(scene.passed(), (20.0, 20.0));
    assert_eq!(scene.pod.syn_retransmissions(), 0);
    let denials = scene.agent.denials();
    assert!(denials.is_empty(), "{denials:?}");
}

#[test]
fn every_address_is_reached_while_the_policy_is_edited() {
    const LISTS: [&str; 2] = ["shop.test:443", "shop.test:443 other.test:80"];
    let scene = Scene::new(LISTS[0]);
    let _web = scene.lab.serve_tcp(443);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let edits = scope.spawn(|| {
            for n in 1..=30 {
                scene.agent.applies_policy_after(&scene.pod, || {
                    scene.lab.write_pod(&scene.pod, &[("allow", LISTS[n % 2])]);
                });
            }
            stop.store(true, Ordering::Relaxed);
        });
        let mut lookups = 0;
        while !stop.load(Ordering::Relaxed) && !edits.is_finished() {
            let address = server(10 + lookups % 200);
            scene.lab.dns().addresses("shop.test", &[address]);
            assert_eq!(scene.pod.lookup("shop.test"), [address]);
            drop(scene.pod.reach_tcp((address, 443)));
            lookups = lookups.wrapping_add(1);
        }
    });
    let denials = scene.agent.denials();
    assert!(denials.is_empty(), "{denials:?}");
    let (_, answers) = scene.passed();
    assert!(
        answers > 30.0,
        "only {answers} responses were read in the kernel"
    );
}

#[test]
fn an_edit_treats_addresses_alike_whether_the_programs_or_the_agent_learned_them() {
    let scene = Scene::new("shop.test:443 old.test:443");
    let _web = scene.lab.serve_tcp(443);
    scene.lab.dns().addresses("shop.test", &[server(10)]);
    scene.lab.dns().addresses("old.test", &[server(11)]);
    let mut streams = Vec::new();
    for (name, n) in [("shop.test", 10), ("old.test", 11)] {
        scene.pod.lookup(name);
        assert_eq!(scene.pod.lookup(name), [server(n)]);
        streams.push(scene.pod.talks_tcp((server(n), 443)));
    }
    scene.agent.applies_policy_after(&scene.pod, || {
        scene
            .lab
            .write_pod(&scene.pod, &[("allow", "shop.test:443")]);
    });
    let [kept, cut] = &mut streams[..] else {
        panic!("two connections");
    };
    assert!(exchange(kept, b"still here", DEADLINE));
    assert!(!exchange(cut, b"cut", SHORT));
    drop(scene.pod.reach_tcp((server(10), 443)));
    scene
        .agent
        .denies_tcp(&scene.pod, (server(11), 443), "address_not_learned");
}

#[test]
fn decided_names_are_resolved_and_reached_while_no_agent_runs() {
    let mut scene = Scene::new("shop.test:443");
    let web = scene.lab.serve_tcp(443);
    scene.lab.dns().addresses("shop.test", &[server(10)]);
    scene.lab.dns().addresses("other.test", &[server(90)]);
    assert_eq!(scene.pod.lookup("shop.test"), [server(10)]);
    scene.agent.kill();
    for n in 11..40 {
        scene.lab.dns().addresses("shop.test", &[server(n)]);
        assert_eq!(scene.pod.lookup("shop.test"), [server(n)]);
        drop(scene.pod.reach_tcp((server(n), 443)));
    }
    assert_eq!(scene.pod.syn_retransmissions(), 0);
    let undecided = scene
        .pod
        .try_resolve(RESOLVER, "other.test", RecordType::A, SHORT);
    assert!(undecided.is_none(), "an undecided name was resolved");
    assert!(!scene.pod.reaches(server(90)));

    let mut stream = scene.pod.talks_tcp((server(39), 443));
    scene.agent = scene.lab.start_agent(&[&scene.pod]);
    // Addresses that were learned meanwhile are known with their names, so an edit keeps them.
    scene.agent.applies_policy_after(&scene.pod, || {
        scene
            .lab
            .write_pod(&scene.pod, &[("allow", "shop.test:443 more.test")]);
    });
    assert!(exchange(&mut stream, b"still here", DEADLINE));
    for n in 11..40 {
        drop(scene.pod.reach_tcp((server(n), 443)));
    }
    eventually("the server has accepted every connection", || {
        holds(web.peers().len() > 50)
    });
}

#[test]
fn a_program_learns_neither_protected_nor_denied_addresses() {
    let lab = Lab::builder()
        .config("dns.learn", "kernel")
        .config("http", HTTP)
        .config("ranges.protected", vec!["203.0.113.20/32"])
        .build();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    let lists = [("allow", "shop.test:443"), ("deny", "203.0.113.21")];
    lab.write_pod(&pod, &lists);
    let agent = lab.start_agent(&[&pod]);
    for n in [10, 20, 21] {
        lab.dns().addresses("shop.test", &[server(n)]);
        assert_eq!(pod.lookup("shop.test"), [server(n)]);
    }
    drop(pod.reach_tcp((server(10), 443)));
    agent.denies_each_tcp(
        &pod,
        &[
            ((server(20), 443), "protected"),
            ((server(21), 443), "deny_rule"),
        ],
    );
}

/// Takes the bit for learning off every interface, as an agent does before it edits a policy.
fn stop_learning(lab: &Lab) {
    lab.rewrite_shared("interfaces", |_, value| {
        let flags = std::mem::offset_of!(InterfaceValue, flags);
        let mut word = [0; 4];
        word.copy_from_slice(&value[flags..flags + 4]);
        let word = u32::from_ne_bytes(word);
        assert_ne!(word & INTERFACE_LEARNS, 0, "the programs learn");
        value[flags..flags + 4].copy_from_slice(&(word & !INTERFACE_LEARNS).to_ne_bytes());
    });
}

#[test]
fn the_programs_learn_again_after_an_agent_was_killed_amid_an_edit() {
    let mut scene = Scene::new("shop.test:443");
    scene.lab.dns().addresses("shop.test", &[server(10)]);
    for allow in ["shop.test:443", "shop.test:443 other.test:443"] {
        assert_eq!(scene.pod.lookup("shop.test"), [server(10)]);
        scene.agent.kill();
        stop_learning(&scene.lab);
        scene.lab.write_pod(&scene.pod, &[("allow", allow)]);
        scene.agent = scene.lab.start_agent(&[&scene.pod]);
        // The new agent decides the name.
        assert_eq!(scene.pod.lookup("shop.test"), [server(10)]);
        let (queries, responses) = scene.passed();
        assert_eq!(scene.pod.lookup("shop.test"), [server(10)]);
        assert_eq!(scene.passed(), (queries + 1.0, responses + 1.0));
    }
}
