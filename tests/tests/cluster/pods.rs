//! Pods of a cluster: a real API server lists them, and they run in cgroups and network namespaces as a
//! kubelet creates them.

use std::{
    net::{IpAddr, TcpListener},
    sync::Arc,
};

use egress_tests::{
    Agent, ApiServer, Cluster, ClusterPod, DEADLINE, Lab, Pod, SHORT,
    addresses::{RESOLVER, STRANGER, server},
    cluster::allow,
    dns::{RecordType, ResponseCode},
    eventually, exchange, holds,
    node::pause,
    workspace,
};
use serde_json::{Value, json};

fn cannot_reach(agent: &Agent, pod: &Pod, to: IpAddr, reason: &str) {
    assert!(!pod.reaches(to), "{to} was reached");
    agent.wait_denial(&format!("{reason} of {to}"), |denial| {
        denial.is(pod, reason, to, 443)
    });
}

/// Waits for an Event on a pod with this reason and these words in its note.
fn wait_event(cluster: &Cluster, pod: &ClusterPod, reason: &str, words: &[&str]) -> Value {
    let (namespace, name) = (pod.net().namespace(), pod.net().name());
    eventually(&format!("an Event {reason} on {namespace}/{name}"), || {
        let mut events = cluster.events(namespace).into_iter();
        let is_it = |event: &Value| {
            let note = event["note"].as_str().unwrap_or_default();
            event["reason"] == reason
                && event["regarding"]["name"] == name
                && words.iter().all(|word| note.contains(word))
        };
        events.find(is_it)
    })
}

#[test]
fn an_annotated_pod_reaches_its_allowed_name_and_nothing_else() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    cluster.lab.dns().addresses("shop.test", &[server(10)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("shop.test:443"));
    let other = cluster.run(&shop, "other", &Value::Null);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());

    assert_eq!(cart.net().lookup("shop.test"), [server(10)]);
    cart.net().talks_tcp((server(10), 443));
    cannot_reach(&agent, cart.net(), server(99), "address_not_learned");
    let answer = cart.net().resolve("elsewhere.test", RecordType::A);
    assert_eq!(answer.code, ResponseCode::NXDomain);
    other.net().talks_tcp((server(99), 443));
    wait_event(
        &cluster,
        &cart,
        "EgressDenied",
        &[&format!("tcp to {}:443", server(99)), "address_not_learned"],
    );
}

#[test]
fn edits_of_a_pods_and_its_namespaces_annotations_apply_while_it_runs() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let mut cart = cluster.run(&shop, "cart", &Value::Null);
    let agent = cluster.start_agent();
    cart.net().talks_tcp((server(20), 443));

    cluster.annotate(&mut cart, &allow(&format!("{}:443", server(10))));
    agent.wait_enforcing(cart.net());
    cart.net().talks_tcp((server(10), 443));
    cannot_reach(&agent, cart.net(), server(20), "no_rule");

    agent.applies_policy_after(cart.net(), || {
        let annotations = allow(&format!("{}:443", server(20)));
        cluster.server.namespace(&shop, &annotations);
    });
    cart.net().talks_tcp((server(20), 443));

    let removed = format!("removed pod={shop}/cart");
    agent.logs_after(
        &removed,
        || {
            cluster.server.namespace(&shop, &json!({}));
            cluster.annotate(&mut cart, &json!({}));
        },
        |line| line.contains("removed") && line.contains(&format!("{shop}/cart")),
    );
    cart.net().talks_tcp((server(99), 443));
}

#[test]
fn resolvers_are_read_from_the_clusters_dns_service() {
    let server_of_its_own = Arc::new(ApiServer::start());
    let builder = Lab::builder().config("dns", json!({}));
    let cluster = Cluster::on(server_of_its_own, builder);
    let _web = cluster.lab.serve_tcp(443);
    cluster.lab.dns().addresses("shop.test", &[server(10)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("shop.test:443"));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());

    let unanswered = cart
        .net()
        .try_resolve(RESOLVER, "shop.test", RecordType::A, SHORT);
    assert!(unanswered.is_none(), "an unknown resolver was queried");

    agent.logs_after(
        "which resolvers there are",
        || cluster.announce_resolver(),
        |line| line.contains(&RESOLVER.to_string()),
    );
    assert_eq!(cart.net().lookup("shop.test"), [server(10)]);
    cart.net().talks_tcp((server(10), 443));
}

#[test]
fn after_a_restart_neither_scaled_resolvers_nor_an_edit_cut_allowed_connections() {
    let server_of_its_own = Arc::new(ApiServer::start());
    let builder = Lab::builder().config("dns", json!({}));
    let cluster = Cluster::on(server_of_its_own, builder);
    let _web = cluster.lab.serve_tcp(443);
    cluster.lab.dns().addresses("shop.test", &[server(10)]);
    cluster.announce_resolver();
    let shop = cluster.namespace("shop", &Value::Null);
    let mut cart = cluster.run(&shop, "cart", &allow("shop.test:443"));
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    agent.wait_enforcing(cart.net());
    cluster.wait_resolver(RESOLVER);
    assert_eq!(cart.net().lookup("shop.test"), [server(10)]);
    let mut open = cart.net().talks_tcp((server(10), 443));
    assert!(agent.stop().success());

    let agent = cluster.start_agent_with(&["--keep-enforcing"]);
    agent.wait_enforcing(cart.net());
    agent.logs_after(
        "that there is another resolver",
        || cluster.set_resolvers(&[RESOLVER, STRANGER]),
        |line| line.contains(&STRANGER.to_string()),
    );
    // When this pod is enforced, the new resolver is in use for all pods.
    let another = cluster.run(&shop, "another", &allow("shop.test:443"));
    agent.wait_enforcing(another.net());
    assert_eq!(
        cart.net()
            .resolve_at(STRANGER, "evil.test", RecordType::A)
            .code,
        ResponseCode::NXDomain,
        "the query was not held"
    );
    assert!(
        exchange(&mut open, b"scaled", DEADLINE),
        "the open connection was cut"
    );
    let of_cart = format!("pod={shop}/cart");
    let is_applied = |line: &str| line.contains("policy applied") && line.contains(&of_cart);
    assert!(!agent.stderr().lines().any(is_applied));
    agent.logs_after(
        "that the edit is applied",
        || cluster.annotate(&mut cart, &allow("shop.test:443 other.test:443")),
        is_applied,
    );
    assert!(
        exchange(&mut open, b"edited", DEADLINE),
        "the open connection was cut"
    );
    cart.net().talks_tcp((server(10), 443));
    assert_eq!(cluster.lab.dns().queries_for("shop.test"), 1);
}

#[test]
fn with_trust_connections_from_before_the_first_agent_go_on() {
    // Not a temporary directory: it may be in memory, where no file survives a reboot.
    let state = tempfile::tempdir_in(workspace::scratch()).expect("a directory");
    let builder = Lab::builder()
        .config("existingConnections", "trust")
        .config("stateDir", state.path().to_str().expect("a path in UTF-8"));
    let cluster = Cluster::on(ApiServer::shared(), builder);
    let _web = cluster.lab.serve_tcp(443);
    let udp = cluster.lab.serve_udp(4433);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow(""));
    let mut out = cart.net().talks_tcp((server(10), 443));
    let datagrams = cart.net().udp_socket((server(11), 4433));
    assert!(egress_tests::echo_on(&datagrams, b"before", DEADLINE));
    let listener = cart.net().listen_tcp(8080);
    let to = (cart.net().ipv4(), 8080);
    let mut caller = cluster
        .lab
        .outside()
        .run(|| std::net::TcpStream::connect(to))
        .expect("the pod is called");
    let (mut answering, _) = listener.accept().expect("the pod accepts");

    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    assert!(
        exchange(&mut out, b"after", DEADLINE),
        "the outbound connection was cut"
    );
    assert!(egress_tests::echo_on(&datagrams, b"after", DEADLINE));
    let echo = std::thread::spawn(move || {
        let mut taken = [0; 4];
        std::io::Read::read_exact(&mut answering, &mut taken).expect("the caller's words");
        std::io::Write::write_all(&mut answering, &taken).expect("an answer");
    });
    assert!(exchange(&mut caller, b"call", DEADLINE), "the call was cut");
    echo.join().expect("the pod's end");
    cannot_reach(&agent, cart.net(), server(10), "no_rule");
    drop(udp);
}

#[test]
fn enforcement_goes_on_without_the_api_server_and_catches_up_later() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    cluster.lab.dns().addresses("shop.test", &[server(10)]);
    cluster.lab.dns().addresses("later.test", &[server(11)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let mut cart = cluster.run(&shop, "cart", &allow("shop.test:443"));
    let mut gone = Some(cluster.run(&shop, "gone", &allow("")));
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    agent.wait_enforcing(cart.net());

    agent.logs_after(
        "that the API server is away",
        || cluster.proxy.refuse(),
        |line| line.contains("API server"),
    );
    assert_eq!(cart.net().lookup("shop.test"), [server(10)]);
    cart.net().talks_tcp((server(10), 443));
    cannot_reach(&agent, cart.net(), server(99), "address_not_learned");
    cluster.annotate(&mut cart, &allow("shop.test:443 later.test:443"));
    if let Some(gone) = gone.take() {
        cluster.delete(gone);
    }

    // An agent that starts meanwhile uses the cluster's last saved state.
    assert!(agent.stop().success());
    let agent = cluster.spawn_agent(&["--keep-enforcing"]);
    agent.wait_log("that the API server is away", |line| {
        line.contains("API server")
    });
    agent.wait_enforcing(cart.net());
    assert_eq!(cart.net().lookup("shop.test"), [server(10)]);
    cart.net().talks_tcp((server(10), 443));
    cannot_reach(&agent, cart.net(), server(99), "address_not_learned");

    cluster.proxy.allow();
    agent.wait_enforcing(cart.net());
    eventually("the edit is applied", || {
        let later = cart
            .net()
            .try_resolve(RESOLVER, "later.test", RecordType::A, SHORT)?;
        holds(later.code == ResponseCode::NoError)
    });
    cart.net().talks_tcp((server(11), 443));
    eventually("the deleted pod's pins are removed", || {
        let pins = cluster.lab.all_pins();
        holds(!pins.iter().any(|pin| pin.ends_with(format!("{shop}_gone"))))
    });
}

#[test]
fn pods_of_other_nodes_are_reached_without_an_entry() {
    let cluster = Cluster::new();
    let elsewhere: IpAddr = [10, 77, 0, 5].into();
    cluster
        .lab
        .outside()
        .ip_batch("addr add 10.77.0.5/32 dev eth0\n");
    cluster
        .lab
        .node()
        .ip_batch("route add 10.77.0.0/16 via 10.98.0.2\n");
    let _server = cluster
        .lab
        .outside()
        .run(|| TcpListener::bind((elsewhere, 443)))
        .expect("listen outside");
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow(""));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    cannot_reach(&agent, cart.net(), elsewhere, "no_rule");

    let name = format!("{}-other", cluster.node());
    cluster.server.apply(&json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": name },
        "spec": { "podCIDR": "10.77.0.0/24", "podCIDRs": ["10.77.0.0/24"] },
    }));
    // Nodes of other tests are on the same API server, so a log line does not tell whose addresses are known.
    eventually("the address is internal", || {
        holds(cart.net().reaches(elsewhere))
    });
    cluster.server.delete(&json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": name },
    }));
    eventually("the address is not internal any more", || {
        holds(!cart.net().reaches(elsewhere))
    });
}

#[test]
fn an_agent_that_starts_without_the_api_server_uses_only_the_last_policy() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    cluster.lab.dns().addresses("shop.test", &[server(10)]);
    cluster.lab.dns().addresses("later.test", &[server(11)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let mut cart = cluster.run(&shop, "cart", &allow("shop.test:443 later.test:443"));
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    agent.wait_enforcing(cart.net());
    cluster.annotate(&mut cart, &allow("shop.test:443"));
    // A new version of the policy may also come of other facts, which the log lines do not tell apart.
    eventually("the edit is applied", || {
        let (_, explanation) = cluster.lab.explain(cart.net(), "later.test:443");
        holds(explanation["decision"] == "denied")
    });
    let free = cluster.run(&shop, "free", &Value::Null);
    eventually("the agent knows the pod that is not enforced", || {
        let (_, status) = cluster.lab.ask_json(&["status", &format!("{shop}/free")]);
        holds(status["pods"][0]["mode"] == "off")
    });
    agent.logs_after(
        "that the API server is away",
        || cluster.proxy.refuse(),
        |line| line.contains("API server"),
    );
    assert!(agent.stop().success());

    let agent = cluster.spawn_agent(&[]);
    agent.wait_enforcing(cart.net());
    assert_eq!(cart.net().lookup("shop.test"), [server(10)]);
    let later = cart.net().resolve("later.test", RecordType::A);
    assert_eq!(
        later.code,
        ResponseCode::NXDomain,
        "the removed name is allowed again"
    );
    free.net().talks_tcp((server(99), 443));
}

#[test]
fn replacing_the_agent_leaves_no_gap_and_keeps_open_connections() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    cluster.lab.dns().addresses("shop.test", &[server(10)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("shop.test:443"));
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    agent.wait_enforcing(cart.net());
    assert_eq!(cart.net().lookup("shop.test"), [server(10)]);
    let mut open = cart.net().talks_tcp((server(10), 443));
    assert!(agent.stop().success());
    assert!(!cart.net().reaches(server(99)), "the pod is open");
    assert!(
        exchange(&mut open, b"meanwhile", DEADLINE),
        "the open connection was cut"
    );

    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    assert!(
        exchange(&mut open, b"after", DEADLINE),
        "the open connection was cut"
    );
    cart.net().talks_tcp((server(10), 443));
    cannot_reach(&agent, cart.net(), server(99), "address_not_learned");
}

#[test]
fn every_interface_of_a_pod_is_enforced() {
    let cluster = Cluster::new();
    let web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let mut cart = cluster.run(&shop, "cart", &allow(&format!("{}:443", server(10))));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    cart.net().talks_tcp((server(10), 443));

    let second = agent.logs_after(
        "that there is another interface",
        || _ = cart.running().add_interface(&cluster.lab, "net1"),
        |line| line.contains("enforcing on other interfaces"),
    );
    assert!(second.contains(&format!("{shop}/cart")), "{second}");
    let number = cart.net().ipv4().octets()[2];
    cart.net().netns().ip_batch(&format!(
        "route replace default via 10.2.{number}.1 dev net1\n"
    ));
    // Nothing leaves from the second interface's address, not even ARP: the cluster does not list this
    // address for the pod.
    assert!(
        !cart.net().reaches(server(10)),
        "it left by the other interface"
    );
    agent.wait_denial("spoofed_source", |denial| {
        denial.of(cart.net()) && denial.reason == "spoofed_source"
    });
    assert_eq!(web.peers().len(), 1);
}

#[test]
fn a_pod_is_enforced_in_its_new_sandbox() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let mut cart = cluster.run(&shop, "cart", &allow(&format!("{}:443", server(10))));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());

    let anew = cluster.lab.pod(&shop, "cart");
    cart.running().stop_containers();
    let old = cart.running().change_sandbox(anew);
    drop(old);
    agent.logs_after(
        "that it is enforced on other interfaces",
        || _ = cart.running().start_container(),
        |line| line.contains("enforcing on other interfaces") && line.contains("/cart"),
    );
    agent.applies_policy_after(cart.net(), || cluster.set_addresses(&cart));
    cart.net().talks_tcp((server(10), 443));
    cannot_reach(&agent, cart.net(), server(99), "no_rule");
}

#[test]
fn a_pod_that_cannot_be_enforced_is_reported_in_the_log_and_as_an_event() {
    let cluster = Cluster::new();
    let shop = cluster.namespace("shop", &Value::Null);
    let (object, uid) = cluster.create_on_host(&shop, "host", &allow("shop.test"));
    let net = cluster.lab.pod(&shop, "host");
    let host = cluster.pod_without_processes(object, &uid, net);
    let unreadable = cluster.run(&shop, "unreadable", &allow("shop.test:port"));
    let agent = cluster.start_agent();

    agent.wait_log("that it is not enforced", |line| {
        line.contains("hostNetwork") && line.contains(&format!("{shop}/host"))
    });
    wait_event(&cluster, &host, "EgressPolicyProblem", &["hostNetwork"]);
    agent.wait_enforcing(unreadable.net());
    wait_event(
        &cluster,
        &unreadable,
        "EgressPolicyProblem",
        &[
            "egress-agent.dev/allow",
            "line 1",
            "everything external is denied",
        ],
    );
    assert!(!unreadable.net().reaches(server(10)), "the pod is open");
}

#[test]
fn an_edit_of_a_namespace_applies_to_a_hundred_pods() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &allow(&format!("{}:443", server(10))));
    let pods: Vec<ClusterPod> = (0..100)
        .map(|n| cluster.run(&shop, &format!("p{n}"), &Value::Null))
        .collect();
    let agent = cluster.start_agent();
    for pod in &pods {
        agent.wait_enforcing(pod.net());
    }
    cluster
        .server
        .namespace(&shop, &allow(&format!("{}:443", server(20))));
    for pod in &pods {
        agent.wait_log("that the policy is applied", |line| {
            line.contains("policy applied")
                && line.contains(&format!("pod={shop}/{} ", pod.net().name()))
        });
    }
    for pod in pods.iter().step_by(9) {
        pod.net().talks_tcp((server(20), 443));
        assert!(!pod.net().reaches(server(10)), "{}", pod.net().name());
    }
}

#[test]
fn pods_that_come_and_go_leave_nothing_behind() {
    // Nodes and Services of other tests would give its pods new policy versions, which have maps.
    let server_of_its_own = Arc::new(ApiServer::start());
    let cluster = Cluster::on(server_of_its_own, Lab::builder());
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    // This pod starts before the agent. Otherwise there may briefly be maps of its interface's quarantine, or
    // of a first policy version without its addresses.
    let stays = cluster.run(&shop, "stays", &allow(&format!("{}:443", server(10))));
    let agent = cluster.start_agent();
    agent.wait_enforcing(stays.net());
    // The maps of an earlier version are removed after the pod is under the next one.
    eventually("the pod has one version of its policy", || {
        holds(cluster.lab.allow_maps().len() == 1)
    });
    let settled = || {
        let objects = agent.kernel_objects();
        (
            objects.programs.len(),
            objects.maps.len(),
            cluster.lab.all_pins().len(),
        )
    };
    let before = eventually("the agent has settled", || {
        let first = settled();
        (first == settled()).then_some(first)
    });

    for round in 0..8 {
        let pods: Vec<ClusterPod> = (0..12)
            .map(|n| {
                let annotations = if n % 3 == 0 {
                    Value::Null
                } else {
                    allow(&format!("{}:443", server(10)))
                };
                cluster.run(&shop, &format!("r{round}-{n}"), &annotations)
            })
            .collect();
        agent.wait_enforcing(pods[1].net());
        pods[1].net().talks_tcp((server(10), 443));
        for pod in pods {
            cluster.delete(pod);
        }
    }
    eventually("everything of the deleted pods is removed", || {
        holds(settled() == before)
    });
    stays.net().talks_tcp((server(10), 443));
    cannot_reach(&agent, stays.net(), server(99), "no_rule");
}

#[test]
fn a_pod_cannot_choose_an_interface_by_its_annotation() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let victim = cluster.run(&shop, "victim", &allow(""));
    let agent = cluster.start_agent();
    agent.wait_enforcing(victim.net());
    let mut annotations = allow("*");
    annotations["egress-agent.dev/interface"] = json!(victim.net().interface());
    let thief = cluster.run(&shop, "thief", &annotations);
    agent.wait_enforcing(thief.net());
    agent.wait_log("that the annotation does not count", |line| {
        line.contains("egress-agent.dev/interface") && line.contains("thief")
    });
    thief.net().talks_tcp((server(10), 443));
    cannot_reach(&agent, victim.net(), server(10), "no_rule");
    // A foreign process in the victim's network does not change anything either.
    let _other = victim.net().start(&mut pause());
    assert!(!victim.net().reaches(server(10)), "the pod is open");
}
