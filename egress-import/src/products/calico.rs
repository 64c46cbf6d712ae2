//! `NetworkPolicy`, `GlobalNetworkPolicy`, `NetworkSet` and `GlobalNetworkSet` of Calico (`projectcalico.org/v3`).
//!
//! Tiers by order, in each the policies by `order`, in each the rules: the first that matches decides. What no rule of
//! a tier matches is denied, if one of the tier's policies selects the pod.
//!
//! If no rule denies or passes, permissions add up, and the order does not matter. Then a policy of a namespace becomes
//! an `EgressPolicy`. Otherwise all policies become `ClusterEgressPolicy` objects in one order.

mod language;
mod order;
mod rules;
mod sets;

use egress_api::{Action, Tier};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use super::{
    Numbered, Reach, add_cluster, close_cluster, closed, document, namespace, needed_namespace,
    policy, translator,
};
use crate::{
    Options,
    fields::Fields,
    manifest::Manifest,
    object::{Cluster, ClusterRule, Document, Entries, Policy, Subject, both},
    remark::{Remark, add},
    rule::{Peer, Rule},
    translate::{Barrier, Barriers},
};
use language::Expression;
use order::{Numbers, Order, Place};
use rules::Around;
use sets::Set;

/// The priority of permissions whose order does not matter.
const ALLOW_PRIORITY: u32 = 500;

/// A policy about egress.
struct Read {
    reach: Reach,
    tier: String,
    order: f64,
    subject: Subject,
    rules: Vec<Rule>,
}

/// A policy and remarks about it, or no policy if it is not about egress.
type ReadPolicy = Result<(Option<Read>, Vec<Remark>), String>;

pub(super) fn import(manifests: &[Numbered<'_>], options: &Options) -> Vec<(usize, Document)> {
    let (sets, mut documents) = sets::import(manifests, options);
    let mut policies: Vec<(usize, &Manifest, ReadPolicy)> = manifests
        .iter()
        .filter(|(_, manifest)| {
            ["NetworkPolicy", "GlobalNetworkPolicy"].contains(&manifest.kind.as_str())
        })
        .map(|(i, manifest)| (*i, *manifest, read(manifest, &sets, options)))
        .collect();
    let order = Order::of(
        manifests,
        policies.iter().filter_map(|(i, manifest, policy)| {
            let (Some(read), _) = policy.as_ref().ok()? else {
                return None;
            };
            Some(Place {
                index: *i,
                tier: read.tier.clone(),
                order: read.order,
                name: manifest.name.clone(),
                decides: read.rules.iter().any(|rule| rule.action != Action::Allow),
                passes_on: read
                    .rules
                    .last()
                    .is_some_and(|rule| rule.action == Action::Pass && rule.is_everything()),
            })
        }),
    );
    // In the order of evaluation, since a rule that cannot be written concerns those behind it.
    policies.sort_by_key(|(i, ..)| order.numbers(*i).ok().map(|numbers| numbers.own));
    let mut barriers = Barriers::default();
    for (i, manifest, policy) in policies {
        let document = document(manifest, |document| {
            let (policy, remarks) = policy?;
            document.remarks.extend(remarks);
            let Some(policy) = policy else {
                return Ok(());
            };
            if order.matters() {
                let place = (order.numbers(i)?, &mut barriers);
                write_ordered(document, manifest, policy, place, options)
            } else {
                write_allow_only(document, manifest, &policy, options);
                Ok(())
            }
        });
        documents.push((i, document));
    }
    for (i, manifest) in manifests {
        if manifest.kind == "Tier" {
            let mut document = super::start(manifest);
            document.remarks.push(Remark::note(
                "the tier's place is in the priority of the policies that use it",
            ));
            documents.push((*i, document));
        }
    }
    documents
}

fn read(manifest: &Manifest, sets: &[Set], options: &Options) -> ReadPolicy {
    let spec = manifest.spec()?;
    let known = [
        "tier",
        "order",
        "selector",
        "namespaceSelector",
        "types",
        "ingress",
        "egress",
        "applyOnForward",
        "performanceHints",
    ];
    let others = spec.others(&known);
    if !others.is_empty() {
        return Err(format!(
            "spec has {}, which no policy here expresses",
            others.join(", ")
        ));
    }
    let mut remarks = Vec::new();
    let types = spec.texts("types")?;
    if spec.has("ingress") || types.iter().any(|kind| kind == "Ingress") {
        remarks.push(Remark::note(
            "the part about ingress stays with the original",
        ));
    }
    let is_egress = if types.is_empty() {
        spec.has("egress")
    } else {
        types.iter().any(|kind| kind == "Egress")
    };
    if !is_egress {
        remarks.push(Remark::note(
            "it does not restrict egress; nothing to import",
        ));
        return Ok((None, remarks));
    }
    let reach = if manifest.kind == "NetworkPolicy" {
        Reach::Namespace(namespace(manifest, options))
    } else {
        Reach::Cluster
    };
    let subject = read_subject(&spec, &reach)?;
    let around = Around {
        sets,
        reach: &reach,
    };
    let mut rules = Vec::new();
    for fields in spec.mappings("egress")? {
        match rules::read(&fields, around)? {
            Some(rule) => rules.push(rule),
            None => add(
                &mut remarks,
                Remark::note(
                    "rules with the action Log are dropped; denials are always logged here",
                ),
            ),
        }
    }
    Ok((
        Some(Read {
            reach,
            tier: spec.text("tier")?.unwrap_or_else(|| "default".to_owned()),
            order: spec.number("order")?.unwrap_or(f64::INFINITY),
            subject,
            rules,
        }),
        remarks,
    ))
}

fn read_subject(spec: &Fields<'_>, reach: &Reach) -> Result<Subject, String> {
    let Subject { namespaces, pods } =
        Expression::read(&spec.text("selector")?.unwrap_or_default())?.subject()?;
    if *reach != Reach::Cluster {
        if namespaces != LabelSelector::default() || spec.has("namespaceSelector") {
            return Err("it selects namespaces, in a policy of one namespace".to_owned());
        }
        return Ok(Subject { namespaces, pods });
    }
    let more =
        Expression::read(&spec.text("namespaceSelector")?.unwrap_or_default())?.namespaces()?;
    Ok(Subject {
        namespaces: both(namespaces, more),
        pods,
    })
}

fn write_allow_only(document: &mut Document, manifest: &Manifest, read: &Read, options: &Options) {
    if let Reach::Namespace(namespace) = &read.reach {
        let mut allow = Entries::default();
        for rule in &read.rules {
            allow.extend(translator(options).entries(rule).0);
        }
        let spec = Policy {
            pods: read.subject.pods.clone(),
            allow: Some(allow),
            deny: None,
        };
        document
            .objects
            .push(policy(&manifest.name, namespace.clone(), spec));
        return;
    }
    let mut translator = translator(options);
    translator.denies_inside = true;
    let cluster = Cluster {
        tier: Tier::Admin,
        priority: ALLOW_PRIORITY,
        subject: read.subject.clone(),
        // No rule denies, so none is refused.
        rules: translator.ordered(&read.rules, Barrier::None).0,
    };
    add_cluster(document, manifest.name.clone(), cluster);
    document.objects.push(close_cluster(
        &format!("{}-close", manifest.name),
        read.subject.clone(),
    ));
}

fn write_ordered(
    document: &mut Document,
    manifest: &Manifest,
    mut read: Read,
    (numbers, barriers): (Numbers, &mut Barriers),
    options: &Options,
) -> Result<(), String> {
    let (subject, name) = match &read.reach {
        Reach::Cluster => (read.subject.clone(), manifest.name.clone()),
        Reach::Namespace(_) => {
            let namespace = needed_namespace(manifest, options)?;
            (
                Subject::of_namespace(&namespace, read.subject.pods.clone()),
                format!("{namespace}-{}", manifest.name),
            )
        }
    };
    let last = read.rules.last().filter(|rule| rule.is_everything());
    match last.map(|rule| rule.action) {
        Some(Action::Pass) if numbers.is_last_of_tier && !numbers.is_last_tier => {
            read.rules.pop();
            document.remarks.push(Remark::note(
                "the last rule passes everything to the next tier, as rules here do that match nothing",
            ));
        }
        Some(Action::Deny) if numbers.is_last_of_tier && read.reach != Reach::Cluster => {
            read.rules.pop();
            document.remarks.push(Remark::note(
                "the last rule denies the rest: the pods are closed",
            ));
        }
        _ => {}
    }
    if !numbers.is_last_tier {
        for rule in &mut read.rules {
            if rule.action == Action::Pass {
                rule.peers = vec![Peer::Unsupported(
                    "Pass leads to the next tier of Calico; here it would skip that".to_owned(),
                )];
            }
        }
    }
    let mut translator = translator(options);
    translator.denies_inside = read.reach == Reach::Cluster;
    let namespace = read.reach.namespace();
    let (rules, barrier) = translator.ordered(&read.rules, barriers.of(namespace));
    barriers.add(namespace, barrier);
    let cluster = Cluster {
        tier: Tier::Admin,
        priority: numbers.own,
        subject: subject.clone(),
        rules,
    };
    add_cluster(document, name.clone(), cluster);
    if let Some(end) = numbers.end_of_tier {
        let cluster = Cluster {
            tier: Tier::Admin,
            priority: end,
            subject,
            rules: vec![ClusterRule {
                name: None,
                action: Action::Deny,
                entries: Entries::everything(),
            }],
        };
        add_cluster(document, format!("{name}-end-of-tier"), cluster);
    } else if numbers.is_last_tier {
        document.objects.push(match &read.reach {
            Reach::Cluster => close_cluster(&format!("{name}-close"), subject),
            Reach::Namespace(namespace) => {
                closed(&manifest.name, namespace.clone(), read.subject.pods.clone())
            }
        });
    }
    Ok(())
}
