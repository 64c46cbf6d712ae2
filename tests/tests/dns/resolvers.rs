//! The servers that count as resolvers, and changes of them while the agent runs.

use std::{fs, net::IpAddr};

use egress_tests::{
    DEADLINE, Lab, SHORT,
    addresses::{RESOLVER, RESOLVER6, STRANGER, numbered, server, server6},
    dns::{RecordType, ResponseCode},
    eventually, exchange, holds,
};

/// A second resolver, another server than [`RESOLVER`].
const SECOND: &str = "10.99.0.54";

fn texts(addresses: &[IpAddr]) -> Vec<String> {
    addresses.iter().map(ToString::to_string).collect()
}

#[test]
fn every_configured_resolver_can_be_queried_over_ipv4_and_ipv6() {
    let second: IpAddr = SECOND.parse().expect("an address");
    let lab = Lab::builder()
        .config("dns.resolvers", texts(&[RESOLVER, RESOLVER6, second]))
        .build();
    let _web = lab.serve_tcp(443);
    let other = lab.serve_dns(&[second]);
    lab.dns().addresses("shop.test", &[server(1), server6(1)]);
    other.addresses("shop.test", &[server(2)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);

    let asked = |resolver, qtype| pod.resolve_at(resolver, "shop.test", qtype).addresses;
    assert_eq!(asked(RESOLVER, RecordType::A), [server(1)]);
    assert_eq!(asked(second, RecordType::A), [server(2)]);
    assert_eq!(asked(RESOLVER6, RecordType::AAAA), [server6(1)]);
    for address in [server(1), server(2), server6(1)] {
        pod.talks_tcp((address, 443));
    }
    assert_eq!(pod.syn_retransmissions(), 0);
}

#[test]
fn dns_over_tls_is_an_ordinary_connection() {
    let lab = Lab::new();
    let _tls = lab.serve_tcp(853);
    let (may, may_not) = (lab.pod("shop", "may"), lab.pod("shop", "may-not"));
    lab.write_pod(&may, &[("allow", "shop.test:443 10.99.0.53:853")]);
    lab.write_pod(&may_not, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&may, &may_not]);
    // Also to a resolver itself: only its port 53 is held.
    may.talks_tcp((RESOLVER, 853));
    agent.denies_tcp(&may_not, (RESOLVER, 853), "no_rule");
    agent.denies_tcp(&may_not, (STRANGER, 853), "no_rule");
}

#[test]
fn a_change_of_resolvers_applies_while_the_agent_runs() {
    let lab = Lab::builder()
        .config("dns.resolvers", texts(&[RESOLVER]))
        .build();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("shop.test", &[server(1)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup("shop.test"), [server(1)]);
    let mut open = pod.talks_tcp((server(1), 443));
    agent.denies_udp(&pod, (STRANGER, 53), "no_rule");

    lab.edit_config("dns.resolvers", texts(&[STRANGER, RESOLVER6]));
    agent.reload();

    // Queries to the new resolvers are judged, and their responses learned.
    lab.dns().addresses("shop.test", &[server(2), server6(2)]);
    let answer = pod.resolve_at(STRANGER, "shop.test", RecordType::A);
    assert_eq!(answer.addresses, [server(2)]);
    pod.talks_tcp((server(2), 443));
    assert_eq!(pod.lookup6("shop.test"), [server6(2)]);
    pod.talks_tcp((server6(2), 443));
    let refused = pod.resolve_at(STRANGER, "evil.test", RecordType::A);
    assert_eq!(refused.code, ResponseCode::NXDomain);
    assert_eq!(lab.dns().queries_for("evil.test"), 0);
    // The old resolver is an ordinary address.
    agent.denies_udp(&pod, (RESOLVER, 53), "no_rule");
    // Addresses learned from the old resolver stay, and open connections go on.
    pod.talks_tcp((server(1), 443));
    assert!(exchange(&mut open, b"still here", DEADLINE));
}

#[test]
fn an_invalid_configuration_is_refused_and_changes_nothing() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("shop.test", &[server(1)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);

    let good = fs::read_to_string(lab.config_file()).expect("the configuration");
    let broken = good.replace("10.99.0.53", "10.99.0.530");
    fs::write(lab.config_file(), &broken).expect("write the configuration");
    let text = agent.refuses_to_reload();
    for expected in [
        "dns.resolvers",
        "10.99.0.530",
        "is not an IP address",
        "line",
    ] {
        assert!(text.contains(expected), "{expected} is missing: {text}");
    }
    fs::remove_file(lab.config_file()).expect("remove the configuration");
    let text = agent.refuses_to_reload();
    assert!(text.contains("cannot read the configuration"), "{text}");
    fs::write(lab.config_file(), &good).expect("write the configuration");
    lab.edit_config("limits.addressesPerPod", 7);
    let text = agent.refuses_to_reload();
    assert!(text.contains("limits cannot change"), "{text}");

    assert_eq!(pod.lookup("shop.test"), [server(1)]);
    pod.talks_tcp((server(1), 443));
    fs::write(lab.config_file(), good).expect("write the configuration");
    agent.reload();
    assert_eq!(pod.lookup("shop.test"), [server(1)]);
}

#[test]
fn an_edit_of_ranges_applies_at_once_also_to_open_connections() {
    let lab = Lab::builder()
        .config("ranges.internal", vec!["198.18.0.0/16"])
        .build();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("shop.test", &[server(1)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    let mut internal = pod.talks_tcp((numbered(1), 443));
    assert_eq!(pod.lookup("shop.test"), [server(1)]);
    let mut named = pod.talks_tcp((server(1), 443));

    lab.edit_config("ranges.internal", vec!["198.19.0.0/16"]);
    agent.applies_policy_after(&pod, || agent.reload());
    assert!(
        !exchange(&mut internal, b"after", SHORT),
        "a connection to an address that is no longer internal was not cut"
    );
    agent.denies_tcp(&pod, (numbered(1), 443), "address_not_learned");
    pod.talks_tcp((numbered(1 << 16), 443));
    assert!(exchange(&mut named, b"still here", DEADLINE));

    lab.edit_config("ranges.protected", texts(&[server(1)]));
    agent.applies_policy_after(&pod, || agent.reload());
    assert!(
        !exchange(&mut named, b"after", SHORT),
        "the protected address was reached"
    );
    agent.denies_tcp(&pod, (server(1), 443), "protected");
    assert_eq!(pod.lookup("shop.test"), [server(1)]);
    agent.denies_tcp(&pod, (server(1), 443), "protected");
}

#[test]
fn the_guard_and_its_refusal_code_can_be_edited_while_the_agent_runs() {
    let lab = Lab::new();
    lab.dns().addresses("evil.test", &[server(66)]);
    let (pod, silent) = (lab.pod("shop", "cart"), lab.pod("shop", "silent"));
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    lab.write_pod(&silent, &[]);
    let agent = lab.start_agent(&[&pod]);
    let code = || pod.resolve("evil.test", RecordType::A).code;
    assert_eq!(code(), ResponseCode::NXDomain);

    lab.edit_config("dns.refusal", "refused");
    agent.reload();
    assert_eq!(code(), ResponseCode::Refused);
    assert_eq!(lab.dns().queries_for("evil.test"), 0);

    lab.edit_config("dns.guard", false);
    agent.applies_policy_after(&pod, || agent.reload());
    assert_eq!(code(), ResponseCode::NoError);
    assert_eq!(lab.dns().queries_for("evil.test"), 1);

    // A default mode is a policy for pods without annotations.
    assert!(
        silent
            .try_resolve(STRANGER, "x.test", RecordType::A, DEADLINE)
            .is_some()
    );
    lab.edit_config("defaultMode", "enforce");
    agent.reload();
    eventually("the silent pod is closed", || {
        // A response may also be late because the machine is busy.
        let answer = silent.try_resolve(STRANGER, "x.test", RecordType::A, SHORT);
        let mut denials = agent.denials().into_iter();
        holds(answer.is_none() && denials.any(|d| d.is(&silent, "no_rule", STRANGER, 53)))
    });
}

#[test]
fn unanswered_queries_are_reported() {
    let lab = Lab::builder().without_dns().build();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*.shop.test")]);
    let agent = lab.start_agent(&[&pod]);
    let socket = pod.dns_socket();
    for id in 0..20 {
        socket.ask(RESOLVER, id, "a.shop.test", RecordType::A);
    }
    agent.wait_log("that no response arrives", |line| {
        line.contains("no response arrives") && line.contains("shop/cart")
    });
}
