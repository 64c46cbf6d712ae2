//! Connections that a pod has open when it begins to be enforced. Connections that others opened go on;
//! connections that the pod opened are judged.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use egress_tests::{
    Agent, ApiServer, Builder, Cluster, DEADLINE, Lab, Pod, SHORT, StopAtEnd, addresses::server,
    cluster::allow, echo_on, eventually, exchange, holds, rewritten::nft, workspace,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use crate::callers::Inbound;

/// Asserts that a denied connection is answered with a reset.
#[track_caller]
pub(super) fn assert_reset(stream: &mut TcpStream) {
    stream.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    let outcome = stream
        .write_all(b"more")
        .and_then(|()| stream.read_exact(&mut [0; 4]));
    let kind = outcome.expect_err("the connection goes on").kind();
    assert_eq!(kind, io::ErrorKind::ConnectionReset);
}

/// A node that tracks connections, as most nodes do, and an agent that answers denied packets with a reset.
pub(super) fn rejecting() -> Builder {
    Lab::builder().tracking().config("onDeny", "reject")
}

/// Removes every pin and table of the laboratory's agents, as a reboot does.
#[track_caller]
pub(super) fn reboot(lab: &Lab) {
    umount2(&lab.bpffs(), MntFlags::MNT_DETACH).expect("unmount the BPF file system");
    let bpf = Some("bpf");
    mount(bpf, &lab.bpffs(), bpf, MsFlags::empty(), None::<&str>).expect("mount a BPF file system");
    eventually("programs without a link are gone", || {
        let shown = lab
            .node()
            .run(|| Command::new("bpftool").args(["net", "show"]).output());
        let shown = shown.expect("bpftool runs");
        assert!(shown.status.success(), "{shown:?}");
        holds(!String::from_utf8_lossy(&shown.stdout).contains("_pod"))
    });
    let delete = |family| format!("delete table {family} egress-agent\n");
    nft(lab.node(), &["inet", "bridge", "arp"].map(delete).concat());
}

/// A directory for `stateDir`. It is on a disk; a directory for temporary files may be in memory.
pub(super) fn state_dir() -> tempfile::TempDir {
    tempfile::tempdir_in(workspace::scratch()).expect("a directory below the build's")
}

/// The bytes that the pod has sent on its interface.
fn sent_by(pod: &Pod) -> u64 {
    let read = || fs::read_to_string("/proc/thread-self/net/dev");
    let table = pod.netns().run(read).expect("the table of interfaces");
    let line = table.lines().find(|line| line.contains("eth0:"));
    let sent = line.and_then(|line| line.split_whitespace().nth(9)?.parse().ok());
    sent.expect("bytes sent by eth0")
}

/// Waits until `status` has these values in `existing_connections`. The agent reports what a round of
/// reconciling did when that round is over.
#[track_caller]
pub(super) fn wait_existing(lab: &Lab, fields: &[(&str, Value)]) -> Value {
    eventually("status reports the existing connections", || {
        let mut command = Command::new(Agent::program());
        command
            .args(["status", "--json", "--socket"])
            .arg(lab.socket());
        let output = lab.node().run(|| command.output()).expect("status runs");
        let status: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let told = status["agent"]["existing_connections"].clone();
        let is = |(field, value): &(&str, Value)| told[*field] == *value;
        fields.iter().all(is).then_some(told)
    })
}

#[test]
fn a_pods_first_annotation_keeps_inbound_connections_and_judges_its_own() {
    let cluster = Cluster::on(ApiServer::shared(), rejecting());
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let mut cart = cluster.run(&shop, "cart", &Value::Null);
    let agent = cluster.start_agent();
    let mut inbound = Inbound::open(&cluster.lab, cart.net(), 8080);
    let mut denied = cart.net().talks_tcp((server(20), 443));
    let mut allowed = cart.net().talks_tcp((server(10), 443));

    cluster.annotate(&mut cart, &allow(&format!("{}:443", server(10))));
    agent.wait_enforcing(cart.net());
    assert!(inbound.goes_on(), "a connection from outside was cut");
    assert!(
        exchange(&mut allowed, b"after", DEADLINE),
        "the allowed connection was cut"
    );
    assert_reset(&mut denied);
    agent.wait_denial("the connection from before", |denial| {
        denial.is(cart.net(), "no_rule", server(20), 443)
    });
}

#[test]
fn at_the_agents_first_start_in_a_cluster_pods_keep_inbound_connections() {
    let cluster = Cluster::on(ApiServer::shared(), rejecting());
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    // The agent has not seen a response for the name yet, so the name allows no address.
    cluster.lab.dns().addresses("shop.test", &[server(20)]);
    let entries = format!("shop.test:443 {}:443", server(10));
    let cart = cluster.run(&shop, "cart", &allow(&entries));
    let mut inbound = Inbound::open(&cluster.lab, cart.net(), 8080);
    let mut named = cart.net().talks_tcp((server(20), 443));
    let mut allowed = cart.net().talks_tcp((server(10), 443));

    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    assert!(inbound.goes_on(), "a connection from outside was cut");
    assert!(
        exchange(&mut allowed, b"after", DEADLINE),
        "the allowed connection was cut"
    );
    assert_reset(&mut named);
    wait_existing(
        &cluster.lab,
        &[("outbound", json!("judged")), ("inbound_kept", json!(1))],
    );
}

#[test]
fn at_the_agents_first_start_with_a_directory_pods_keep_inbound_connections() {
    let lab = rejecting().build();
    let (_web, cart) = lab.shop_and_cart(&format!("{}:443", server(10)));
    let mut inbound = Inbound::open(&lab, &cart, 8080);
    let mut denied = cart.talks_tcp((server(20), 443));
    let mut allowed = cart.talks_tcp((server(10), 443));

    let _agent = lab.start_agent(&[&cart]);
    assert!(inbound.goes_on(), "a connection from outside was cut");
    assert!(
        exchange(&mut allowed, b"after", DEADLINE),
        "the allowed connection was cut"
    );
    assert_reset(&mut denied);
}

#[test]
fn a_network_namespace_without_a_name_is_found_by_a_process_in_it() {
    let lab = rejecting().build();
    let (_web, cart) = lab.shop_and_cart("shop.test");
    let mut inbound = Inbound::open(&lab, &cart, 8080);
    let _process = cart.start(&mut egress_tests::node::pause());
    // The agent runs in a mount namespace without named network namespaces.
    let mut command = Command::new("unshare");
    let agent = lab.agent_command("run");
    command
        .args([
            "--mount",
            "sh",
            "-c",
            "mount -t tmpfs none /run/netns && exec \"$@\"",
            "sh",
        ])
        .arg(agent.get_program())
        .args(agent.get_args())
        .arg("--pods-dir")
        .arg(lab.pods_dir())
        .env("NO_COLOR", "1");
    let agent = Agent::start(lab.node(), command);
    agent.wait_enforcing(&cart);
    assert!(inbound.goes_on(), "a connection from outside was cut");
}

#[test]
fn an_outbound_connection_is_judged_even_if_the_pod_listens_on_its_port() {
    let cluster = Cluster::on(ApiServer::shared(), rejecting());
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("shop.test"));
    let (mut opened, _listener) = cart.net().netns().run(|| {
        let reusing = |port| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            socket.set_reuse_address(true).expect("SO_REUSEADDR");
            let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
            socket.bind(&any.into()).expect("bind");
            socket
        };
        let opened = reusing(8080);
        let to = SocketAddr::from((server(20), 443));
        opened.connect(&to.into()).expect("connect");
        let listener = reusing(8080);
        listener.listen(1).expect("listen on the connection's port");
        (TcpStream::from(opened), listener)
    });
    assert!(exchange(&mut opened, b"before", DEADLINE));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    assert_reset(&mut opened);
}

#[test]
fn a_server_that_sends_at_full_speed_keeps_its_client() {
    let lab = rejecting().build();
    let (_web, cart) = lab.shop_and_cart("shop.test");
    let Inbound { mut caller, server } = Inbound::open(&lab, &cart, 8080);
    // With the time-outs neither thread blocks for ever when the connection is lost.
    caller.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    server
        .set_write_timeout(Some(DEADLINE))
        .expect("a time-out");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut server = server;
            let block = vec![7; 1 << 16];
            while !stop.load(Ordering::Relaxed) {
                server.write_all(&block)?;
            }
            io::Result::Ok(())
        });
        let reader = scope.spawn(move || io::copy(&mut caller, &mut io::sink()));
        let sending = StopAtEnd(&stop);
        let sends_more = || {
            let from = sent_by(&cart);
            eventually("the pod goes on sending, or has stopped", || {
                holds(sender.is_finished() || sent_by(&cart) > from + (1 << 24))
            });
        };
        sends_more();
        let agent = lab.start_agent(&[&cart]);
        sends_more();
        drop(sending);
        let sent = sender.join().expect("no panic");
        let received = reader.join().expect("no panic");
        sent.expect("the client was lost");
        received.expect("the server was lost");
        drop(agent);
    });
}

#[test]
fn a_datagram_from_outside_does_not_reopen_a_udp_flow_that_the_pod_began() {
    let lab = rejecting().build();
    let _echo = lab.serve_udp(4433);
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", &format!("{}:4433/udp", server(10)))]);
    let allowed = cart.udp_socket((server(10), 4433));
    assert!(echo_on(&allowed, b"before", DEADLINE));
    let peer = lab.outside().run(|| UdpSocket::bind((server(20), 4434)));
    let peer = peer.expect("bind outside");
    peer.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    let denied = cart.udp_socket((server(20), 4434));
    denied.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    let own = denied.local_addr().expect("its address");
    let mut taken = [0; 16];
    denied.send(b"before").expect("send");
    assert_eq!(peer.recv(&mut taken).expect("the data arrives"), 6);

    let agent = lab.start_agent(&[&cart]);
    peer.send_to(b"go on", own).expect("send to the pod");
    assert_eq!(denied.recv(&mut taken).expect("the data arrives"), 5);
    peer.set_read_timeout(Some(SHORT)).expect("a time-out");
    denied.send(b"after").expect("send");
    let heard = peer.recv(&mut taken);
    assert!(heard.is_err(), "the conversation goes on");
    agent.wait_denial("the datagram", |denial| {
        denial.is(&cart, "no_rule", server(20), 4434)
    });
    assert!(
        echo_on(&allowed, b"after", DEADLINE),
        "the connection was cut"
    );
}

#[test]
fn a_server_with_a_socket_for_each_client_answers_its_clients_next_datagram() {
    let lab = rejecting().build();
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test")]);
    let client = lab.outside().run(|| UdpSocket::bind((server(20), 0)));
    let client = client.expect("bind outside");
    client.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    let at = SocketAddr::from((cart.ipv4(), 4433));
    let (_hears, of_client) = cart.netns().run(|| {
        let reusing = || {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).expect("a socket");
            socket.set_reuse_address(true).expect("SO_REUSEADDR");
            socket.bind(&at.into()).expect("bind");
            socket
        };
        let (hears, of_client) = (reusing(), reusing());
        let to = client.local_addr().expect("the client's address");
        of_client.connect(&to.into()).expect("connect");
        (hears, UdpSocket::from(of_client))
    });
    let _agent = lab.start_agent(&[&cart]);
    let mut taken = [0; 16];
    client.send_to(b"ask", at).expect("send to the pod");
    assert_eq!(of_client.recv(&mut taken).expect("the data arrives"), 3);
    of_client.send(b"answer").expect("send");
    assert_eq!(client.recv(&mut taken).expect("the answer arrives"), 6);
}

#[test]
fn connections_that_pods_open_between_a_reboot_and_the_agents_start_are_judged() {
    let lab = rejecting().build();
    let (_web, cart) = lab.shop_and_cart("shop.test:443");
    let mut agent = lab.start_agent_with(&["--keep-enforcing"], &[&cart]);
    assert!(agent.stop().success());
    reboot(&lab);
    let mut denied = cart.talks_tcp((server(99), 443));
    let mut inbound = Inbound::open(&lab, &cart, 8080);

    let _agent = lab.start_agent(&[&cart]);
    assert_reset(&mut denied);
    assert!(inbound.goes_on(), "a connection from outside was cut");
}

#[test]
fn in_a_cluster_connections_that_pods_open_between_a_reboot_and_the_agents_start_are_judged() {
    let cluster = Cluster::on(ApiServer::shared(), rejecting());
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("shop.test:443"));
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    agent.wait_enforcing(cart.net());
    assert!(agent.stop().success());
    reboot(&cluster.lab);
    let mut denied = cart.net().talks_tcp((server(99), 443));
    let mut inbound = Inbound::open(&cluster.lab, cart.net(), 8080);

    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    assert_reset(&mut denied);
    assert!(inbound.goes_on(), "a connection from outside was cut");
}

#[test]
fn a_connection_through_a_service_goes_on() {
    let lab = rejecting().build();
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    // As kube-proxy does for a node port: the node's address replaces the caller's.
    nft(
        lab.node(),
        &format!(
            "table ip service {{
                chain before {{
                    type nat hook prerouting priority dstnat;
                    ip daddr 10.98.0.1 tcp dport 30080 dnat to {}:8080
                }}
                chain after {{
                    type nat hook postrouting priority srcnat;
                    ct status dnat masquerade
                }}
            }}",
            cart.ipv4()
        ),
    );
    let listener = cart.listen_tcp(8080);
    let caller = lab.outside().run(|| TcpStream::connect("10.98.0.1:30080"));
    let (server, seen) = listener.accept().expect("the pod's server accepts");
    assert_eq!(seen.ip().to_canonical().to_string(), "10.1.1.1");
    let mut inbound = Inbound {
        caller: caller.expect("the pod is called"),
        server,
    };
    let _agent = lab.start_agent(&[&cart]);
    assert!(inbound.goes_on(), "a connection from outside was cut");
}

#[test]
fn over_ipv6_an_inbound_connection_goes_on() {
    let lab = rejecting().build();
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", "shop.test:443")]);
    let listener = cart.listen_tcp(8080);
    let to = SocketAddr::from((cart.ipv6(), 8080));
    let caller = lab.outside().run(|| TcpStream::connect(to));
    let (server, _) = listener.accept().expect("the pod's server accepts");
    let mut inbound = Inbound {
        caller: caller.expect("the pod is called"),
        server,
    };
    let _agent = lab.start_agent(&[&cart]);
    assert!(inbound.goes_on(), "a connection from outside was cut");
}

#[test]
fn without_connection_tracking_inbound_connections_are_judged_and_counted() {
    let lab = Lab::builder().config("onDeny", "reject").build();
    let cart = lab.pod("shop", "cart");
    lab.write_pod(&cart, &[("allow", &format!("{}:443", server(10)))]);
    let mut inbound = Inbound::open(&lab, &cart, 8080);
    let agent = lab.start_agent(&[&cart]);
    assert_reset(&mut inbound.server);
    let text = agent.wait_log("that it is judged", |line| {
        line.contains("are judged as the")
    });
    assert!(
        text.contains("WARN") && text.contains("connections=1") && text.contains("has no entry"),
        "{text}"
    );
    wait_existing(
        &lab,
        &[("inbound_kept", json!(0)), ("inbound_judged", json!(1))],
    );
    // New inbound connections work as before.
    assert!(Inbound::open(&lab, &cart, 8081).goes_on());
}

#[test]
fn with_existing_connections_end_no_older_connection_goes_on() {
    let lab = rejecting().config("existingConnections", "end").build();
    let (_web, cart) = lab.shop_and_cart("shop.test:443");
    let mut inbound = Inbound::open(&lab, &cart, 8080);
    let mut opened = cart.talks_tcp((server(20), 443));
    let _agent = lab.start_agent(&[&cart]);
    assert_reset(&mut inbound.server);
    assert_reset(&mut opened);
    assert!(Inbound::open(&lab, &cart, 8081).goes_on());
    wait_existing(&lab, &[("because", json!("existingConnections: end"))]);
}

#[test]
fn a_pod_with_more_sockets_than_the_agent_reads_is_reported_and_enforced() {
    let lab = rejecting().build();
    let (_web, cart) = lab.shop_and_cart(&format!("{}:443", server(10)));
    let other = lab.pod("shop", "other");
    lab.write_pod(&other, &[("allow", "shop.test:443")]);
    let mut inbound = Inbound::open(&lab, &cart, 8080);
    let mut of_other = Inbound::open(&lab, &other, 8080);
    let to = SocketAddr::from((server(20), 9));
    let sockets: Vec<UdpSocket> = (0..9_000).map(|_| cart.udp_socket(to)).collect();
    let agent = lab.start_agent(&[&cart, &other]);
    agent.wait_log("that not all are read", |line| {
        line.contains("cut_short=true") && line.contains("shop/cart")
    });
    assert!(
        inbound.goes_on() && of_other.goes_on(),
        "the connection was cut"
    );
    assert!(cart.connect_tcp((server(10), 443), DEADLINE).is_ok());
    drop(sockets);
}
