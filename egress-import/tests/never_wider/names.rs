//! Products whose policies list names.

use std::{fmt::Write as _, net::Ipv4Addr};

use proptest::prelude::*;

use crate::{
    Block, addresses, block, has_port, imported_in_part, ports,
    written::{Packet, Written},
};

/// A name of three or four labels, so that patterns match often.
pub(crate) fn names() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec("([ab]\\.){1,3}c", 32)
}

/// A name, or a wildcard at its beginning.
pub(crate) fn pattern() -> impl Strategy<Value = String> {
    prop_oneof![2 => "([ab]\\.){1,3}c", 1 => "\\*\\.([ab]\\.){0,2}c"]
}

/// Whether a name or a wildcard, which stands for `labels` whole labels, matches a name.
pub(crate) fn matches(pattern: &str, name: &str, labels: std::ops::RangeInclusive<usize>) -> bool {
    let Some(end) = pattern.strip_prefix("*.") else {
        return pattern == name;
    };
    name.strip_suffix(end)
        .and_then(|before| before.strip_suffix('.'))
        .is_some_and(|before| labels.contains(&before.split('.').count()))
}

/// The line with the ports of a rule in the form of a `NetworkPolicy`.
fn ports_line(text: &mut String, protocol: &str, ports: Option<(u16, u16)>) {
    if let Some((min, max)) = ports {
        let _ = writeln!(
            text,
            "    ports: [{{protocol: {protocol}, port: {min}, endPort: {max}}}]"
        );
    }
}

/// A peer of an `ApplicationNetworkPolicy`.
#[derive(Clone, Debug)]
enum Peer {
    Block(Block, Vec<Block>),
    Names(Vec<String>),
    /// Pods of the cluster, which are no destination of these packets.
    Pods,
    /// Something that the documentation does not have. What it means is not known, so it matches nothing.
    Unknown,
}

impl Peer {
    fn text(&self) -> String {
        match self {
            Self::Block(block, except) => {
                let except: Vec<String> = except.iter().map(|block| block.text()).collect();
                let (cidr, except) = (block.text(), except.join(", "));
                format!("{{ipBlock: {{cidr: {cidr}, except: [{except}]}}}}")
            }
            Self::Names(names) => format!("{{domainNames: ['{}']}}", names.join("', '")),
            Self::Pods => "{podSelector: {}}".to_owned(),
            Self::Unknown => "{fqdnGroup: x}".to_owned(),
        }
    }

    fn reaches(&self, address: Ipv4Addr) -> bool {
        matches!(self, Self::Block(block, except)
            if block.contains(address) && !except.iter().any(|except| except.contains(address)))
    }

    fn names(&self, name: &str) -> bool {
        // `*` at the beginning is one or more labels.
        matches!(self, Self::Names(patterns)
            if patterns.iter().any(|pattern| matches(pattern, name, 1..=usize::MAX)))
    }
}

fn peer() -> impl Strategy<Value = Peer> {
    prop_oneof![
        4 => (block(), prop::collection::vec(block(), 0..2))
            .prop_map(|(block, except)| Peer::Block(block, except)),
        4 => prop::collection::vec(pattern(), 1..3).prop_map(Peer::Names),
        1 => Just(Peer::Pods),
        1 => Just(Peer::Unknown),
    ]
}

/// The part of the ports that concerns TCP.
fn protocol() -> impl Strategy<Value = &'static str> {
    prop_oneof![4 => Just("TCP"), 1 => Just("UDP")]
}

/// What a rule opens, for a packet to this port.
fn has_tcp_port(protocol: &str, ports: Option<(u16, u16)>, port: u16) -> bool {
    has_port(ports, port) && (ports.is_none() || protocol == "TCP")
}

proptest! {
    #[test]
    fn peers_of_an_application_network_policy(
        policies in prop::collection::vec(
            (
                prop_oneof![Just("[Egress]"), Just("[Egress, Ingress]"), Just("[Ingress]"), Just("[]")],
                prop::collection::vec((prop::collection::vec(peer(), 0..4), protocol(), ports()), 0..3),
            ),
            1..3,
        ),
        addresses in addresses(),
        names in names(),
        port in 1_u16..8,
    ) {
        let mut text = String::new();
        for (i, (types, rules)) in policies.iter().enumerate() {
            let _ = writeln!(
                text,
                "---\napiVersion: networking.k8s.aws/v1alpha1\nkind: ApplicationNetworkPolicy\nmetadata: {{name: a{i}, \
                 namespace: n}}\nspec:\n  podSelector: {{}}\n  policyTypes: {types}\n  egress:"
            );
            for (peers, protocol, ports) in rules {
                let peers: Vec<String> = peers.iter().map(Peer::text).collect();
                let _ = writeln!(text, "  - to: [{}]", peers.join(", "));
                ports_line(&mut text, protocol, *ports);
            }
        }
        let (written, findings) = imported_in_part(&text);
        // As with a NetworkPolicy: without types, one with rules for egress is about egress. Pods that none is about
        // reach everything, and a rule without peers matches every destination.
        let about_egress = || policies.iter().filter(|(types, rules)| {
            if *types == "[]" { !rules.is_empty() } else { types.contains("Egress") }
        });
        let theirs = |reaches: &dyn Fn(&Peer) -> bool| {
            about_egress().next().is_none() || about_egress().flat_map(|(_, rules)| rules).any(|(peers, protocol, ports)| {
                has_tcp_port(protocol, *ports, port) && (peers.is_empty() || peers.iter().any(reaches))
            })
        };
        let to_addresses = addresses.iter().map(|address| {
            (Packet::to(*address, port), theirs(&|peer: &Peer| peer.reaches(*address)))
        });
        let to_names = names.iter().map(|name| {
            (Packet::to_name(name, port), theirs(&|peer: &Peer| peer.names(name)))
        });
        for (packet, theirs) in to_addresses.chain(to_names) {
            let ours = written.allows(&packet);
            prop_assert!(theirs || !ours, "{:?}\n{}", packet, text);
            prop_assert!(ours || !theirs || !findings.is_empty(), "{:?}\n{}", packet, text);
        }
    }

    #[test]
    fn names_and_patterns_of_an_fqdn_network_policy(
        policies in prop::collection::vec(
            prop::collection::vec(
                (prop::collection::vec((pattern(), any::<bool>()), 0..4), protocol(), ports()),
                0..3,
            ),
            1..3,
        ),
        by_controller in any::<bool>(),
        addresses in addresses(),
        names in names(),
        port in 1_u16..8,
    ) {
        let version = if by_controller { "v1alpha3" } else { "v1" };
        let mut text = String::new();
        for (i, rules) in policies.iter().enumerate() {
            let _ = writeln!(
                text,
                "---\napiVersion: networking.gke.io/{version}\nkind: FQDNNetworkPolicy\nmetadata: {{name: a{i}, \
                 namespace: n}}\nspec:\n  podSelector: {{}}\n  egress:"
            );
            for (names, protocol, ports) in rules {
                let key = |is_pattern: bool| if is_pattern { "pattern" } else { "name" };
                let list = |one: &dyn Fn(&(String, bool)) -> String| {
                    names.iter().map(one).collect::<Vec<_>>().join(", ")
                };
                if by_controller {
                    let _ = writeln!(text, "  - to: [{{fqdns: [{}]}}]", list(&|(name, _)| format!("'{name}'")));
                } else {
                    let matches = list(&|(name, is_pattern)| format!("{{{}: '{name}'}}", key(*is_pattern)));
                    let _ = writeln!(text, "  - matches: [{matches}]");
                }
                ports_line(&mut text, protocol, *ports);
            }
        }
        let (written, findings) = imported_in_part(&text);
        for name in names {
            let theirs = policies.iter().flatten().any(|(listed, protocol, ports)| {
                has_tcp_port(protocol, *ports, port) && listed.iter().any(|(listed, is_pattern)| {
                    // A wildcard is one label, and only a pattern has it.
                    let has_wildcards = *is_pattern && !by_controller;
                    (has_wildcards || !listed.contains('*')) && matches(listed, &name, 1..=1)
                })
            });
            let ours = written.allows(&Packet::to_name(&name, port));
            prop_assert!(theirs || !ours, "{}\n{}", name, text);
            prop_assert!(ours || !theirs || !findings.is_empty(), "{}\n{}", name, text);
        }
        for address in addresses {
            prop_assert!(!written.allows(&Packet::to(address, port)), "{}\n{}", address, text);
        }
    }

    /// A text in the place of a name is never read as something else that an entry may be.
    #[test]
    fn a_text_that_is_no_name_opens_no_address_and_no_set(
        listed in prop_oneof![
            addresses().prop_map(|addresses| addresses[0].to_string()),
            block().prop_map(Block::text),
            Just("@partners".to_owned()),
            Just("a.c:1-65535".to_owned()),
            Just("a.c/any".to_owned()),
            Just("198.51.100.0/24!198.51.100.1".to_owned()),
            Just("198.51.0.0-198.51.255.255".to_owned()),
        ],
        addresses in addresses(),
    ) {
        let at_gke = format!(
            "apiVersion: networking.gke.io/v1\nkind: FQDNNetworkPolicy\nmetadata: {{name: a, namespace: n}}\nspec:\n  \
             podSelector: {{}}\n  egress:\n  - matches: [{{name: '{listed}'}}]\n    ports: [{{protocol: TCP, port: 443}}]\n"
        );
        let at_aws = format!(
            "apiVersion: networking.k8s.aws/v1alpha1\nkind: ApplicationNetworkPolicy\nmetadata: {{name: a, namespace: n}}\n\
             spec:\n  podSelector: {{}}\n  egress:\n  - to: [{{domainNames: ['{listed}']}}]\n    ports: [{{port: 443}}]\n"
        );
        let at_istio = format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: a, namespace: n}}\nspec:\n  \
             hosts: ['{listed}']\n  ports: [{{number: 443, protocol: TCP}}]\n---\napiVersion: networking.istio.io/v1\n\
             kind: Sidecar\nmetadata: {{name: b, namespace: n}}\nspec:\n  outboundTrafficPolicy: {{mode: REGISTRY_ONLY}}\n  \
             egress: [{{hosts: ['*/*']}}]\n"
        );
        for text in [at_gke, at_aws, at_istio] {
            let (written, findings) = imported_in_part(&text);
            prop_assert!(!findings.is_empty(), "{}", text);
            prop_assert_eq!(written.entries(), Vec::<String>::new(), "{}", text);
            for address in &addresses {
                prop_assert!(!written.allows(&Packet::to(*address, 443)), "{}\n{}", address, text);
            }
        }
    }
}

/// The reading of [`Written`] knows no sets, so it would not notice one.
#[test]
fn a_rule_file_with_an_at_sign_uses_no_set() {
    let input = egress_import::Input {
        name: "shop/egress/external/@partners:443.rule".to_owned(),
        text: String::new(),
    };
    let imported = egress_import::import(&[input], &egress_import::Options::default());
    assert_eq!(
        Written::read(&imported.yaml).entries(),
        Vec::<String>::new()
    );
    assert_eq!(imported.findings.len(), 1, "{:?}", imported.findings);
}
