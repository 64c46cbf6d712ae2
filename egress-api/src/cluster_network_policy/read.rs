//! Reads the egress part of a `ClusterNetworkPolicy`.

use std::sync::Arc;

use egress_policy::objects::{ObjectName, Tier, TierAction, TierPolicy, TierRule};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::Value;

use super::{
    EgressPeer, EgressRule, RuleAction, Subject,
    entries::{Destinations, Peers, destinations},
};
use crate::{
    policy::{Body, ONLY_TAKES_AWAY, Policy, PolicySubject},
    read::Reader,
    selector::Selector,
    tiers::{Place, consequence, deny_everything, fail_closed, name_in, rule_title, tighten},
};

/// A policy with peers whose addresses change with the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPolicy {
    name: Arc<ObjectName>,
    tier: Tier,
    priority: u32,
    rules: Vec<NetworkRule>,
    /// Whether rules only take away, because it is not known which pods they are about.
    only_takes_away: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum NetworkRule {
    /// The entries do not change.
    Fixed(TierRule),
    /// The entries depend on the cluster.
    OfCluster {
        name: Option<String>,
        index: usize,
        action: RuleAction,
        to: Destinations,
    },
}

impl NetworkPolicy {
    /// Whether a rule names nodes.
    pub fn needs_nodes(&self) -> bool {
        self.destinations().any(Destinations::has_nodes)
    }

    /// Whether a rule names pods or namespaces.
    pub fn needs_pods(&self) -> bool {
        self.destinations().any(Destinations::has_pods)
    }

    fn destinations(&self) -> impl Iterator<Item = &Destinations> {
        self.rules.iter().filter_map(|rule| match rule {
            NetworkRule::Fixed(_) => None,
            NetworkRule::OfCluster { to, .. } => Some(to),
        })
    }

    /// The rules with the addresses that `peers` has now, and their problems.
    pub fn resolve(&self, peers: &dyn Peers) -> (TierPolicy, Vec<String>) {
        let mut problems = Vec::new();
        let mut rules: Vec<TierRule> = self
            .rules
            .iter()
            .map(|rule| match rule {
                NetworkRule::Fixed(rule) => rule.clone(),
                NetworkRule::OfCluster {
                    name,
                    index,
                    action,
                    to,
                } => with_entries(
                    *index,
                    name.clone(),
                    *action,
                    to.entries(*action, peers),
                    &mut problems,
                ),
            })
            .collect();
        if self.only_takes_away {
            rules.iter_mut().for_each(tighten);
        }
        let policy = TierPolicy {
            name: Arc::clone(&self.name),
            tier: self.tier,
            priority: self.priority,
            rules,
        };
        (policy, problems)
    }
}

pub(crate) fn policy(name: Arc<ObjectName>, reader: &mut Reader<'_>) -> Policy {
    let place = Place::read(reader);
    let mut is_good = place.is_good;
    let subject = subject(reader, &mut is_good);
    if !is_good {
        reader.problems.push(ONLY_TAKES_AWAY.to_owned());
    }
    // A field of a later version of the API fails closed as upstream asks for, so the object counts as readable.
    let is_complete = reader.problems.is_empty();
    let mut problems = Vec::new();
    let rules = match reader.try_optional::<Vec<Value>>("egress") {
        Ok(rules) => {
            let rules = rules.unwrap_or_default();
            let rules = rules.iter().enumerate();
            rules
                .map(|(index, written)| rule(index, written, &mut problems))
                .collect()
        }
        Err(_) => vec![NetworkRule::Fixed(deny_everything(0, None))],
    };
    reader.problems.append(&mut problems);
    let ingress = reader.optional::<Vec<Value>>("ingress");
    let ingress = ingress.map_or(0, |rules| rules.len());
    if ingress > 0 {
        let what =
            format!("has {ingress} rules: egress-agent does not enforce rules about ingress");
        reader.problem("ingress", &what);
    }
    let network = NetworkPolicy {
        name: Arc::clone(&name),
        tier: place.tier,
        priority: place.priority,
        rules,
        only_takes_away: !is_good,
    };
    let body = if network.destinations().next().is_some() {
        Body::Network(Arc::new(network))
    } else {
        Body::Tier(Arc::new(network.resolve(&Nowhere).0))
    };
    Policy {
        name,
        subject: Arc::new(subject),
        body,
        problems: std::mem::take(&mut reader.problems),
        is_complete,
    }
}

/// No rule asks for it.
struct Nowhere;

impl Peers for Nowhere {
    fn nodes(&self, _: &Selector) -> Result<Vec<std::net::IpAddr>, String> {
        Ok(Vec::new())
    }

    fn pods(&self, _: &Selector, _: &Selector) -> Result<Vec<super::PeerPod>, String> {
        Ok(Vec::new())
    }
}

fn subject(reader: &mut Reader<'_>, is_good: &mut bool) -> PolicySubject {
    let mut subject = PolicySubject {
        without_host_network: true,
        ..PolicySubject::default()
    };
    let Some(read) = reader.required::<Subject>("subject") else {
        *is_good = false;
        return subject;
    };
    let selectors = match (read.namespaces, read.pods) {
        (Some(namespaces), None) => (namespaces, LabelSelector::default()),
        (None, Some(pods)) => (pods.namespace_selector, pods.pod_selector),
        _ => {
            reader.problem("subject", "has neither namespaces nor pods, or both");
            *is_good = false;
            return subject;
        }
    };
    for (selector, read) in [
        (selectors.0, &mut subject.namespaces),
        (selectors.1, &mut subject.pods),
    ] {
        match Selector::read(&selector) {
            Ok(selector) => *read = selector,
            Err(error) => {
                reader.problem("subject", &format!("cannot be read: {error}"));
                *is_good = false;
            }
        }
    }
    subject
}

fn rule(index: usize, written: &Value, problems: &mut Vec<String>) -> NetworkRule {
    let name = name_in(written);
    let rule = match serde_json::from_value::<EgressRule>(written.clone()) {
        Ok(rule) => rule,
        Err(error) => {
            let is_allow = written["action"] == "Accept";
            problems.push(format!(
                "{} cannot be read: {error}: {}",
                title(index, name.as_deref()),
                consequence(is_allow)
            ));
            return NetworkRule::Fixed(fail_closed(index, name, is_allow));
        }
    };
    let action = rule.action;
    match destinations(&rule) {
        Ok(to) if to.is_of_cluster() => NetworkRule::OfCluster {
            name,
            index,
            action,
            to,
        },
        read => {
            let entries = read.and_then(|to| to.entries(action, &Nowhere));
            NetworkRule::Fixed(with_entries(index, name, action, entries, problems))
        }
    }
}

fn with_entries(
    index: usize,
    name: Option<String>,
    action: RuleAction,
    entries: Result<Vec<String>, String>,
    problems: &mut Vec<String>,
) -> TierRule {
    let is_allow = action == RuleAction::Accept;
    match entries {
        Ok(entries) => TierRule {
            name,
            index,
            action: match action {
                RuleAction::Accept => TierAction::Allow,
                RuleAction::Deny => TierAction::Deny,
                RuleAction::Pass => TierAction::Pass,
            },
            entries,
        },
        Err(why) => {
            problems.push(format!(
                "{}: {why}: {}",
                title(index, name.as_deref()),
                consequence(is_allow)
            ));
            fail_closed(index, name, is_allow)
        }
    }
}

fn title(index: usize, name: Option<&str>) -> String {
    rule_title("egress", index, name)
}

/// Whether a peer has no field that is known here.
pub(super) fn is_unknown(peer: &EgressPeer) -> bool {
    *peer == EgressPeer::default()
}
