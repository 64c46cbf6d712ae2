use std::net::IpAddr;

use egress_common::{
    address,
    records::{Policy, RANGE_TRANSLATED},
    translation::embedded_v4,
    verdict::{Destination, Translated},
};

use super::*;
use egress_policy::{Autopath, InternalAnswers, Resolver, Translators, exact_name};
use std::time::Duration;

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
    let found = |address: Address| {
        let differing = |network| u128::from_be_bytes(network) ^ u128::from_be_bytes(address);
        let ranges = config.ranges().into_iter();
        ranges
            .filter(|(network, prefix_len, _)| differing(*network).leading_zeros() >= *prefix_len)
            .max_by_key(|(_, prefix_len, _)| *prefix_len)
            .map_or(0, |(_, _, range)| range.kinds)
    };
    let address = egress_policy::prefix::to_mapped(ip);
    let mut destination = Destination {
        ranges: found(address),
        ..Destination::default()
    };
    if let Some(v4) = embedded_v4(&address, destination.ranges) {
        let translated = Translated {
            cidr: 0,
            ranges: found(v4),
        };
        destination.add_translated(&Policy::CLOSED, translated);
    }
    destination.ranges & !RANGE_TRANSLATED
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
        "unenforcedInterfaces",
        "existingConnections",
        "stateDir",
        "bpffs",
        "ranges.internal",
        "ranges.allowInternal",
        "ranges.tunnels",
        "ranges.protected",
        "ranges.nat64",
        "dns.resolvers",
        "dns.clusterDomain",
        "dns.minTtl",
        "dns.maxTtl",
        "dns.grace",
        "dns.internalAnswers",
        "dns.guard",
        "dns.autopath",
        "dns.refusal",
        "limits.addressesPerPod",
        "limits.flowsPerPod",
        "limits.udpIdle",
        "cluster.dnsService",
        "cluster.kubeletConfig",
        "cluster.nodes",
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
                tunnels: vec![Tunnel::Other, Tunnel::Udp(4789)],
                protected: vec![prefix("192.0.2.0/24")],
                translators: {
                    let mut translators = Translators::well_known();
                    translators.add(prefix("2001:db8:64::/96")).unwrap();
                    translators
                },
            },
            dns: Dns {
                resolvers: vec!["10.96.0.10".parse().unwrap()],
                cluster_domain: exact_name("cluster.local").unwrap(),
                min_ttl: Duration::from_secs(60),
                max_ttl: Duration::from_secs(86_400),
                grace: Duration::from_secs(30),
                internal_answers: Arc::new(InternalAnswers::Names(Vec::new())),
                guard: true,
                autopath: Autopath::Auto,
                refusal: Refusal::NxDomain,
            },
            on_deny: OnDeny::Drop,
            unenforced_interfaces: UnenforcedInterfaces::Report,
            existing_connections: ExistingConnections::Judge,
            state_dir: "/var/lib/egress-agent".into(),
            bpffs: "/sys/fs/bpf".into(),
            limits: Limits {
                addresses_per_pod: 4096,
                flows_per_pod: 16_384,
                udp_idle: Duration::from_secs(300),
            },
            cluster: Cluster {
                dns_service: ("kube-system".to_owned(), "kube-dns".to_owned()),
                kubelet_config: "/var/lib/kubelet/config.yaml".into(),
                nodes: Nodes::All,
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
                tunnels: TUNNELS.iter().map(|(tunnel, _)| *tunnel).collect(),
                protected: vec![],
                translators: Translators::well_known(),
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
         unenforcedInterfaces: refuse\n\
         existingConnections: trust\nstateDir: /srv/state\n\
         ranges: {allowInternal: false}\nlimits: {addressesPerPod: 100, flowsPerPod: 64, udpIdle: 12h}\ndns:\n  resolvers:\n  - \
         fd00::1\n  - 10.0.0.1:5353\n  - 10.0.0.1\n  clusterDomain: Example.Org.\n  minTtl: 90\n  maxTtl: 2h\n  grace: \
         5m\n  guard: false\n  refusal: refused\ncluster: {nodes: own}\n",
    );
    assert_eq!(config.default_mode, Mode::Enforce);
    assert_eq!(config.pod_annotations, PodAnnotations::Narrow);
    assert_eq!(config.on_deny, OnDeny::Reject);
    assert_eq!(config.unenforced_interfaces, UnenforcedInterfaces::Refuse);
    assert_eq!(config.existing_connections, ExistingConnections::Trust);
    assert_eq!(config.state_dir, PathBuf::from("/srv/state"));
    assert_eq!(config.cluster.nodes, Nodes::Own);
    assert_eq!(config.bpffs, PathBuf::from("/run/bpf"));
    assert!(!config.ranges.allow_internal);
    assert_eq!(config.limits.addresses_per_pod, 100);
    assert_eq!(config.limits.flows_per_pod, 64);
    assert_eq!(config.limits.udp_idle, Duration::from_secs(12 * 3600));
    assert_eq!(
        config.dns.resolvers,
        ["10.0.0.1", "10.0.0.1:5353", "fd00::1"].map(|text| text.parse().unwrap())
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
             podAnnotations, ranges, dns, onDeny, unenforcedInterfaces, existingConnections, stateDir, \
             bpffs, limits, cluster, quarantine, http, socket",
        ),
        (
            "dns:\n  resolvers: [10.0.0.1]\n  ttl: 5\n",
            "line 3, column 3: dns.ttl: is not a known key: expected one of resolvers, \
             clusterDomain, minTtl, maxTtl, grace, internalAnswers, guard, autopath, refusal",
        ),
        (
            "dns:\n  resolvers:\n  - 10.0.0.1\n  - dns.example\n",
            "line 4, column 5: dns.resolvers: `dns.example` is not an IP address: expected one, \
             alone or with a port, such as 10.1.0.2:5353 or '[fd00::1]:5353', and no name",
        ),
        (
            "dns: {resolvers: ['10.0.0.1:0']}",
            "line 1, column 19: dns.resolvers: `10.0.0.1:0` is not an IP address: expected one, \
             alone or with a port, such as 10.1.0.2:5353 or '[fd00::1]:5353', and no name",
        ),
        (
            "dns: {resolvers: [10.0.0.1, 10.0.0.1:1, 10.0.0.2:2, 10.0.0.3:3, 10.0.0.4:4]}",
            "line 1, column 65: dns.resolvers: `10.0.0.4:4` is one port too many: resolvers can be \
             asked on 4 different ports",
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
            "unenforcedInterfaces: close",
            "line 1, column 23: unenforcedInterfaces: `close` is not one of report, refuse",
        ),
        (
            "existingConnections: allow",
            "line 1, column 22: existingConnections: `allow` is not one of judge, trust, end",
        ),
        (
            "stateDir: state",
            "line 1, column 11: stateDir: `state` is not an absolute path",
        ),
        (
            "ranges:\n  internal:\n    - 10.0.0.1/8\n",
            "line 3, column 7: ranges.internal: `10.0.0.1/8` has bits set outside its prefix: the \
             network is 10.0.0.0/8",
        ),
        (
            "ranges: {nat64: ['2001:db8::/33']}",
            "line 1, column 18: ranges.nat64: `2001:db8::/33` is not a NAT64 prefix: expected an \
             IPv6 prefix of 32, 40, 48, 56, 64 or 96 bits (RFC 6052, section 2.2)",
        ),
        (
            "ranges: {nat64: ['2001:db8:0:0:100::/96']}",
            "line 1, column 18: ranges.nat64: `2001:db8:0:0:100::/96` is not a NAT64 prefix: bits \
             64 to 71 must be zero (RFC 6052, section 2.2)",
        ),
        (
            "ranges: {nat64: ['2001:db8::/32', '2001:db8:64::/96']}",
            "line 1, column 35: ranges.nat64: `2001:db8:64::/96` overlaps 2001:db8::/32, the prefix of \
             another translator",
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
            "line 1, column 38: dns.minTtl: `2d` makes dns.minTtl (172800 s) longer than dns.maxTtl \
             (86400 s)",
        ),
        (
            "dns: {resolvers: [10.0.0.1], maxTtl: 30}",
            "line 1, column 38: dns.maxTtl: `30` makes dns.minTtl (60 s) longer than dns.maxTtl (30 s)",
        ),
        (
            "dns: {resolvers: [10.0.0.1], autopath: yes}",
            "line 1, column 40: dns.autopath: `yes` is not one of auto, on, off",
        ),
        (
            "dns: {resolvers: [10.0.0.1], internalAnswers: some}",
            "line 1, column 47: dns.internalAnswers: `some` is not a list: expected `all`, or a list \
             of names such as [corp.example, '*.corp.example']",
        ),
        (
            "dns: {resolvers: [10.0.0.1], internalAnswers: [corp.example, 'a b']}",
            "line 1, column 62: dns.internalAnswers: `a b` is not a DNS name: it has ' '; expected \
             letters, digits, `-`, `_`, `*` and dots",
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
            "dns: {resolvers: ['fe80::1']}",
            "line 1, column 19: dns.resolvers: `fe80::1` is a link-local address, which pods cannot ask from \
             their own addresses: expected one that is routed",
        ),
        (
            "dns: {resolvers: [127.0.0.53]}",
            "line 1, column 19: dns.resolvers: `127.0.0.53` is a loopback address, which is each pod's own: \
             expected the address that the pods' resolv.conf has",
        ),
        (
            "dns: {resolvers: [10.0.0.1]}\nlimits: {flowsPerPod: 63}",
            "line 2, column 23: limits.flowsPerPod: `63` is not a number from 64 to 1048576",
        ),
        (
            "dns: {resolvers: [10.0.0.1]}\nlimits: {udpIdle: 30s}",
            "line 2, column 19: limits.udpIdle: `30s` is not a duration from 1m to 24h",
        ),
        (
            "dns: {resolvers: [10.0.0.1]}\nlimits: {udpIdle: 2d}",
            "line 2, column 19: limits.udpIdle: `2d` is not a duration from 1m to 24h",
        ),
        (
            "bpffs: sys/fs/bpf",
            "line 1, column 8: bpffs: `sys/fs/bpf` is not an absolute path",
        ),
        (
            "ranges: {tunnels: [4789]}",
            "line 1, column 20: ranges.tunnels: `4789` is not a text: put it in quotes",
        ),
        (
            "ranges: {tunnels: [other, gre]}",
            "line 1, column 27: ranges.tunnels: `gre` is not a tunnel: expected a port and its protocol, \
             such as 4789/udp, with udp, tcp or sctp; or `other` for every other protocol",
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
fn an_error_names_the_place_where_a_value_is_used() {
    for (text, expected) in [
        (
            "node: &name n1\nstateDir: *name\n",
            "line 2, column 11: stateDir: `n1` is not an absolute path",
        ),
        ("node: [n1]", "line 1, column 7: node: a list is not a text"),
        (
            "node: {name: [n1], zone: {a: b}}",
            "line 1, column 7: node: a mapping is not a text",
        ),
        ("node:", "line 1, column 5: node: nothing is not a text"),
        ("node: ' '", "line 1, column 7: node: ` ` is empty"),
        (
            "limits: 4096",
            "line 1, column 9: limits: `4096` is not a mapping of keys to values",
        ),
        (
            "limits: {addressesPerPod: 1.5}",
            "line 1, column 27: limits.addressesPerPod: `1.5` is not a number from 1 to 1048576",
        ),
        (
            "limits: {addressesPerPod: 100000000000000000000}",
            "line 1, column 27: limits.addressesPerPod: `100000000000000000000` is not a number from 1 to 1048576",
        ),
        (
            "dns: {minTtl: 5, minTtl: 6}",
            "duplicate mapping key: minTtl not allowed here at line 1, column 18",
        ),
        (
            "ranges:\n  internal:\n  - [10.0.0.0/8]\n",
            "line 3, column 5: ranges.internal: a list is not a text",
        ),
        (
            "quarantine: {exclude: docker0}",
            "line 1, column 23: quarantine.exclude: `docker0` is not a list: expected values in brackets or \
             behind dashes",
        ),
        (
            "1: a",
            "line 1, column 1: 1: is not a known key: expected one of node, defaultMode, podAnnotations, \
             ranges, dns, onDeny, unenforcedInterfaces, existingConnections, stateDir, bpffs, limits, cluster, \
             quarantine, http, socket",
        ),
        (
            "# a comment\ntext",
            "line 2, column 1: the file: `text` is not a mapping of keys to values",
        ),
    ] {
        assert_eq!(error(text), expected, "{text:?}");
    }
}

#[test]
fn a_key_with_nothing_behind_it_is_an_empty_section_or_list() {
    let empty = "limits:\nranges: {internal: , tunnels: }\nquarantine: {exclude: }\n";
    let config = config(empty);
    assert_eq!(config.limits, Limits::default());
    assert!(config.ranges.internal.is_empty() && config.ranges.tunnels.is_empty());
    assert!(config.quarantine.exclude.is_empty());
}

#[test]
fn there_may_be_256_names_with_internal_answers_and_no_more() {
    let text = |count: usize| {
        let names: Vec<String> = (0..count).map(|n| format!("n{n}.example")).collect();
        format!("dns: {{internalAnswers: [{}]}}", names.join(", "))
    };
    let InternalAnswers::Names(names) = &*config(&text(256)).dns.internal_answers else {
        panic!("not a list");
    };
    assert_eq!(names.len(), 256);
    let error = error(&text(257));
    assert!(
        error.ends_with("`n256.example` is one name too many: the limit is 256"),
        "{error}"
    );
    let all = config("dns: {internalAnswers: all}").dns.internal_answers;
    assert_eq!(*all, InternalAnswers::All);
}

#[test]
fn there_may_be_64_tunnels_and_no_more() {
    let text = |count: usize| {
        let ports: Vec<String> = (1..=count).map(|port| format!("{port}/udp")).collect();
        format!("ranges: {{tunnels: [{}]}}\n{RESOLVERS}", ports.join(", "))
    };
    assert_eq!(config(&text(64)).tunnels().len(), 64);
    let error = error(&text(65));
    assert!(
        error.ends_with("`65/udp` is one too many: the limit is 64"),
        "{error}"
    );
    assert!(
        config(&format!("ranges: {{tunnels: []}}\n{RESOLVERS}"))
            .tunnels()
            .is_empty()
    );
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
    let kind = |kinds| Range {
        kinds,
        ..Range::default()
    };
    let resolver = Range {
        resolver_ports: [53, 0, 0, 0],
        ..kind(RANGE_RESOLVER)
    };
    assert!(ranges.contains(&(address::from_v4([10, 96, 0, 10]), 128, resolver)));
    let protected = kind(RANGE_PROTECTED);
    assert!(ranges.contains(&(address::from_v4([169, 254, 0, 0]), 112, protected)));
}

#[test]
fn a_resolver_is_asked_on_its_ports_and_no_other_has_them() {
    let config = config("dns: {resolvers: [10.0.0.1:5353, 10.0.0.2, 10.0.0.1]}");
    let of = |address| {
        let ranges = config.ranges().into_iter();
        let mut found = ranges.filter(|(network, ..)| *network == address::from_v4(address));
        found.next().expect("a range").2
    };
    let asked = |address| [53, 5353, 0].map(|port| of(address).is_resolver_at(port));
    assert_eq!(asked([10, 0, 0, 1]), [true, true, false]);
    assert_eq!(asked([10, 0, 0, 2]), [true, false, false]);
}

#[test]
fn resolvers_of_the_cluster_are_added_as_long_as_there_are_ports() {
    let mut dns = config("dns: {resolvers: [10.0.0.1:1, 10.0.0.1:2]}").dns;
    let more = ["10.0.0.9:9", "10.0.0.8:8", "10.0.0.2"].map(|text| text.parse().unwrap());
    let left_out = dns.add_resolvers(more);
    let texts = |all: &[Resolver]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(texts(&left_out), ["10.0.0.8:8"]);
    assert_eq!(
        texts(&dns.resolvers),
        ["10.0.0.1:1", "10.0.0.1:2", "10.0.0.2", "10.0.0.9:9"]
    );
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
