//! C libraries as programs use them, with a search list and `ndots:5` as kubelet configures them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use egress_tests::{
    Agent, Lab, Pod,
    addresses::{RESOLVER, server, server6},
    dns::{Answer, RecordType, ResponseCode, Send, address},
};

/// Looks up each name in its arguments, as `getent ahosts` does, with the C library that it is linked to.
const PROGRAM: &str = r#"
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

int main(int count, char **names) {
    int failed = 0;
    for (int i = 1; i < count; i++) {
        struct addrinfo hints, *first;
        memset(&hints, 0, sizeof hints);
        hints.ai_socktype = SOCK_STREAM;
        int error = getaddrinfo(names[i], NULL, &hints, &first);
        if (error) {
            printf("%s: %s\n", names[i], gai_strerror(error));
            failed = 1;
            continue;
        }
        for (struct addrinfo *at = first; at; at = at->ai_next) {
            char host[64];
            getnameinfo(at->ai_addr, at->ai_addrlen, host, sizeof host, NULL, 0, NI_NUMERICHOST);
            printf("%s %s\n", names[i], host);
        }
        freeaddrinfo(first);
    }
    return failed;
}
"#;

/// Compiles [`PROGRAM`].
#[track_caller]
fn compiled(lab: &Lab, compiler: &str, flags: &[&str]) -> PathBuf {
    let source = lab.directory().join("lookup.c");
    fs::write(&source, PROGRAM).expect("write a program");
    let program = lab.directory().join(format!("lookup-{compiler}"));
    let output = Command::new(compiler)
        .args(flags)
        .arg("-o")
        .arg(&program)
        .arg(&source)
        .output()
        .unwrap_or_else(|e| panic!("{compiler}: {e}; `cargo xtask setup` installs it"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{compiler}: {text}");
    program
}

/// A pod with a cluster's search list and a domain of the operator in it.
struct Scene {
    agent: Agent,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::builder()
            .config("dns.clusterDomain", "cluster.test")
            .build();
        lab.dns()
            .addresses("web.example", &[server(10), server6(10)]);
        lab.dns()
            .addresses("db.shop.svc.cluster.test", &[server(30)]);
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", "web.example:443 203.0.113.30:5432")]);
        let agent = lab.start_agent(&[&pod]);
        Self { agent, pod, lab }
    }

    /// Runs the program with these names; returns its output.
    fn run_lookup(&self, program: &Path, names: &[&str]) -> String {
        let settings = format!(
            "nameserver {RESOLVER}\n\
             search shop.svc.cluster.test svc.cluster.test cluster.test corp.example\n\
             options ndots:5\n"
        );
        let mut command = Command::new(program);
        let output = self.lab.run_in(&self.pod, &settings, command.args(names));
        format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    }

    /// A name with fewer than five dots goes through the whole list and is found at its end; a short name of
    /// the cluster is found by the list; a name without an entry is not found.
    #[track_caller]
    fn assert_search_lists_reach_the_right_name(&self, program: &Path) {
        let _servers = [self.lab.serve_tcp(443), self.lab.serve_tcp(5432)];
        let text = self.run_lookup(program, &["web.example"]);
        for address in [server(10), server6(10)] {
            assert!(text.contains(&address.to_string()), "{text}");
            self.pod.talks_tcp((address, 443));
        }
        let text = self.run_lookup(program, &["db"]);
        assert!(text.contains(&server(30).to_string()), "{text}");
        self.pod.talks_tcp((server(30), 5432));
        let text = self.run_lookup(program, &["evil.example"]);
        assert!(!text.contains("203.0.113."), "{text}");
        self.agent.wait_denial("the name itself", |d| {
            d.is_question(&self.pod, "evil.example")
        });

        // Queries for the cluster's names went to the resolver; queries for the other names did not.
        assert!(self.lab.dns().queries_for("web.example.svc.cluster.test") > 0);
        for asked in self.lab.dns().questions() {
            let name = asked.name.as_str();
            assert!(
                name == "web.example" || name.ends_with(".cluster.test"),
                "{name} left the node"
            );
        }
        self.agent.wait_denial("the operator's own domain", |d| {
            d.is_question(&self.pod, "web.example.corp.example")
        });
        assert_eq!(self.pod.syn_retransmissions(), 0);
    }
}

#[test]
fn search_lists_reach_the_right_name_with_glibc() {
    let scene = Scene::new();
    let program = compiled(&scene.lab, "cc", &[]);
    scene.assert_search_lists_reach_the_right_name(&program);
}

#[test]
fn search_lists_reach_the_right_name_with_musl() {
    let scene = Scene::new();
    let program = compiled(&scene.lab, "musl-gcc", &["-static"]);
    scene.assert_search_lists_reach_the_right_name(&program);
}

#[test]
fn refusals_can_be_configured_as_refused() {
    let lab = Lab::builder().config("dns.refusal", "refused").build();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    let answer = pod.resolve("evil.test", RecordType::A);
    assert_eq!(answer.code, ResponseCode::Refused);
    assert_eq!(answer.extended_error(), Some(18), "Prohibited");
    assert_eq!(lab.dns().queries_for("evil.test"), 0);
}

#[test]
fn responses_keep_their_letter_case_for_clients_that_compare_it() {
    // As unbound and other resolvers query, to make forgery harder (0x20 encoding).
    // The agent keeps the order of responses; the programs pass the exact one at once.
    let lab = Lab::builder().config("dns.learn", "agent").build();
    let _web = lab.serve_tcp(443);
    lab.dns().on("shop.test", |asked| {
        let mut other = asked.clone();
        other.name = "shop.test".to_owned();
        vec![
            Send::answer(&other, &[address(server(66))]),
            Send::answer(asked, &[address(server(10))]),
            Send::answer(asked, &[address(server(67))]),
        ]
    });
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    let socket = pod.dns_socket();
    socket.ask(RESOLVER, 1, "sHOp.TeSt", RecordType::A);
    let name = |answer: &Answer| answer.message.queries[0].name().to_string();
    let other = socket.expect("the response with other letters");
    assert_eq!(name(&other), "shop.test.");
    let exact = socket.expect("the response with the letters of the query");
    assert_eq!(name(&exact), "sHOp.TeSt.");
    assert_eq!(exact.addresses, [server(10)]);
    pod.talks_tcp((server(10), 443));
    agent.wait_denial("a second response", |d| {
        d.of(&pod) && d.reason == "dns_unsolicited"
    });
    agent.denies_tcp(&pod, (server(67), 443), "address_not_learned");
}

#[test]
fn a_response_in_lower_case_matches_its_query() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().on("shop.test", |asked| {
        let mut lower = asked.clone();
        lower.name.make_ascii_lowercase();
        vec![Send::answer(&lower, &[address(server(10))])]
    });
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    for name in ["Shop.test", "SHOP.TEST", "shop.test"] {
        let answer = pod.resolve(name, RecordType::A);
        assert_eq!(answer.addresses, [server(10)], "{name}");
    }
    pod.talks_tcp((server(10), 443));
}

#[test]
fn two_queries_from_one_port_with_one_id_are_both_answered() {
    // As musl before 1.1.25 queries A and AAAA.
    let lab = Lab::new();
    lab.dns().addresses("shop.test", &[server(10), server6(10)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    let socket = pod.dns_socket();
    socket.ask(RESOLVER, 7, "shop.test", RecordType::A);
    socket.ask(RESOLVER, 7, "shop.test", RecordType::AAAA);
    let mut addresses = socket.expect("one response").addresses;
    addresses.extend(socket.expect("the other response").addresses);
    addresses.sort();
    assert_eq!(addresses, [server(10), server6(10)]);
}

#[test]
fn a_format_error_without_a_question_section_is_delivered() {
    let lab = Lab::new();
    lab.dns().on("shop.test", |asked| {
        let format_error = || {
            Send::code(asked, ResponseCode::FormErr).edited(|message| {
                message.truncate(12);
                message[4..12].fill(0);
            })
        };
        vec![format_error(), format_error()]
    });
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    let answer = pod.resolve("shop.test", RecordType::A);
    assert_eq!(answer.code, ResponseCode::FormErr);
    agent.wait_denial("the second, which matches no query", |d| {
        d.of(&pod) && d.reason == "dns_unsolicited"
    });
}
