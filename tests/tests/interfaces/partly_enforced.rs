//! Pods with interfaces that no host end stands for: macvlan and its like.

use std::net::TcpStream;

use egress_tests::{
    Agent, ApiServer, Cluster, DEADLINE, Lab, Pod, SHORT,
    addresses::{RESOLVER, server},
    dns::{RecordType, ResponseCode},
    eventually, exchange, holds,
    observed::HTTP,
};
use serde_json::{Value, json};

/// What the outside is reached by, past the pod's own interface.
const PAST: u8 = 99;

fn is_open(pod: &Pod, host: u8) -> bool {
    pod.connect_tcp((server(host), 443), SHORT).is_ok()
}

/// Gives the pod a macvlan of the node's way out, by which it reaches one server and no other.
fn add_macvlan(lab: &Lab, pod: &Pod, name: &str) {
    lab.node().ip_batch(&format!(
        "link add link uplink name {name} netns {netns} type macvlan mode bridge\n",
        netns = pod.netns().name()
    ));
    lab.outside()
        .ip_batch("addr replace 10.97.0.1/24 dev eth0\n");
    let number = pod.ipv4().octets()[2];
    pod.netns().ip_batch(&format!(
        "addr add 10.97.0.{}/24 dev {name}\n\
         link set {name} up\n\
         route add {}/32 via 10.97.0.1 dev {name}\n",
        number + 10,
        server(PAST)
    ));
}

/// Waits until `status` says which interfaces of the pod cannot be enforced.
#[track_caller]
fn status_with(lab: &Lab, pod: &Pod, unenforced: &Value) -> Value {
    eventually(&format!("the interfaces {unenforced}"), || {
        let status = lab.status_of(pod);
        (status["unenforced_interfaces"] == *unenforced).then_some(status)
    })
}

fn macvlan(name: &str) -> Value {
    json!([{ "name": name, "kind": "macvlan", "leads_to": "host" }])
}

#[track_caller]
fn says_partly(agent: &Agent, pod: &Pod, words: &str) {
    agent.wait_said(
        &format!("that the pod is partly enforced: {words}"),
        |line| {
            line.contains("partly enforced")
                && line.contains(words)
                && line.contains(&format!("{}/{}", pod.namespace(), pod.name()))
        },
    );
}

#[test]
fn a_pod_with_a_macvlan_beside_its_interface_is_said_to_be_partly_enforced() {
    let cluster = Cluster::on(ApiServer::shared(), Lab::builder().config("http", HTTP));
    let lab = &cluster.lab;
    let _web = lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let allow = json!({ "egress-agent.dev/allow": format!("{}:443", server(10)) });
    let cart = cluster.run(&shop, "cart", &allow);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    assert_eq!(lab.status_of(cart.net())["mode"], "enforce");
    assert!(!is_open(cart.net(), PAST));

    add_macvlan(lab, cart.net(), "net1");
    assert!(is_open(cart.net(), PAST), "this is what cannot be enforced");
    says_partly(
        &agent,
        cart.net(),
        "net1 (macvlan, to an interface of the host)",
    );
    let status = status_with(lab, cart.net(), &macvlan("net1"));
    assert_eq!(status["mode"], "partly_enforced", "{status}");
    assert_eq!(status["enforced"], true, "{status}");
    let problem = status["problem"].as_str().unwrap_or_default();
    assert!(problem.contains("net1"), "{status}");
    let metrics = lab.metrics();
    let in_mode = |mode: &str| metrics.get(&format!("egress_agent_pods{{mode=\"{mode}\"}}"));
    assert_eq!((in_mode("partly_enforced"), in_mode("enforce")), (1.0, 0.0));
    let like = json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": { "namespace": shop, "name": "any" },
    });
    eventually("an Event on the pod", || {
        let events = cluster.server.list(&like);
        let tells = |event: &Value| {
            let note = event["note"].as_str().unwrap_or_default();
            event["regarding"]["name"] == "cart" && note.contains("partly enforced")
        };
        holds(events.iter().any(|event| tells(&event.data)))
    });
    // Its own interface is enforced as before.
    cart.net().talks_tcp((server(10), 443));
    assert!(!is_open(cart.net(), 98));

    cart.net().netns().ip_batch("link del net1\n");
    let status = status_with(lab, cart.net(), &json!([]));
    assert_eq!(status["mode"], "enforce", "{status}");
    agent.wait_said("that it is enforced again", |line| {
        line.contains("the problem is gone") && line.contains(&format!("{shop}/cart"))
    });
}

#[test]
fn a_pod_of_a_manifest_with_interfaces_that_it_does_not_name_is_partly_enforced() {
    let lab = Lab::new();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    add_macvlan(&lab, &pod, "net1");
    lab.node().ip_batch(&format!(
        "link add second type veth peer name net2 netns {}\nlink set second up\n",
        pod.netns().name()
    ));
    let agent = lab.start_agent(&[&pod]);
    says_partly(&agent, &pod, "net1 (macvlan");
    let status = lab.status_of(&pod);
    assert_eq!(status["mode"], "partly_enforced", "{status}");
    let veth = json!({ "name": "net2", "kind": "veth", "leads_to": "host" });
    assert_eq!(
        status["unenforced_interfaces"],
        json!([macvlan("net1")[0], veth]),
        "{status}"
    );
}

#[test]
fn with_refuse_nothing_leaves_a_pod_by_the_interfaces_that_are_enforced() {
    let lab = Lab::builder()
        .config("unenforcedInterfaces", "refuse")
        .config("ranges", json!({ "internal": ["203.0.113.20/32"] }))
        .build();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let audited = lab.pod("shop", "audited");
    lab.write_pod(&audited, &[("allow", "shop.test:443"), ("mode", "audit")]);
    let agent = lab.start_agent(&[&pod, &audited]);
    assert_eq!(pod.lookup("shop.test"), [server(10)]);
    let mut open = pod.talks_tcp((server(10), 443));
    assert!(is_open(&pod, 20), "it is internal");

    agent.applies(&pod, || add_macvlan(&lab, &pod, "net1"));
    let reason = "unenforced_interface";
    agent.denies_tcp(&pod, (server(10), 443), reason);
    agent.denies_tcp(&pod, (server(20), 443), reason);
    assert!(!exchange(&mut open, b"more", SHORT), "it goes on");
    let answer = pod.resolve("shop.test", RecordType::A);
    assert_eq!(answer.code, ResponseCode::NXDomain);
    let (code, explanation) = lab.explain(&pod, &format!("{}:443", server(10)));
    assert_eq!(explanation["reason"], reason, "{explanation}");
    assert_ne!(code, 0, "{explanation}");
    // It still answers who calls it, such as a probe; and what cannot be closed is open.
    let listener = pod.listen_tcp(8080);
    let to = (pod.ipv4(), 8080);
    let caller = lab.node().run(|| TcpStream::connect(to));
    caller.expect("the pod is called");
    listener.accept().expect("it accepts");
    assert!(is_open(&pod, PAST), "this is what cannot be closed");

    // Audit mode denies nothing.
    add_macvlan(&lab, &audited, "net1");
    says_partly(&agent, &audited, "net1");
    assert!(is_open(&audited, 10));

    agent.applies(&pod, || pod.netns().ip_batch("link del net1\n"));
    assert_eq!(
        pod.try_resolve(RESOLVER, "shop.test", RecordType::A, DEADLINE)
            .expect("an answer")
            .addresses,
        [server(10)]
    );
    pod.talks_tcp((server(10), 443));
}

#[test]
fn an_interface_that_a_pod_has_moved_to_the_host_is_a_way_out() {
    let lab = Lab::builder()
        .config("unenforcedInterfaces", "refuse")
        .build();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup("shop.test"), [server(10)]);
    pod.talks_tcp((server(10), 443));
    let node = lab.node().name();
    // A tunnel whose socket stays in the pod, and a macvlan on an interface of the pod. Each could be
    // moved by a pod with `CAP_NET_ADMIN` in the host's user namespace.
    for (make, name, kind) in [
        (
            "link add vx9 type vxlan id 9 dstport 4790 local 10.77.0.1\n",
            "vx9",
            "vxlan",
        ),
        (
            "link add va type veth peer name vb\n\
             link add link va name mv9 type macvlan mode bridge\n",
            "mv9",
            "macvlan",
        ),
    ] {
        agent.applies(&pod, || {
            pod.netns()
                .ip_batch(&format!("{make}link set {name} netns {node}\n"));
        });
        says_partly(&agent, &pod, &format!("{name} ({kind}, on the host"));
        let expected = json!([{ "name": name, "kind": kind, "leads_to": "on_host" }]);
        let status = status_with(&lab, &pod, &expected);
        assert_eq!(status["mode"], "partly_enforced", "{status}");
        agent.denies_tcp(&pod, (server(10), 443), "unenforced_interface");
        agent.applies(&pod, || lab.node().ip_batch(&format!("link del {name}\n")));
        status_with(&lab, &pod, &json!([]));
        assert_eq!(pod.lookup("shop.test"), [server(10)]);
        pod.talks_tcp((server(10), 443));
    }
}

#[test]
fn an_interface_that_was_there_for_a_moment_only_is_told() {
    let lab = Lab::new();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let agent = lab.start_agent(&[&pod]);
    let moment = format!(
        "link add evhost type veth peer name ev0 netns {}\nlink del evhost\n",
        pod.netns().name()
    );
    lab.node().ip_batch(&moment.repeat(20));
    agent.wait_said("that an interface was there", |line| {
        line.contains("evhost (veth)")
            && line.contains("for a moment")
            && line.contains("shop/cart")
    });
    assert_eq!(lab.status_of(&pod)["mode"], "enforce");
}

#[test]
fn an_interface_of_the_host_that_belongs_to_no_pod_is_told() {
    let lab = Lab::new();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let inner = lab.pod_without_interface("shop", "inner");
    let agent = lab.start_agent(&[&pod]);
    inner.netns().ip_batch(&format!(
        "link add vx9 type vxlan id 9 dstport 4790 local 10.77.0.1\nlink set vx9 netns {}\n",
        lab.node().name()
    ));
    agent.wait_said("that an interface belongs to another namespace", |line| {
        line.contains("vx9 (vxlan, on the host") && line.contains("no pod's")
    });
    assert_eq!(lab.status_of(&pod)["mode"], "enforce");
    lab.node().ip_batch("link del vx9\n");
    agent.wait_said("that it is gone", |line| {
        line.contains("the problem is gone") && line.contains("interfaces of other namespaces")
    });
}

#[test]
fn what_a_pod_makes_in_its_own_network_is_no_way_out() {
    let lab = Lab::builder()
        .config("unenforcedInterfaces", "refuse")
        .build();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let inner = lab.pod_without_interface("shop", "inner");
    let more = (0..100).map(|n| format!("link add many{n} type bridge\n"));
    let more = more.collect::<Vec<_>>().concat();
    pod.netns().ip_batch(&format!(
        "link add br0 type bridge\n\
         link add ifb7 type ifb\n\
         link add va type veth peer name vb\n\
         link add link eth0 name mv type macvlan\n\
         link add vx type vxlan id 5 dstport 4789 dev eth0\n\
         tuntap add t0 mode tun\n\
         link add v0 type veth peer name eth0 netns {}\n{more}",
        inner.netns().name()
    ));
    inner
        .netns()
        .ip_batch("link add link eth0 name mv type macvlan\n");
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup("shop.test"), [server(10)]);
    pod.talks_tcp((server(10), 443));
    let status = lab.status_of(&pod);
    assert_eq!(status["mode"], "enforce", "{status}");
    assert_eq!(status["problem"], Value::Null, "{status}");

    // When that namespace has a way out of its own, the interface to it leads out.
    agent.applies(&pod, || add_macvlan(&lab, &inner, "net1"));
    says_partly(&agent, &pod, "v0 (veth, to another network namespace)");
    let expected = json!([{ "name": "v0", "kind": "veth", "leads_to": "namespace" }]);
    status_with(&lab, &pod, &expected);
}

#[test]
fn an_interface_that_has_the_number_of_its_host_end_is_enforced() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("shop.test", &[server(10)]);
    let pod = lab.pod_without_interface("shop", "cart");
    // As on a node in a namespace of its own (kind), where numbers begin with 2 on both sides.
    lab.add_interface_with_index(&pod, 50);
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup("shop.test"), [server(10)]);
    pod.talks_tcp((server(10), 443));
    // By the time that another interface is told of, all have been looked at.
    add_macvlan(&lab, &pod, "net1");
    status_with(&lab, &pod, &macvlan("net1"));
    pod.talks_tcp((server(10), 443));
}

#[test]
fn a_pod_with_more_interfaces_than_are_looked_at_hides_nothing_by_them() {
    let lab = Lab::new();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let many = (0..260).map(|n| format!("link add a{n} type veth peer name b{n}\n"));
    let many = many.collect::<Vec<_>>().concat();
    pod.netns().ip_batch(&many);
    let agent = lab.start_agent(&[&pod]);
    says_partly(&agent, &pod, "more interfaces than are looked at");
    assert_eq!(lab.status_of(&pod)["mode"], "partly_enforced");
    pod.lookup("shop.test");
    pod.talks_tcp((server(10), 443));
}
