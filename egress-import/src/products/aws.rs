//! `ApplicationNetworkPolicy` and `ClusterNetworkPolicy` of Amazon EKS (`networking.k8s.aws/v1alpha1`).

use egress_api::{Action, Tier};

use super::{Numbered, add_cluster, document, network_policy, translator};
use crate::{
    Options,
    fields::Fields,
    manifest::Manifest,
    names::Wildcards,
    object::{Cluster, Document, Subject},
    remark::Remark,
    rule::{Peer, Ports, Protocol, Rule},
    selector,
    translate::Barrier,
};

pub(super) fn import(manifests: &[Numbered<'_>], options: &Options) -> Vec<(usize, Document)> {
    let mut documents = Vec::new();
    let mut clusters = Vec::new();
    for (i, manifest) in manifests {
        match manifest.kind.as_str() {
            "ApplicationNetworkPolicy" => documents.push((
                *i,
                network_policy::import_one(manifest, Wildcards::Labels, options),
            )),
            "ClusterNetworkPolicy" => clusters.push((*i, *manifest, read_cluster(manifest))),
            _ => {}
        }
    }
    // In the order of evaluation, since a rule that cannot be written concerns those behind it.
    clusters.sort_by_key(|(.., read)| {
        let place = read.as_ref().ok();
        place.map(|read| (read.tier == Tier::Baseline, read.priority))
    });
    let mut barrier = Barrier::None;
    for (i, manifest, read) in clusters {
        let document = document(manifest, |document| {
            let read = read?;
            if read.has_ingress {
                document.remarks.push(Remark::note(
                    "the part about ingress stays with the original",
                ));
            }
            let (rules, missing) = translator(options).ordered(&read.rules, barrier);
            barrier = missing;
            let cluster = Cluster {
                tier: read.tier,
                priority: read.priority,
                subject: read.subject,
                rules,
            };
            add_cluster(document, manifest.name.clone(), cluster);
            Ok(())
        });
        documents.push((i, document));
    }
    documents
}

/// A `ClusterNetworkPolicy`.
struct ReadCluster {
    tier: Tier,
    priority: u32,
    subject: Subject,
    rules: Vec<Rule>,
    has_ingress: bool,
}

fn read_cluster(manifest: &Manifest) -> Result<ReadCluster, String> {
    let spec = manifest.spec()?;
    let others = spec.others(&["tier", "priority", "subject", "ingress", "egress"]);
    if !others.is_empty() {
        return Err(format!("spec has unknown fields: {}", others.join(", ")));
    }
    let tier = match spec.needed("tier")?.as_str() {
        "Admin" => Tier::Admin,
        "Baseline" => Tier::Baseline,
        other => {
            return Err(format!(
                "spec.tier is `{other}`: expected Admin or Baseline"
            ));
        }
    };
    let priority: u32 = spec
        .needed("priority")?
        .parse()
        .ok()
        .filter(|priority| *priority <= super::LAST_PRIORITY)
        .ok_or("spec.priority is not a number from 0 to 1000")?;
    let rules = spec.mappings("egress")?;
    Ok(ReadCluster {
        tier,
        priority,
        subject: read_subject(&spec.mapping("subject")?)?,
        rules: rules.iter().map(read_rule).collect::<Result<_, _>>()?,
        has_ingress: spec.has("ingress"),
    })
}

fn read_subject(fields: &Fields<'_>) -> Result<Subject, String> {
    let others = fields.others(&["namespaces", "pods"]);
    if !others.is_empty() || fields.has("namespaces") == fields.has("pods") {
        return Err("spec.subject is not one of namespaces and pods".to_owned());
    }
    if fields.has("namespaces") {
        return Ok(Subject {
            namespaces: selector::read(&fields.mapping("namespaces")?)?,
            ..Subject::default()
        });
    }
    read_pods(&fields.mapping("pods")?)
}

fn read_pods(fields: &Fields<'_>) -> Result<Subject, String> {
    let others = fields.others(&["namespaceSelector", "podSelector"]);
    if !others.is_empty() {
        return Err(format!(
            "{} has unknown fields: {}",
            fields.place(),
            others.join(", ")
        ));
    }
    Ok(Subject {
        namespaces: selector::read(&fields.mapping("namespaceSelector")?)?,
        pods: selector::read(&fields.mapping("podSelector")?)?,
    })
}

fn read_rule(fields: &Fields<'_>) -> Result<Rule, String> {
    let action = match fields.needed("action")?.as_str() {
        "Accept" | "Allow" => Action::Allow,
        "Deny" => Action::Deny,
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
    for other in fields.others(&["name", "action", "to", "ports", "protocols"]) {
        rule.conditions.push(format!("the unknown field `{other}`"));
    }
    for port in fields.mappings("ports")? {
        rule.ports.push(read_port(&port)?);
    }
    for protocol in fields.mappings("protocols")? {
        rule.ports.push(read_protocol(&protocol)?);
    }
    for peer in fields.mappings("to")? {
        rule.peers.extend(read_peer(&peer)?);
    }
    Ok(rule)
}

fn read_peer(fields: &Fields<'_>) -> Result<Vec<Peer>, String> {
    let known = ["namespaces", "pods", "networks", "nodes", "domainNames"];
    if !fields.others(&known).is_empty() {
        return Ok(vec![Peer::Unsupported(format!(
            "{} has a kind of peer that is not known",
            fields.place()
        ))]);
    }
    let networks = fields.texts("networks")?;
    let mut peers: Vec<Peer> = networks
        .iter()
        .map(|network| Peer::cidr(network, &[]))
        .collect();
    peers.extend(
        fields
            .texts("domainNames")?
            .into_iter()
            .map(|text| Peer::Name {
                text,
                wildcards: Wildcards::Labels,
            }),
    );
    if fields.has("namespaces") {
        let words = selector::words(&selector::read(&fields.mapping("namespaces")?)?);
        peers.push(Peer::Cluster(format!("pods in namespaces ({words})")));
    }
    if fields.has("pods") {
        let Subject { namespaces, pods } = read_pods(&fields.mapping("pods")?)?;
        peers.push(Peer::Cluster(format!(
            "pods ({}) in namespaces ({})",
            selector::words(&pods),
            selector::words(&namespaces)
        )));
    }
    if fields.has("nodes") {
        let words = selector::words(&selector::read(&fields.mapping("nodes")?)?);
        peers.push(Peer::Cluster(format!("nodes ({words})")));
    }
    Ok(peers)
}

/// `portNumber`, `portRange` or `namedPort`.
fn read_port(fields: &Fields<'_>) -> Result<Ports, String> {
    let number = fields.mapping("portNumber")?;
    let range = fields.mapping("portRange")?;
    let (one, first, last) = if fields.has("portNumber") {
        (&number, "port", None)
    } else if fields.has("portRange") {
        (&range, "start", Some("end"))
    } else {
        return Ok(Ports::Unsupported {
            what: format!("{} is a named port, or unknown", fields.place()),
            widest: Protocol::All,
        });
    };
    let protocol = one.text("protocol")?.unwrap_or_else(|| "TCP".to_owned());
    let Some(protocol) = Protocol::read(&protocol) else {
        return Ok(Ports::Unsupported {
            what: format!("protocol `{protocol}`"),
            widest: Protocol::All,
        });
    };
    let end = last.map(|last| one.needed(last)).transpose()?;
    Ok(Ports::read(
        protocol,
        Some(&one.needed(first)?),
        end.as_deref(),
    ))
}

/// `tcp`, `udp` or `sctp` with `destinationPort`, or `destinationNamedPort`.
fn read_protocol(fields: &Fields<'_>) -> Result<Ports, String> {
    for (key, protocol) in [
        ("tcp", Protocol::Tcp),
        ("udp", Protocol::Udp),
        ("sctp", Protocol::Sctp),
    ] {
        if !fields.has(key) {
            continue;
        }
        let inner = fields.mapping(key)?;
        if !inner.others(&["destinationPort"]).is_empty() {
            return Ok(Ports::Unsupported {
                what: format!("{} has unknown fields", inner.place()),
                widest: protocol,
            });
        }
        let port = inner.mapping("destinationPort")?;
        if port.has("number") {
            return Ok(Ports::read(protocol, Some(&port.needed("number")?), None));
        }
        if port.has("range") {
            let range = port.mapping("range")?;
            let (start, end) = (range.needed("start")?, range.needed("end")?);
            return Ok(Ports::read(protocol, Some(&start), Some(&end)));
        }
        return Ok(if inner.has("destinationPort") {
            Ports::Unsupported {
                what: format!("{} is not known", port.place()),
                widest: protocol,
            }
        } else {
            Ports::read(protocol, None, None)
        });
    }
    Ok(Ports::Unsupported {
        what: format!("{} is a named port, or unknown", fields.place()),
        widest: Protocol::All,
    })
}
