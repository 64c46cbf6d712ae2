//! `EgressFirewall` of OVN-Kubernetes (`k8s.ovn.org/v1`).
//!
//! The first rule that matches decides, and what no rule matches is allowed. Only traffic that leaves the cluster is
//! compared with rules.

use egress_api::{Action, Tier};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use super::{
    Numbered, add_cluster, closed, document, namespace, needed_namespace,
    network_policy::read_port, policy, translator,
};
use crate::{
    Options,
    cidr::may_be_internal,
    fields::Fields,
    manifest::Manifest,
    names::Wildcards,
    object::{Cluster, Document, Entries, Policy, Subject},
    remark::{Remark, add},
    rule::{Peer, Protocol, Rule},
    selector,
    translate::{Barrier, hold_back},
};

/// In the middle of the tier, so that there is room before and behind it.
const PRIORITY: u32 = 500;

pub(super) fn import(manifests: &[Numbered<'_>], options: &Options) -> Vec<(usize, Document)> {
    manifests
        .iter()
        .filter(|(_, manifest)| manifest.kind == "EgressFirewall")
        .map(|(i, manifest)| (*i, import_one(manifest, options)))
        .collect()
}

fn import_one(manifest: &Manifest, options: &Options) -> Document {
    document(manifest, |document| {
        let spec = manifest.spec()?;
        let others = spec.others(&["egress"]);
        if !others.is_empty() {
            return Err(format!("spec has unknown fields: {}", others.join(", ")));
        }
        let mut rules = Vec::new();
        let mut closes = false;
        for fields in spec.mappings("egress")? {
            let rule = read_rule(&fields)?;
            match catch_all(&rule) {
                None => rules.push(rule),
                Some(action) => {
                    // Later rules match nothing of this IP version.
                    closes = action == Action::Deny;
                    add(
                        &mut document.remarks,
                        Remark::note(if closes {
                            "the rule that denies every address: the pods are closed, for IPv4 and IPv6"
                        } else {
                            "the rule that allows every address: the rules before it count, and the pods stay open"
                        }),
                    );
                    break;
                }
            }
        }
        write(document, manifest, &rules, closes, options)
    })
}

fn write(
    document: &mut Document,
    manifest: &Manifest,
    rules: &[Rule],
    closes: bool,
    options: &Options,
) -> Result<(), String> {
    let first_allow = rules
        .iter()
        .position(|rule| rule.action == Action::Allow)
        .unwrap_or(rules.len());
    let denies_first = rules[first_allow..]
        .iter()
        .all(|rule| rule.action == Action::Allow);
    let needs_order = !denies_first || (!closes && first_allow < rules.len());
    let name = object_name(manifest);
    if needs_order {
        let namespace = needed_namespace(manifest, options)?;
        let cluster = Cluster {
            tier: Tier::Admin,
            priority: PRIORITY,
            subject: Subject::of_namespace(&namespace, LabelSelector::default()),
            rules: translator(options).ordered(rules, Barrier::None).0,
        };
        document.remarks.push(Remark::note(
            "the order of the rules counts, so they are a ClusterEgressPolicy of this namespace",
        ));
        add_cluster(document, format!("{namespace}-{name}"), cluster);
        if closes {
            document
                .objects
                .push(closed(&name, Some(namespace), LabelSelector::default()));
        }
        return Ok(());
    }
    let list = |rules: &[Rule]| {
        let mut entries = Entries::default();
        let mut barrier = Barrier::None;
        for rule in rules {
            let (more, missing) = translator(options).entries(rule);
            entries.extend(more);
            barrier = barrier.max(missing);
        }
        (entries, barrier)
    };
    let (deny, barrier) = list(&rules[..first_allow]);
    let (mut allow, _) = list(&rules[first_allow..]);
    hold_back(&mut allow, barrier);
    let policy_spec = Policy {
        pods: LabelSelector::default(),
        allow: closes.then_some(allow),
        deny: (first_allow > 0).then_some(deny),
    };
    if !closes && !policy_spec.deny.as_ref().is_some_and(Entries::has_entries) {
        let remarks = policy_spec.deny.iter().flat_map(Entries::remarks);
        document.remarks.extend(remarks.cloned());
        document.remarks.push(Remark::note(
            "nothing is denied that an entry can deny, so there is nothing to write",
        ));
        return Ok(());
    }
    let namespace = namespace(manifest, options);
    document.objects.push(policy(&name, namespace, policy_spec));
    Ok(())
}

/// The original is always called `default`.
fn object_name(manifest: &Manifest) -> String {
    if manifest.name == "default" {
        "egress-firewall".to_owned()
    } else {
        manifest.name.clone()
    }
}

/// The action of a rule for every IPv4 or IPv6 address.
fn catch_all(rule: &Rule) -> Option<Action> {
    let [Peer::Prefixes { prefixes, .. }] = rule.peers.as_slice() else {
        return None;
    };
    let is_v4 = prefixes
        .iter()
        .any(|prefix| prefix.is_whole_family() && prefix.is_v4());
    (is_v4 && rule.ports.is_empty() && rule.conditions.is_empty()).then_some(rule.action)
}

fn read_rule(fields: &Fields<'_>) -> Result<Rule, String> {
    let action = match fields.needed("type")?.as_str() {
        "Allow" => Action::Allow,
        "Deny" => Action::Deny,
        other => return Err(format!("{} has the unknown type `{other}`", fields.place())),
    };
    let mut rule = Rule::new(action);
    for other in fields.others(&["type", "to", "ports"]) {
        rule.conditions.push(format!("the unknown field `{other}`"));
    }
    for port in fields.mappings("ports")? {
        rule.ports.push(read_port(&port, Some(Protocol::Tcp))?);
    }
    let to = fields.mapping("to")?;
    let known = ["cidrSelector", "dnsName", "nodeSelector"];
    let others = to.others(&known);
    let given = known.into_iter().filter(|key| to.has(key)).count();
    if !others.is_empty() || given != 1 {
        rule.peers.push(Peer::Unsupported(format!(
            "{} is not one of {}",
            to.place(),
            known.join(", ")
        )));
        return Ok(rule);
    }
    if let Some(cidr) = to.text("cidrSelector")? {
        let peer = Peer::cidr(&cidr, &[]);
        if let Peer::Prefixes { prefixes, .. } = &peer
            && prefixes.iter().any(may_be_internal)
        {
            rule.remarks.push(Remark::note(
                "the original does not concern traffic within the cluster; here the entry also matches pods and nodes \
                 in its range",
            ));
        }
        rule.peers.push(peer);
    }
    if let Some(text) = to.text("dnsName")? {
        rule.peers.push(Peer::Name {
            text,
            wildcards: Wildcards::OneLabel,
        });
    }
    if to.has("nodeSelector") {
        let words = selector::words(&selector::read(&to.mapping("nodeSelector")?)?);
        rule.peers.push(Peer::Cluster(format!("nodes ({words})")));
    }
    Ok(rule)
}
