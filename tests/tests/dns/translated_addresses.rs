//! An IPv4 address and its NAT64 translations (RFC 6052) are the same host to a policy.
//!
//! No translator runs in the laboratory: `outside` answers on the translated addresses itself, and the tests
//! check only which packets leave the pod.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use egress_tests::{
    Lab,
    addresses::{numbered, server},
    dns::RecordType,
};

/// The prefixes that the tests configure: one of each length of RFC 6052, besides the well-known one.
const PREFIXES: [(&str, u32); 6] = [
    ("2001:db8::", 32),
    ("2001:db9:4000::", 40),
    ("2001:db9:48::", 48),
    ("2001:db9:56:5600::", 56),
    ("2001:db9:64:64::", 64),
    ("2001:db9:96::", 96),
];

const WELL_KNOWN: (&str, u32) = ("64:ff9b::", 96);

/// The translation of an IPv4 address by RFC 6052, section 2.2. `reserved` replaces the zeros: the octet from
/// bit 64 on, and the suffix.
fn image((prefix, length): (&str, u32), v4: IpAddr, reserved: u8) -> IpAddr {
    let IpAddr::V4(v4) = v4 else {
        panic!("{v4} is not an IPv4 address");
    };
    let mut octets = prefix.parse::<Ipv6Addr>().expect("a prefix").octets();
    let mut at = (length / 8) as usize;
    for octet in v4.octets() {
        if at == 8 {
            octets[8] = reserved;
            at += 1;
        }
        octets[at] = octet;
        at += 1;
    }
    for octet in &mut octets[at..] {
        *octet = reserved;
    }
    Ipv6Addr::from(octets).into()
}

/// The 6to4 address of an IPv4 address (RFC 3056).
fn six_to_four(v4: IpAddr) -> IpAddr {
    let IpAddr::V4(v4) = v4 else {
        panic!("{v4} is not an IPv4 address");
    };
    let [a, b, c, d] = v4.octets();
    let word = |a, b| u16::from_be_bytes([a, b]);
    Ipv6Addr::new(0x2002, word(a, b), word(c, d), 0, 0, 0, 0, 1).into()
}

fn lab() -> Lab {
    let prefixes: Vec<String> = PREFIXES
        .iter()
        .map(|(prefix, length)| format!("{prefix}/{length}"))
        .collect();
    Lab::builder()
        .config("ranges.nat64", prefixes)
        .config("ranges.internal", vec!["198.18.0.0/16"])
        .config("ranges.allowInternal", false)
        .build()
}

fn all_images(v4: IpAddr) -> Vec<(IpAddr, u16)> {
    let mut images = vec![(image(WELL_KNOWN, v4, 0), 443)];
    for prefix in PREFIXES {
        images.push((image(prefix, v4, 0), 443));
        if prefix.1 < 96 {
            // Translators ignore these bits (RFC 6052, section 2.3).
            images.push((image(prefix, v4, 0x5a), 443));
        }
    }
    images
}

#[test]
fn a_denied_ipv4_address_is_denied_through_the_well_known_nat64_prefix() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    let (anywhere, open) = (lab.pod("shop", "anywhere"), lab.pod("shop", "open"));
    lab.write_pod(&anywhere, &[("allow", "*:443"), ("deny", "203.0.113.9")]);
    lab.write_pod(&open, &[("deny", "203.0.113.9")]);
    let agent = lab.start_agent(&[&anywhere, &open]);
    for pod in [&anywhere, &open] {
        pod.talks_tcp((image(WELL_KNOWN, server(10), 0), 443));
        agent.denies_tcp(pod, (image(WELL_KNOWN, server(9), 0), 443), "deny_rule");
    }
}

#[test]
fn a_denied_ipv4_address_is_denied_through_every_translator() {
    let lab = lab();
    let _web = lab.serve_tcp(443);
    let (anywhere, open) = (lab.pod("shop", "anywhere"), lab.pod("shop", "open"));
    lab.write_pod(&anywhere, &[("allow", "*:443"), ("deny", "203.0.113.8/30")]);
    lab.write_pod(&open, &[("deny", "203.0.113.8/30")]);
    let agent = lab.start_agent(&[&anywhere, &open]);
    for pod in [&anywhere, &open] {
        pod.talks_tcp((server(12), 443));
        for to in all_images(server(12)) {
            pod.talks_tcp(to);
        }
        pod.talks_tcp((six_to_four(server(12)), 443));
        let mut denied: Vec<_> = all_images(server(9));
        denied.push((six_to_four(server(9)), 443));
        let denied: Vec<_> = denied.into_iter().map(|to| (to, "deny_rule")).collect();
        agent.denies_each_tcp(pod, &denied);
    }
    let told = agent.denials();
    assert!(
        told.iter()
            .all(|d| d.rule.as_deref() == Some("203.0.113.8/30")),
        "{told:?}"
    );
}

#[test]
fn an_allowed_ipv4_address_is_allowed_through_every_translator() {
    let lab = lab();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "203.0.113.8/30:443")]);
    let agent = lab.start_agent(&[&pod]);
    for to in all_images(server(9)) {
        pod.talks_tcp(to);
    }
    let denied = all_images(server(12)).into_iter().map(|to| (to, "no_rule"));
    let mut denied: Vec<_> = denied.collect();
    // A 6to4 address is that of another host behind the IPv4 address.
    denied.push(((six_to_four(server(9)), 443), "no_rule"));
    agent.denies_each_tcp(&pod, &denied);
}

#[test]
fn a_protected_address_is_protected_through_every_translator() {
    let lab = lab();
    let _web = lab.serve_tcp(443);
    let metadata = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));
    let mut images = all_images(metadata);
    images.push((six_to_four(metadata), 443));
    let answers: Vec<IpAddr> = images.iter().map(|(ip, _)| *ip).collect();
    lab.dns().addresses("rebind.test", &answers);
    let (anywhere, named) = (lab.pod("shop", "anywhere"), lab.pod("shop", "named"));
    lab.write_pod(&anywhere, &[("allow", "*")]);
    lab.write_pod(&named, &[("allow", "rebind.test:443")]);
    let agent = lab.start_agent(&[&anywhere, &named]);
    assert_eq!(
        named.resolve("rebind.test", RecordType::AAAA).addresses,
        answers
    );
    let denied: Vec<_> = images.into_iter().map(|to| (to, "protected")).collect();
    for pod in [&anywhere, &named] {
        agent.denies_each_tcp(pod, &denied);
    }
    assert!(lab.allowed(&named).is_empty(), "{:?}", lab.allowed(&named));
}

#[test]
fn an_internal_address_is_internal_through_a_translator() {
    let lab = lab();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", ""), ("deny", "198.18.0.2")]);
    let agent = lab.start_agent(&[&pod]);
    let (passes, denied) = (
        image(WELL_KNOWN, numbered(1), 0),
        image(WELL_KNOWN, numbered(2), 0),
    );
    agent.denies_tcp(&pod, (passes, 443), "no_rule");
    lab.edit_config("ranges.allowInternal", true);
    agent.applies_policy_after(&pod, || agent.reload());
    pod.talks_tcp((passes, 443));
    agent.denies_tcp(&pod, (denied, 443), "deny_rule");
}

#[test]
fn a_translator_that_is_configured_later_applies_at_once() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*:443"), ("deny", "203.0.113.9")]);
    let agent = lab.start_agent(&[&pod]);
    let to = (image(PREFIXES[0], server(9), 0), 443);
    let mut open = pod.talks_tcp(to);
    lab.edit_config("ranges.nat64", vec!["2001:db8::/32"]);
    agent.applies_policy_after(&pod, || agent.reload());
    assert!(
        !egress_tests::exchange(&mut open, b"after", egress_tests::SHORT),
        "the open connection was not cut"
    );
    agent.denies_tcp(&pod, to, "deny_rule");
}

#[test]
fn a_connection_to_the_translation_of_a_new_resolver_is_judged_again() {
    let lab = Lab::builder()
        .config("ranges.internal", vec!["198.18.0.0/16"])
        .config("dns.resolvers", vec!["10.99.0.53", "fd99::53"])
        .build();
    let _web = lab.serve_tcp(443);
    let (plain, listed) = (lab.pod("shop", "plain"), lab.pod("shop", "listed"));
    lab.write_pod(&plain, &[("allow", "shop.test:443")]);
    lab.write_pod(&listed, &[("allow", "203.0.113.9:443")]);
    let agent = lab.start_agent(&[&plain, &listed]);
    let cases = [(&plain, numbered(5)), (&listed, server(9))];
    for (pod, resolver) in cases {
        let to = (image(WELL_KNOWN, resolver, 0), 443);
        let mut open = pod.talks_tcp(to);
        let resolvers = vec!["10.99.0.53".to_owned(), resolver.to_string()];
        lab.edit_config("dns.resolvers", resolvers);
        agent.applies_policy_after(pod, || agent.reload());
        assert!(
            !egress_tests::exchange(&mut open, b"after", egress_tests::SHORT),
            "{resolver}: the open connection was not cut"
        );
        assert!(pod.connect_tcp(to, egress_tests::SHORT).is_err());
    }
}
