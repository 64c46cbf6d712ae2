use std::net::{Ipv4Addr, Ipv6Addr};

use egress_common::address;

use super::*;

const RESOLVERS: &str = "dns: {resolvers: [10.96.0.10]}\n";

fn config(text: &str) -> Config {
    Config::from_yaml(text).unwrap()
}

fn error(text: &str) -> String {
    Config::from_yaml(text).unwrap_err().to_string()
}

fn prefix(text: &str) -> Prefix {
    Prefix::parse(text).unwrap()
}

/// What the kernel's longest-prefix match would say.
fn kinds(config: &Config, ip: IpAddr) -> u64 {
    let address = crate::policy::prefix::to_mapped(ip);
    let differing = |network| u128::from_be_bytes(network) ^ u128::from_be_bytes(address);
    config
        .ranges()
        .into_iter()
        .filter(|(network, prefix_len, _)| differing(*network).leading_zeros() >= *prefix_len)
        .max_by_key(|(_, prefix_len, _)| *prefix_len)
        .map_or(0, |(_, _, kinds)| kinds)
}

/// The reference for users.
const REFERENCE: &str = include_str!("../../../docs/configuration.md");

#[test]
fn the_reference_has_the_documented_example_and_every_key() {
    let example = REFERENCE
        .split_once("```yaml\n")
        .and_then(|(_, rest)| rest.split_once("```"))
        .expect("a YAML example")
        .0;
    assert_eq!(config(example), config(&documented()));
    for key in [
        "node",
        "defaultMode",
        "podAnnotations",
        "onDeny",
        "bpffs",
        "ranges.internal",
        "ranges.allowInternal",
        "ranges.protected",
        "dns.resolvers",
        "dns.clusterDomain",
        "dns.minTtl",
        "dns.maxTtl",
        "dns.grace",
        "dns.guard",
        "dns.refusal",
        "limits.addressesPerPod",
        "limits.flowsPerPod",
        "cluster.dnsService",
        "cluster.kubeletConfig",
        "quarantine.enabled",
        "quarantine.exclude",
        "http",
        "socket",
    ] {
        assert!(REFERENCE.contains(&format!("\n| `{key}` |")), "{key}");
    }
    for (prefix, _) in PROTECTED {
        assert!(REFERENCE.contains(&format!("\n| `{prefix}` |")), "{prefix}");
    }
}

/// The example in the module's documentation.
fn documented() -> String {
    let lines: Vec<&str> = include_str!("mod.rs")
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .skip_while(|line| !line.contains("```yaml"))
        .skip(1)
        .take_while(|line| !line.contains("```"))
        .map(|line| line.strip_prefix(' ').unwrap_or(line))
        .collect();
    lines.join("\n")
}

#[test]
fn the_documented_example_says_every_key_and_parses() {
    assert_eq!(
        config(&documented()),
        Config {
            node: "node-1".to_owned(),
            default_mode: Mode::Off,
            pod_annotations: PodAnnotations::Grant,
            ranges: Ranges {
                internal: vec![prefix("10.0.0.0/8")],
                allow_internal: true,
                protected: vec![prefix("192.0.2.0/24")],
            },
            dns: Dns {
                resolvers: vec![Ipv4Addr::new(10, 96, 0, 10).into()],
                cluster_domain: exact_name("cluster.local").unwrap(),
                min_ttl: Duration::from_secs(60),
                max_ttl: Duration::from_secs(86_400),
                grace: Duration::from_secs(30),
                guard: true,
                refusal: Refusal::NxDomain,
            },
            on_deny: OnDeny::Drop,
            bpffs: "/sys/fs/bpf".into(),
            limits: Limits {
                addresses_per_pod: 4096,
                flows_per_pod: 16_384,
            },
            cluster: Cluster {
                dns_service: ("kube-system".to_owned(), "kube-dns".to_owned()),
                kubelet_config: "/var/lib/kubelet/config.yaml".into(),
            },
            quarantine: Quarantine {
                enabled: true,
                exclude: vec!["docker*".to_owned(), "br-*".to_owned()],
            },
            serve: Serve {
                http: Some(([127, 0, 0, 1], 9465).into()),
                socket: "/run/egress-agent/agent.sock".into(),
            },
        }
    );
}

#[test]
fn only_the_resolvers_have_no_default() {
    let minimal = config(RESOLVERS);
    let documented = config(&documented());
    assert!(!minimal.node.is_empty());
    assert_eq!(
        minimal,
        Config {
            node: minimal.node.clone(),
            ranges: Ranges {
                internal: vec![],
                protected: vec![],
                ..documented.ranges.clone()
            },
            quarantine: Quarantine {
                exclude: minimal.quarantine.exclude.clone(),
                ..documented.quarantine.clone()
            },
            serve: Serve {
                http: None,
                ..documented.serve.clone()
            },
            ..documented
        }
    );
}

#[test]
fn every_choice_can_be_made() {
    let config = config(
        "defaultMode: enforce\npodAnnotations: narrow\nonDeny: reject\nbpffs: /run/bpf\n\
         ranges: {allowInternal: false}\nlimits: {addressesPerPod: 100, flowsPerPod: 64}\ndns:\n  resolvers:\n  - \
         ::1\n  - 10.0.0.1\n  clusterDomain: Example.Org.\n  minTtl: 90\n  maxTtl: 2h\n  grace: \
         5m\n  guard: false\n  refusal: refused\n",
    );
    assert_eq!(config.default_mode, Mode::Enforce);
    assert_eq!(config.pod_annotations, PodAnnotations::Narrow);
    assert_eq!(config.on_deny, OnDeny::Reject);
    assert_eq!(config.bpffs, PathBuf::from("/run/bpf"));
    assert!(!config.ranges.allow_internal);
    assert_eq!(config.limits.addresses_per_pod, 100);
    assert_eq!(config.limits.flows_per_pod, 64);
    assert_eq!(
        config.dns.resolvers,
        [IpAddr::from([10, 0, 0, 1]), Ipv6Addr::LOCALHOST.into()]
    );
    assert_eq!(config.dns.cluster_domain.to_string(), "example.org");
    assert_eq!(config.dns.min_ttl, Duration::from_secs(90));
    assert_eq!(config.dns.max_ttl, Duration::from_secs(7200));
    assert_eq!(config.dns.grace, Duration::from_secs(300));
    assert!(!config.dns.guard);
    assert_eq!(config.dns.refusal, Refusal::Refused);
    let settings = config.policy_settings();
    assert!(!settings.guard && !settings.allow_internal);
    assert_eq!(settings.default_mode, Mode::Enforce);
    assert!(settings.protected.contains(&prefix("169.254.0.0/16")));
}

#[test]
fn missing_resolvers_are_explained() {
    let expected = "dns.resolvers is missing: a pod learns addresses only from the answers of the \
                    resolvers listed here; list the addresses in the pods' /etc/resolv.conf, such \
                    as the cluster IP of kube-dns";
    for text in [
        "",
        "# nothing\n",
        "dns:\n",
        "dns: {}",
        "dns: {resolvers: []}",
    ] {
        let error = config(text).check_resolvers().expect_err("no resolvers");
        assert_eq!(error.to_string(), expected, "{text:?}");
    }
}

#[test]
fn an_error_names_the_key_and_the_place() {
    for (text, expected) in [
        (
            "node: n1\ndefautMode: off\n",
            "line 2, column 1: defautMode: is not a known key: expected one of node, defaultMode, \
             podAnnotations, ranges, dns, onDeny, bpffs, limits, cluster, quarantine, http, socket",
        ),
        (
            "dns:\n  resolvers: [10.0.0.1]\n  ttl: 5\n",
            "line 3, column 3: dns.ttl: is not a known key: expected one of resolvers, \
             clusterDomain, minTtl, maxTtl, grace, guard, refusal",
        ),
        (
            "dns:\n  resolvers:\n  - 10.0.0.1\n  - dns.example\n",
            "line 4, column 5: dns.resolvers: `dns.example` is not an IP address: expected one \
             without port, and no name",
        ),
        (
            "dns: {resolvers: ['10.0.0.1:53']}",
            "line 1, column 19: dns.resolvers: `10.0.0.1:53` is not an IP address: expected one \
             without port, and no name",
        ),
        (
            "dns: {resolvers: 10.0.0.1}",
            "line 1, column 18: dns.resolvers: `10.0.0.1` is not a list: expected values in \
             brackets or behind dashes",
        ),
        (
            "dns: {resolvers: [0.0.0.0]}",
            "line 1, column 19: dns.resolvers: `0.0.0.0` is not the address of a machine",
        ),
        (
            "defaultMode: on",
            "line 1, column 14: defaultMode: `on` is not one of off, audit, enforce",
        ),
        (
            "defaultMode: no",
            "line 1, column 14: defaultMode: `no` is not one of off, audit, enforce",
        ),
        (
            "onDeny: [drop]",
            "line 1, column 9: onDeny: a list is not one of drop, reject",
        ),
        (
            "ranges:\n  internal:\n    - 10.0.0.1/8\n",
            "line 3, column 7: ranges.internal: `10.0.0.1/8` has bits set outside its prefix: the \
             network is 10.0.0.0/8",
        ),
        (
            "ranges: {allowInternal: maybe}",
            "line 1, column 25: ranges.allowInternal: `maybe` is neither true nor false",
        ),
        (
            "dns: {resolvers: [10.0.0.1], grace: 30 seconds}",
            "line 1, column 37: dns.grace: `30 seconds` is not a duration: expected seconds, or a \
             number with s, m, h or d, of at most 2147483647 seconds",
        ),
        (
            "dns: {resolvers: [10.0.0.1], maxTtl: -1}",
            "line 1, column 38: dns.maxTtl: `-1` is not a duration: expected seconds, or a number \
             with s, m, h or d, of at most 2147483647 seconds",
        ),
        (
            "dns: {resolvers: [10.0.0.1], minTtl: 2d}",
            "line 1, column 38: dns.minTtl: `2d` leaves dns.minTtl, 172800 s, above dns.maxTtl, \
             86400 s",
        ),
        (
            "dns: {resolvers: [10.0.0.1], maxTtl: 30}",
            "line 1, column 38: dns.maxTtl: `30` leaves dns.minTtl, 60 s, above dns.maxTtl, 30 s",
        ),
        (
            "dns: {resolvers: [10.0.0.1], clusterDomain: '*.local'}",
            "line 1, column 45: dns.clusterDomain: `*.local` is a wildcard: expected a name",
        ),
        (
            "dns: {resolvers: [10.0.0.1]}\nlimits: {addressesPerPod: 0}",
            "line 2, column 27: limits.addressesPerPod: `0` is not a number from 1 to 1048576",
        ),
        (
            "dns: {resolvers: [10.0.0.1]}\nlimits: {flowsPerPod: 63}",
            "line 2, column 23: limits.flowsPerPod: `63` is not a number from 64 to 1048576",
        ),
        (
            "bpffs: sys/fs/bpf",
            "line 1, column 8: bpffs: `sys/fs/bpf` is not an absolute path",
        ),
        (
            "node: 12",
            "line 1, column 7: node: `12` is not a text: put it in quotes",
        ),
        (
            "- a",
            "line 1, column 1: the file: a list is not a mapping of keys to values",
        ),
    ] {
        let text = if text.contains("resolvers") || text.starts_with('-') {
            text.to_owned()
        } else {
            format!("{text}\n{RESOLVERS}")
        };
        assert_eq!(error(&text), expected, "{text:?}");
    }
}

#[test]
fn text_that_is_no_yaml_names_the_place() {
    for (text, expected) in [
        (
            "dns: {resolvers: [10.0.0.1]\nnode: x",
            "while parsing a flow mapping, did not find expected ',' or '}' at line 2, column 1",
        ),
        (
            "node: a\nnode: b\n",
            "duplicate mapping key: node not allowed here at line 2, column 1",
        ),
        (
            "node: a\n---\nnode: b\n",
            "only single YAML document expected but multiple found at line 3, column 1",
        ),
    ] {
        assert_eq!(error(text), expected, "{text:?}");
    }
}

#[test]
fn the_metadata_service_is_protected_in_every_form() {
    let config = config(RESOLVERS);
    for address in [
        "169.254.169.254",
        "127.0.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "100.100.100.200",
        "168.63.129.16",
        "::",
        "::1",
        "fe80::1",
        "ff02::1",
        "fd00:ec2::254",
        "64:ff9b::169.254.169.254",
        "64:ff9b::127.0.0.1",
    ] {
        assert_eq!(
            kinds(&config, address.parse().unwrap()),
            RANGE_PROTECTED,
            "{address}"
        );
    }
    for address in ["8.8.8.8", "2001:db8::1", "64:ff9b::8.8.8.8", "169.253.0.1"] {
        assert_eq!(kinds(&config, address.parse().unwrap()), 0, "{address}");
    }
}

#[test]
fn an_address_may_be_of_several_kinds() {
    let config = config(
        "ranges: {internal: [10.0.0.0/8, '::/0'], protected: [10.9.0.0/16, fd00::/8]}\n\
         dns: {resolvers: [169.254.20.10, 10.96.0.10]}",
    );
    let kinds = |address: &str| kinds(&config, address.parse().unwrap());
    assert_eq!(kinds("169.254.20.10"), RANGE_RESOLVER | RANGE_PROTECTED);
    assert_eq!(kinds("10.96.0.10"), RANGE_RESOLVER | RANGE_INTERNAL);
    assert_eq!(kinds("10.96.0.11"), RANGE_INTERNAL);
    assert_eq!(kinds("10.9.0.1"), RANGE_PROTECTED | RANGE_INTERNAL);
    assert_eq!(kinds("fd00::1"), RANGE_PROTECTED | RANGE_INTERNAL);
    assert_eq!(kinds("64:ff9b::10.9.0.1"), RANGE_PROTECTED | RANGE_INTERNAL);
    assert_eq!(kinds("8.8.8.8"), 0, "all of IPv6 is not IPv4");
}

#[test]
fn ranges_are_as_the_kernel_wants_them() {
    let ranges = config(RESOLVERS).ranges();
    assert!(ranges.is_sorted());
    assert!(ranges.contains(&(address::from_v4([10, 96, 0, 10]), 128, RANGE_RESOLVER)));
    assert!(ranges.contains(&(address::from_v4([169, 254, 0, 0]), 112, RANGE_PROTECTED)));
}

#[test]
fn more_ranges_than_the_map_holds_are_an_error() {
    let list: Vec<String> = (0..4096)
        .map(|n| format!("10.{}.{}.0/24", n / 256, n % 256))
        .collect();
    let message = error(&format!(
        "ranges: {{internal: [{}]}}\n{RESOLVERS}",
        list.join(", ")
    ));
    assert!(message.starts_with("ranges: 41"), "{message}");
    assert!(message.ends_with("prefixes, the built-in ones included; the limit is 4096"));
}
