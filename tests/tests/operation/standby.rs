//! An agent that stands by while another one runs, and takes over when it ends.

use std::process::Command;

use egress_tests::{
    Agent, DEADLINE, Lab, Pod, SHORT,
    addresses::{RESOLVER, server},
    dns::{RecordType, Send, address},
    eventually, exchange, holds,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A laboratory with a pod that may reach `shop.test` and `slow.test`, its agent, and a standby agent.
struct Scene {
    standby: Agent,
    agent: Agent,
    cart: Pod,
    lab: Lab,
}

impl Scene {
    fn new(arguments: &[&str]) -> Self {
        let lab = Lab::new();
        lab.dns().addresses("shop.test", &[server(10)]);
        // Queries for this name get no response.
        lab.dns().on("slow.test", |_| Vec::new());
        let cart = lab.pod("shop", "cart");
        lab.write_pod(&cart, &[("allow", "shop.test:443 slow.test:443")]);
        let agent = lab.start_agent_with(arguments, &[&cart]);
        // As in a cluster, where each agent's pod has its own directory for the socket.
        lab.edit_config("socket", standby_socket(&lab));
        let standby = lab.spawn_agent(&["--take-over", "--keep-enforcing"]);
        standby.wait_log("that it stands by", |line| line.contains("standing by"));
        Self {
            standby,
            agent,
            cart,
            lab,
        }
    }

    /// Runs `egress-agent ready` for the standby agent.
    fn is_ready(&self) -> bool {
        let mut command = Command::new(Agent::program());
        command.args(["ready", "--socket", &standby_socket(&self.lab)]);
        let output = self.lab.node().run(|| command.output());
        output.expect("the agent's program runs").status.success()
    }

    fn send(&self, signal: Signal) {
        let pid = Pid::from_raw(self.standby.pid().cast_signed());
        kill(pid, signal).expect("send a signal");
    }
}

fn standby_socket(lab: &Lab) -> String {
    let path = lab.directory().join("standby.sock");
    path.to_str().expect("a path in UTF-8").to_owned()
}

#[test]
fn a_takeover_keeps_connections_and_answers_every_query() {
    let _web;
    let mut scene = Scene::new(&["--keep-enforcing"]);
    _web = scene.lab.serve_tcp(443);
    assert_eq!(scene.cart.lookup("shop.test"), [server(10)]);
    let mut open = scene.cart.talks_tcp((server(10), 443));
    eventually("the standby is ready", || holds(scene.is_ready()));
    let slow = scene.cart.dns_socket();
    slow.ask(RESOLVER, 7, "slow.test", RecordType::A);
    eventually("the query is out", || {
        holds(scene.lab.dns().queries_for("slow.test") == 1)
    });

    // The pod sends one query while no agent reads it.
    scene.send(Signal::SIGSTOP);
    assert!(scene.agent.stop().success());
    assert!(scene.cart.connect_tcp((server(99), 443), SHORT).is_err());
    let meanwhile = scene.cart.dns_socket();
    meanwhile.ask(RESOLVER, 8, "shop.test", RecordType::A);
    assert!(
        exchange(&mut open, b"meanwhile", DEADLINE),
        "the connection was cut"
    );
    scene.send(Signal::SIGCONT);
    assert_eq!(meanwhile.expect("shop.test").addresses, [server(10)]);

    // The response to another query arrives only now.
    let asked = scene.lab.dns().questions();
    let asked = asked.iter().find(|question| question.name == "slow.test");
    let answer = Send::answer(
        asked.expect("a query for slow.test"),
        &[address(server(11))],
    );
    scene
        .lab
        .dns()
        .send(RESOLVER, slow.address(), answer.bytes());
    assert_eq!(slow.expect("slow.test").addresses, [server(11)]);
    scene.cart.talks_tcp((server(11), 443));
    assert!(
        exchange(&mut open, b"after", DEADLINE),
        "the connection was cut"
    );
    assert!(scene.cart.connect_tcp((server(99), 443), SHORT).is_err());
    scene.standby.wait_ready();
    eventually("the standby has taken over the socket", || {
        holds(scene.is_ready())
    });
}

#[test]
fn a_standby_takes_over_from_an_agent_that_removes_everything() {
    let mut scene = Scene::new(&[]);
    let _web = scene.lab.serve_tcp(443);
    assert!(scene.agent.stop().success());
    scene.standby.wait_enforcing(&scene.cart);
    assert_eq!(scene.cart.lookup("shop.test"), [server(10)]);
    scene.cart.talks_tcp((server(10), 443));
    assert!(scene.cart.connect_tcp((server(99), 443), SHORT).is_err());
}

#[test]
fn a_standby_takes_over_from_a_killed_agent() {
    let mut scene = Scene::new(&[]);
    let _web = scene.lab.serve_tcp(443);
    scene.agent.kill();
    scene.standby.wait_enforcing(&scene.cart);
    assert_eq!(scene.cart.lookup("shop.test"), [server(10)]);
    scene.cart.talks_tcp((server(10), 443));
}

#[test]
fn stopping_the_standby_harms_nothing() {
    let mut scene = Scene::new(&["--keep-enforcing"]);
    let _web = scene.lab.serve_tcp(443);
    assert!(scene.standby.stop().success());
    assert_eq!(scene.cart.lookup("shop.test"), [server(10)]);
    scene.cart.talks_tcp((server(10), 443));
    assert!(!scene.is_ready());
}
