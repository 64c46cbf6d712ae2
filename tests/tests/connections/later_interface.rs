//! Connections that a pod has open on an interface which is enforced later than the pod itself.

use std::{
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
};

use egress_common::records::FLOW_IN;
use egress_tests::{
    ApiServer, Cluster, Lab, Pod,
    cluster::allow,
    eventually,
    frames::Tap,
    holds,
    raw::{Ip, flag},
};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

/// The server at the other end of the later interface, and its port.
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const PORT: u16 = 8888;
/// Names of the interface's end in the pod, and of its other end.
const INSIDE: &str = "net2";
const END: &str = "later2";
/// The hardware address of the interface's other end.
const END_ADDRESS: &str = "02:00:00:00:00:02";

/// Gives the pod an interface that leads past the node.
///
/// The server's hardware address is permanent: while the other end moves, the interface has no carrier, and the
/// kernel then forgets the addresses that it has asked for.
fn add_interface(lab: &Lab, pod: &Pod) {
    let (inside, outside) = (pod.netns(), lab.outside());
    outside.ip_batch(&format!(
        "link add {END} address {END_ADDRESS} type veth peer name {INSIDE} netns {}\n\
         addr add {SERVER}/32 dev {END}\n\
         link set {END} up\n\
         route add {}/32 dev {END}\n",
        inside.name(),
        pod.ipv4()
    ));
    inside.ip_batch(&format!(
        "link set {INSIDE} up\n\
         route add {SERVER}/32 dev {INSIDE}\n\
         neigh add {SERVER} lladdr {END_ADDRESS} dev {INSIDE} nud permanent\n"
    ));
}

/// Makes the interface's other end one of the node's.
fn move_to_node(lab: &Lab) {
    let node = lab.node();
    lab.outside()
        .ip_batch(&format!("link set {END} netns {}\n", node.name()));
    node.ip_batch(&format!("link set {END} up\n"));
}

/// A connection of the pod from its own address to the server.
fn connect(lab: &Lab, pod: &Pod) -> (TcpStream, TcpStream) {
    let server = lab.outside().run(|| TcpListener::bind((SERVER, PORT)));
    let server = server.expect("listen at the other end");
    let stream = pod.netns().run(|| -> io::Result<TcpStream> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((pod.ipv4(), 0)).into())?;
        socket.connect(&SocketAddr::from((SERVER, PORT)).into())?;
        Ok(socket.into())
    });
    let (accepted, _) = server.accept().expect("the pod calls");
    (stream.expect("the server is reached"), accepted)
}

#[test]
fn connections_that_a_pod_opened_on_a_later_interface_are_judged_and_do_not_come_back() {
    let builder = Lab::builder().config("quarantine.enabled", false);
    let cluster = Cluster::on(ApiServer::shared(), builder);
    let lab = &cluster.lab;
    let shop = cluster.namespace("shop", &Value::Null);
    let listed = allow("203.0.113.10:443");
    let cart = cluster.run(&shop, "cart", &listed);
    let pod = cart.net();
    add_interface(lab, pod);
    let agent = cluster.start_agent();
    agent.wait_enforcing(pod);
    let (mut stream, _accepted) = connect(lab, pod);
    move_to_node(lab);
    agent.wait_log("that the interface is enforced", |line| {
        line.contains("enforcing on other interfaces") && line.contains(&format!("{shop}/cart"))
    });

    let mark = agent.mark();
    let peer = IpAddr::from(SERVER);
    stream.write_all(b"more").expect("write");
    agent.wait_denial_from(mark, "its next segment", |denial| {
        denial.is(pod, "no_rule", peer, PORT)
    });
    // A SYN in the server's name from the connection's port opens nothing, and one from another port does.
    let own = stream.local_addr().expect("an address").port();
    let end = Tap::open(lab.node(), END);
    for port in [PORT, PORT + 1] {
        end.send(&Ip::new(peer, pod.ipv4()).tcp(port, own, flag::SYN));
    }
    let opened = eventually("the other port's flow", || {
        let flows = lab.pod_entries(pod, "opening");
        let opened = |flow: &&Value| flow["value"]["flow"]["state"] == FLOW_IN;
        let ports: Vec<Value> = flows
            .iter()
            .filter(opened)
            .map(|flow| flow["key"]["peer_port"].clone())
            .collect();
        (!ports.is_empty()).then_some(ports)
    });
    assert_eq!(opened, [json!(PORT + 1)]);
}

#[test]
fn connections_that_others_opened_on_a_later_interface_in_quarantine_go_on() {
    const CALLER: u16 = 5000;
    let cluster = Cluster::new();
    let lab = &cluster.lab;
    let shop = cluster.namespace("shop", &Value::Null);
    let listed = allow("203.0.113.10:443");
    let mut cart = cluster.run(&shop, "cart", &listed);
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    // Without a process nobody can tell whose the interface is.
    cart.running().stop_containers();
    let inside = cart.net().netns();
    lab.node().ip_batch(&format!(
        "link add {END} type veth peer name {INSIDE} netns {}\nlink set {END} up\n",
        inside.name()
    ));
    inside.ip_batch(&format!("link set {INSIDE} up\n"));
    agent.wait_quarantined(END);
    let syn = Ip::new(SERVER, cart.net().ipv4()).tcp(CALLER, PORT, flag::SYN);
    Tap::open(lab.node(), END).send(&syn);
    cart.running().start_container();
    agent.wait_log("whose the interface is", |line| {
        line.contains("enforcing on other interfaces") && line.contains(&format!("{shop}/cart"))
    });
    eventually("the caller's flow", || {
        let flows = lab.pod_entries(cart.net(), "inbound");
        let mut flows = flows.iter();
        holds(flows.any(|flow| flow["key"]["peer_port"] == CALLER))
    });
}
