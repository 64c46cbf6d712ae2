//! DNS over TCP of a pod whose manifest names another interface: the old one may be another pod's.

use std::net::IpAddr;

use egress_tests::{
    DEADLINE, Lab, Pod, SHORT,
    addresses::{RESOLVER, server},
    dns::DnsStream,
    frames::{self, Tap},
    rewritten::nft,
};
use etherparse::ip_number::TCP;

/// Waits for a segment from the resolver in which the refused name is.
fn is_repeated(tap: &Tap, pod: &Pod, timeout: std::time::Duration) -> bool {
    let (from, to): (IpAddr, IpAddr) = (RESOLVER, pod.ipv4().into());
    let refusal = |frame: &[u8]| {
        frames::is(frame, from, to, TCP) && frame.windows(4).any(|window| window == b"evil")
    };
    tap.receive(timeout, refusal).is_some()
}

#[test]
fn a_pod_gets_no_repeated_response_of_the_pod_that_had_its_interface() {
    let lab = Lab::new();
    lab.dns().addresses("shop.test", &[server(10)]);
    let (cart, other) = (lab.pod("shop", "cart"), lab.pod("shop", "other"));
    let spare = lab.pod("shop", "spare");
    let allow = &[("allow", "shop.test:443")];
    lab.write_pod(&cart, allow);
    let agent = lab.start_agent(&[&cart]);
    let mut stream = DnsStream::open(&cart, RESOLVER);
    // The pod acknowledges nothing of what follows, so the agent repeats the refusal.
    nft(
        cart.netns(),
        "table inet deaf { chain in { type filter hook input priority filter; tcp sport 53 drop; }; }",
    );
    let tap = Tap::open(cart.netns(), "eth0");
    stream.ask(1, "evil.test");
    assert!(is_repeated(&tap, &cart, DEADLINE), "the refusal");
    assert!(is_repeated(&tap, &cart, DEADLINE), "its repetition");

    lab.write_pod_on(&cart, Some(spare.interface()), allow);
    lab.write_pod_on(&other, Some(cart.interface()), allow);
    agent.wait_enforcing(&other);
    let tap = Tap::open(cart.netns(), "eth0");
    assert!(!is_repeated(&tap, &cart, SHORT * 10), "another pod gets it");
}
