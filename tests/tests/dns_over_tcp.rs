//! DNS over TCP: what UDP gives and refuses, TCP gives and refuses.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, TcpStream},
    process::Command,
};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod,
    addresses::{RESOLVER, RESOLVER6, server, server6},
    dns::{Answer, RecordType, ResponseCode, Send, address, question, text},
};

/// A pod that may reach `shop.test`, and a server there.
struct Scene {
    _web: egress_tests::TcpEcho,
    agent: Agent,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::new();
        let web = lab.serve_tcp(443);
        lab.dns().addresses("shop.test", &[server(10), server6(10)]);
        lab.dns().addresses("evil.test", &[server(66)]);
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", "shop.test:443 *.many.test:443")]);
        let agent = lab.start_agent(&[&pod]);
        Self {
            _web: web,
            agent,
            pod,
            lab,
        }
    }

    /// What a program in the pod prints, which must succeed.
    #[track_caller]
    fn prints(&self, command: &mut Command) -> String {
        let output = self.pod.netns().run(|| command.output());
        let output = output.unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{command:?}: {}\n{printed}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        printed
    }

    #[track_caller]
    fn dig(&self, arguments: &[&str]) -> String {
        self.prints(
            Command::new("dig")
                .arg(format!("@{RESOLVER}"))
                .args(arguments),
        )
    }

    fn asked_over_tcp(&self, name: &str) -> usize {
        let questions = self.lab.dns().questions();
        questions
            .iter()
            .filter(|q| q.tcp && q.name.eq_ignore_ascii_case(name))
            .count()
    }

    #[track_caller]
    fn learned(&self) -> Vec<IpAddr> {
        self.lab.allowed(&self.pod).into_keys().collect()
    }
}

#[test]
fn dig_over_tcp_opens_exactly_what_it_answers() {
    let scene = Scene::new();
    let printed = scene.dig(&["+tcp", "+short", "shop.test"]);
    assert_eq!(printed.trim(), server(10).to_string());
    assert_eq!(scene.learned(), [server(10)]);
    scene.pod.talks_tcp((server(10), 443));
    let printed = scene.prints(
        Command::new("dig")
            .arg(format!("@{RESOLVER6}"))
            .args(["+tcp", "+short", "shop.test", "AAAA"]),
    );
    assert_eq!(printed.trim(), server6(10).to_string());
    scene.pod.talks_tcp((server6(10), 443));
    scene
        .agent
        .denies_tcp(&scene.pod, (server(66), 443), "address_not_learned");
    assert_eq!(scene.pod.syn_retransmissions(), 1, "that of the denied connection");
    assert_eq!(scene.asked_over_tcp("shop.test"), 2);
}
