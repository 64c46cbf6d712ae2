//! Interfaces whose pods are not known yet: the interface is closed, but its DNS queries are kept.

use egress_tests::{
    Cluster, ClusterPod, DEADLINE, Pod, SHORT,
    addresses::{RESOLVER, RESOLVER6, server},
    cluster::allow,
    dns::{RecordType, ResponseCode},
    eventually, exchange, holds,
};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

/// Creates the pod object for this network, and starts the pod.
fn identify(cluster: &Cluster, namespace: &str, net: Pod, annotations: &Value) -> ClusterPod {
    let (object, uid) = cluster.create(namespace, net.name(), annotations);
    let mut pod = cluster.pod_without_processes(object, &uid, net);
    pod.running().start_container();
    pod
}

#[test]
fn an_interface_is_closed_until_its_pod_is_known() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    cluster.lab.dns().addresses("shop.test", &[server(10)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let agent = cluster.start_agent();

    let closed = |net: &Pod| {
        assert!(!net.reaches(server(10)), "the pod is open");
        let denial = agent.wait_denial("pod_unknown", |denial| {
            denial.reason == "pod_unknown" && denial.pod == net.interface()
        });
        assert_eq!(denial.namespace, "");
    };
    let net = cluster.quarantined(&agent, &shop, "cart");
    closed(&net);
    let cart = identify(&cluster, &shop, net, &allow("shop.test:443"));
    agent.wait_enforcing(cart.net());
    cluster.set_addresses(&cart);
    assert_eq!(cart.net().lookup("shop.test"), [server(10)]);
    cart.net().talks_tcp((server(10), 443));
    assert!(!cart.net().reaches(server(99)), "the pod is open");
    agent.wait_denial("the address", |denial| {
        denial.is(cart.net(), "address_not_learned", server(99), 443)
    });

    // An interface whose pod is not to be enforced is released.
    let net = cluster.quarantined(&agent, &shop, "free");
    closed(&net);
    let free = identify(&cluster, &shop, net, &Value::Null);
    eventually("the pod is released", || {
        holds(free.net().reaches(server(99)))
    });
}

#[test]
fn an_inbound_connection_from_before_the_pod_was_known_goes_on() {
    let cluster = Cluster::new();
    let shop = cluster.namespace("shop", &Value::Null);
    let agent = cluster.start_agent();
    let net = cluster.quarantined(&agent, &shop, "cart");
    let listener = net.listen_tcp(8080);
    let to = (net.ipv4(), 8080);
    let outside = cluster.lab.outside();
    let mut caller = outside
        .run(|| std::net::TcpStream::connect(to))
        .expect("the pod is called");
    let (mut server, _) = listener.accept().expect("the pod accepts");
    let mut echo = || {
        let mut taken = [0; 4];
        std::thread::scope(|scope| {
            let answer = scope.spawn(|| {
                server.set_read_timeout(Some(DEADLINE))?;
                std::io::Read::read_exact(&mut server, &mut taken)?;
                std::io::Write::write_all(&mut server, &taken)
            });
            let answered = exchange(&mut caller, b"call", DEADLINE);
            answer.join().expect("no panic").is_ok() && answered
        })
    };
    assert!(echo(), "nobody may call it");
    let cart = identify(&cluster, &shop, net, &allow("shop.test:443"));
    agent.wait_enforcing(cart.net());
    assert!(echo(), "the call was cut");
}

/// With `CAP_NET_ADMIN` in its network a program can create an established connection without sending a
/// packet, so without the SYN that shows who opened it.
#[test]
fn a_forged_connection_from_before_the_pod_was_known_opens_nothing() {
    let cluster = Cluster::new();
    let shop = cluster.namespace("shop", &Value::Null);
    let agent = cluster.start_agent();
    let net = cluster.quarantined(&agent, &shop, "cart");
    let own = std::net::SocketAddr::from((net.ipv4(), 8080));
    let to = std::net::SocketAddr::from((server(99), 443));
    let made_up = net.netns().run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        setsockopt(&socket, sockopt::TcpRepair, &1).expect("TCP_REPAIR");
        socket.bind(&own.into()).expect("bind");
        socket
            .connect(&to.into())
            .expect("connect without a packet");
        setsockopt(&socket, sockopt::TcpRepair, &0).expect("TCP_REPAIR off");
        socket
    });
    let cart = identify(&cluster, &shop, net, &allow("shop.test:443"));
    agent.wait_enforcing(cart.net());
    let mark = agent.mark();
    made_up.send(b"secret").expect("send");
    agent.wait_denial_from(mark, "the segment", |denial| {
        denial.is(cart.net(), "no_rule", server(99), 443)
            || denial.is(cart.net(), "address_not_learned", server(99), 443)
    });
}

#[test]
fn queries_from_before_the_pod_was_known_are_answered_when_it_is() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    let dns = cluster.lab.dns();
    dns.addresses("shop.test", &[server(10)]);
    dns.addresses("later.test", &[server(11)]);
    dns.addresses("other.test", &[server(12)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let agent = cluster.start_agent();

    let net = cluster.quarantined(&agent, &shop, "cart");
    let (socket, socket6) = (net.dns_socket(), net.dns_socket6());
    socket.ask(RESOLVER, 1, "shop.test", RecordType::A);
    socket6.ask(RESOLVER6, 2, "later.test", RecordType::A);
    assert!(socket.receive(SHORT).is_none(), "the query was not held");
    assert!(dns.questions().is_empty(), "a question left the node");

    let cart = identify(&cluster, &shop, net, &allow("shop.test:443 later.test:443"));
    assert_eq!(
        socket.expect("a response once the pod is known").addresses,
        [server(10)]
    );
    assert_eq!(
        socket6.expect("a response once the pod is known").addresses,
        [server(11)]
    );
    cart.net().talks_tcp((server(10), 443));
    cart.net().talks_tcp((server(11), 443));
    assert_eq!(
        dns.queries_for("shop.test"),
        1,
        "the query was sent more than once"
    );

    // A query that the policy does not allow does not leave after the quarantine either.
    let net = cluster.quarantined(&agent, &shop, "strict");
    let socket = net.dns_socket();
    socket.ask(RESOLVER, 3, "other.test", RecordType::A);
    assert!(socket.receive(SHORT).is_none(), "the query was not held");
    let strict = identify(&cluster, &shop, net, &allow("shop.test:443"));
    assert_eq!(socket.expect("a refusal").code, ResponseCode::NXDomain);
    agent.wait_denial("the name", |denial| {
        denial.reason == "dns_name" && denial.pod == strict.net().name()
    });
    assert_eq!(dns.queries_for("other.test"), 0);
}

#[test]
fn held_queries_of_an_unenforced_pod_are_forwarded_on_release() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    let dns = cluster.lab.dns();
    dns.addresses("shop.test", &[server(10)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let agent = cluster.start_agent();
    let audit = json!({"egress-agent.dev/allow": "", "egress-agent.dev/mode": "audit"});
    for (name, annotations) in [("free", Value::Null), ("audited", audit)] {
        let net = cluster.quarantined(&agent, &shop, name);
        let before = dns.queries_for("shop.test");
        let socket = net.dns_socket();
        socket.ask(RESOLVER, 1, "shop.test", RecordType::A);
        assert!(socket.receive(SHORT).is_none(), "the query was not held");
        let pod = identify(&cluster, &shop, net, &annotations);
        assert_eq!(socket.expect("the pod is released").addresses, [server(10)]);
        assert_eq!(dns.queries_for("shop.test"), before + 1);
        pod.net().talks_tcp((server(10), 443));
    }
}

#[test]
fn no_query_is_lost_while_a_pod_becomes_known() {
    let cluster = Cluster::new();
    cluster.lab.dns().addresses("shop.test", &[server(10)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let agent = cluster.start_agent();
    for (name, annotations) in [("cart", allow("shop.test:443")), ("free", Value::Null)] {
        let net = cluster.quarantined(&agent, &shop, name);
        let socket = net.dns_socket();
        let _pod = std::thread::scope(|scope| {
            // Fewer than may wait at once, spread over the time in which the pod becomes known.
            scope.spawn(|| {
                for id in 0..30 {
                    socket.ask(RESOLVER, id, "shop.test", RecordType::A);
                    std::thread::sleep(std::time::Duration::from_millis(4));
                }
            });
            identify(&cluster, &shop, net, &annotations)
        });
        let mut missing: std::collections::BTreeSet<u16> = (0..30).collect();
        while !missing.is_empty() {
            let answer =
                socket.expect(&format!("an answer to each question; not yet: {missing:?}"));
            missing.remove(&answer.message.metadata.id);
        }
    }
}

#[test]
fn queries_that_time_out_or_exceed_the_queue_are_reported() {
    let cluster = Cluster::new();
    let dns = cluster.lab.dns();
    dns.addresses("shop.test", &[server(10)]);
    let agent = cluster.start_agent();
    let net = cluster.quarantined(&agent, "shop", "nobody");
    let reported = |name: &str| {
        let denial = agent.wait_denial(name, |denial| {
            denial.reason == "pod_unknown" && denial.dns_name.as_deref() == Some(name)
        });
        assert_eq!(denial.pod, net.interface());
        assert_eq!(denial.dst_ip, Some(RESOLVER));
    };
    let socket = net.dns_socket();
    for id in 0..32 {
        socket.ask(RESOLVER, id, "shop.test", RecordType::A);
    }
    // The queue has no room for this one; the others time out after some seconds.
    socket.ask(RESOLVER, 99, "more.test", RecordType::A);
    reported("more.test");
    reported("shop.test");
    assert!(dns.questions().is_empty(), "a question left the node");
    assert!(socket.receive(SHORT).is_none());
}

#[test]
fn an_interface_in_quarantine_stays_closed_when_it_is_renamed() {
    let cluster = Cluster::new();
    let _web = cluster.lab.serve_tcp(443);
    cluster.lab.dns().addresses("shop.test", &[server(10)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let agent = cluster.start_agent();
    let net = cluster.quarantined(&agent, &shop, "cart");
    let socket = net.dns_socket();
    socket.ask(RESOLVER, 1, "shop.test", RecordType::A);
    assert!(socket.receive(SHORT).is_none(), "the query was not held");
    let was = net.interface().to_owned();
    agent.quarantines_after("moved0", || {
        let line = format!("link set {was} name moved0\n");
        cluster.lab.node().ip_batch(&line);
    });
    assert!(!net.reaches(server(10)), "the pod is open");
    // Another interface that takes the name is closed too.
    let second = cluster.lab.pod(&shop, "next");
    agent.wait_quarantined(second.interface());
    agent.quarantines_after(&was, || {
        let line = format!("link set {} name {was}\n", second.interface());
        cluster.lab.node().ip_batch(&line);
    });
    assert!(!second.reaches(server(10)), "the pod is open");
    assert!(!net.reaches(server(10)), "the pod is open");

    let cart = identify(&cluster, &shop, net, &allow("shop.test:443"));
    agent.wait_enforcing(cart.net());
    cluster.set_addresses(&cart);
    assert_eq!(cart.net().lookup("shop.test"), [server(10)]);
    cart.net().talks_tcp((server(10), 443));
    assert!(!cart.net().reaches(server(99)), "the pod is open");
}

#[test]
fn held_queries_of_other_pods_leave_room_for_the_next_pods() {
    // With the maximum number of queries each, the other pods fill the shared queue.
    const OTHERS: usize = 90;
    let cluster = Cluster::new();
    let dns = cluster.lab.dns();
    dns.addresses("shop.test", &[server(10)]);
    let shop = cluster.namespace("shop", &Value::Null);
    let agent = cluster.start_agent();
    let others: Vec<Pod> = (0..OTHERS)
        .map(|number| cluster.lab.pod("shop", &format!("other-{number}")))
        .collect();
    let next = cluster.lab.pod("shop", "next");
    for net in others.iter().chain([&next]) {
        agent.wait_quarantined(net.interface());
    }
    let all = others.iter().chain([&next]);
    let addresses: Vec<_> = all.map(|net| net.ipv4().into()).collect();
    cluster.lab.wait_own(&addresses);
    for other in &others {
        let socket = other.dns_socket();
        for id in 0..32 {
            socket.ask(RESOLVER, id, "shop.test", RecordType::A);
        }
    }
    let socket = next.dns_socket();
    socket.ask(RESOLVER, 1, "shop.test", RecordType::A);
    let _next = identify(&cluster, &shop, next, &allow("shop.test:443"));
    assert_eq!(
        socket.expect("a response once the pod is known").addresses,
        [server(10)]
    );
    assert_eq!(dns.queries_for("shop.test"), 1);
}
