//! Without a problem the agent logs no error and writes no Event on a pod.

use std::{fs, sync::Arc, time::Duration};

use egress_tests::{
    Agent, ApiServer, Cluster, ClusterPod, Lab, SHORT,
    addresses::{RESOLVER, server},
    cluster::allow,
    eventually,
    node::pause,
};
use serde_json::{Value, json};

const PROBLEM: &str = "EgressPolicyProblem";

/// A cluster without any problem: it also has its DNS Service.
#[track_caller]
fn healthy() -> Cluster {
    let cluster = Cluster::new();
    cluster.announce_resolver();
    cluster
}

/// The reasons and pods of the Events in a namespace.
#[track_caller]
fn events(cluster: &Cluster, namespace: &str) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let events = cluster.events(namespace).into_iter();
    events
        .map(|event| {
            let (reason, regarding) = (&event["reason"], &event["regarding"]["name"]);
            (text(reason), text(regarding))
        })
        .collect()
}

/// Waits until the API server has the Events that the agent has sent so far: adds a pod with unreadable
/// annotations, and waits for its Event.
#[track_caller]
fn events_so_far(cluster: &Cluster, namespace: &str) -> Vec<(String, String)> {
    let unreadable = cluster.run(namespace, "unreadable", &allow("shop.test:port"));
    let events = eventually("an Event on the unreadable pod", || {
        let events = events(cluster, namespace);
        let is_it = |(_, pod): &(String, String)| pod == unreadable.net().name();
        events.iter().any(is_it).then_some(events)
    });
    cluster.delete(unreadable);
    events
}

fn errors(agent: &Agent) -> Vec<String> {
    let printed = agent.stderr();
    let errors = printed.lines().filter(|line| line.contains(" ERROR "));
    errors.map(str::to_owned).collect()
}

/// Makes the agent reconcile all pods: adds another pod and waits until it is enforced.
#[track_caller]
fn reconcile_by_adding(
    cluster: &Cluster,
    agent: &Agent,
    namespace: &str,
    name: &str,
) -> ClusterPod {
    let other = cluster.run(namespace, name, &allow("shop.test:443"));
    agent.wait_enforcing(other.net());
    other
}

#[test]
fn a_pod_that_ends_is_not_reported_as_a_problem() {
    let cluster = healthy();
    let shop = cluster.namespace("shop", &Value::Null);
    let annotations = allow("shop.test:443");
    let mut processes_first = cluster.run(&shop, "processes-first", &annotations);
    let interface_first = cluster.run(&shop, "interface-first", &annotations);
    let other_interface = cluster.run(&shop, "other-interface", &annotations);
    let pods = [&processes_first, &interface_first, &other_interface];
    let agent = cluster.start_agent();
    for pod in pods {
        agent.wait_enforcing(pod.net());
    }

    // As when a Job's pod ends: its phase stays `Running` until the kubelet notices.
    processes_first.running().stop_containers();
    // Interfaces that a kernel module creates in each namespace (`tunl0`) stay.
    other_interface
        .net()
        .netns()
        .ip_batch("link add tunl9 type bridge\n");
    for pod in [&processes_first, &interface_first, &other_interface] {
        let host = pod.net().interface();
        cluster.lab.node().ip_batch(&format!("link del {host}\n"));
    }
    let _others = ["one", "two"].map(|name| reconcile_by_adding(&cluster, &agent, &shop, name));
    for pod in [&processes_first, &interface_first, &other_interface] {
        let title = format!("pod={shop}/{}", pod.net().name());
        agent.logs_after(
            &format!("removed {title}"),
            || {
                cluster
                    .server
                    .set_status(pod.object(), &json!({ "phase": "Succeeded" }));
            },
            |line| line.contains("removed") && line.contains(&title),
        );
    }
    assert_eq!(errors(&agent), Vec::<String>::new());
    let events = events_so_far(&cluster, &shop);
    assert!(
        events.iter().all(|(_, pod)| pod == "unreadable"),
        "{events:?}"
    );
}

#[test]
fn many_pods_that_end_at_once_are_no_problem() {
    let cluster = healthy();
    let shop = cluster.namespace("shop", &Value::Null);
    let agent = cluster.start_agent();
    // Young pods are looked at often.
    let pods: Vec<ClusterPod> = (0..24)
        .map(|n| cluster.run(&shop, &format!("job{n}"), &allow("shop.test:443")))
        .collect();
    for pod in &pods {
        agent.wait_enforcing(pod.net());
    }
    // Their processes and networks; no object says that they have ended.
    drop(pods);
    for name in ["one", "two", "three"] {
        let other = reconcile_by_adding(&cluster, &agent, &shop, name);
        drop(other);
    }
    assert_eq!(errors(&agent), Vec::<String>::new());
}

#[test]
fn an_ended_pod_is_no_problem_before_its_phase_changes() {
    let cluster = healthy();
    let shop = cluster.namespace("shop", &Value::Null);
    let mut ended = cluster.run(&shop, "ended", &allow("shop.test:443"));
    let agent = cluster.start_agent();
    agent.wait_enforcing(ended.net());
    ended.running().stop_containers();
    let host = ended.net().interface();
    cluster.lab.node().ip_batch(&format!("link del {host}\n"));
    // Longer than the time within which a pod must be found.
    std::thread::sleep(Duration::from_secs(12));
    let _other = reconcile_by_adding(&cluster, &agent, &shop, "other");
    assert_eq!(errors(&agent), Vec::<String>::new());
}

#[test]
fn the_remaining_interface_of_an_ended_pod_is_no_problem() {
    let cluster = healthy();
    let shop = cluster.namespace("shop", &Value::Null);
    let mut ended = cluster.run(&shop, "ended", &allow("shop.test:443"));
    // The agent caches a pod's location for a minute, unless its interface has no address.
    ended.net().netns().ip_batch("addr flush dev eth0\n");
    let agent = cluster.start_agent();
    agent.wait_enforcing(ended.net());
    ended.running().stop_containers();
    let _one = reconcile_by_adding(&cluster, &agent, &shop, "one");
    // Longer than the time within which an interface's pod must become known.
    std::thread::sleep(Duration::from_secs(12));
    let _two = reconcile_by_adding(&cluster, &agent, &shop, "two");
    assert_eq!(errors(&agent), Vec::<String>::new());
}

#[test]
fn a_pod_that_its_booted_node_has_not_started_yet_is_no_problem() {
    let cluster = healthy();
    let shop = cluster.namespace("shop", &Value::Null);
    // The API server still says what the kubelet said before the boot.
    let (object, uid) = cluster.create(&shop, "cart", &allow("shop.test:443"));
    let net = cluster.lab.pod_without_interface(&shop, "cart");
    let mut cart = cluster.pod_without_processes(object, &uid, net);
    cluster.set_addresses(&cart);
    let agent = cluster.start_agent();
    // Longer than a pod with processes may take to be found.
    std::thread::sleep(Duration::from_secs(12));
    // The runtime's own process comes first, in the host's network.
    let runtime = cluster.lab.run_on_node(&mut pause());
    cart.running().adopt(runtime);
    let _other = reconcile_by_adding(&cluster, &agent, &shop, "other");
    cart.running().start_container();
    cluster.lab.add_interface(cart.net());
    agent.wait_enforcing(cart.net());
    assert_eq!(errors(&agent), Vec::<String>::new());
    let events = events_so_far(&cluster, &shop);
    assert!(
        events.iter().all(|(_, pod)| pod == "unreadable"),
        "{events:?}"
    );
}

#[test]
fn the_interface_of_a_resolver_that_has_been_scaled_down_is_no_problem() {
    let server_of_its_own = Arc::new(ApiServer::start());
    let builder = Lab::builder().config("dns", json!({}));
    let cluster = Cluster::on(server_of_its_own, builder);
    cluster.announce_resolver();
    let agent = cluster.start_agent();
    let shop = cluster.namespace("shop", &Value::Null);
    let resolver = cluster.run(&shop, "resolver", &allow("shop.test:443"));
    agent.wait_enforcing(resolver.net());
    let address = resolver.net().ipv4();
    agent.logs_after(
        "that there is another resolver",
        || cluster.set_resolvers(&[RESOLVER, address.into()]),
        |line| line.contains(&address.to_string()),
    );
    // The cluster forgets the pod before its network is taken down.
    agent.quarantines_after(resolver.net().interface(), || {
        cluster.server.delete(resolver.object());
    });
    let _other = reconcile_by_adding(&cluster, &agent, &shop, "other");
    assert_eq!(errors(&agent), Vec::<String>::new());
}

#[test]
fn a_running_pod_that_lost_its_interface_is_reported() {
    let cluster = Cluster::new();
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("shop.test:443"));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    let host = cart.net().interface();
    cluster.lab.node().ip_batch(&format!("link del {host}\n"));
    agent.wait_log("that it has no interface", |line| {
        line.contains(" ERROR ")
            && line.contains(&format!("{shop}/cart"))
            && line.contains("no interface yet; enforced on its earlier interfaces")
    });
}

#[test]
fn a_host_network_pod_is_a_problem_only_if_its_enforcement_was_requested() {
    for mode in ["audit", "enforce"] {
        let builder = Lab::builder().config("defaultMode", mode);
        let cluster = Cluster::on(ApiServer::shared(), builder);
        let agents = cluster.namespace(&format!("agents-{mode}"), &Value::Null);
        cluster.create_on_host(&agents, "agent", &Value::Null);
        cluster.create_on_host(&agents, "annotated", &allow("shop.test"));
        let shop = cluster.namespace(&format!("shop-{mode}"), &allow("shop.test"));
        cluster.create_on_host(&shop, "listed", &Value::Null);
        let agent = cluster.start_agent();
        for asked in [format!("{agents}/annotated"), format!("{shop}/listed")] {
            agent.wait_log("that it is not enforced", |line| {
                line.contains("hostNetwork") && line.contains(&asked)
            });
        }
        // The log lines come before the end of the reconcile that publishes the status.
        let status = eventually("status has the pod", || {
            let (_, status) = cluster
                .lab
                .ask_json(&["status", &format!("{agents}/agent")]);
            (status["pods"][0]["mode"] == "host_network").then_some(status)
        });
        assert_eq!(status["pods"][0]["problem"], Value::Null, "{status}");
        let own = format!("{agents}/agent");
        let printed = agent.stderr();
        assert!(!printed.contains(&own), "{printed}");
        let events = events_so_far(&cluster, &agents);
        assert!(events.iter().all(|(_, pod)| pod != "agent"), "{events:?}");
        assert!(
            events.contains(&(PROBLEM.to_owned(), "annotated".to_owned())),
            "{events:?}"
        );
    }
}

#[test]
fn a_restart_is_no_problem_and_the_agent_is_ready_when_it_knows_its_pods() {
    let cluster = healthy();
    let shop = cluster.namespace("shop", &Value::Null);
    let pods =
        ["one", "two", "three"].map(|name| cluster.run(&shop, name, &allow("shop.test:443")));
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    for pod in &pods {
        agent.wait_enforcing(pod.net());
    }
    assert!(agent.stop().success());

    let agent = cluster.start_agent();
    let ready = agent.wait_log("that it is ready", |line| line.contains(" ready "));
    assert!(ready.contains("pods=3"), "{ready}");
    assert_eq!(errors(&agent), Vec::<String>::new());
    let events = events_so_far(&cluster, &shop);
    assert!(
        events.iter().all(|(_, pod)| pod == "unreadable"),
        "{events:?}"
    );
}

#[test]
fn adopted_pods_have_one_summary_line_and_denial_lines_without_the_api_server() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let listed = allow(&format!("{}:443", server(10)));
    let pods = ["one", "two"].map(|name| cluster.run(&shop, name, &listed));
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    for pod in &pods {
        agent.wait_enforcing(pod.net());
    }
    assert!(agent.stop().success());
    // As an agent leaves the directory if it could not save the cluster's state.
    let saved = cluster.lab.directory().join("state/cluster.json");
    fs::remove_file(saved).expect("the saved state of the cluster");

    cluster.proxy.refuse();
    let agent = cluster.spawn_agent(&["--keep-enforcing"]);
    agent.wait_log("that it waits", |line| {
        line.contains("waiting for the API server") && line.contains("left=2")
    });
    for pod in &pods {
        assert!(pod.net().connect_tcp((server(20), 443), SHORT).is_err());
        let denial = agent.wait_denial("the denial by the earlier policy", |denial| {
            denial.is(pod.net(), "no_rule", server(20), 443)
        });
        assert_eq!(denial.node, cluster.node());
        assert!(!denial.uid.is_empty());
    }
    agent.wait_log("that the pods are as they were left", |line| {
        line.contains("2 pods are enforced as an earlier agent left them, without DNS")
    });
    let printed = agent.stderr();
    for unwanted in [" ready ", "denials without a line"] {
        assert!(!printed.contains(unwanted), "{printed}");
    }
    for pod in &pods {
        let title = format!("{shop}/{}", pod.net().name());
        assert!(!printed.contains(&title), "{printed}");
    }

    cluster.proxy.allow();
    agent.wait_log("that it is ready", |line| {
        line.contains(" ready ") && line.contains("pods=2")
    });
}
