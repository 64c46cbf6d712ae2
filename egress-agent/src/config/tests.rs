mod errors;

use std::net::IpAddr;

use egress_common::{
    address,
    classes::ClassSet,
    records::{Policy, RANGE_TRANSLATED},
    translation::embedded_v4,
    verdict::{Destination, Translated},
};

use super::{dns::Learn, *};
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

/// The kinds that the kernel's longest-prefix match would find.
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
            cidr: ClassSet::EMPTY,
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
        "dns.learn",
        "dns.refusal",
        "whenAgentDown.resolveFor",
        "whenAgentDown.undecided",
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
                services: Vec::new(),
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
                learn: Learn::Kernel,
                refusal: Refusal::NxDomain,
            },
            when_agent_down: WhenAgentDown {
                resolve_for: Duration::from_secs(86_400),
                undecided: Undecided::Hold,
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
fn a_key_with_nothing_behind_it_is_an_empty_section_or_list() {
    let empty = "limits:\nranges: {internal: , tunnels: }\nquarantine: {exclude: }\n";
    let config = config(empty);
    assert_eq!(config.limits, Limits::default());
    assert!(config.ranges.internal.is_empty() && config.ranges.tunnels.is_empty());
    assert!(config.quarantine.exclude.is_empty());
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
