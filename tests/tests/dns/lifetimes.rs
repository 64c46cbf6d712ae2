//! How long a learned address stays allowed.

use std::{
    net::{IpAddr, TcpStream},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod, SHORT,
    addresses::{numbered, server},
    dns::{RecordType, Send, address, cname},
    echo_on, eventually, exchange, holds,
};
use nix::time::{ClockId, clock_gettime};
use socket2::Socket;

fn boot_time() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .expect("CLOCK_BOOTTIME")
        .into()
}

/// The time until the pod's entry for this address expires.
#[track_caller]
fn remaining(lab: &Lab, pod: &Pod, address: IpAddr) -> Duration {
    let entry = lab.allowed(pod).remove(&address);
    let expires = entry
        .unwrap_or_else(|| panic!("{address} is not in the allow map"))
        .expires_ns;
    Duration::from_nanos(expires).saturating_sub(boot_time())
}

/// Waits until new connections are denied.
#[track_caller]
fn wait_expired(agent: &Agent, pod: &Pod, to: (IpAddr, u16)) {
    eventually("new connections are denied", || {
        // A connection may also fail because the machine is busy.
        let failed = pod.connect_tcp(to, SHORT).is_err();
        let denials = agent.denials();
        holds(failed && denials.iter().any(|d| d.is(pod, "expired", to.0, to.1)))
    });
}

#[test]
fn an_expired_address_takes_no_new_connection_and_keeps_the_open_one() {
    let lab = Lab::builder().exact_lifetimes().build();
    let _web = lab.serve_tcp(443);
    lab.dns().answer("shop.test", [address(server(10)).ttl(1)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);

    let mut stream = pod.talks_tcp_within_ttl("shop.test", (server(10), 443));
    wait_expired(&agent, &pod, (server(10), 443));
    assert!(
        exchange(&mut stream, b"still here", DEADLINE),
        "the open connection was cut"
    );

    // A new query allows the address again.
    pod.talks_tcp_within_ttl("shop.test", (server(10), 443));
}

#[test]
fn an_expired_address_takes_no_new_udp_flow_and_keeps_the_open_one() {
    let lab = Lab::builder().exact_lifetimes().build();
    let _echo = lab.serve_udp(4000);
    lab.dns().answer("shop.test", [address(server(10)).ttl(1)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:4000/udp")]);
    let agent = lab.start_agent(&[&pod]);

    let socket = pod.udp_socket((server(10), 4000));
    eventually("a flow is open within the TTL", || {
        pod.lookup("shop.test");
        holds(echo_on(&socket, b"before", SHORT))
    });
    eventually("new flows are denied", || {
        // The open flow lives on because it is used.
        assert!(
            echo_on(&socket, b"meanwhile", DEADLINE),
            "the open flow was cut"
        );
        // An echo may also be late because the machine is busy.
        let failed = !pod.echo_udp((server(10), 4000), b"new", SHORT);
        let mut denials = agent.denials().into_iter();
        holds(failed && denials.any(|d| d.is(&pod, "expired", server(10), 4000)))
    });
    assert!(
        echo_on(&socket, b"after", DEADLINE),
        "the open flow was cut"
    );
}

#[test]
fn the_lowest_ttl_of_a_chain_applies() {
    let lab = Lab::builder().exact_lifetimes().build();
    lab.dns().answer(
        "shop.test",
        [
            cname("a.test").ttl(900),
            cname("b.test").ttl(100),
            address(server(10)).ttl(800),
        ],
    );
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    pod.lookup("shop.test");
    let left = remaining(&lab, &pod, server(10));
    assert!((50..=100).contains(&left.as_secs()), "{left:?}");
}

#[test]
fn ttls_are_clamped_and_the_grace_is_added() {
    let lab = Lab::builder()
        .config("dns.minTtl", "600s")
        .config("dns.maxTtl", "1200s")
        .config("dns.grace", "300s")
        .build();
    lab.dns().answer("zero.test", [address(server(1)).ttl(0)]);
    lab.dns()
        .answer("long.test", [address(server(2)).ttl(65_535)]);
    lab.dns()
        .answer("endless.test", [address(server(3)).ttl(u32::MAX)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(
        &pod,
        &[("allow", "zero.test:443 long.test:443 endless.test:443")],
    );
    let _agent = lab.start_agent(&[&pod]);
    for (name, address, seconds) in [
        ("zero.test", server(1), 900),
        ("long.test", server(2), 1500),
    ] {
        assert_eq!(pod.lookup(name), [address]);
        let left = remaining(&lab, &pod, address).as_secs();
        assert!(
            (seconds - 100..=seconds).contains(&left),
            "{name}: {left} s of {seconds} s"
        );
    }
    // RFC 2181, section 8: a TTL with the highest bit set counts as zero. Either way it is clamped.
    assert_eq!(pod.lookup("endless.test"), [server(3)]);
    assert!(remaining(&lab, &pod, server(3)).as_secs() <= 1500);
}

#[test]
fn a_response_that_does_not_fit_is_not_delivered() {
    let lab = Lab::builder()
        // The addresses that the programs learn are extra.
        .config("dns.learn", "agent")
        .config("limits.addressesPerPod", 4)
        .build();
    let _web = lab.serve_tcp(443);
    let addresses: Vec<_> = (0..8).map(numbered).collect();
    lab.dns().addresses("big.test", &addresses);
    lab.dns().addresses("small.test", &[server(10)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "big.test:443 small.test:443")]);
    let agent = lab.start_agent(&[&pod]);

    let socket = pod.dns_socket();
    let resolver = egress_tests::addresses::RESOLVER;
    socket.ask(resolver, 1, "big.test", RecordType::A);
    agent.wait_denial("a response that does not fit", |d| {
        d.of(&pod) && d.reason == "allow_map_full"
    });
    assert_eq!(lab.dns().queries_for("big.test"), 1);
    // The next response is the first that the pod receives.
    socket.ask(resolver, 2, "small.test", RecordType::A);
    let answer = socket.expect("the response for small.test");
    assert_eq!(
        (answer.message.metadata.id, answer.addresses),
        (2, vec![server(10)])
    );
    pod.talks_tcp((server(10), 443));
    assert!(lab.allowed(&pod).len() <= 4);
}

#[test]
fn when_the_map_is_full_the_oldest_names_are_evicted() {
    const LIMIT: u32 = 4;
    let lab = Lab::builder()
        // The addresses that the programs learn are extra.
        .config("dns.learn", "agent")
        .config("limits.addressesPerPod", LIMIT)
        .build();
    let _web = lab.serve_tcp(443);
    lab.dns().numbered("fresh.test");
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*.fresh.test:443")]);
    let _agent = lab.start_agent(&[&pod]);

    for n in 0..3 * LIMIT {
        assert_eq!(pod.lookup(&format!("n{n}.fresh.test")), [numbered(n)]);
        reset(pod.reach_tcp((numbered(n), 443)));
        let allowed = lab.allowed(&pod);
        assert!(allowed.len() <= LIMIT as usize, "{} entries", allowed.len());
        assert!(allowed.contains_key(&numbered(n)));
    }
    assert!(!lab.allowed(&pod).contains_key(&numbered(0)));
    assert!(
        pod.connect_tcp((numbered(0), 443), SHORT).is_err(),
        "an evicted address is open"
    );
    // A new query brings it back.
    pod.lookup("n0.fresh.test");
    pod.reach_tcp((numbered(0), 443));
}

/// Resets a connection: both kernels and the agent's programs see its end at once.
fn reset(stream: TcpStream) {
    let stream = Socket::from(stream);
    stream
        .set_linger(Some(Duration::ZERO))
        .expect("a socket that does not linger");
    drop(stream);
}

#[test]
fn an_address_in_use_stays_when_the_map_is_full() {
    const LIMIT: u32 = 4;
    let lab = Lab::builder()
        // The addresses that the programs learn are extra.
        .config("dns.learn", "agent")
        .config("limits.addressesPerPod", LIMIT)
        .build();
    let _servers = (lab.serve_tcp(443), lab.serve_udp(443));
    lab.dns().numbered("fresh.test");
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*.fresh.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    let lookup = |n: u32| pod.lookup(&format!("n{n}.fresh.test"));

    assert_eq!(lookup(0), [numbered(0)]);
    let mut stream = pod.talks_tcp((numbered(0), 443));
    assert_eq!(lookup(1), [numbered(1)]);
    let socket = pod.udp_socket((numbered(1), 443));
    assert!(echo_on(&socket, b"hello", DEADLINE));
    for n in 2..20 {
        assert_eq!(lookup(n), [numbered(n)]);
    }
    let allowed = lab.allowed(&pod);
    assert!(allowed.len() <= LIMIT as usize);
    for n in [0, 1, 19] {
        assert!(allowed.contains_key(&numbered(n)), "{n}: {allowed:?}");
    }
    // An edit judges open connections again, by these entries.
    agent.applies_policy_after(&pod, || {
        lab.write_pod(&pod, &[("allow", "*.fresh.test:443 other.test")]);
    });
    assert!(
        exchange(&mut stream, b"still here", DEADLINE),
        "the connection was cut"
    );
    assert!(
        echo_on(&socket, b"still here", DEADLINE),
        "the flow was cut"
    );

    // When all addresses are in use, a response that needs room is not delivered.
    let _held: Vec<_> = (20..22)
        .map(|n| {
            assert_eq!(lookup(n), [numbered(n)]);
            pod.talks_tcp((numbered(n), 443))
        })
        .collect();
    let resolver = egress_tests::addresses::RESOLVER;
    assert!(
        pod.try_resolve(resolver, "n30.fresh.test", RecordType::A, SHORT)
            .is_none()
    );
    agent.wait_denial("a response without room", |d| {
        d.of(&pod) && d.reason == "allow_map_full"
    });
    // When one is not in use any more, the response is delivered.
    reset(stream);
    assert_eq!(lookup(30), [numbered(30)]);
    assert!(!lab.allowed(&pod).contains_key(&numbered(0)));
}

#[test]
fn a_name_with_another_address_in_every_response_is_always_reached() {
    const ADDRESSES: u32 = 300;
    const LIMIT: u32 = 64;
    let lab = Lab::builder()
        // The addresses that the programs learn are extra.
        .config("dns.learn", "agent")
        .config("limits.addressesPerPod", LIMIT)
        .build();
    let _web = lab.serve_tcp(443);
    let next = AtomicU32::new(0);
    lab.dns().on("robin.test", move |asked| {
        let n = next.fetch_add(1, Ordering::Relaxed);
        vec![Send::answer(
            asked,
            &[address(numbered(n % ADDRESSES)).ttl(1)],
        )]
    });
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "robin.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    let mut first = None;
    for n in 0..ADDRESSES + 50 {
        let address = numbered(n % ADDRESSES);
        assert_eq!(pod.lookup("robin.test"), [address]);
        let stream = pod.reach_tcp((address, 443));
        if first.is_none() {
            first = Some(stream);
        } else {
            reset(stream);
        }
    }
    assert_eq!(pod.syn_retransmissions(), 0);
    let allowed = lab.allowed(&pod);
    assert!(allowed.len() <= LIMIT as usize, "{} entries", allowed.len());
    let mut first = first.expect("a first connection");
    assert!(exchange(&mut first, b"still here", DEADLINE));
    assert!(agent.denials().is_empty(), "{:?}", agent.denials());
}

#[test]
fn a_pods_successor_inherits_no_state() {
    let lab = Lab::new();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let agent = lab.start_agent(&[&pod]);
    pod.lookup("shop.test");
    pod.talks_tcp((server(10), 443));
    assert!(lab.allow_pin(&pod).exists());

    // Without its manifest the agent does not know the pod, and does not enforce it.
    lab.remove_pod(&pod);
    eventually("the pod's pins are gone", || {
        holds(!lab.allow_pin(&pod).exists())
    });
    eventually("its interface is not enforced any more", || {
        holds(pod.connect_tcp((server(99), 443), SHORT).is_ok())
    });

    let agent_says = agent.logs_after(
        "that it enforces the pod again",
        || lab.write_pod(&pod, &[("allow", "shop.test:443")]),
        |line| line.contains("enforcing") && line.contains("pod=shop/cart"),
    );
    assert!(!agent_says.is_empty());
    assert!(lab.allowed(&pod).is_empty());
    agent.denies_tcp(&pod, (server(10), 443), "address_not_learned");
}
