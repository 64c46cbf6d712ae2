//! `ClusterNetworkPolicy` and `NetworkPolicy` of Antrea (`crd.antrea.io`).
//!
//! Tiers, then policies by priority, then rules in order: the first that matches decides. What none matches goes on to
//! the `NetworkPolicy` objects of Kubernetes, and then to the tier `baseline`. `ClusterEgressPolicy` has the same order.

use std::{cmp::Ordering, collections::BTreeMap};

use egress_api::{Action, Tier};

use super::{
    LAST_PRIORITY, Numbered, add_cluster, document, needed_namespace,
    network_policy::{read_block, read_port},
    ranks, translator,
};
use crate::{
    Options,
    fields::Fields,
    manifest::Manifest,
    names::Wildcards,
    object::{Cluster, ClusterRule, Document, Subject},
    remark::{Remark, add},
    rule::{Peer, Ports, Protocol, Rule},
    selector,
    translate::Barriers,
};

/// The tiers that Antrea has from the beginning.
const TIERS: [(&str, f64); 6] = [
    ("emergency", 50.0),
    ("securityops", 100.0),
    ("networkops", 150.0),
    ("platform", 200.0),
    ("application", 250.0),
    ("baseline", 253.0),
];

/// The tier behind the `NetworkPolicy` objects of Kubernetes.
const BASELINE: f64 = 253.0;

/// The first priority number that is used, so that there is room in front.
const FIRST: u32 = 10;

/// Rules of a policy that apply to the same pods.
struct Unit {
    name: String,
    subjects: Vec<Subject>,
    rules: Vec<Rule>,
    order: (f64, f64, usize),
    namespace: Option<String>,
    /// The rules as entries.
    written: Vec<ClusterRule>,
}

pub(super) fn import(manifests: &[Numbered<'_>], options: &Options) -> Vec<(usize, Document)> {
    let tiers = read_tiers(manifests);
    let policies = manifests.iter().filter(|(_, manifest)| {
        ["ClusterNetworkPolicy", "NetworkPolicy"].contains(&manifest.kind.as_str())
    });
    let mut read: Vec<_> = policies
        .map(|(i, manifest)| (*i, *manifest, read(manifest, &tiers, options)))
        .collect();
    let mut orders: Vec<(f64, f64, usize)> = read
        .iter()
        .filter_map(|(_, _, policy)| policy.as_ref().ok())
        .flat_map(|(units, _)| units.iter().map(|unit| unit.order))
        .collect();
    orders.sort_by(compare);
    let numbers = ranks(&orders, FIRST, LAST_PRIORITY);
    translate(
        read.iter_mut()
            .filter_map(|(_, _, policy)| policy.as_mut().ok())
            .flat_map(|(units, _)| units)
            .collect(),
        options,
    );
    let mut documents: Vec<(usize, Document)> = read
        .into_iter()
        .map(|(i, manifest, policy)| {
            let document = document(manifest, |document| {
                let (units, remarks) = policy?;
                document.remarks.extend(remarks);
                let numbers = numbers.as_ref().map_err(Clone::clone)?;
                for unit in units {
                    let number = orders
                        .iter()
                        .position(|order| *order == unit.order)
                        .and_then(|at| numbers.get(at));
                    write(document, unit, *number.unwrap_or(&LAST_PRIORITY));
                }
                Ok(())
            });
            (i, document)
        })
        .collect();
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

/// Translates rules in the order of evaluation, since a rule that cannot be written concerns those behind it.
fn translate(mut units: Vec<&mut Unit>, options: &Options) {
    units.sort_by(|a, b| compare(&a.order, &b.order));
    let mut barriers = Barriers::default();
    for unit in units {
        let namespace = unit.namespace.as_deref();
        let before = barriers.of(namespace);
        let (rules, barrier) = translator(options).ordered(&unit.rules, before);
        barriers.add(namespace, barrier);
        unit.written = rules;
    }
}

fn compare(a: &(f64, f64, usize), b: &(f64, f64, usize)) -> Ordering {
    a.0.total_cmp(&b.0)
        .then(a.1.total_cmp(&b.1))
        .then(a.2.cmp(&b.2))
}

fn read_tiers(manifests: &[Numbered<'_>]) -> BTreeMap<String, f64> {
    let own = TIERS
        .into_iter()
        .map(|(name, priority)| (name.to_owned(), priority));
    let further = manifests
        .iter()
        .filter(|(_, manifest)| manifest.kind == "Tier")
        .filter_map(|(_, manifest)| {
            let priority = manifest.spec().ok()?.number("priority").ok()??;
            Some((manifest.name.clone(), priority))
        });
    own.chain(further).collect()
}

fn read(
    manifest: &Manifest,
    tiers: &BTreeMap<String, f64>,
    options: &Options,
) -> Result<(Vec<Unit>, Vec<Remark>), String> {
    let spec = manifest.spec()?;
    let others = spec.others(&["tier", "priority", "appliedTo", "ingress", "egress"]);
    if !others.is_empty() {
        return Err(format!("spec has unknown fields: {}", others.join(", ")));
    }
    let mut remarks = Vec::new();
    if spec.has("ingress") {
        remarks.push(Remark::note(
            "the part about ingress stays with the original",
        ));
    }
    let egress = spec.mappings("egress")?;
    if egress.is_empty() {
        remarks.push(Remark::note(
            "it does not restrict egress; nothing to import",
        ));
        return Ok((Vec::new(), remarks));
    }
    let namespace = if manifest.kind == "NetworkPolicy" {
        Some(needed_namespace(manifest, options)?)
    } else {
        None
    };
    let tier = spec
        .text("tier")?
        .unwrap_or_else(|| "application".to_owned());
    let place = *tiers
        .get(&tier)
        .or_else(|| tiers.get(&tier.to_lowercase()))
        .ok_or_else(|| {
            format!("the Tier `{tier}` is not among the files, so its place is not known")
        })?;
    let priority = spec.number("priority")?.ok_or("spec.priority is missing")?;
    let name = match &namespace {
        Some(namespace) => format!("{namespace}-{}", manifest.name),
        None => manifest.name.clone(),
    };
    let whole = read_subjects(&spec.mappings("appliedTo")?, namespace.as_deref())?;
    let mut units: Vec<Unit> = Vec::new();
    for fields in egress {
        let rule = read_rule(&fields)?;
        let own = read_subjects(&fields.mappings("appliedTo")?, namespace.as_deref())?;
        let subjects = if own.is_empty() { whole.clone() } else { own };
        match units.last_mut() {
            Some(unit) if unit.subjects == subjects => unit.rules.push(rule),
            _ => units.push(Unit {
                name: name.clone(),
                subjects,
                rules: vec![rule],
                order: (place, priority, units.len()),
                namespace: namespace.clone(),
                written: Vec::new(),
            }),
        }
    }
    if units.len() > 1 {
        remarks.push(Remark::note(
            "its rules apply to different pods, so they are several objects, in the order of the rules",
        ));
    }
    Ok((units, remarks))
}

fn write(document: &mut Document, unit: Unit, priority: u32) {
    if unit.subjects.is_empty() {
        add(
            &mut document.remarks,
            Remark::note("it applies to no pods (appliedTo is empty)"),
        );
    }
    let tier = if unit.order.0 >= BASELINE {
        Tier::Baseline
    } else {
        Tier::Admin
    };
    let several = unit.subjects.len() > 1 || unit.order.2 > 0;
    for (i, subject) in unit.subjects.into_iter().enumerate() {
        let name = if several {
            format!("{}-{}-{}", unit.name, unit.order.2 + 1, i + 1)
        } else {
            unit.name.clone()
        };
        let cluster = Cluster {
            tier,
            priority,
            subject,
            rules: unit.written.clone(),
        };
        add_cluster(document, name, cluster);
    }
}

/// The pods that a list `appliedTo` names.
fn read_subjects(list: &[Fields<'_>], namespace: Option<&str>) -> Result<Vec<Subject>, String> {
    list.iter()
        .map(|fields| {
            let others = fields.others(&["podSelector", "namespaceSelector"]);
            if !others.is_empty() {
                return Err(format!(
                    "{} selects by {}, which no selector of labels expresses",
                    fields.place(),
                    others.join(", ")
                ));
            }
            let pods = selector::read(&fields.mapping("podSelector")?)?;
            match namespace {
                Some(_) if fields.has("namespaceSelector") => Err(format!(
                    "{} selects namespaces, in a policy of one namespace",
                    fields.place()
                )),
                Some(namespace) => Ok(Subject::of_namespace(namespace, pods)),
                None => Ok(Subject {
                    namespaces: selector::read(&fields.mapping("namespaceSelector")?)?,
                    pods,
                }),
            }
        })
        .collect()
}

fn read_rule(fields: &Fields<'_>) -> Result<Rule, String> {
    let action = match fields.needed("action")?.as_str() {
        "Allow" => Action::Allow,
        "Drop" | "Reject" => Action::Deny,
        "Pass" => Action::Pass,
        other => {
            return Err(format!(
                "{} has the unknown action `{other}`",
                fields.place()
            ));
        }
    };
    let mut rule = Rule::new(action);
    rule.name = fields.text("name")?;
    let known = [
        "action",
        "name",
        "to",
        "ports",
        "protocols",
        "toServices",
        "appliedTo",
        "enableLogging",
        "logLabel",
    ];
    for other in fields.others(&known) {
        rule.conditions.push(format!("`{other}`"));
    }
    for port in fields.mappings("ports")? {
        if port.has("sourcePort") || port.has("sourceEndPort") {
            rule.ports.push(Ports::Unsupported {
                what: format!("{} has a source port", port.place()),
                widest: Protocol::All,
            });
        } else {
            rule.ports.push(read_port(&port, Some(Protocol::Tcp))?);
        }
    }
    for protocol in fields.mappings("protocols")? {
        rule.ports.push(read_protocol(&protocol)?);
    }
    let peers = fields.mappings("to")?;
    if fields.has("toServices") {
        rule.peers
            .push(Peer::Cluster("Services (`toServices`)".to_owned()));
    } else if peers.is_empty() {
        rule.peers.push(Peer::Anywhere);
    }
    for peer in peers {
        let peer = read_peer(&peer, &rule.ports)?;
        rule.peers.push(peer);
    }
    Ok(rule)
}

fn read_protocol(fields: &Fields<'_>) -> Result<Ports, String> {
    let icmp = fields.mapping("icmp")?;
    // Without a type it is every type of ICMP, of IPv4.
    let is_all =
        fields.has("icmp") && fields.others(&["icmp"]).is_empty() && icmp.others(&[]).is_empty();
    let protocol = Protocol::Icmp {
        v4: true,
        v6: false,
    };
    Ok(if is_all {
        Ports::Of {
            protocol,
            range: None,
        }
    } else {
        Ports::Unsupported {
            what: format!("{} selects types of ICMP, or is not known", fields.place()),
            widest: Protocol::All,
        }
    })
}

fn read_peer(fields: &Fields<'_>, ports: &[Ports]) -> Result<Peer, String> {
    if fields.has("fqdn") && fields.others(&["fqdn"]).is_empty() {
        return Ok(Peer::Name {
            text: fields.needed("fqdn")?,
            wildcards: Wildcards::Text,
        });
    }
    if fields.has("ipBlock") && fields.others(&["ipBlock"]).is_empty() {
        return read_block(&fields.mapping("ipBlock")?);
    }
    let in_cluster = [
        "podSelector",
        "namespaceSelector",
        "namespaces",
        "nodeSelector",
        "serviceAccount",
    ];
    let given: Vec<&str> = in_cluster
        .into_iter()
        .filter(|key| fields.has(key))
        .collect();
    if !given.is_empty() && fields.others(&in_cluster).is_empty() {
        let words = selector::words(&selector::read(&fields.mapping("podSelector")?)?);
        return Ok(Peer::in_cluster(
            format!("pods ({words}) by {}", given.join(" and ")),
            ports,
        ));
    }
    Ok(Peer::Unsupported(format!(
        "{} selects by {}",
        fields.place(),
        fields.others(&[]).join(" and ")
    )))
}
