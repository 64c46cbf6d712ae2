//! Compares what written objects allow with what the originals allow, over random policies and packets.
//!
//! A packet is TCP to an IPv4 address outside of the cluster, or to a name that was resolved.

mod names;
mod rule_files;
mod sidecars;
mod written;

use std::{fmt::Write as _, net::Ipv4Addr};

use egress_import::{Finding, Imported, Input, Options, import};
use proptest::prelude::*;
use written::{Packet, Written};

/// The objects of a policy of which nothing is left out.
fn imported(text: &str) -> Written {
    let (written, findings) = imported_in_part(text);
    assert!(findings.is_empty(), "{findings:?}\n{text}");
    written
}

fn imported_in_part(text: &str) -> (Written, Vec<Finding>) {
    let input = Input {
        name: "random.yaml".to_owned(),
        text: text.to_owned(),
    };
    let Imported {
        yaml,
        findings,
        problems,
        ..
    } = import(&[input], &Options::default());
    assert!(problems.is_empty(), "{problems:?}\n{text}");
    (Written::read(&yaml), findings)
}

/// A prefix within 198.51.0.0/16, so that random ones overlap.
#[derive(Clone, Copy, Debug)]
struct Block {
    bits: u32,
    length: u32,
}

impl Block {
    fn contains(self, address: Ipv4Addr) -> bool {
        let keep = u32::MAX << (32 - self.length);
        u32::from(address) & keep == self.bits & keep
    }

    fn text(self) -> String {
        let keep = u32::MAX << (32 - self.length);
        format!("{}/{}", Ipv4Addr::from(self.bits & keep), self.length)
    }
}

fn block() -> impl Strategy<Value = Block> {
    (0_u32..=0xffff, 17_u32..=32).prop_map(|(low, length)| Block {
        bits: 0xc633_0000 | low,
        length,
    })
}

fn addresses() -> impl Strategy<Value = Vec<Ipv4Addr>> {
    prop::collection::vec(0_u32..=0xffff, 64).prop_map(|low| {
        low.into_iter()
            .map(|low| (0xc633_0000 | low).into())
            .collect()
    })
}

fn ports() -> impl Strategy<Value = Option<(u16, u16)>> {
    prop::option::of((1_u16..6, 0_u16..3).prop_map(|(min, more)| (min, min + more)))
}

fn has_port(ports: Option<(u16, u16)>, port: u16) -> bool {
    ports.is_none_or(|(min, max)| (min..=max).contains(&port))
}

/// The actions of an ordered rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Allow,
    Deny,
    Pass,
}

#[derive(Clone, Copy, Debug)]
struct Ordered {
    action: Action,
    block: Block,
    ports: Option<(u16, u16)>,
}

impl Ordered {
    fn matches(&self, address: Ipv4Addr, port: u16) -> bool {
        self.block.contains(address) && has_port(self.ports, port)
    }
}

fn ordered(actions: &'static [Action]) -> impl Strategy<Value = Ordered> {
    (prop::sample::select(actions), block(), ports()).prop_map(|(action, block, ports)| Ordered {
        action,
        block,
        ports,
    })
}

const ALLOW_OR_DENY: &[Action] = &[Action::Allow, Action::Deny];
const ALL_ACTIONS: &[Action] = &[Action::Allow, Action::Deny, Action::Pass];

proptest! {
    #[test]
    fn exceptions_of_a_network_policy(
        rules in prop::collection::vec((block(), prop::collection::vec(block(), 0..3), ports()), 0..4),
        addresses in addresses(),
        port in 1_u16..8,
    ) {
        let mut text = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: a, namespace: n}\n\
             spec:\n  podSelector: {}\n  policyTypes: [Egress]\n  egress:\n".to_owned();
        for (block, except, ports) in &rules {
            let except: Vec<String> = except.iter().map(|block| block.text()).collect();
            let _ = writeln!(text, "  - to: [{{ipBlock: {{cidr: {}, except: [{}]}}}}]", block.text(), except.join(", "));
            if let Some((min, max)) = ports {
                let _ = writeln!(text, "    ports: [{{port: {min}, endPort: {max}}}]");
            }
        }
        let written = imported(&text);
        for address in addresses {
            let theirs = rules.iter().any(|(block, except, ports)| {
                block.contains(address)
                    && !except.iter().any(|except| except.contains(address))
                    && has_port(*ports, port)
            });
            prop_assert_eq!(written.allows(&Packet::to(address, port)), theirs, "{} {}\n{}", address, port, text);
        }
    }

    #[test]
    fn the_order_of_an_egress_firewall(
        rules in prop::collection::vec(ordered(ALLOW_OR_DENY), 0..5),
        closes in any::<bool>(),
        addresses in addresses(),
        port in 1_u16..8,
    ) {
        let mut text = "apiVersion: k8s.ovn.org/v1\nkind: EgressFirewall\nmetadata: {name: default, namespace: n}\n\
             spec:\n  egress:\n".to_owned();
        for rule in &rules {
            let _ = writeln!(text, "  - type: {:?}\n    to: {{cidrSelector: {}}}", rule.action, rule.block.text());
            if let Some((min, max)) = rule.ports {
                let ports: Vec<String> = (min..=max).map(|port| format!("{{protocol: TCP, port: {port}}}")).collect();
                let _ = writeln!(text, "    ports: [{}]", ports.join(", "));
            }
        }
        if closes {
            text.push_str("  - type: Deny\n    to: {cidrSelector: 0.0.0.0/0}\n");
        }
        let written = imported(&text);
        for address in addresses {
            let decides = rules.iter().find(|rule| rule.matches(address, port));
            let theirs = decides.map_or(!closes, |rule| rule.action == Action::Allow);
            prop_assert_eq!(written.allows(&Packet::to(address, port)), theirs, "{} {}\n{}", address, port, text);
        }
    }

    #[test]
    fn tiers_and_priorities_of_antrea(
        policies in prop::collection::vec(
            (0_usize..3, prop::collection::vec(ordered(ALL_ACTIONS), 0..4)),
            0..4,
        ),
        addresses in addresses(),
        port in 1_u16..8,
    ) {
        const TIERS: [&str; 3] = ["emergency", "application", "baseline"];
        let mut text = String::new();
        for (i, (tier, rules)) in policies.iter().enumerate() {
            let _ = writeln!(
                text,
                "---\napiVersion: crd.antrea.io/v1beta1\nkind: ClusterNetworkPolicy\nmetadata: {{name: a{i}}}\nspec:\n  \
                 tier: {}\n  priority: {}\n  appliedTo: [{{podSelector: {{}}}}]\n  egress:",
                TIERS[*tier],
                // The last one in the file is the first in its tier.
                100 - i
            );
            for rule in rules {
                let action = match rule.action {
                    Action::Allow => "Allow",
                    Action::Deny => "Drop",
                    Action::Pass => "Pass",
                };
                let _ = writeln!(text, "  - action: {action}\n    to: [{{ipBlock: {{cidr: {}}}}}]", rule.block.text());
                if let Some((min, max)) = rule.ports {
                    let _ = writeln!(text, "    ports: [{{protocol: TCP, port: {min}, endPort: {max}}}]");
                }
            }
        }
        let written = imported(&text);
        for address in addresses {
            let first = |of_tier: &dyn Fn(usize) -> bool, tiers: &mut dyn Iterator<Item = usize>| {
                tiers.filter(|tier| of_tier(*tier)).find_map(|tier| {
                    policies
                        .iter()
                        .rev()
                        .filter(|(of, _)| *of == tier)
                        .flat_map(|(_, rules)| rules)
                        .find(|rule| rule.matches(address, port))
                })
            };
            let before = first(&|tier| tier < 2, &mut (0..3)).map(|rule| rule.action);
            let theirs = match before {
                Some(Action::Allow) => true,
                Some(Action::Deny) => false,
                // No NetworkPolicy selects the pod, so the baseline decides.
                Some(Action::Pass) | None => {
                    first(&|tier| tier == 2, &mut (0..3)).is_none_or(|rule| rule.action != Action::Deny)
                }
            };
            prop_assert_eq!(written.allows(&Packet::to(address, port)), theirs, "{} {}\n{}", address, port, text);
        }
    }

    #[test]
    fn the_order_of_calico(
        policies in prop::collection::vec(
            (any::<bool>(), prop::collection::vec(ordered(ALLOW_OR_DENY), 0..4), any::<bool>()),
            1..4,
        ),
        addresses in addresses(),
        port in 1_u16..8,
    ) {
        let mut text = String::new();
        for (i, (is_global, rules, ends)) in policies.iter().enumerate() {
            let (kind, namespace) = if *is_global {
                ("GlobalNetworkPolicy", "")
            } else {
                ("NetworkPolicy", ", namespace: n")
            };
            let _ = writeln!(
                text,
                "---\napiVersion: projectcalico.org/v3\nkind: {kind}\nmetadata: {{name: a{i}{namespace}}}\nspec:\n  order: \
                 {}\n  types: [Egress]\n  egress:",
                100 - i
            );
            for rule in rules {
                let _ = writeln!(text, "  - action: {:?}\n    protocol: TCP\n    destination:\n      nets: [{}]", rule.action, rule.block.text());
                if let Some((min, max)) = rule.ports {
                    let _ = writeln!(text, "      ports: ['{min}:{max}']");
                }
            }
            if *ends {
                text.push_str("  - action: Deny\n");
            }
        }
        let written = imported(&text);
        for address in addresses {
            let mut theirs = false;
            for (_, rules, ends) in policies.iter().rev() {
                if let Some(rule) = rules.iter().find(|rule| rule.matches(address, port)) {
                    theirs = rule.action == Action::Allow;
                    break;
                }
                if *ends {
                    break;
                }
            }
            prop_assert_eq!(written.allows(&Packet::to(address, port)), theirs, "{} {}\n{}", address, port, text);
        }
    }

    #[test]
    fn tiers_of_calico(
        policies in prop::collection::vec(
            (any::<bool>(), any::<bool>(), prop::collection::vec(ordered(ALL_ACTIONS), 0..3), any::<bool>()),
            1..5,
        ),
        addresses in addresses(),
        port in 1_u16..8,
    ) {
        const TIERS: [&str; 2] = ["security", "default"];
        let mut text = "apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: security}\nspec: {order: 10}\n".to_owned();
        for (i, (is_default, is_global, rules, passes)) in policies.iter().enumerate() {
            let (kind, namespace) = if *is_global {
                ("GlobalNetworkPolicy", "")
            } else {
                ("NetworkPolicy", ", namespace: n")
            };
            let _ = writeln!(
                text,
                "---\napiVersion: projectcalico.org/v3\nkind: {kind}\nmetadata: {{name: a{i}{namespace}}}\nspec:\n  tier: \
                 {}\n  order: {i}\n  types: [Egress]\n  egress:",
                TIERS[usize::from(*is_default)],
            );
            for rule in rules {
                let _ = writeln!(text, "  - action: {:?}\n    destination:\n      nets: [{}]", rule.action, rule.block.text());
            }
            if *passes {
                text.push_str("  - action: Pass\n");
            }
        }
        let (written, _) = imported_in_part(&text);
        for address in addresses {
            // What every tier passes on is allowed by the profile of the namespace.
            let mut theirs = true;
            for tier in 0..2 {
                let of_tier = || policies.iter().filter(|(is_default, ..)| usize::from(*is_default) == tier);
                let decision = of_tier().find_map(|(_, _, rules, passes)| {
                    let decides = rules.iter().find(|rule| rule.block.contains(address));
                    decides.map(|rule| rule.action).or(passes.then_some(Action::Pass))
                });
                match decision {
                    Some(Action::Pass) => {}
                    None if of_tier().next().is_none() => {}
                    decision => {
                        theirs = decision == Some(Action::Allow);
                        break;
                    }
                }
            }
            if written.allows(&Packet::to(address, port)) {
                prop_assert!(theirs, "{} {}\n{}", address, port, text);
            }
        }
    }

    #[test]
    fn denials_and_permissions_of_cilium(
        policies in prop::collection::vec(
            (
                any::<bool>(),
                any::<bool>(),
                prop::collection::vec((block(), prop::collection::vec(block(), 0..2)), 0..3),
                prop::collection::vec(block(), 0..2),
            ),
            1..4,
        ),
        addresses in addresses(),
    ) {
        let mut text = String::new();
        for (i, (is_cluster, closes, allow, deny)) in policies.iter().enumerate() {
            let (kind, namespace) = if *is_cluster {
                ("CiliumClusterwideNetworkPolicy", "")
            } else {
                ("CiliumNetworkPolicy", ", namespace: n")
            };
            let _ = writeln!(
                text,
                "---\napiVersion: cilium.io/v2\nkind: {kind}\nmetadata: {{name: a{i}{namespace}}}\nspec:\n  \
                 endpointSelector: {{}}\n  enableDefaultDeny: {{egress: {closes}}}\n  egress:\n  - {{}}"
            );
            for (block, except) in allow {
                let except: Vec<String> = except.iter().map(|block| block.text()).collect();
                let _ = writeln!(text, "  - toCIDRSet: [{{cidr: {}, except: [{}]}}]", block.text(), except.join(", "));
            }
            if !deny.is_empty() {
                let deny: Vec<String> = deny.iter().map(|block| block.text()).collect();
                let _ = writeln!(text, "  egressDeny:\n  - toCIDR: [{}]", deny.join(", "));
            }
        }
        let written = imported(&text);
        for address in addresses {
            let denied = policies.iter().any(|(.., deny)| deny.iter().any(|block| block.contains(address)));
            let allowed = policies.iter().any(|(_, _, allow, _)| {
                allow.iter().any(|(block, except)| {
                    block.contains(address) && !except.iter().any(|except| except.contains(address))
                })
            });
            let closed = policies.iter().any(|(_, closes, ..)| *closes);
            let theirs = !denied && (allowed || !closed);
            prop_assert_eq!(written.allows(&Packet::to(address, 443)), theirs, "{}\n{}", address, text);
        }
    }

    #[test]
    fn patterns_of_cilium(
        patterns in prop::collection::vec("(a|b|a\\*|\\*b)\\.(a|b|\\*)\\.c", 1..4),
        names in prop::collection::vec("([ab]{1,2}\\.){1,3}c", 32),
    ) {
        let mut text = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: a, namespace: n}\nspec:\n  \
             endpointSelector: {}\n  egress:\n  - toFQDNs:\n".to_owned();
        for pattern in &patterns {
            let _ = writeln!(text, "    - matchPattern: '{pattern}'");
        }
        let written = imported(&text);
        for name in names {
            let theirs = patterns.iter().any(|pattern| {
                let (pattern, name): (Vec<&str>, Vec<&str>) = (pattern.split('.').collect(), name.split('.').collect());
                pattern.len() == name.len() && pattern.iter().zip(&name).all(|(pattern, label)| {
                    match pattern.split_once('*') {
                        None => pattern == label,
                        Some((start, end)) => label.starts_with(start) && label.ends_with(end)
                            && label.len() >= start.len() + end.len(),
                    }
                })
            });
            prop_assert_eq!(written.allows(&Packet::to_name(&name, 443)), theirs, "{}\n{}", name, text);
        }
    }
}
