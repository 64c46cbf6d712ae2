//! Pods with interfaces that have no host end: macvlan and the like.

use std::{io, net::TcpStream, thread};

use egress_agent::host::{ExitFinder, interface_name};
use egress_common::ids::IfIndex;
use egress_tests::{
    Agent, ApiServer, Cluster, DEADLINE, Lab, Pod, SHORT,
    addresses::{RESOLVER, server},
    cluster::allow,
    dns::{RecordType, ResponseCode},
    eventually, exchange, holds,
    observed::HTTP,
};
use nix::net::if_::if_nametoindex;
use serde_json::{Value, json};

/// The server that the pod reaches past its enforced interface.
const PAST: u8 = 99;

/// Gives the pod a macvlan on the node's uplink, through which it reaches one server only.
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

/// Waits until `status` reports these unenforced interfaces of the pod.
#[track_caller]
fn status_with(lab: &Lab, pod: &Pod, unenforced: &Value) -> Value {
    eventually(&format!("the interfaces {unenforced}"), || {
        let status = lab.status_of(pod);
        (status["unenforced_interfaces"] == *unenforced).then_some(status)
    })
}

/// Waits until `status` reports this mode of the pod. A line about the pod comes before its status.
#[track_caller]
fn wait_mode(lab: &Lab, pod: &Pod, mode: &str) {
    eventually(&format!("the mode {mode} in `status`"), || {
        holds(lab.status_of(pod)["mode"] == mode)
    });
}

fn macvlan(name: &str) -> Value {
    json!([{ "name": name, "kind": "macvlan", "leads_to": "host" }])
}

#[track_caller]
fn wait_partly_enforced(agent: &Agent, pod: &Pod, words: &str) {
    agent.wait_log(
        &format!("that the pod is partly enforced: {words}"),
        |line| {
            line.contains("partly enforced")
                && line.contains(words)
                && line.contains(&format!("{}/{}", pod.namespace(), pod.name()))
        },
    );
}

#[test]
fn a_pod_with_an_additional_macvlan_is_reported_as_partly_enforced() {
    let cluster = Cluster::on(ApiServer::shared(), Lab::builder().config("http", HTTP));
    let lab = &cluster.lab;
    let _web = lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let listed = allow(&format!("{}:443", server(10)));
    let cart = cluster.run(&shop, "cart", &listed);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    wait_mode(lab, cart.net(), "enforce");
    assert!(!cart.net().reaches(server(PAST)));

    add_macvlan(lab, cart.net(), "net1");
    // The macvlan bypasses enforcement.
    cart.net().talks_tcp((server(PAST), 443));
    wait_partly_enforced(
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
    eventually("an Event on the pod", || {
        let tells = |event: &Value| {
            let note = event["note"].as_str().unwrap_or_default();
            event["regarding"]["name"] == "cart" && note.contains("partly enforced")
        };
        holds(cluster.events(&shop).iter().any(tells))
    });
    // Its own interface is enforced as before.
    cart.net().talks_tcp((server(10), 443));
    assert!(!cart.net().reaches(server(98)));

    cart.net().netns().ip_batch("link del net1\n");
    let status = status_with(lab, cart.net(), &json!([]));
    assert_eq!(status["mode"], "enforce", "{status}");
    agent.wait_log("that it is enforced again", |line| {
        line.contains("the problem is gone") && line.contains(&format!("{shop}/cart"))
    });
}

#[test]
fn a_pod_with_interfaces_that_its_manifest_does_not_name_is_partly_enforced() {
    let lab = Lab::new();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    add_macvlan(&lab, &pod, "net1");
    lab.node().ip_batch(&format!(
        "link add second type veth peer name net2 netns {}\nlink set second up\n",
        pod.netns().name()
    ));
    let agent = lab.start_agent(&[&pod]);
    wait_partly_enforced(&agent, &pod, "net1 (macvlan");
    let veth = json!({ "name": "net2", "kind": "veth", "leads_to": "host" });
    let status = status_with(&lab, &pod, &json!([macvlan("net1")[0], veth]));
    assert_eq!(status["mode"], "partly_enforced", "{status}");
}

#[test]
fn with_refuse_nothing_leaves_on_the_enforced_interfaces() {
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
    // The address is internal.
    pod.talks_tcp((server(20), 443));

    agent.applies_policy_after(&pod, || add_macvlan(&lab, &pod, "net1"));
    let reason = "unenforced_interface";
    agent.denies_tcp(&pod, (server(10), 443), reason);
    agent.denies_tcp(&pod, (server(20), 443), reason);
    assert!(
        !exchange(&mut open, b"more", SHORT),
        "the connection goes on"
    );
    let answer = pod.resolve("shop.test", RecordType::A);
    assert_eq!(answer.code, ResponseCode::NXDomain);
    let (code, explanation) = lab.explain(&pod, &format!("{}:443", server(10)));
    assert_eq!(explanation["reason"], reason, "{explanation}");
    assert_ne!(code, 0, "{explanation}");
    // The pod still answers inbound connections, such as probes, and the unenforced interface stays open.
    let listener = pod.listen_tcp(8080);
    let to = (pod.ipv4(), 8080);
    let caller = lab.node().run(|| TcpStream::connect(to));
    caller.expect("the pod is called");
    listener.accept().expect("the pod accepts");
    pod.talks_tcp((server(PAST), 443));

    // Audit mode denies nothing.
    add_macvlan(&lab, &audited, "net1");
    wait_partly_enforced(&agent, &audited, "net1");
    audited.talks_tcp((server(10), 443));

    agent.applies_policy_after(&pod, || pod.netns().ip_batch("link del net1\n"));
    assert_eq!(
        pod.try_resolve(RESOLVER, "shop.test", RecordType::A, DEADLINE)
            .expect("a response")
            .addresses,
        [server(10)]
    );
    pod.talks_tcp((server(10), 443));
}

#[test]
fn an_interface_that_a_pod_moved_to_the_host_counts_as_unenforced() {
    let lab = Lab::builder()
        .config("unenforcedInterfaces", "refuse")
        .build();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup("shop.test"), [server(10)]);
    pod.talks_tcp((server(10), 443));
    let node = lab.node().name();
    // A tunnel whose socket stays in the pod, and a macvlan on an interface of the pod. A pod with
    // `CAP_NET_ADMIN` in the host's user namespace could move either to the host.
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
        agent.applies_policy_after(&pod, || {
            pod.netns()
                .ip_batch(&format!("{make}link set {name} netns {node}\n"));
        });
        wait_partly_enforced(&agent, &pod, &format!("{name} ({kind}, on the host"));
        let expected = json!([{ "name": name, "kind": kind, "leads_to": "on_host" }]);
        let status = status_with(&lab, &pod, &expected);
        assert_eq!(status["mode"], "partly_enforced", "{status}");
        agent.denies_tcp(&pod, (server(10), 443), "unenforced_interface");
        agent.applies_policy_after(&pod, || lab.node().ip_batch(&format!("link del {name}\n")));
        status_with(&lab, &pod, &json!([]));
        assert_eq!(pod.lookup("shop.test"), [server(10)]);
        pod.talks_tcp((server(10), 443));
    }
}

#[test]
fn a_short_lived_interface_is_reported() {
    let lab = Lab::new();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let agent = lab.start_agent(&[&pod]);
    let moment = format!(
        "link add evhost type veth peer name ev0 netns {}\nlink del evhost\n",
        pod.netns().name()
    );
    lab.node().ip_batch(&moment.repeat(20));
    agent.wait_log("that an interface was there", |line| {
        line.contains("evhost (veth)")
            && line.contains("for a moment")
            && line.contains("shop/cart")
    });
    wait_mode(&lab, &pod, "enforce");
}

#[test]
fn a_host_interface_of_an_unknown_namespace_is_reported() {
    let lab = Lab::new();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let inner = lab.pod_without_interface("shop", "inner");
    let agent = lab.start_agent(&[&pod]);
    inner.netns().ip_batch(&format!(
        "link add vx9 type vxlan id 9 dstport 4790 local 10.77.0.1\nlink set vx9 netns {}\n",
        lab.node().name()
    ));
    agent.wait_log("that an interface belongs to another namespace", |line| {
        line.contains("vx9 (vxlan, on the host") && line.contains("no pod's")
    });
    assert_eq!(lab.status_of(&pod)["mode"], "enforce");
    lab.node().ip_batch("link del vx9\n");
    agent.wait_log("that it is gone", |line| {
        line.contains("the problem is gone") && line.contains("interfaces of other namespaces")
    });
}

#[test]
fn interfaces_within_the_pods_network_do_not_count_as_unenforced() {
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

    // When that namespace gets an uplink of its own, the interface to it leads out.
    agent.applies_policy_after(&pod, || add_macvlan(&lab, &inner, "net1"));
    wait_partly_enforced(&agent, &pod, "v0 (veth, to another network namespace)");
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
    // When another interface is reported, all have been inspected.
    add_macvlan(&lab, &pod, "net1");
    status_with(&lab, &pod, &macvlan("net1"));
    pod.talks_tcp((server(10), 443));
}

#[test]
fn a_pod_with_too_many_interfaces_to_inspect_counts_as_partly_enforced() {
    let lab = Lab::new();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let many = (0..260).map(|n| format!("link add a{n} type veth peer name b{n}\n"));
    let many = many.collect::<Vec<_>>().concat();
    pod.netns().ip_batch(&many);
    let agent = lab.start_agent(&[&pod]);
    wait_partly_enforced(&agent, &pod, "more interfaces than are looked at");
    wait_mode(&lab, &pod, "partly_enforced");
    pod.lookup("shop.test");
    pod.talks_tcp((server(10), 443));
}

#[test]
fn pods_that_end_are_inspected_without_an_error() {
    let lab = Lab::builder().without_dns().build();
    let pods: Vec<Pod> = (0..24)
        .map(|n| lab.pod("shop", &format!("pod{n}")))
        .collect();
    let index =
        |pod: &Pod| IfIndex::new(if_nametoindex(pod.interface()).expect("the pod's interface"));
    let ends: Vec<IfIndex> = lab.node().run(|| pods.iter().map(index).collect());
    // All the time while they end, and the kernel takes its time over so many.
    let looked = thread::scope(|scope| {
        let looking = scope.spawn(|| {
            lab.node().run(|| -> io::Result<()> {
                let mut finder = ExitFinder::open()?;
                let mut left = ends;
                while !left.is_empty() {
                    for end in &left {
                        finder.exits(&[*end], |_| true)?;
                    }
                    let is_there = |end: &IfIndex| interface_name(*end).is_some();
                    left.retain(is_there);
                }
                Ok(())
            })
        });
        drop(pods);
        looking.join().expect("it looks")
    });
    looked.expect("no error");
}
