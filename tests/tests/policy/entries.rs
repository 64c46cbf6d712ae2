//! The annotations take effect at once.

use std::net::IpAddr;

use egress_tests::{
    DEADLINE, Lab, SHORT,
    addresses::{numbered, server, server6},
    dns::{RecordType, ResponseCode},
    echo_on, eventually, exchange, holds,
};

#[test]
fn an_added_entry_applies_at_once_to_names_already_resolved() {
    let lab = Lab::new();
    let _servers = [lab.serve_tcp(443), lab.serve_tcp(8080)];
    lab.dns().addresses("shop.test", &[server(10)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    pod.lookup("shop.test");
    let mut open = pod.talks_tcp((server(10), 443));
    agent.denies_tcp(&pod, (server(10), 8080), "port_not_allowed");

    agent.applies_policy_after(&pod, || {
        lab.write_pod(&pod, &[("allow", "shop.test:443 shop.test:8080")]);
    });
    pod.talks_tcp((server(10), 8080));
    assert!(
        exchange(&mut open, b"still here", DEADLINE),
        "the edit cut an allowed connection"
    );
    assert_eq!(lab.dns().queries_for("shop.test"), 1);
}

#[test]
fn a_removed_entry_cuts_its_connections_at_once() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    let _echo = lab.serve_udp(443);
    lab.dns().addresses("shop.test", &[server(10)]);
    lab.dns().addresses("kept.test", &[server(20)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443 kept.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    pod.lookup("shop.test");
    pod.lookup("kept.test");
    let mut cut = pod.talks_tcp((server(10), 443));
    let mut kept = pod.talks_tcp((server(20), 443));
    let cut_flow = pod.udp_socket((server(10), 443));
    assert!(echo_on(&cut_flow, b"before", DEADLINE));

    agent.applies_policy_after(&pod, || lab.write_pod(&pod, &[("allow", "kept.test:443")]));
    assert!(
        !exchange(&mut cut, b"after", SHORT),
        "an open connection was not cut"
    );
    assert!(
        !echo_on(&cut_flow, b"after", SHORT),
        "an open flow was not cut"
    );
    assert!(pod.connect_tcp((server(10), 443), SHORT).is_err());
    assert!(
        exchange(&mut kept, b"after", DEADLINE),
        "the edit cut an allowed connection"
    );
    agent.denies_name(&pod, "shop.test");
}

#[test]
fn a_deny_entry_added_to_a_running_pod_cuts_its_connections() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "203.0.113.0/24:443")]);
    let agent = lab.start_agent(&[&pod]);
    let mut stream = pod.talks_tcp((server(10), 443));
    agent.applies_policy_after(&pod, || {
        lab.write_pod(
            &pod,
            &[("allow", "203.0.113.0/24:443"), ("deny", "203.0.113.10")],
        );
    });
    assert!(
        !exchange(&mut stream, b"after", SHORT),
        "an open connection was not cut"
    );
    agent.denies_tcp(&pod, (server(10), 443), "deny_rule");
    pod.talks_tcp((server(11), 443));
}

#[test]
fn a_namespace_grants_to_all_its_pods_and_to_no_other() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("all.test", &[server(1)]);
    lab.dns().addresses("own.test", &[server(2)]);
    let (plain, more) = (lab.pod("shop", "plain"), lab.pod("shop", "more"));
    let stranger = lab.pod("other", "stranger");
    lab.write_namespace("shop", &[("allow", "all.test:443")]);
    lab.write_pod(&plain, &[]);
    lab.write_pod(&more, &[("allow", "own.test:443")]);
    lab.write_pod(&stranger, &[("allow", "own.test:443")]);
    let agent = lab.start_agent(&[&plain, &more, &stranger]);

    for pod in [&plain, &more] {
        assert_eq!(pod.lookup("all.test"), [server(1)]);
        pod.talks_tcp((server(1), 443));
    }
    more.lookup("own.test");
    more.talks_tcp((server(2), 443));
    agent.denies_name(&plain, "own.test");
    agent.denies_name(&stranger, "all.test");

    // An edit of the namespace applies to its running pods.
    agent.applies_policy_after(&plain, || {
        lab.write_namespace("shop", &[("allow", "all.test:443 own.test:443")]);
    });
    plain.lookup("own.test");
    plain.talks_tcp((server(2), 443));

    // Deny beats allow, on the pod and on the namespace.
    agent.applies_policy_after(&more, || {
        lab.write_namespace("shop", &[("allow", "all.test:443"), ("deny", "own.test")]);
    });
    agent.denies_name(&more, "own.test");
}

#[test]
fn with_narrow_a_pod_gets_only_entries_that_its_namespace_covers() {
    let lab = Lab::builder().config("podAnnotations", "narrow").build();
    let _servers = [lab.serve_tcp(443), lab.serve_tcp(22)];
    lab.dns().addresses("*.corp.test", &[server(1)]);
    let pod = lab.pod("shop", "cart");
    lab.write_namespace("shop", &[("allow", "*.corp.test:443")]);
    let entries = "a.corp.test:443 a.corp.test:22 evil.test:443 203.0.113.9";
    lab.write_pod(&pod, &[("allow", entries), ("mode", "off")]);
    let agent = lab.start_agent(&[&pod]);

    assert_eq!(pod.lookup("a.corp.test"), [server(1)]);
    pod.talks_tcp((server(1), 443));
    agent.denies_tcp(&pod, (server(1), 22), "port_not_allowed");
    agent.denies_name(&pod, "evil.test");
    agent.denies_tcp(&pod, (server(9), 22), "no_rule");
}

#[test]
fn with_ignore_a_pod_has_its_namespaces_rules() {
    let lab = Lab::builder().config("podAnnotations", "ignore").build();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("all.test", &[server(1)]);
    let pod = lab.pod("shop", "cart");
    lab.write_namespace("shop", &[("allow", "all.test:443")]);
    lab.write_pod(&pod, &[("allow", "evil.test:443"), ("mode", "off")]);
    let agent = lab.start_agent(&[&pod]);
    pod.lookup("all.test");
    pod.talks_tcp((server(1), 443));
    agent.denies_name(&pod, "evil.test");
}

#[test]
fn audit_mode_reports_denials_and_stops_nothing() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("shop.test", &[server(10)]);
    lab.dns().addresses("evil.test", &[server(66)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443"), ("mode", "audit")]);
    let agent = lab.start_agent(&[&pod]);

    assert_eq!(pod.lookup("evil.test"), [server(66)]);
    pod.talks_tcp((server(66), 443));
    pod.talks_tcp((server(99), 443));
    for to in [server(66), server(99)] {
        let denial = agent.wait_denial("what would be denied", |d| {
            d.is(&pod, "address_not_learned", to, 443)
        });
        assert_eq!(
            (denial.event.as_str(), denial.verdict.as_str()),
            ("would_deny", "audited")
        );
    }
    let denial = agent.wait_denial("the query", |d| d.is_question(&pod, "evil.test"));
    assert_eq!(
        (denial.event.as_str(), denial.verdict.as_str()),
        ("would_deny", "audited")
    );

    // An allowed name is learned, and not reported.
    assert_eq!(pod.lookup("shop.test"), [server(10)]);
    eventually("the audited response is learned", || {
        holds(lab.allowed(&pod).contains_key(&server(10)))
    });
    pod.talks_tcp((server(10), 443));
    // When a later connection has its line, a line for this one would be there too.
    pod.talks_tcp((server(98), 443));
    agent.wait_denial("the last one", |d| d.dst_ip == Some(server(98)));
    assert!(agent.denials().iter().all(|d| d.dst_ip != Some(server(10))));
}

#[test]
fn a_pod_moves_between_modes_while_it_runs() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    let rules = ("allow", "shop.test:443");
    lab.write_pod(&pod, &[rules, ("mode", "audit")]);
    let agent = lab.start_agent(&[&pod]);
    pod.talks_tcp((server(99), 443));
    agent.applies_policy_after(&pod, || lab.write_pod(&pod, &[rules, ("mode", "enforce")]));
    agent.denies_tcp(&pod, (server(99), 443), "address_not_learned");
    lab.write_pod(&pod, &[rules, ("mode", "off")]);
    eventually("the pod is not enforced", || {
        holds(pod.connect_tcp((server(99), 443), SHORT).is_ok())
    });
}

#[test]
fn a_pod_that_is_off_or_without_annotations_is_not_enforced() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("any.test", &[server(5)]);
    let (off, silent) = (lab.pod("shop", "off"), lab.pod("shop", "silent"));
    let enforced = lab.pod("shop", "enforced");
    lab.write_pod(&off, &[("allow", "shop.test:443"), ("mode", "off")]);
    lab.write_pod(&silent, &[]);
    lab.write_pod(&enforced, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&enforced]);
    agent.denies_tcp(&enforced, (server(5), 443), "address_not_learned");
    for pod in [&off, &silent] {
        assert_eq!(pod.lookup("any.test"), [server(5)]);
        pod.talks_tcp((server(5), 443));
    }
}

#[test]
fn with_default_mode_enforce_a_pod_without_annotations_is_closed() {
    let lab = Lab::builder().config("defaultMode", "enforce").build();
    let pod = lab.pod("shop", "silent");
    lab.write_pod(&pod, &[]);
    let agent = lab.start_agent(&[&pod]);
    agent.denies_tcp(&pod, (server(5), 443), "no_rule");
    agent.denies_name(&pod, "any.test");
}

#[test]
fn an_empty_allow_closes_a_pod_and_a_deny_alone_leaves_it_open() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("fine.test", &[server(1)]);
    lab.dns().addresses("bad.test", &[server(2)]);
    let (closed, open) = (lab.pod("shop", "closed"), lab.pod("shop", "open"));
    lab.write_pod(&closed, &[("allow", "")]);
    lab.write_pod(&open, &[("deny", "bad.test 203.0.113.64/26:443")]);
    let agent = lab.start_agent(&[&closed, &open]);

    agent.denies_tcp(&closed, (server(1), 443), "no_rule");
    agent.denies_name(&closed, "fine.test");

    assert_eq!(open.lookup("fine.test"), [server(1)]);
    open.talks_tcp((server(1), 443));
    open.talks_tcp((server(3), 443));
    agent.denies_name(&open, "bad.test");
    agent.denies_tcp(&open, (server(100), 443), "deny_rule");
    assert_eq!(lab.dns().queries_for("bad.test"), 0);
}

#[test]
fn deny_beats_allow() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("*.example.test", &[server(1)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(
        &pod,
        &[
            (
                "allow",
                "*.example.test:443 203.0.113.0/24:443 2001:db8::/32",
            ),
            (
                "deny",
                "gist.example.test 203.0.113.128/25 [2001:db8::66]:443",
            ),
        ],
    );
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup("api.example.test"), [server(1)]);
    agent.denies_name(&pod, "gist.example.test");
    pod.talks_tcp((server(1), 443));
    let denial = agent.denies_tcp(&pod, (server(200), 443), "deny_rule");
    let rule = denial.rule.expect("the line names the entry that denies");
    assert!(rule.contains("203.0.113.128/25"), "{rule}");
    pod.talks_tcp((server6(1), 443));
    agent.denies_tcp(&pod, (server6(0x66), 443), "deny_rule");
}

#[test]
fn addresses_prefixes_ports_and_protocols_match_exactly() {
    let lab = Lab::new();
    let _servers = [22, 443, 8000, 8050, 8100].map(|port| lab.serve_tcp(port));
    let _echoes = [443, 8000, 8050].map(|port| lab.serve_udp(port));
    let pod = lab.pod("shop", "cart");
    let entries = "203.0.113.7:22/tcp\n198.18.0.0/24:443\n198.18.0.128/25:22\n\
                   [2001:db8::7]:8000-8100/udp, 2001:db8:1::/48\n203.0.113.8:8000-8100";
    lab.write_pod(&pod, &[("allow", entries)]);
    let agent = lab.start_agent(&[&pod]);
    let subnet6: IpAddr = "2001:db8:1:2::3".parse().expect("an address");

    for to in [
        (server(7), 22),
        (numbered(5), 443),
        (numbered(130), 443),
        (numbered(130), 22),
        (subnet6, 22),
        (server(8), 8000),
        (server(8), 8100),
    ] {
        pod.talks_tcp(to);
    }
    for to in [
        (server6(7), 8000),
        (server6(7), 8050),
        (subnet6, 443),
        (server(8), 8050),
    ] {
        pod.talks_udp(to);
    }
    agent.denies_each_tcp(
        &pod,
        &[
            ((server(7), 443), "port_not_allowed"),
            ((numbered(5), 22), "port_not_allowed"),
            ((server6(7), 8050), "port_not_allowed"),
            ((server(8), 443), "port_not_allowed"),
            ((numbered(256), 443), "no_rule"),
            ((server6(8), 443), "no_rule"),
        ],
    );
    agent.denies_udp(&pod, (server6(7), 443), "port_not_allowed");
    agent.denies_udp(&pod, (server(7), 443), "port_not_allowed");
}

#[test]
fn a_star_allows_its_port_everywhere_and_no_other() {
    let lab = Lab::new();
    let _servers = [443, 8101].map(|port| lab.serve_tcp(port));
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*:8101/tcp")]);
    let agent = lab.start_agent(&[&pod]);
    pod.talks_tcp((server(99), 8101));
    pod.talks_tcp((server6(99), 8101));
    agent.denies_tcp(&pod, (server(99), 443), "port_not_allowed");
}

#[test]
fn internal_addresses_need_no_entry_and_can_still_be_denied() {
    let lab = Lab::builder()
        .config("ranges.internal", vec!["198.18.0.0/16"])
        .build();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443"), ("deny", "198.18.0.7")]);
    let agent = lab.start_agent(&[&pod]);
    pod.talks_tcp((numbered(1), 443));
    agent.denies_tcp(&pod, (numbered(7), 443), "deny_rule");
    agent.denies_tcp(&pod, (numbered(70_000), 443), "address_not_learned");
}

#[test]
fn protected_addresses_are_allowed_only_by_their_exact_address() {
    let lab = Lab::builder()
        .config("ranges.protected", vec!["203.0.113.200/32"])
        .build();
    let _web = lab.serve_tcp(80);
    let metadata: IpAddr = "169.254.169.254".parse().expect("an address");
    let (broad, exact) = (lab.pod("shop", "broad"), lab.pod("shop", "exact"));
    lab.write_pod(&broad, &[("allow", "*:80")]);
    lab.write_pod(&exact, &[("allow", "169.254.169.254:80 203.0.113.200:80")]);
    let agent = lab.start_agent(&[&broad, &exact]);
    broad.talks_tcp((server(1), 80));
    agent.denies_tcp(&broad, (metadata, 80), "protected");
    agent.denies_tcp(&broad, (server(200), 80), "protected");
    exact.talks_tcp((metadata, 80));
    exact.talks_tcp((server(200), 80));
}

#[test]
fn every_name_may_be_queried_when_every_destination_is_allowed() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("any.test", &[server(5)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*:443")]);
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(
        pod.resolve("any.test", RecordType::A).code,
        ResponseCode::NoError
    );
    pod.talks_tcp((server(5), 443));
    agent.denies_tcp(&pod, (server(5), 22), "port_not_allowed");
}
