//! A refused query on a TCP connection to a resolver: the connection goes on, and every query on it gets its
//! response.

use std::{
    fs,
    io::{ErrorKind, Read as _},
    net::{IpAddr, Ipv4Addr, Shutdown},
    process::Command,
};

use egress_tests::{
    Agent, Lab, Pod, Running, SHORT,
    addresses::{RESOLVER, RESOLVER6, numbered, server, server6},
    dns::{DnsStream, RecordType, ResponseCode, Send, address, framed_query},
    eventually, resolvers,
};

/// A pod that may reach `shop.test` and the names below `many.test`.
struct Scene {
    agent: Agent,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        Self::of(Lab::new())
    }

    #[track_caller]
    fn of(lab: Lab) -> Self {
        lab.dns().addresses("shop.test", &[server(10), server6(10)]);
        lab.dns().addresses("evil.test", &[server(66)]);
        lab.dns().numbered("many.test");
        Self::with_resolver(lab)
    }

    #[track_caller]
    fn with_resolver(lab: Lab) -> Self {
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", "shop.test:443 *.many.test:443")]);
        let agent = lab.start_agent(&[&pod]);
        Self { agent, pod, lab }
    }

    #[track_caller]
    fn connect(&self, resolver: IpAddr) -> DnsStream {
        DnsStream::open_without_delay(&self.pod, resolver)
    }

    fn has_learned(&self, address: IpAddr) -> bool {
        self.lab.allowed(&self.pod).contains_key(&address)
    }

    /// Asserts that no query for a refused name has left the node, and that no connection was reset.
    #[track_caller]
    fn assert_only_names_were_refused(&self) {
        let questions = self.lab.dns().questions();
        assert!(!questions.iter().any(|q| q.name.contains("evil.test")));
        for denial in self.agent.denials() {
            assert_eq!(denial.reason, "dns_name", "{denial:?}");
        }
    }
}

#[test]
fn an_allowed_query_after_a_refused_one_is_answered() {
    let scene = Scene::new();
    for resolver in [RESOLVER, RESOLVER6] {
        let mut stream = scene.connect(resolver);
        stream.ask(1, "evil.test");
        stream.expect_refusal(1);
        stream.ask(2, "shop.test");
        assert_eq!(stream.expect(2).addresses, [server(10)]);
        assert!(scene.has_learned(server(10)));
        stream.ask(3, "evil.test");
        stream.expect_refusal(3);
        stream.ask(4, "n4.many.test");
        assert_eq!(stream.expect(4).addresses, [numbered(4)]);
    }
    scene.assert_only_names_were_refused();
}

#[test]
fn a_refused_query_does_not_wait_for_the_resolver() {
    let scene = Scene::new();
    scene.lab.dns().on("shop.test", |asked| {
        std::thread::sleep(std::time::Duration::from_millis(300));
        vec![Send::answer(asked, &[address(server(10))])]
    });
    let mut stream = scene.connect(RESOLVER);
    let asked = [framed_query(1, "shop.test"), framed_query(2, "evil.test")].concat();
    stream.write(&asked);
    stream.expect_refusal(2);
    assert_eq!(stream.expect(1).addresses, [server(10)]);
    scene.assert_only_names_were_refused();
}

/// The zone for unbound and BIND.
fn zone(lab: &Lab) -> &'static str {
    let head = "$ORIGIN test.\n$TTL 300\n@ IN SOA ns.test. root.test. 1 3600 600 86400 300\n\
                @ IN NS ns.test.\nns IN A 10.99.0.53\nshop IN A 203.0.113.10\nevil IN A 203.0.113.66\n";
    let many = (0..100).map(|n| format!("n{n}.many IN A {}\n", numbered(n)));
    let zone = head.to_owned() + &many.collect::<String>();
    fs::write(lab.directory().join("test.zone"), zone).expect("write a zone");
    "test.zone"
}

#[track_caller]
fn mix_refused_and_allowed(scene: &Scene, resolver: IpAddr, in_one_write: bool) {
    let mut stream = scene.connect(resolver);
    let name = |id: u16| match id % 2 {
        0 => format!("n{id}.many.test"),
        _ => format!("n{id}.evil.test"),
    };
    let asked: Vec<_> = (0..100).map(|id| framed_query(id, &name(id))).collect();
    if in_one_write {
        stream.write(&asked.concat());
    } else {
        for question in &asked {
            stream.write(question);
        }
    }
    for (id, answer) in stream.expect_all(asked.len()) {
        if id.is_multiple_of(2) {
            assert_eq!(answer.addresses, [numbered(id.into())]);
            assert!(scene.has_learned(numbered(id.into())));
        } else {
            assert_eq!(answer.code, ResponseCode::NXDomain);
        }
    }
}

#[test]
fn unbound_answers_allowed_queries_between_refused_ones() {
    let lab = Lab::builder().without_dns().build();
    let zone = zone(&lab);
    let mut command = resolvers::unbound(&lab, zone);
    let _resolver = lab.run_resolver(&mut command);
    let scene = Scene::with_resolver(lab);
    for resolver in [RESOLVER, RESOLVER6] {
        mix_refused_and_allowed(&scene, resolver, true);
        mix_refused_and_allowed(&scene, resolver, false);
    }
}

#[test]
fn bind_answers_allowed_queries_between_refused_ones() {
    let lab = Lab::builder().without_dns().build();
    let zone = zone(&lab);
    let mut command = resolvers::named(&lab, &[RESOLVER, RESOLVER6], zone);
    let _resolver = lab.run_resolver(&mut command);
    let scene = Scene::with_resolver(lab);
    mix_refused_and_allowed(&scene, RESOLVER, true);
    mix_refused_and_allowed(&scene, RESOLVER6, false);
}

/// Runs unbound in the pod; it queries the node's resolver over TCP only.
#[track_caller]
fn unbound_in(scene: &Scene) -> Running {
    let mut command = resolvers::unbound_over_tcp(&scene.lab, RESOLVER);
    let running = scene.pod.start(&mut command);
    let here = IpAddr::V4(Ipv4Addr::LOCALHOST);
    eventually("the resolver in the pod answers", || {
        let answer = scene
            .pod
            .try_resolve(here, "shop.test", RecordType::A, SHORT)?;
        (answer.code == ResponseCode::NoError).then_some(())
    });
    running
}

#[test]
fn a_resolver_in_the_pod_that_queries_over_tcp_resolves_every_listed_name() {
    const NAMES: u16 = 20;
    let scene = Scene::new();
    let _unbound = unbound_in(&scene);
    let here = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let socket = scene.pod.dns_socket();
    for id in 0..NAMES {
        socket.ask(here, 1000 + id, &format!("n{id}.evil.test"), RecordType::A);
        socket.ask(here, id, &format!("n{id}.many.test"), RecordType::A);
    }
    let mut resolved = Vec::new();
    let mut refused = Vec::new();
    for _ in 0..2 * NAMES {
        let answer = socket.expect("a response to each query");
        match answer.message.metadata.id {
            id @ 1000.. => {
                assert_eq!(answer.code, ResponseCode::NXDomain, "{id}");
                refused.push(id - 1000);
            }
            id => {
                assert_eq!(answer.addresses, [numbered(id.into())], "{id}");
                resolved.push(id);
            }
        }
    }
    resolved.sort_unstable();
    refused.sort_unstable();
    let all: Vec<u16> = (0..NAMES).collect();
    assert_eq!((&resolved, &refused), (&all, &all));
    scene.assert_only_names_were_refused();
}

#[test]
fn glibc_walks_its_search_list_on_one_connection() {
    let scene = Scene::new();
    let settings = format!(
        "nameserver {RESOLVER}\nsearch evil.test\noptions use-vc ndots:5 attempts:1 timeout:5\n"
    );
    let mut command = Command::new("getent");
    command.args(["ahosts", "shop.test"]);
    let output = scene.lab.run_in(&scene.pod, &settings, &command);
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(
        printed.contains("203.0.113.10") && printed.contains("2001:db8::a"),
        "{printed}"
    );
    let questions = scene.lab.dns().questions();
    let asked_from: Vec<u16> = questions.iter().map(|q| q.from.port()).collect();
    assert_eq!(asked_from.len(), 2, "A and AAAA, over TCP: {questions:?}");
    assert!(questions.iter().all(|q| q.tcp));
    assert_eq!(asked_from[0], asked_from[1], "on one connection");
    scene.assert_only_names_were_refused();
}

/// The number of addresses in the largest possible response.
const ADDRESSES: u32 = 2660;

fn serve_large_responses(scene: &Scene) {
    scene.lab.dns().on("shop.test", |asked| {
        let all: Vec<_> = (0..ADDRESSES).map(|n| address(numbered(n))).collect();
        vec![Send::answer(asked, &all)]
    });
}

#[test]
fn a_response_of_64_kib_arrives_after_a_refusal() {
    let scene = Scene::new();
    serve_large_responses(&scene);
    let mut stream = scene.connect(RESOLVER);
    for id in 0..4 {
        stream.ask(100 + id, "evil.test");
        stream.expect_refusal(100 + id);
        stream.ask(id, "shop.test");
        let answer = stream.expect(id);
        assert_eq!(answer.addresses.len(), ADDRESSES as usize);
        assert!(answer.bytes > 64_000, "{} bytes", answer.bytes);
        assert!(scene.has_learned(numbered(ADDRESSES - 1)));
    }
    scene.assert_only_names_were_refused();
}

#[test]
fn a_refusal_during_a_large_response_follows_that_response() {
    let scene = Scene::new();
    serve_large_responses(&scene);
    let mut stream = scene.connect(RESOLVER);
    for id in 0..20 {
        stream.ask(id, "shop.test");
        // Part of the response has passed before the refusal.
        stream.tcp.peek(&mut [0]).expect("the response begins");
        stream.ask(100 + id, "evil.test");
        let answers = stream.expect_all(2);
        assert_eq!(answers[&id].addresses.len(), ADDRESSES as usize);
        assert_eq!(answers[&(100 + id)].code, ResponseCode::NXDomain);
    }
    scene.assert_only_names_were_refused();
}

#[test]
fn a_pod_that_reads_late_gets_everything() {
    const ANSWERS: u16 = 30;
    let scene = Scene::new();
    serve_large_responses(&scene);
    let mut stream = scene.connect(RESOLVER);
    stream.ask(1000, "evil.test");
    for id in 0..ANSWERS {
        stream.ask(id, "shop.test");
        stream.ask(2000 + id, "evil.test");
    }
    eventually("the pod's window is closed", || {
        let closed = scene.pod.netns().counter("TcpExt:", "TCPToZeroWindowAdv");
        (closed > 0).then_some(())
    });
    let answers = stream.expect_all(1 + 2 * usize::from(ANSWERS));
    for id in 0..ANSWERS {
        assert_eq!(answers[&id].addresses.len(), ADDRESSES as usize);
        assert_eq!(answers[&(2000 + id)].code, ResponseCode::NXDomain);
    }
    scene.assert_only_names_were_refused();
}

#[test]
fn the_fin_of_each_side_reaches_the_other() {
    let scene = Scene::new();
    let mut stream = scene.connect(RESOLVER);
    stream.ask(1, "evil.test");
    stream.ask(2, "shop.test");
    stream.tcp.shutdown(Shutdown::Write).expect("shutdown(2)");
    let answers = stream.expect_all(2);
    assert_eq!(answers[&2].addresses, [server(10)]);
    // The resolver ends the connection when it reads the pod's FIN.
    let mut rest = Vec::new();
    stream.tcp.read_to_end(&mut rest).expect("the end");
    assert!(rest.is_empty());
    scene.assert_only_names_were_refused();
    let connections = || {
        let mut command = Command::new("ss");
        command.args(["--no-header", "--tcp", "--numeric", "sport", "=", ":53"]);
        let output = scene.lab.outside().run(|| command.output());
        String::from_utf8_lossy(&output.expect("ss, of the package iproute2").stdout).into_owned()
    };
    // A pod that closes its socket without reading resets the connection.
    let mut stream = scene.connect(RESOLVER);
    stream.ask(1, "evil.test");
    stream.ask(2, "shop.test");
    stream.expect_refusal(1);
    stream.tcp.peek(&mut [0]).expect("a response");
    drop(stream);
    eventually("the resolver knows of no connection", || {
        connections().trim().is_empty().then_some(())
    });
}

/// A connection on which one query was refused and another was answered.
#[track_caller]
fn connection_after_a_refusal(scene: &Scene) -> DnsStream {
    let mut stream = scene.connect(RESOLVER);
    stream.ask(1, "evil.test");
    stream.expect_refusal(1);
    stream.ask(2, "shop.test");
    assert_eq!(stream.expect(2).addresses, [server(10)]);
    stream
}

#[test]
fn the_connection_is_reset_when_the_agent_stops_judging_it() {
    type Leave = fn(&mut Scene);
    let ways: [(&str, Leave); 4] = [
        ("the pod is only audited", |scene| {
            let audit = [("allow", "shop.test:443"), ("mode", "audit")];
            scene
                .agent
                .applies_policy_after(&scene.pod, || scene.lab.write_pod(&scene.pod, &audit));
        }),
        ("the pod is not enforced", |scene| {
            scene.lab.remove_pod(&scene.pod);
        }),
        ("the server is no resolver any more", |scene| {
            scene
                .lab
                .edit_config("dns.resolvers", vec![RESOLVER6.to_string()]);
            scene.agent.reload();
        }),
        ("the agent ends", |scene| {
            assert!(scene.agent.stop().success());
        }),
    ];
    for (what, leave) in ways {
        let mut scene = Scene::new();
        let mut stream = connection_after_a_refusal(&scene);
        leave(&mut scene);
        let error = stream.tcp.read_exact(&mut [0]).expect_err("nothing comes");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{what}");
    }
}

#[test]
fn the_connection_goes_on_on_a_node_that_tracks_connections() {
    let scene = Scene::of(Lab::builder().tracking().build());
    serve_large_responses(&scene);
    let mut stream = scene.connect(RESOLVER);
    for id in 0..4 {
        stream.ask(100 + id, "evil.test");
        stream.expect_refusal(100 + id);
        stream.ask(id, "shop.test");
        assert_eq!(stream.expect(id).addresses.len(), ADDRESSES as usize);
        stream.ask(200 + id, "n1.many.test");
        assert_eq!(stream.expect(200 + id).addresses, [numbered(1)]);
    }
    scene.assert_only_names_were_refused();
}

#[test]
fn a_withheld_response_does_not_affect_the_others() {
    let scene = Scene::new();
    scene.lab.dns().on("shop.test", |asked| {
        let lie = Send::answer(asked, &[address(server(66))]);
        let answer = Send::answer(asked, &[address(server(10))]);
        vec![lie.clone().with_id(asked.id ^ 0x100), answer, lie]
    });
    let mut stream = scene.connect(RESOLVER);
    stream.ask(1, "evil.test");
    stream.expect_refusal(1);
    for id in 2..10 {
        stream.ask(id, "shop.test");
        assert_eq!(stream.expect(id).addresses, [server(10)]);
    }
    assert!(!scene.has_learned(server(66)));
    scene.agent.wait_denial("the lies", |d| {
        d.of(&scene.pod) && d.reason == "dns_unsolicited"
    });
}

#[test]
fn every_query_is_answered_over_a_lossy_link() {
    let scene = Scene::of(Lab::builder().lossy().build());
    for first in 0..10 {
        let mut stream = scene.connect(RESOLVER);
        for id in 0..20 {
            let number = first * 20 + id;
            stream.ask(1000 + id, "evil.test");
            stream.ask(id, &format!("n{number}.many.test"));
        }
        let answers = stream.expect_all(40);
        for id in 0..20 {
            let number = u32::from(first * 20 + id);
            assert_eq!(answers[&id].addresses, [numbered(number)]);
            assert!(scene.has_learned(numbered(number)));
            assert_eq!(answers[&(1000 + id)].code, ResponseCode::NXDomain);
        }
    }
    scene.assert_only_names_were_refused();
}
