//! Egress rules, and `CiliumCIDRGroup` objects that they use.

use std::collections::BTreeMap;

use egress_api::Action;

use crate::{
    cidr::{self, may_be_internal},
    fields::Fields,
    names::Wildcards,
    object::Document,
    products::{Numbered, start},
    remark::Remark,
    rule::{Peer, Ports, Protocol, Rule},
};

/// The fields that say where a rule leads to.
const PEERS: [&str; 8] = [
    "toEndpoints",
    "toCIDR",
    "toCIDRSet",
    "toEntities",
    "toServices",
    "toGroups",
    "toNodes",
    "toFQDNs",
];

/// `CiliumCIDRGroup` objects by name.
pub(super) struct Groups(BTreeMap<String, Vec<String>>);

impl Groups {
    pub(super) fn read(manifests: &[Numbered<'_>]) -> Self {
        let groups = manifests
            .iter()
            .filter(|(_, manifest)| manifest.kind == "CiliumCIDRGroup")
            .filter_map(|(_, manifest)| {
                let prefixes = manifest.spec().ok()?.texts("externalCIDRs").ok()?;
                Some((manifest.name.clone(), prefixes))
            });
        Self(groups.collect())
    }

    /// Says of each group that its prefixes are in the policies that use it.
    pub(super) fn documents(&self, manifests: &[Numbered<'_>]) -> Vec<(usize, Document)> {
        let groups = manifests
            .iter()
            .filter(|(_, manifest)| self.0.contains_key(&manifest.name))
            .filter(|(_, manifest)| manifest.kind == "CiliumCIDRGroup");
        groups
            .map(|(i, manifest)| {
                let mut document = start(manifest);
                document.remarks.push(Remark::note(
                    "the prefixes of the group are copied to the policies that use it",
                ));
                (*i, document)
            })
            .collect()
    }
}

/// The rules of a list.
pub(super) fn read(
    spec: &Fields<'_>,
    key: &str,
    action: Action,
    groups: &Groups,
) -> Result<Vec<Rule>, String> {
    let mut rules = Vec::new();
    for fields in spec.mappings(key)? {
        // A rule without any field only closes the pods.
        let is_empty = fields.others(&[]).is_empty();
        if !is_empty {
            rules.extend(read_rule(&fields, action, groups)?);
        }
    }
    Ok(rules)
}

/// The rules for one rule: one for each element of `toPorts`, whose conditions differ.
fn read_rule(fields: &Fields<'_>, action: Action, groups: &Groups) -> Result<Vec<Rule>, String> {
    let mut conditions = Vec::new();
    let known: Vec<&str> = PEERS.into_iter().chain(["toPorts", "icmps"]).collect();
    for other in fields.others(&known) {
        conditions.push(format!("`{other}`"));
    }
    let given: Vec<&str> = PEERS.into_iter().filter(|key| fields.has(key)).collect();
    let is_cidr = |key: &&str| key.starts_with("toCIDR");
    if given.len() > 1 && !given.iter().all(is_cidr) {
        conditions.push(format!("{} together", given.join(" and ")));
    }
    let mut rules = Vec::new();
    if fields.has("icmps") && fields.has("toPorts") {
        conditions.push("`icmps` and `toPorts` together".to_owned());
    }
    let port_rules = fields.mappings("toPorts")?;
    if port_rules.is_empty() {
        let mut rule = Rule::new(action);
        rule.conditions = conditions;
        if fields.has("icmps") {
            rule.ports.push(Ports::Unsupported {
                what: "`icmps`: no entry selects types of ICMP".to_owned(),
                widest: Protocol::Icmp { v4: true, v6: true },
            });
        }
        fill_peers(&mut rule, fields, groups, given.is_empty())?;
        rules.push(rule);
        return Ok(rules);
    }
    for port_rule in &port_rules {
        let mut rule = Rule::new(action);
        rule.conditions.clone_from(&conditions);
        fill_ports(&mut rule, port_rule)?;
        fill_peers(&mut rule, fields, groups, given.is_empty())?;
        rules.push(rule);
    }
    Ok(rules)
}

fn fill_ports(rule: &mut Rule, fields: &Fields<'_>) -> Result<(), String> {
    let known = ["ports", "rules", "terminatingTLS", "originatingTLS"];
    for other in fields.others(&known) {
        rule.conditions.push(format!("`{other}` of toPorts"));
    }
    for key in ["terminatingTLS", "originatingTLS"] {
        if fields.has(key) {
            rule.conditions
                .push(format!("`{key}` of toPorts, which ends TLS at a proxy"));
        }
    }
    let l7 = fields.mapping("rules")?;
    for kind in l7.others(&["dns"]) {
        rule.conditions
            .push(format!("rules about requests (`rules.{kind}`)"));
    }
    if l7.has("dns") {
        rule.remarks.push(Remark::note(
            "`rules.dns`: pods may look up the names that their entries name; more names go to `resolve`",
        ));
    }
    for port in fields.mappings("ports")? {
        let protocol = port.text("protocol")?.unwrap_or_else(|| "ANY".to_owned());
        let others = port.others(&["port", "protocol", "endPort"]);
        let Some(protocol) = Protocol::read(&protocol).filter(|_| others.is_empty()) else {
            rule.ports.push(Ports::Unsupported {
                what: format!("{} has a protocol or field that is not known", port.place()),
                widest: Protocol::All,
            });
            continue;
        };
        // Port 0 is every port.
        let number = port.text("port")?.filter(|port| port != "0");
        let end = port.text("endPort")?;
        rule.ports
            .push(Ports::read(protocol, number.as_deref(), end.as_deref()));
    }
    Ok(())
}

fn fill_peers(
    rule: &mut Rule,
    fields: &Fields<'_>,
    groups: &Groups,
    anywhere: bool,
) -> Result<(), String> {
    if anywhere {
        rule.peers.push(Peer::Anywhere);
    }
    for name in fields.mappings("toFQDNs")? {
        rule.peers.extend(read_name(&name)?);
    }
    for cidr in fields.texts("toCIDR")? {
        rule.peers.push(Peer::cidr(&cidr, &[]));
    }
    for set in fields.mappings("toCIDRSet")? {
        rule.peers.extend(read_set(&set, groups)?);
    }
    for entity in fields.texts("toEntities")? {
        rule.peers.push(read_entity(&entity));
    }
    for endpoint in fields.mappings("toEndpoints")? {
        let words = endpoint_words(&endpoint)?;
        rule.peers.push(Peer::in_cluster(words, &rule.ports));
    }
    for (key, what) in [
        ("toServices", "a Service without a selector"),
        ("toGroups", "addresses of a cloud's groups"),
    ] {
        if !fields.list(key)?.is_empty() {
            rule.peers
                .push(Peer::Unsupported(format!("`{key}`: {what}")));
        }
    }
    if !fields.list("toNodes")?.is_empty() {
        rule.peers
            .push(Peer::Cluster("nodes (`toNodes`)".to_owned()));
    }
    let is_private = |peer: &Peer| match peer {
        Peer::Prefixes { prefixes, .. } => prefixes.iter().any(may_be_internal),
        _ => false,
    };
    if rule.peers.iter().any(is_private) {
        rule.remarks.push(Remark::note(
            "in Cilium a CIDR does not match pods and nodes of the cluster; here it matches every address in it",
        ));
    }
    Ok(())
}

fn read_name(fields: &Fields<'_>) -> Result<Vec<Peer>, String> {
    let mut peers = Vec::new();
    for other in fields.others(&["matchName", "matchPattern"]) {
        peers.push(Peer::Unsupported(format!(
            "{} has the unknown field `{other}`",
            fields.place()
        )));
    }
    for (key, wildcards) in [
        ("matchName", Wildcards::None),
        ("matchPattern", Wildcards::Within),
    ] {
        if let Some(text) = fields.text(key)? {
            peers.push(Peer::Name { text, wildcards });
        }
    }
    Ok(peers)
}

fn read_set(fields: &Fields<'_>, groups: &Groups) -> Result<Vec<Peer>, String> {
    let others = fields.others(&["cidr", "except", "cidrGroupRef"]);
    if !others.is_empty() {
        return Ok(vec![Peer::Unsupported(format!(
            "{} has fields without a counterpart: {}",
            fields.place(),
            others.join(", ")
        ))]);
    }
    let exceptions = fields.texts("except")?;
    if let Some(name) = fields.text("cidrGroupRef")? {
        return Ok(match groups.0.get(&name) {
            Some(prefixes) => prefixes
                .iter()
                .map(|prefix| Peer::cidr(prefix, &exceptions))
                .collect(),
            None => vec![Peer::Unsupported(format!(
                "the CiliumCIDRGroup `{name}` is not among the files"
            ))],
        });
    }
    Ok(vec![Peer::cidr(&fields.needed("cidr")?, &exceptions)])
}

fn read_entity(entity: &str) -> Peer {
    let family = |v4| Peer::Prefixes {
        shown: entity.to_owned(),
        prefixes: vec![cidr::family(v4)],
    };
    match entity {
        "world" => Peer::World,
        "world-ipv4" => family(true),
        "world-ipv6" => family(false),
        "all" => Peer::Anywhere,
        "kube-apiserver" => Peer::Cluster(
            "the entity kube-apiserver (give its address an entry if it is outside of the cluster's ranges)"
                .to_owned(),
        ),
        "cluster" | "host" | "remote-node" | "ingress" | "init" | "health" | "unmanaged"
        | "none" => Peer::Cluster(format!("the entity {entity}")),
        other => Peer::Unsupported(format!("the entity `{other}` is not known")),
    }
}

/// The labels of a selector of endpoints, for a remark.
fn endpoint_words(fields: &Fields<'_>) -> Result<String, String> {
    let labels: Vec<String> = fields
        .text_map("matchLabels")?
        .into_iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    Ok(match (labels.is_empty(), fields.has("matchExpressions")) {
        (true, false) => "endpoints (all)".to_owned(),
        (true, true) => "endpoints (by expressions)".to_owned(),
        (false, _) => format!("endpoints ({})", labels.join(", ")),
    })
}
