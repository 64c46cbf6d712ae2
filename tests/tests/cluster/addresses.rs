//! The source addresses from which a pod of a cluster may send: while the pod is unknown, with addresses that
//! its interfaces were created with, and with addresses that annotations claim.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use egress_tests::{
    Agent, ApiServer, Cluster, ClusterPod, Lab, Pod,
    addresses::{PODS, PODS6, RESOLVER, server},
    cluster::allow,
    dns::{Question, RecordType, Send, address},
    eventually,
    frames::{self, Tap},
    holds,
};
use serde_json::{Value, json};

/// An internal server: an interface in quarantine reaches it too.
const INTERNAL: IpAddr = server(20);

/// A cluster in which the ranges of pods and of internal servers are configured.
#[track_caller]
fn cluster() -> Cluster {
    let internal = json!({ "internal": [PODS, PODS6, format!("{INTERNAL}/32")] });
    let lab = Lab::builder().config("ranges", internal);
    Cluster::on(ApiServer::shared(), lab)
}

/// Sends a datagram from this source, as a program with a packet socket in the pod does.
fn send_from(pod: &Pod, from: IpAddr, to: (IpAddr, u16), payload: &[u8]) {
    let frame = frames::udp(pod, (from, 53), to, payload);
    Tap::open(pod.netns(), "eth0").send(&frame);
}

/// Waits until a packet from this source was dropped at the pod's interface. `name` is the name of the pod or
/// of the interface.
#[track_caller]
fn wait_stopped(agent: &Agent, name: &str, from: IpAddr) {
    agent.wait_denial(&format!("a packet of {name} from {from}"), |denial| {
        denial.pod == name && denial.reason == "spoofed_source" && denial.src_ip == Some(from)
    });
}

/// Gives a pod without a process a second interface. The interface is created with an address of its own,
/// which is returned, and with the addresses in `more`. Both servers are routed through it.
fn second_interface(cluster: &Cluster, pod: &Pod, more: &[IpAddr]) -> Ipv4Addr {
    let lab = &cluster.lab;
    let number = pod.ipv4().octets()[2];
    let host = second_end(pod);
    lab.outside()
        .ip_batch("route replace 10.2.0.0/16 via 10.98.0.1\n");
    lab.node().ip_batch(&format!(
        "link add {host} type veth peer name net1 netns {netns}\n\
         addr add 10.2.{number}.1/30 dev {host}\n\
         link set {host} up\n",
        netns = pod.netns().name()
    ));
    // All addresses at once, as a plugin sets them.
    let more = more
        .iter()
        .map(|address| format!("addr add {address}/32 dev net1\n"));
    let more = more.collect::<Vec<_>>().concat();
    pod.netns().ip_batch(&format!(
        "addr add 10.2.{number}.2/30 dev net1\n{more}\
         link set net1 up\n\
         route add {INTERNAL}/32 via 10.2.{number}.1 dev net1\n\
         route add {}/32 via 10.2.{number}.1 dev net1\n",
        server(10)
    ));
    Ipv4Addr::new(10, 2, number, 2)
}

/// The host end of the pod's second interface.
fn second_end(pod: &Pod) -> String {
    format!("{}net1", pod.interface())
}

/// A pod whose network exists, but which has no process yet.
fn without_process(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
    annotations: &Value,
) -> ClusterPod {
    let (object, uid) = cluster.create(namespace, name, annotations);
    let net = cluster.lab.pod(namespace, name);
    cluster.pod_without_processes(object, &uid, net)
}

#[test]
fn an_interface_in_quarantine_sends_only_from_its_own_address() {
    let cluster = cluster();
    let lab = &cluster.lab;
    let web = lab.serve_tcp(443);
    lab.dns().on("shop.test", |_| Vec::new());
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("shop.test:443"));
    let other = cluster.run(&shop, "other", &Value::Null);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    let socket = cart.net().dns_socket();
    socket.ask(RESOLVER, 7, "shop.test", RecordType::A);
    eventually("the query is at the resolver", || {
        holds(lab.dns().queries_for("shop.test") == 1)
    });

    let hidden = lab.pod(&shop, "hidden");
    agent.wait_quarantined(hidden.interface());
    eventually(
        "an internal server is reached from the pod's address",
        || holds(hidden.reaches(INTERNAL)),
    );
    let from = IpAddr::V4(hidden.ipv4());
    eventually("the server has seen the address", || {
        holds(web.peers().iter().any(|peer| peer.ip() == from))
    });
    assert!(!hidden.reaches(server(10)), "it is open to the outside");

    // The program has guessed port, id, name and type.
    let asked = Question {
        name: "shop.test".to_owned(),
        qtype: RecordType::A,
        id: 7,
        from: socket.address(),
        to: SocketAddr::new(RESOLVER, 53),
        tcp: false,
        payload: 512,
    };
    let client = (socket.address().ip(), socket.address().port());
    let answer = |host| {
        Send::answer(&asked, &[address(server(host))])
            .bytes()
            .to_vec()
    };
    let later = Ipv4Addr::new(10, 1, 99, 2);
    hidden
        .netns()
        .ip_batch(&format!("addr add {later}/32 dev eth0\n"));
    let names: [IpAddr; 4] = [
        RESOLVER,
        other.net().ipv4().into(),
        [10, 98, 0, 1].into(),
        later.into(),
    ];
    // Denials to one destination share a line.
    for (name, port) in names.into_iter().zip(client.1..) {
        send_from(&hidden, name, (client.0, port), &answer(66));
    }
    lab.dns().send(RESOLVER, socket.address(), &answer(10));
    let heard = socket.expect("the resolver's response");
    assert_eq!(heard.addresses, [server(10)]);
    assert_eq!(lab.allowed(cart.net()).len(), 1);
    for name in names {
        wait_stopped(&agent, hidden.interface(), name);
    }
}

#[test]
fn a_pod_may_send_from_every_address_its_interfaces_were_created_with() {
    let cluster = cluster();
    let lab = &cluster.lab;
    let web = lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    let policy = allow(&format!("{0}:443 {0}:53/udp", server(10)));
    let mut cart = without_process(&cluster, &shop, "cart", &policy);
    let second = second_interface(&cluster, cart.net(), &[]);
    agent.wait_quarantined(&second_end(cart.net()));
    cluster.lab.wait_own(&[second.into()]);
    // The address of the interface is known before its pod is.
    eventually(
        "an internal server is reached by the second interface",
        || holds(cart.net().reaches(INTERNAL)),
    );
    cart.running().start_container();
    agent.wait_enforcing(cart.net());
    cluster.set_addresses(&cart);
    eventually(
        "an allowed server is reached by the second interface",
        || holds(cart.net().reaches(server(10))),
    );
    let from_second = || {
        let peers = web.peers();
        let from = peers.iter().filter(|peer| peer.ip() == second);
        from.count()
    };
    eventually("both servers have seen the address", || {
        holds(from_second() >= 2)
    });

    // An address that a program adds to the interface later is not the pod's own.
    let later = Ipv4Addr::new(10, 3, 0, 9);
    cart.net()
        .netns()
        .ip_batch(&format!("addr add {later}/32 dev net1\n"));
    send_from(cart.net(), later.into(), (server(10), 53), b"x");
    wait_stopped(&agent, "cart", later.into());

    // The next agent keeps the first address, and does not accept the second.
    let before = from_second();
    assert!(agent.stop().success());
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    cart.net().talks_tcp((server(10), 443));
    eventually("the server has seen the address again", || {
        holds(from_second() > before)
    });
    send_from(cart.net(), later.into(), (server(10), 53), b"x");
    wait_stopped(&agent, "cart", later.into());
}

#[test]
fn an_interface_created_with_a_foreign_address_may_not_send_from_it() {
    let cluster = cluster();
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow(""));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    let mut thief = without_process(&cluster, &shop, "thief", &allow("*"));
    // The address of another pod, one in another node's range, the resolver's, the node's, and its gateway's.
    let remote = Ipv4Addr::new(10, 1, 200, 7);
    let node = Ipv4Addr::new(10, 98, 0, 1);
    let gateway = Ipv4Addr::new(10, 98, 0, 2);
    let names: [IpAddr; 5] = [
        cart.net().ipv4().into(),
        remote.into(),
        RESOLVER,
        node.into(),
        gateway.into(),
    ];
    let second = second_interface(&cluster, thief.net(), &names);
    agent.wait_quarantined(&second_end(thief.net()));
    cluster.lab.wait_own(&[second.into()]);
    thief.running().start_container();
    agent.wait_enforcing(thief.net());
    cluster.set_addresses(&thief);
    for (name, port, whose) in [
        (names[0], 1, format!("that of pod {shop}/cart")),
        (names[1], 2, "another node's pod".to_owned()),
        (names[2], 3, "a resolver's".to_owned()),
        (names[3], 4, "the node's".to_owned()),
        (names[4], 5, "that of a gateway of the node".to_owned()),
    ] {
        agent.wait_log(&format!("whose {name} is"), |line| {
            line.contains(&name.to_string()) && line.contains(&whose) && line.contains("thief")
        });
        send_from(thief.net(), name, (server(10), port), b"x");
        wait_stopped(&agent, "thief", name);
    }
}

#[test]
fn after_a_restart_an_address_that_a_program_may_have_chosen_is_not_accepted() {
    let cluster = cluster();
    let shop = cluster.namespace("shop", &Value::Null);
    let mut cart = without_process(&cluster, &shop, "cart", &allow("*"));
    let chosen = Ipv4Addr::new(10, 3, 0, 9);
    cart.net()
        .netns()
        .ip_batch(&format!("addr add {chosen}/32 dev eth0\n"));
    cart.running().start_container();
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    agent.wait_enforcing(cart.net());
    // While the pod's status has no address, only the addresses of its interface are known.
    cluster.lab.wait_own(&[chosen.into()]);
    assert!(agent.stop().success());
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    cluster.set_addresses(&cart);
    eventually("only the address in its status is its own", || {
        send_from(cart.net(), chosen.into(), (server(10), 9), b"x");
        holds(agent.denials().iter().any(|denial| {
            denial.reason == "spoofed_source" && denial.src_ip == Some(chosen.into())
        }))
    });
}

#[test]
fn an_annotation_cannot_give_a_pod_an_address_its_interfaces_were_not_created_with() {
    // The ranges of pods are not configured.
    let cluster = Cluster::new();
    let shop = cluster.namespace("shop", &Value::Null);
    let agent = cluster.start_agent();
    // The address of a pod on another node.
    let remote = Ipv4Addr::new(10, 244, 2, 5);
    let mut annotations = allow("*");
    annotations["k8s.v1.cni.cncf.io/network-status"] = json!(
        json!([
            { "name": "cluster", "default": true, "ips": ["10.1.1.2"] },
            { "name": "other", "interface": "net1", "ips": [remote] },
        ])
        .to_string()
    );
    let thief = cluster.run(&shop, "thief", &annotations);
    agent.wait_enforcing(thief.net());
    agent.wait_log("that the address is not the pod's", |line| {
        line.contains("thief")
            && line.contains(&remote.to_string())
            && line.contains("network status")
    });
    thief
        .net()
        .netns()
        .ip_batch(&format!("addr add {remote}/32 dev eth0\n"));
    // Until the agent knows the pod's status, the addresses of its interface count.
    eventually("only the address in its status is its own", || {
        send_from(thief.net(), remote.into(), (server(10), 9), b"x");
        holds(agent.denials().iter().any(|denial| {
            denial.pod == "thief"
                && denial.reason == "spoofed_source"
                && denial.src_ip == Some(remote.into())
        }))
    });

    // Without configured ranges an interface's addresses do not count either.
    let mut cart = without_process(&cluster, &shop, "cart", &annotations);
    let second = second_interface(&cluster, cart.net(), &[remote.into()]);
    agent.wait_quarantined(&second_end(cart.net()));
    cluster.lab.wait_own(&[second.into()]);
    cart.running().start_container();
    agent.wait_enforcing(cart.net());
    cluster.set_addresses(&cart);
    agent.wait_log("why the interface's address is not taken", |line| {
        line.contains("/cart")
            && line.contains(&second.to_string())
            && line.contains("ranges.internal")
    });
    for (name, port) in [(IpAddr::V4(remote), 1), (IpAddr::V4(second), 2)] {
        send_from(cart.net(), name, (server(10), port), b"x");
        wait_stopped(&agent, "cart", name);
    }
}
