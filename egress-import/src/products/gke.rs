//! `FQDNNetworkPolicy` of Google Kubernetes Engine.
//!
//! `networking.gke.io/v1alpha1` and `v1` have `egress[].matches[]` with `name` or `pattern`. The controller of the same
//! name (`v1alpha3`) has `egress[].to[].fqdns[]`.

use egress_api::Action;

use super::{Numbered, document, namespace, network_policy::read_port, policy, translator};
use crate::{
    Options,
    fields::Fields,
    manifest::Manifest,
    names::Wildcards,
    object::{Document, Entries, Policy},
    remark::Remark,
    rule::{Peer, Protocol, Rule},
    selector,
};

pub(super) fn import(manifests: &[Numbered<'_>], options: &Options) -> Vec<(usize, Document)> {
    manifests
        .iter()
        .filter(|(_, manifest)| manifest.kind == "FQDNNetworkPolicy")
        .map(|(i, manifest)| (*i, import_one(manifest, options)))
        .collect()
}

fn import_one(manifest: &Manifest, options: &Options) -> Document {
    document(manifest, |document| {
        let spec = manifest.spec()?;
        let others = spec.others(&["podSelector", "egress", "ingress", "policyTypes"]);
        if !others.is_empty() {
            return Err(format!("spec has unknown fields: {}", others.join(", ")));
        }
        let mut allow = Entries::default();
        for rule in spec.mappings("egress")? {
            allow.extend(translator(options).entries(&read_rule(&rule)?).0);
        }
        let mut object = policy(
            &manifest.name,
            namespace(manifest, options),
            Policy {
                pods: selector::read(&spec.mapping("podSelector")?)?,
                allow: Some(allow),
                deny: None,
            },
        );
        object.remarks.push(Remark::note(
            "the selected pods are closed; import the NetworkPolicies of these pods too, since allow lists add up",
        ));
        document.objects.push(object);
        Ok(())
    })
}

fn read_rule(fields: &Fields<'_>) -> Result<Rule, String> {
    let mut rule = Rule::new(Action::Allow);
    for other in fields.others(&["matches", "to", "ports"]) {
        rule.conditions.push(format!("the unknown field `{other}`"));
    }
    for port in fields.mappings("ports")? {
        rule.ports.push(read_port(&port, Some(Protocol::Tcp))?);
    }
    for one in fields.mappings("matches")? {
        let others = one.others(&["name", "pattern"]);
        if !others.is_empty() {
            rule.peers.push(Peer::Unsupported(format!(
                "{} has unknown fields: {}",
                one.place(),
                others.join(", ")
            )));
            continue;
        }
        for (key, wildcards) in [("name", Wildcards::None), ("pattern", Wildcards::OneLabel)] {
            if let Some(text) = one.text(key)? {
                rule.peers.push(Peer::Name { text, wildcards });
            }
        }
    }
    for to in fields.mappings("to")? {
        for other in to.others(&["fqdns"]) {
            rule.peers.push(Peer::Unsupported(format!(
                "{} has the unknown field {other}",
                to.place()
            )));
        }
        for text in to.texts("fqdns")? {
            rule.peers.push(Peer::Name {
                text,
                wildcards: Wildcards::None,
            });
        }
    }
    Ok(rule)
}
