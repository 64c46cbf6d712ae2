//! The resolver libraries of common languages: a truncated response over UDP makes each of them repeat the
//! query over TCP.

use std::{
    env, fs,
    path::PathBuf,
    process::{Command, Output},
};

use egress_tests::{
    Agent, Lab, Pod, TcpEcho,
    addresses::{RESOLVER, server, server6},
    dns::{RecordType, Send, address},
    workspace,
};

/// A pod that may reach `big.test`, which has more addresses than fit into a response over UDP.
struct Scene {
    _web: TcpEcho,
    agent: Agent,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::new();
        let web = lab.serve_tcp(443);
        lab.dns().on("big.test", |asked| {
            vec![match asked.qtype {
                _ if !asked.tcp => Send::truncated(asked),
                RecordType::A => Send::answer(asked, &[address(server(10))]),
                RecordType::AAAA => Send::answer(asked, &[address(server6(10))]),
                _ => Send::answer(asked, &[]),
            }]
        });
        lab.dns().addresses("evil.test", &[server(66), server6(66)]);
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", "big.test:443")]);
        let agent = lab.start_agent(&[&pod]);
        Self {
            _web: web,
            agent,
            pod,
            lab,
        }
    }

    /// Runs a program in the pod, with its resolver and these options in /etc/resolv.conf.
    #[track_caller]
    fn run(&self, options: &str, command: &Command) -> Output {
        let settings = format!("nameserver {RESOLVER}\noptions timeout:2 {options}\n");
        self.lab.run_in(&self.pod, &settings, command)
    }

    /// Asserts that the program prints the addresses of `big.test`, received over TCP, and that the pod may
    /// connect to them. Asserts that the program finds no address for a refused name, and that its query does
    /// not leave the node.
    #[track_caller]
    fn assert_resolves(&self, options: &str, command: impl Fn(&str) -> Command) {
        let found = self.run(options, &command("big.test"));
        let printed = String::from_utf8_lossy(&found.stdout);
        let complaint = String::from_utf8_lossy(&found.stderr);
        assert!(
            printed.contains("203.0.113.10") && printed.contains("2001:db8::a"),
            "{printed}{complaint}"
        );
        let questions = self.lab.dns().questions();
        assert!(
            questions.iter().any(|question| question.tcp),
            "{questions:?}"
        );
        self.pod.talks_tcp((server(10), 443));
        self.pod.talks_tcp((server6(10), 443));

        let refused = self.run(options, &command("evil.test"));
        let printed = String::from_utf8_lossy(&refused.stdout);
        assert!(
            !printed.contains("203.0.113.66") && !printed.contains("2001:db8::42"),
            "{printed}"
        );
        self.agent.wait_denial("the refused query", |denial| {
            denial.is_question(&self.pod, "evil.test")
        });
        assert_eq!(self.lab.dns().queries_for("evil.test"), 0);
    }
}

/// A command line of `dig`, which queries one type at a time.
fn dig(options: &str, name: &str) -> Command {
    let mut command = Command::new("dig");
    command.args(["+short", options, name, "A", name, "AAAA"]);
    command
}

#[test]
fn dig_repeats_a_truncated_query_over_tcp() {
    Scene::new().assert_resolves("", |name| dig("+edns", name));
}

#[test]
fn dig_sends_several_queries_on_one_tcp_connection() {
    Scene::new().assert_resolves("", |name| {
        let mut command = dig("+keepopen", name);
        command.arg("+tcp");
        command
    });
}

fn getent(name: &str) -> Command {
    let mut command = Command::new("getent");
    command.args(["ahosts", name]);
    command
}

#[test]
fn glibc_repeats_a_truncated_query_over_tcp() {
    Scene::new().assert_resolves("", getent);
}

#[test]
fn glibc_resolves_over_tcp_with_use_vc() {
    Scene::new().assert_resolves("use-vc", getent);
}

#[test]
fn glibc_gets_a_refusal_over_tcp_at_once() {
    let mut scene = Scene::new();
    let refused = scene.run("use-vc attempts:1", &getent("evil.test"));
    assert_eq!(refused.status.code(), Some(2), "the name does not exist");
    assert!(scene.agent.stop().success());
    let denials = scene.agent.denials();
    let mut types: Vec<_> = denials.iter().filter_map(|d| d.dns_type.clone()).collect();
    types.sort();
    assert_eq!(types, ["A", "AAAA"], "each was answered once");
    assert!(scene.lab.dns().questions().is_empty());
}

#[test]
fn python_repeats_a_truncated_query_over_tcp() {
    Scene::new().assert_resolves("", |name| {
        let mut command = Command::new("/usr/bin/python3");
        let script = "import socket, sys\n\
                      for a in socket.getaddrinfo(sys.argv[1], 443): print(a[4][0])";
        command.args(["-c", script, name]);
        command
    });
}

#[test]
fn musl_repeats_a_truncated_query_over_tcp() {
    let scene = Scene::new();
    let source = scene.lab.directory().join("lookup.rs");
    let program = scene.lab.directory().join("lookup");
    let text = "fn main() {\n\
                    let name = std::env::args().nth(1).unwrap();\n\
                    let found = std::net::ToSocketAddrs::to_socket_addrs(&(name, 443)).unwrap();\n\
                    for address in found { println!(\"{}\", address.ip()); }\n\
                }\n";
    fs::write(&source, text).expect("write a program");
    assert_success(
        Command::new("rustc")
            .arg("--target")
            .arg(format!("{}-unknown-linux-musl", env::consts::ARCH))
            .args(["--edition", "2024", "-o"])
            .args([&program, &source]),
    );
    scene.assert_resolves("", |name| {
        let mut command = Command::new(&program);
        command.arg(name);
        command
    });
}

#[test]
fn go_repeats_a_truncated_query_over_tcp() {
    let scene = Scene::new();
    let source = scene.lab.directory().join("lookup.go");
    let program = scene.lab.directory().join("lookup-go");
    let text = "package main\n\
                import (\"fmt\"; \"net\"; \"os\")\n\
                func main() {\n\
                    found, err := net.LookupHost(os.Args[1])\n\
                    if err != nil { fmt.Fprintln(os.Stderr, err); os.Exit(1) }\n\
                    for _, address := range found { fmt.Println(address) }\n\
                }\n";
    fs::write(&source, text).expect("write a program");
    assert_success(
        Command::new("go")
            .env("CGO_ENABLED", "0")
            .env("GOCACHE", cache("go"))
            .args(["build", "-o"])
            .args([&program, &source]),
    );
    scene.assert_resolves("", |name| {
        let mut command = Command::new(&program);
        command.arg(name).env("GODEBUG", "netdns=go");
        command
    });
}

/// A directory that outlives the test, below cargo's target directory.
fn cache(name: &str) -> PathBuf {
    workspace::scratch().join(name)
}

#[track_caller]
fn assert_success(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}; `cargo xtask setup` installs it"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
