//! `NetworkPolicy` of Kubernetes, and kinds with the same form and names in addition.

use egress_api::Action;

use super::{Numbered, document, namespace, policy, translator};
use crate::{
    Options,
    fields::Fields,
    manifest::Manifest,
    names::Wildcards,
    object::{Document, Entries, Policy},
    remark::Remark,
    rule::{Peer, Ports, Protocol, Rule},
    selector,
};

/// Imports `networking.k8s.io` `NetworkPolicy`.
pub(super) fn import(manifests: &[Numbered<'_>], options: &Options) -> Vec<(usize, Document)> {
    manifests
        .iter()
        .filter(|(_, manifest)| manifest.kind == "NetworkPolicy")
        .map(|(i, manifest)| (*i, import_one(manifest, Wildcards::None, options)))
        .collect()
}

/// One policy. Its peers may have `domainNames` with these wildcards.
pub(super) fn import_one(manifest: &Manifest, wildcards: Wildcards, options: &Options) -> Document {
    document(manifest, |document| {
        let spec = manifest.spec()?;
        let others = spec.others(&["podSelector", "policyTypes", "ingress", "egress"]);
        if !others.is_empty() {
            return Err(format!("spec has unknown fields: {}", others.join(", ")));
        }
        let types = spec.texts("policyTypes")?;
        let egress = spec.mappings("egress")?;
        let is_egress = if types.is_empty() {
            !egress.is_empty()
        } else {
            types.iter().any(|kind| kind == "Egress")
        };
        if spec.has("ingress") || types.iter().any(|kind| kind == "Ingress") {
            document.remarks.push(Remark::note(
                "the part about ingress stays with the original",
            ));
        }
        if !is_egress {
            document.remarks.push(Remark::note(
                "it does not restrict egress; nothing to import",
            ));
            return Ok(());
        }
        let mut allow = Entries::default();
        for rule in egress {
            let rule = read_rule(&rule, wildcards)?;
            allow.extend(translator(options).entries(&rule).0);
        }
        document.objects.push(policy(
            &manifest.name,
            namespace(manifest, options),
            Policy {
                pods: selector::read(&spec.mapping("podSelector")?)?,
                allow: Some(allow),
                deny: None,
            },
        ));
        Ok(())
    })
}

fn read_rule(fields: &Fields<'_>, wildcards: Wildcards) -> Result<Rule, String> {
    let mut rule = Rule::new(Action::Allow);
    for other in fields.others(&["to", "ports"]) {
        rule.conditions.push(format!("the unknown field `{other}`"));
    }
    for port in fields.mappings("ports")? {
        rule.ports.push(read_port(&port, Some(Protocol::Tcp))?);
    }
    let peers = fields.mappings("to")?;
    if peers.is_empty() {
        rule.peers.push(Peer::Anywhere);
    }
    for peer in &peers {
        rule.peers.extend(read_peer(peer, wildcards, &rule.ports)?);
    }
    Ok(rule)
}

/// A port in the form of a `NetworkPolicy`: `protocol`, `port`, `endPort`.
pub(super) fn read_port(fields: &Fields<'_>, missing: Option<Protocol>) -> Result<Ports, String> {
    let protocol = match fields.text("protocol")? {
        None => missing,
        Some(text) => Protocol::read(&text),
    };
    let others = fields.others(&["protocol", "port", "endPort"]);
    let Some(protocol) = protocol.filter(|_| others.is_empty()) else {
        return Ok(Ports::Unsupported {
            what: format!(
                "{} has a protocol or field that is not known",
                fields.place()
            ),
            widest: Protocol::All,
        });
    };
    let (port, end) = (fields.text("port")?, fields.text("endPort")?);
    Ok(Ports::read(protocol, port.as_deref(), end.as_deref()))
}

fn read_peer(
    fields: &Fields<'_>,
    wildcards: Wildcards,
    ports: &[Ports],
) -> Result<Vec<Peer>, String> {
    let known: &[&str] = if wildcards == Wildcards::None {
        &["ipBlock", "podSelector", "namespaceSelector"]
    } else {
        &["ipBlock", "podSelector", "namespaceSelector", "domainNames"]
    };
    let others = fields.others(known);
    if !others.is_empty() {
        return Ok(vec![Peer::Unsupported(format!(
            "{} has unknown fields: {}",
            fields.place(),
            others.join(", ")
        ))]);
    }
    if fields.has("ipBlock") {
        return Ok(vec![read_block(&fields.mapping("ipBlock")?)?]);
    }
    if fields.has("domainNames") {
        let names = fields.texts("domainNames")?;
        let peers = names.into_iter().map(|text| Peer::Name { text, wildcards });
        return Ok(peers.collect());
    }
    let pods = selector::words(&selector::read(&fields.mapping("podSelector")?)?);
    let what = if fields.has("namespaceSelector") {
        let namespaces = selector::words(&selector::read(&fields.mapping("namespaceSelector")?)?);
        format!("pods ({pods}) in namespaces ({namespaces})")
    } else {
        format!("pods ({pods}) of the namespace")
    };
    Ok(vec![Peer::in_cluster(what, ports)])
}

/// An `ipBlock` with its `except`.
pub(super) fn read_block(fields: &Fields<'_>) -> Result<Peer, String> {
    let others = fields.others(&["cidr", "except"]);
    if !others.is_empty() {
        return Ok(Peer::Unsupported(format!(
            "{} has unknown fields: {}",
            fields.place(),
            others.join(", ")
        )));
    }
    Ok(Peer::cidr(
        &fields.needed("cidr")?,
        &fields.texts("except")?,
    ))
}
