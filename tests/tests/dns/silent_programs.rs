//! Programs that resolve a name once and then send nothing for longer than its TTL.

use std::{net::UdpSocket, thread, time::Duration};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod, SHORT, UdpEcho,
    addresses::server,
    dns::{Record, address},
    echo_on, eventually, holds,
};
use nix::time::{ClockId, clock_gettime};

/// Longer than the default time for which flows and expired addresses are kept.
const LONG: Duration = Duration::from_secs(400);

/// The time since boot. Waits until it is longer than [`LONG`].
fn boot_time() -> Duration {
    loop {
        let now: Duration = clock_gettime(ClockId::CLOCK_BOOTTIME)
            .expect("CLOCK_BOOTTIME")
            .into();
        if now > LONG + Duration::from_secs(10) {
            return now;
        }
        thread::sleep(Duration::from_secs(1));
    }
}

fn nanoseconds(time: Duration) -> [u8; 8] {
    let nanoseconds = u64::try_from(time.as_nanos()).expect("a machine is not up for centuries");
    nanoseconds.to_ne_bytes()
}

fn one_second_address(host: u8) -> [Record; 1] {
    [address(server(host)).ttl(1)]
}

/// A UDP flow that has been idle for [`LONG`], and whose address has expired.
struct IdleFlow {
    socket: UdpSocket,
    agent: Agent,
    pod: Pod,
    _echo: UdpEcho,
    _lab: Lab,
}

impl IdleFlow {
    #[track_caller]
    fn new(config: &[(&str, &str)]) -> Self {
        let now = boot_time();
        let builder = config
            .iter()
            .fold(Lab::builder(), |builder, &(key, value)| {
                builder.config(key, value)
            });
        let lab = builder.exact_lifetimes().build();
        let echo = lab.serve_udp(4000);
        lab.dns().answer("peer.test", one_second_address(10));
        let pod = lab.pod("shop", "tunnel");
        lab.write_pod(&pod, &[("allow", "peer.test:4000/udp")]);
        let agent = lab.start_agent(&[&pod]);
        let socket = pod.udp_socket((server(10), 4000));
        eventually("a flow is open within the TTL", || {
            assert_eq!(pod.lookup("peer.test"), [server(10)]);
            holds(echo_on(&socket, b"handshake", SHORT))
        });
        assert!(echo_on(&socket, b"and again", DEADLINE));
        eventually("the address has expired", || {
            // An echo may also be late because the machine is busy.
            let failed = !pod.echo_udp((server(10), 4000), b"new", SHORT);
            let mut denials = agent.denials().into_iter();
            holds(failed && denials.any(|d| d.is(&pod, "expired", server(10), 4000)))
        });
        lab.rewrite(&pod, "flows", |_, flow| {
            flow[..8].copy_from_slice(&nanoseconds(now.saturating_sub(LONG)));
        });
        Self {
            socket,
            agent,
            pod,
            _echo: echo,
            _lab: lab,
        }
    }
}

#[test]
fn a_udp_flow_survives_the_configured_idle_time() {
    let silent = IdleFlow::new(&[("limits.udpIdle", "1h")]);
    assert!(
        echo_on(&silent.socket, b"still here", DEADLINE),
        "the flow was forgotten"
    );
}

#[test]
fn after_a_longer_idle_time_a_udp_flow_is_denied_with_its_expired_name() {
    let silent = IdleFlow::new(&[]);
    let mark = silent.agent.mark();
    assert!(
        !echo_on(&silent.socket, b"still here", SHORT),
        "the flow is remembered"
    );
    let denied = silent
        .agent
        .wait_denial_from(mark, "an expired address", |d| {
            d.is(&silent.pod, "expired", server(10), 4000)
        });
    assert_eq!(denied.dst_names, ["peer.test"]);
}

#[test]
fn a_denial_names_an_expired_address_long_after_its_ttl() {
    let now = boot_time();
    let lab = Lab::builder()
        .exact_lifetimes()
        .config("limits.addressesPerPod", 8)
        // The test changes the lifetimes that the agent has written. Those that the programs learn would count besides.
        .config("dns.learn", "agent")
        .build();
    let pod = lab.pod("shop", "cart");
    let hosts = [11, 12, 13];
    let names = hosts.map(|host| format!("n{host}.test"));
    for (name, host) in names.iter().zip(hosts) {
        lab.dns().answer(name, one_second_address(host));
    }
    lab.dns().addresses("alive.test", &[server(20)]);
    lab.write_pod(&pod, &[("allow", "*.test:443")]);
    let mut agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    for name in &names {
        pod.lookup(name);
    }
    pod.lookup("alive.test");
    assert!(agent.stop().success());
    // The address of host 13 expired last.
    let expired = |host: u8| {
        let since = LONG + Duration::from_secs(20 - u64::from(host));
        nanoseconds(now.saturating_sub(since))
    };
    lab.rewrite(&pod, "allow", |key, entry| {
        if hosts.contains(&key[15]) {
            entry[32..40].copy_from_slice(&expired(key[15]));
        }
    });
    lab.rewrite(&pod, "names", |key, entry| {
        if hosts.contains(&key[15]) {
            entry[..8].copy_from_slice(&expired(key[15]));
        }
    });

    let agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    eventually("expired addresses fill a quarter of the map", || {
        holds(lab.allowed(&pod).len() == 3)
    });
    for host in [12, 13] {
        let denied = agent.denies_tcp(&pod, (server(host), 443), "expired");
        assert_eq!(denied.dst_names, [format!("n{host}.test")]);
        let (code, explained) = lab.explain(&pod, &format!("203.0.113.{host}:443"));
        assert_eq!((code, explained["reason"].as_str()), (1, Some("expired")));
        assert_eq!(
            explained["addresses"][0]["names"][0],
            format!("n{host}.test")
        );
    }
    agent.denies_tcp(&pod, (server(11), 443), "address_not_learned");
    let status = lab.status_of(&pod);
    let resolved = status["resolved"].as_array().expect("a list of names");
    let of = |name: &str| resolved.iter().find(|resolved| resolved["name"] == name);
    let expired = of("n13.test").expect("status has the expired name");
    assert_eq!(expired["addresses"][0]["remaining_seconds"], 0);
    assert!(of("n11.test").is_none(), "{status}");
}
