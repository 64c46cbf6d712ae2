//! A pod reaches the addresses of its own names, and nothing else.

use std::net::SocketAddr;

use egress_tests::{
    DEADLINE, Lab,
    addresses::{numbered, server, server6},
    dns::{RecordType, ResponseCode, Send, address, cname, hints},
};

/// Extended DNS error "Prohibited" (RFC 8914, section 4.19).
const PROHIBITED: u16 = 18;

#[test]
fn an_allowed_name_is_reached_on_the_first_syn() {
    let lab = Lab::new();
    let web = lab.serve_tcp(443);
    lab.dns().addresses("shop.test", &[server(10), server6(10)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);

    assert_eq!(pod.lookup("shop.test"), [server(10)]);
    pod.talks_tcp((server(10), 443));
    assert_eq!(pod.lookup6("shop.test"), [server6(10)]);
    pod.talks_tcp((server6(10), 443));

    assert_eq!(pod.syn_retransmissions(), 0);
    assert_eq!(web.peers().len(), 2);
    assert!(
        agent.denials().is_empty(),
        "nothing was denied: {:?}",
        agent.denials()
    );
}

#[test]
fn a_thousand_fresh_names_each_connect_on_the_first_syn() {
    const NAMES: u32 = 1000;
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().numbered("fresh.test");
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*.fresh.test:443")]);
    let agent = lab.start_agent(&[&pod]);

    for n in 0..NAMES {
        let name = format!("n{n}.fresh.test");
        assert_eq!(pod.lookup(&name), [numbered(n)], "{name}");
        drop(pod.reach_tcp((numbered(n), 443)));
    }
    assert_eq!(pod.syn_retransmissions(), 0);
    assert_eq!(lab.allowed(&pod).len(), NAMES as usize);
    assert!(
        agent.denials().is_empty(),
        "nothing was denied: {:?}",
        agent.denials()
    );
}

#[test]
fn another_port_of_an_allowed_name_is_denied() {
    let lab = Lab::new();
    let web = lab.serve_tcp(80);
    lab.dns().addresses("shop.test", &[server(10), server6(10)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);

    pod.lookup("shop.test");
    agent.denies_tcp(&pod, (server(10), 80), "port_not_allowed");
    pod.lookup6("shop.test");
    agent.denies_tcp(&pod, (server6(10), 80), "port_not_allowed");
    assert!(web.peers().is_empty(), "the server saw {:?}", web.peers());
}

#[test]
fn a_name_without_an_entry_gets_nxdomain_and_its_query_stays_on_the_node() {
    let lab = Lab::new();
    lab.dns().addresses("shop.test", &[server(10)]);
    lab.dns().addresses("evil.test", &[server(66)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);

    let (answer, denial) = agent.denies_name(&pod, "evil.test");
    assert_eq!(answer.extended_error(), Some(PROHIBITED));
    assert_eq!(denial.dns_type.as_deref(), Some("A"));
    assert_eq!(
        pod.resolve("evil.test", RecordType::TXT).code,
        ResponseCode::NXDomain
    );
    assert_eq!(
        lab.dns().queries_for("evil.test"),
        0,
        "the question left the node"
    );

    // The refusal does not delay the next query, as a search list sends it.
    assert_eq!(pod.lookup("shop.test"), [server(10)]);
}

#[test]
fn a_literal_address_is_denied() {
    let lab = Lab::new();
    let web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);

    agent.denies_tcp(&pod, (server(99), 443), "address_not_learned");
    agent.denies_tcp(&pod, (server6(99), 443), "address_not_learned");
    agent.denies_tcp(&pod, (server(99), 22), "no_rule");
    assert!(web.peers().is_empty(), "the server saw {:?}", web.peers());
}

#[test]
fn a_name_that_one_pod_resolved_opens_nothing_for_another() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("shop.test", &[server(10)]);
    let (cart, mail) = (lab.pod("shop", "cart"), lab.pod("shop", "mail"));
    for pod in [&cart, &mail] {
        lab.write_pod(pod, &[("allow", "shop.test:443")]);
    }
    let agent = lab.start_agent(&[&cart, &mail]);

    assert_eq!(cart.lookup("shop.test"), [server(10)]);
    cart.talks_tcp((server(10), 443));
    agent.denies_tcp(&mail, (server(10), 443), "address_not_learned");
    assert!(lab.allowed(&mail).is_empty());

    assert_eq!(mail.lookup("shop.test"), [server(10)]);
    mail.talks_tcp((server(10), 443));
}

#[test]
fn wildcards_match_names_below_them_and_no_look_alikes() {
    let lab = Lab::new();
    for top in ["test", "example", "xn--bcher-kva.test", "_tcp.under.test"] {
        for name in [top.to_owned(), format!("*.{top}")] {
            lab.dns().addresses(&name, &[server(10)]);
        }
    }
    let pod = lab.pod("shop", "cart");
    let entries = "*.example.test:443, api-*.corp.test:443\nEXACT.test:443 # as people write it\n\
                   bücher.test:443 _srv._tcp.under.test";
    lab.write_pod(&pod, &[("allow", entries)]);
    let _agent = lab.start_agent(&[&pod]);

    for (name, allowed) in [
        ("a.example.test", true),
        ("a.b.c.example.test", true),
        ("A.eXaMpLe.TEST", true),
        ("example.test", false),
        ("evilexample.test", false),
        ("a.evilexample.test", false),
        ("example.test.evil.test", false),
        ("a.example.test.evil.test", false),
        ("a.example", false),
        ("api-1.corp.test", true),
        ("API-eu-west.corp.test", true),
        ("api-1.x.corp.test", false),
        ("x.api-1.corp.test", false),
        ("xapi-1.corp.test", false),
        ("api.corp.test", false),
        ("exact.test", true),
        ("Exact.Test", true),
        ("sub.exact.test", false),
        ("inexact.test", false),
        ("exact.test.evil.test", false),
        ("xn--bcher-kva.test", true),
        ("bucher.test", false),
        ("_srv._tcp.under.test", true),
        ("_srw._tcp.under.test", false),
        ("test", false),
    ] {
        let answer = pod.resolve(name, RecordType::A);
        let expected = if allowed {
            ResponseCode::NoError
        } else {
            ResponseCode::NXDomain
        };
        assert_eq!(answer.code, expected, "{name}");
        assert_eq!(answer.addresses.len(), usize::from(allowed), "{name}");
        assert_eq!(lab.dns().queries_for(name) > 0, allowed, "{name}");
    }
}

#[test]
fn chains_are_followed_from_the_queried_name() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns()
        .answer("one.test", [cname("cdn.example"), address(server(1))]);
    lab.dns().answer(
        "three.test",
        [
            cname("a.example"),
            cname("B.Example"),
            cname("c.example"),
            address(server(3)),
        ],
    );
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "one.test:443 three.test:443")]);
    let agent = lab.start_agent(&[&pod]);

    assert_eq!(pod.lookup("one.test"), [server(1)]);
    pod.talks_tcp((server(1), 443));
    assert_eq!(pod.lookup("three.test"), [server(3)]);
    pod.talks_tcp((server(3), 443));
    // The names in a chain may not be queried by themselves.
    agent.denies_name(&pod, "cdn.example");
}

#[test]
fn a_chain_in_any_order_is_followed() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().answer(
        "shop.test",
        [
            address(server(5)).of("b.example"),
            cname("b.example").of("a.example"),
            cname("a.example").of("shop.test"),
        ],
    );
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    pod.lookup("shop.test");
    pod.talks_tcp((server(5), 443));
}

#[test]
fn all_of_120_addresses_in_one_response_can_be_reached() {
    const ADDRESSES: u32 = 120;
    let lab = Lab::builder().mtu(9000).build();
    let _web = lab.serve_tcp(443);
    let addresses: Vec<_> = (0..ADDRESSES).map(numbered).collect();
    lab.dns().addresses("big.test", &addresses);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "big.test:443")]);
    let _agent = lab.start_agent(&[&pod]);

    assert_eq!(pod.lookup("big.test"), addresses);
    let allowed = lab.allowed(&pod);
    assert!(
        addresses.iter().all(|a| allowed.contains_key(a)),
        "the map has {}",
        allowed.len()
    );
    for address in addresses {
        drop(pod.reach_tcp((address, 443)));
    }
    assert_eq!(pod.syn_retransmissions(), 0);
}

#[test]
fn addresses_of_several_responses_add_up() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    for host in 1..=3 {
        lab.dns().addresses("shop.test", &[server(host)]);
        assert_eq!(pod.lookup("shop.test"), [server(host)]);
    }
    for host in 1..=3 {
        pod.talks_tcp((server(host), 443));
    }
}

#[test]
fn address_hints_of_https_records_can_be_reached() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns()
        .answer("shop.test", [hints(&[server(8), server6(8)])]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    assert_eq!(
        pod.resolve("shop.test", RecordType::HTTPS)
            .message
            .answers
            .len(),
        1
    );
    pod.talks_tcp((server(8), 443));
    pod.talks_tcp((server6(8), 443));
}

#[test]
fn a_response_is_delivered_byte_for_byte() {
    let lab = Lab::new();
    lab.dns().on("shop.test", |asked| {
        vec![Send::answer(asked, &[address(server(10))]).edited(|b| b.extend(b"trailing bytes"))]
    });
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);

    let socket = pod.dns_socket();
    socket.ask(
        egress_tests::addresses::RESOLVER,
        7,
        "sHoP.tEsT",
        RecordType::A,
    );
    let (bytes, from) = socket.receive(DEADLINE).expect("a response");
    assert_eq!(from, SocketAddr::new(egress_tests::addresses::RESOLVER, 53));
    assert!(
        bytes.windows(4).any(|w| w == b"sHoP"),
        "the question's letters were changed"
    );
    assert!(bytes.ends_with(b"trailing bytes"));
    assert_eq!(lab.dns().questions()[0].name, "sHoP.tEsT");
}

#[test]
fn names_in_resolve_can_be_queried_and_allow_nothing() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("db.test", &[server(20)]);
    lab.dns().addresses("other.test", &[server(99)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(
        &pod,
        &[
            ("allow", "203.0.113.20:443"),
            ("resolve", "db.test other.test"),
        ],
    );
    let agent = lab.start_agent(&[&pod]);

    assert_eq!(pod.lookup("db.test"), [server(20)]);
    pod.talks_tcp((server(20), 443));
    assert_eq!(pod.lookup("other.test"), [server(99)]);
    agent.denies_tcp(&pod, (server(99), 443), "no_rule");
    assert!(
        lab.allowed(&pod).is_empty(),
        "an address of a `resolve` entry was learned"
    );
}

#[test]
fn names_of_the_cluster_can_always_be_queried() {
    let lab = Lab::builder()
        .config("dns.clusterDomain", "cluster.test")
        .build();
    lab.dns()
        .addresses("db.shop.svc.cluster.test", &[server(30)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup("db.shop.svc.cluster.test"), [server(30)]);
    agent.denies_tcp(&pod, (server(30), 443), "address_not_learned");
}
