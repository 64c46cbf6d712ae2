//! An agent that starts with another configuration judges the flows again that an earlier agent let pass.

use std::{net::TcpStream, process::ExitStatus};

use egress_tests::{Agent, DEADLINE, Lab, Pod, SHORT, TcpEcho, addresses::server, exchange};

/// A pod with one connection that its allowed name opened, and one that its allowed address opened.
struct Scene {
    by_name: TcpStream,
    by_address: TcpStream,
    agent: Agent,
    _web: TcpEcho,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn of(lab: Lab) -> Self {
        let (web, pod) = lab.shop_and_cart(&format!("shop.test:443 {}:443", server(12)));
        let agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
        assert_eq!(pod.lookup("shop.test"), [server(10)]);
        let by_name = pod.talks_tcp((server(10), 443));
        let by_address = pod.talks_tcp((server(12), 443));
        Self {
            by_name,
            by_address,
            agent,
            _web: web,
            pod,
            lab,
        }
    }

    /// Ends the agent in this way, and starts another one with this key of the configuration.
    #[track_caller]
    fn restart_with(
        &mut self,
        end: impl FnOnce(&mut Agent) -> ExitStatus,
        key: &str,
        prefixes: &[&str],
    ) {
        end(&mut self.agent);
        self.lab.edit_config(key, prefixes.to_vec());
        self.agent = self
            .lab
            .start_agent_with(&["--keep-enforcing"], &[&self.pod]);
    }

    #[track_caller]
    fn only_the_name_is_cut(&mut self) {
        assert!(
            !exchange(&mut self.by_name, b"after", SHORT),
            "the connection goes on"
        );
        assert!(
            exchange(&mut self.by_address, b"after", DEADLINE),
            "a connection was cut that is still allowed"
        );
    }
}

#[test]
fn a_restart_that_protects_an_address_ends_connections_to_it() {
    let mut scene = Scene::of(Lab::new());
    scene.restart_with(Agent::stop, "ranges.protected", &["203.0.113.10/32"]);
    scene.only_the_name_is_cut();
    scene
        .agent
        .denies_tcp(&scene.pod, (server(10), 443), "protected");
}

#[test]
fn a_restart_after_the_agent_was_killed_ends_connections_to_an_address_that_is_protected_now() {
    let mut scene = Scene::of(Lab::new());
    scene.restart_with(Agent::kill, "ranges.protected", &["203.0.113.10/32"]);
    scene.only_the_name_is_cut();
}

#[test]
fn an_agent_that_takes_over_ends_connections_to_an_address_that_is_protected_now() {
    let mut scene = Scene::of(Lab::new());
    let lab = &scene.lab;
    let socket = lab.directory().join("standby.sock");
    lab.edit_config("socket", socket.to_str().expect("a path in UTF-8"));
    lab.edit_config("ranges.protected", vec!["203.0.113.10/32"]);
    let standby = lab.spawn_agent(&["--take-over", "--keep-enforcing"]);
    standby.wait_said("that it stands by", |line| line.contains("standing by"));
    assert!(exchange(&mut scene.by_name, b"before", DEADLINE));
    assert!(scene.agent.stop().success());
    standby.wait_enforcing(&scene.pod);
    scene.only_the_name_is_cut();
}

#[test]
fn a_restart_after_which_an_address_is_no_longer_internal_ends_connections_to_it() {
    let lab = Lab::builder()
        .config("ranges.internal", vec!["203.0.113.99/32"])
        .build();
    let mut scene = Scene::of(lab);
    let mut internal = scene.pod.talks_tcp((server(99), 443));
    scene.restart_with(Agent::stop, "ranges.internal", &[]);
    assert!(
        !exchange(&mut internal, b"after", SHORT),
        "the connection goes on"
    );
    for open in [&mut scene.by_name, &mut scene.by_address] {
        assert!(
            exchange(open, b"after", DEADLINE),
            "a connection was cut that is still allowed"
        );
    }
}
