//! DNS while no agent runs.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod, SHORT, StopAtEnd, TcpEcho,
    addresses::{RESOLVER, server},
    dns::{DnsStream, RecordType, address},
    eventually, exchange, holds,
    observed::HTTP,
};

struct Scene {
    agent: Agent,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    /// A pod that may reach `shop.test` and `late.test`, and has resolved `shop.test`.
    #[track_caller]
    fn new(learn: &str, (key, value): (&str, &str)) -> Self {
        let lab = Lab::builder()
            .config("dns.learn", learn)
            .config(key, value)
            .config("http", HTTP)
            .build();
        for (name, n) in [("shop.test", 10), ("late.test", 20), ("other.test", 30)] {
            lab.dns().addresses(name, &[server(n)]);
        }
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", "shop.test:443 late.test:443")]);
        let agent = lab.start_agent(&[&pod]);
        assert_eq!(pod.lookup("shop.test"), [server(10)]);
        Self { agent, pod, lab }
    }

    fn is_resolved(&self, name: &str) -> bool {
        let response = self.pod.try_resolve(RESOLVER, name, RecordType::A, SHORT);
        response.is_some_and(|response| !response.addresses.is_empty())
    }

    #[track_caller]
    fn wait_resolved(&self, name: &str, expected: bool) {
        eventually(&format!("{name} is resolved: {expected}"), || {
            holds(self.is_resolved(name) == expected)
        });
    }
}

#[test]
fn decided_names_resolve_for_as_long_as_configured() {
    let mut scene = Scene::new("kernel", ("whenAgentDown.resolveFor", "0s"));
    // While the agent runs, the time does not count.
    for n in 1..5 {
        scene.lab.dns().addresses("shop.test", &[server(10 + n)]);
        assert_eq!(scene.pod.lookup("shop.test"), [server(10 + n)]);
    }
    let _web = scene.lab.serve_tcp(443);
    let mut open = scene.pod.talks_tcp((server(14), 443));
    scene.agent.kill();
    scene.wait_resolved("shop.test", false);
    // Addresses live as long as their responses said.
    scene.pod.talks_tcp((server(14), 443));
    assert!(exchange(&mut open, b"still here", DEADLINE));

    scene.agent = scene.lab.start_agent(&[&scene.pod]);
    assert_eq!(scene.pod.lookup("shop.test"), [server(14)]);
    assert!(exchange(&mut open, b"still here", DEADLINE));
}

#[test]
fn undecided_names_are_delivered_without_an_agent_if_configured() {
    for learn in ["agent", "kernel"] {
        let mut scene = Scene::new(learn, ("whenAgentDown.undecided", "deliver"));
        let _web = scene.lab.serve_tcp(443);
        assert!(!scene.is_resolved("other.test"), "an agent runs");
        scene.agent.kill();
        scene.wait_resolved("other.test", true);
        assert_eq!(scene.pod.lookup("late.test"), [server(20)]);
        let mut stream = DnsStream::open(&scene.pod, RESOLVER);
        stream.ask(1, "late.test");
        assert_eq!(stream.expect(1).addresses, [server(20)]);
        // The responses teach nothing.
        for n in [20, 30] {
            assert!(!scene.pod.reaches(server(n)), "{n} is open");
        }
        scene.pod.talks_tcp((server(10), 443));

        scene.agent = scene.lab.start_agent(&[&scene.pod]);
        let metrics = scene.lab.metrics();
        for direction in ["question", "answer"] {
            let series = format!("egress_agent_dns_unread_total{{direction=\"{direction}\"}}");
            assert!(metrics.get(&series) >= 2.0, "{series}");
        }
        assert!(!scene.is_resolved("other.test"), "an agent runs again");
        assert_eq!(scene.pod.lookup("late.test"), [server(20)]);
        scene.pod.talks_tcp((server(20), 443));
        assert!(!scene.pod.reaches(server(30)), "30 is open");
    }
}

#[test]
fn without_an_agent_undecided_names_are_not_resolved_by_default() {
    let mut scene = Scene::new("kernel", ("whenAgentDown.resolveFor", "24h"));
    let _web = scene.lab.serve_tcp(443);
    scene.agent.kill();
    // Longer than it takes until an agent counts as down.
    let killed = Instant::now();
    while killed.elapsed() < Duration::from_secs(5) {
        assert_eq!(scene.pod.lookup("shop.test"), [server(10)]);
        assert!(!scene.is_resolved("late.test"), "an undecided name");
    }
    assert_eq!(scene.lab.dns().queries_for("late.test"), 0);
}

/// A pod whose agent was killed.
struct WithoutAgent {
    pod: Pod,
    lab: Lab,
    _web: TcpEcho,
}

impl WithoutAgent {
    /// The name resolves to an address that lives 8 seconds. The agent has decided it, and knows the address or not.
    #[track_caller]
    fn new(knows_address: bool) -> Self {
        let lab = Lab::builder()
            .config("dns.learn", "kernel")
            .config("http", HTTP)
            .exact_lifetimes()
            .build();
        let web = lab.serve_tcp(443);
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", "shop.test:443")]);
        let mut agent = lab.start_agent(&[&pod]);
        lab.dns()
            .answer("shop.test", vec![address(server(90)).ttl(8)]);
        assert_eq!(pod.lookup("shop.test"), [server(90)]);
        lab.dns()
            .answer("shop.test", vec![address(server(10)).ttl(8)]);
        if knows_address {
            assert_eq!(pod.lookup("shop.test"), [server(10)]);
            eventually("the agent has kept the names of both addresses", || {
                holds(lab.pod_entries(&pod, "names").len() == 2)
            });
        }
        agent.kill();
        assert_eq!(pod.lookup("shop.test"), [server(10)]);
        Self {
            pod,
            lab,
            _web: web,
        }
    }

    /// Starts an agent, and meanwhile edits the policy.
    #[track_caller]
    fn edit(&self) -> Agent {
        self.lab
            .write_pod(&self.pod, &[("allow", "shop.test:443 other.test:443")]);
        self.lab.start_agent(&[&self.pod])
    }
}

#[test]
fn a_lifetime_that_grew_without_an_agent_survives_an_edit_of_the_policy() {
    for knows_address in [true, false] {
        let scene = WithoutAgent::new(knows_address);
        let first = Instant::now();
        scene
            .lab
            .dns()
            .answer("shop.test", vec![address(server(10)).ttl(300)]);
        assert_eq!(scene.pod.lookup("shop.test"), [server(10)]);
        std::thread::sleep(Duration::from_secs(9).saturating_sub(first.elapsed()));
        assert!(scene.pod.reaches(server(10)));
        let _agent = scene.edit();
        assert!(scene.pod.reaches(server(10)), "known: {knows_address}");
    }
}

#[test]
fn an_edit_at_the_start_cuts_no_connection_to_an_address_that_no_agent_knew() {
    let scene = WithoutAgent::new(false);
    let mut open = scene.pod.talks_tcp((server(10), 443));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let talk = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                assert!(exchange(&mut open, b"still here", DEADLINE), "it was cut");
            }
        });
        let _at_end = StopAtEnd(&stop);
        let _agent = scene.edit();
        assert!(!talk.is_finished(), "it was cut");
    });
}
