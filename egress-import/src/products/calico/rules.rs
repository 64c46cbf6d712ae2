//! Egress rules.

use egress_api::Action;

use super::{
    language::Expression,
    sets::{Among, Set, matching},
};
use crate::{
    cidr,
    fields::{Fields, text},
    names::Wildcards,
    products::Reach,
    remark::Remark,
    rule::{Peer, Ports, Protocol, Rule},
};

/// What a rule's selectors are compared with.
#[derive(Clone, Copy)]
pub(super) struct Around<'a> {
    pub(super) sets: &'a [Set],
    /// The namespace of the policy.
    pub(super) reach: &'a Reach,
}

/// Reads a rule; none for `Log`, which decides nothing.
pub(super) fn read(fields: &Fields<'_>, around: Around<'_>) -> Result<Option<Rule>, String> {
    let action = match fields.needed("action")?.to_ascii_lowercase().as_str() {
        "allow" => Action::Allow,
        "deny" => Action::Deny,
        "pass" => Action::Pass,
        "log" => return Ok(None),
        other => {
            return Err(format!(
                "{} has the unknown action `{other}`",
                fields.place()
            ));
        }
    };
    let mut rule = Rule::new(action);
    let known = [
        "action",
        "ipVersion",
        "protocol",
        "source",
        "destination",
        "metadata",
    ];
    for other in fields.others(&known) {
        rule.conditions.push(format!("`{other}`"));
    }
    for other in fields.mapping("source")?.others(&[]) {
        rule.conditions.push(format!("`source.{other}`"));
    }
    let v4 = match fields.text("ipVersion")?.as_deref() {
        None => None,
        Some("4") => Some(true),
        Some("6") => Some(false),
        Some(other) => return Err(format!("{} has ipVersion {other}", fields.place())),
    };
    let destination = fields.mapping("destination")?;
    rule.ports = read_ports(fields, &destination)?;
    read_destination(&mut rule, &destination, v4, around)?;
    Ok(Some(rule))
}

fn read_ports(fields: &Fields<'_>, destination: &Fields<'_>) -> Result<Vec<Ports>, String> {
    let protocol = match fields.text("protocol")? {
        None => None,
        Some(text) => match text.to_ascii_lowercase().as_str() {
            "udplite" => Some(Protocol::Number(136)),
            _ => match Protocol::read(&text) {
                Some(protocol) => Some(protocol),
                None => {
                    return Ok(vec![Ports::Unsupported {
                        what: format!("the protocol `{text}` is not known"),
                        widest: Protocol::All,
                    }]);
                }
            },
        },
    };
    let listed = destination.list("ports")?;
    let excluded = destination.list("notPorts")?;
    let Some(protocol) = protocol else {
        return Ok(if listed.is_empty() && excluded.is_empty() {
            Vec::new()
        } else {
            vec![Ports::Unsupported {
                what: "ports without a protocol".to_owned(),
                widest: Protocol::All,
            }]
        });
    };
    if !excluded.is_empty() {
        return Ok(other_ports(protocol, listed, excluded));
    }
    if listed.is_empty() {
        return Ok(vec![Ports::read(protocol, None, None)]);
    }
    Ok(listed
        .iter()
        .map(|port| {
            let port = text(port).unwrap_or_default();
            match port.split_once(':') {
                Some((min, max)) => Ports::read(protocol, Some(min), Some(max)),
                None => Ports::read(protocol, Some(&port), None),
            }
        })
        .collect())
}

/// The ports that are not excluded, as ranges.
fn other_ports(
    protocol: Protocol,
    listed: &[serde_json::Value],
    excluded: &[serde_json::Value],
) -> Vec<Ports> {
    let unsupported = |what: &str| {
        vec![Ports::Unsupported {
            what: what.to_owned(),
            widest: protocol,
        }]
    };
    if !listed.is_empty() {
        return unsupported("`ports` and `notPorts` together");
    }
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for port in excluded {
        let port = text(port).unwrap_or_default();
        let (min, max) = port.split_once(':').unwrap_or((&port, &port));
        match (min.parse::<u16>(), max.parse::<u16>()) {
            (Ok(min), Ok(max)) if min <= max => ranges.push((min.into(), max.into())),
            _ => return unsupported("`notPorts` with the name of a port"),
        }
    }
    ranges.sort_unstable();
    let mut free = 1_u32;
    let mut ports = Vec::new();
    for (min, max) in ranges.into_iter().chain([(65_536, 65_536)]) {
        if let (Ok(first), Ok(last)) = (u16::try_from(free), u16::try_from(min.saturating_sub(1)))
            && first <= last
        {
            ports.push(Ports::Of {
                protocol,
                range: Some((first, last)),
            });
        }
        free = free.max(max + 1);
    }
    if ports.is_empty() {
        // No ports at all would mean every port.
        return unsupported("`notPorts` with every port");
    }
    ports
}

fn read_destination(
    rule: &mut Rule,
    fields: &Fields<'_>,
    v4: Option<bool>,
    around: Around<'_>,
) -> Result<(), String> {
    let known = [
        "nets",
        "notNets",
        "domains",
        "selector",
        "namespaceSelector",
        "services",
        "serviceAccounts",
        "ports",
        "notPorts",
    ];
    for other in fields.others(&known) {
        rule.conditions.push(format!("`destination.{other}`"));
    }
    let is_given = |key: &str| {
        Ok::<_, String>(
            fields
                .text(key)?
                .is_some_and(|text| !text.trim().is_empty()),
        )
    };
    let by_selector = is_given("selector")? || is_given("namespaceSelector")?;
    let kinds = [
        fields.has("nets") || fields.has("notNets"),
        fields.has("domains"),
        by_selector,
        fields.has("services"),
        fields.has("serviceAccounts"),
    ];
    if kinds.iter().filter(|given| **given).count() > 1 {
        rule.conditions
            .push("several kinds of destination, of which all must match".to_owned());
    }
    if fields.has("nets") || fields.has("notNets") {
        let nets = fields.texts("nets")?;
        let not = fields.texts("notNets")?;
        for net in whole_nets(nets, v4) {
            rule.peers.push(restricted(&net, &not, v4));
        }
    }
    if fields.has("domains") {
        if v4.is_some() {
            rule.conditions
                .push("`ipVersion` with `domains`".to_owned());
        }
        for text in fields.texts("domains")? {
            rule.peers.push(Peer::Name {
                text,
                wildcards: Wildcards::Labels,
            });
        }
    }
    if by_selector {
        read_selectors(rule, fields, v4, around)?;
    }
    if fields.has("services") {
        let name = fields.mapping("services")?.text("name")?;
        let what = format!("the Service {}", name.unwrap_or_default());
        rule.peers.push(Peer::Cluster(what));
    }
    if fields.has("serviceAccounts") {
        rule.peers
            .push(Peer::Cluster("pods by service account".to_owned()));
    }
    if !kinds.contains(&true) {
        rule.peers.push(match v4 {
            None => Peer::Anywhere,
            Some(v4) => Peer::Prefixes {
                shown: "every address of one IP version".to_owned(),
                prefixes: vec![cidr::family(v4)],
            },
        });
    }
    Ok(())
}

/// The nets of a rule; those of the IP versions if it only has exceptions.
fn whole_nets(nets: Vec<String>, v4: Option<bool>) -> Vec<String> {
    if !nets.is_empty() {
        return nets;
    }
    [true, false]
        .into_iter()
        .filter(|family| v4.is_none_or(|v4| v4 == *family))
        .map(|family| cidr::family(family).to_string())
        .collect()
}

/// A net without exceptions, of one IP version if that is given.
fn restricted(net: &str, not: &[String], v4: Option<bool>) -> Peer {
    match (Peer::cidr(net, not), v4) {
        (Peer::Prefixes { shown, prefixes }, Some(v4)) => Peer::Prefixes {
            prefixes: cidr::intersection(&prefixes, &[cidr::family(v4)]),
            shown,
        },
        (peer, _) => peer,
    }
}

fn read_selectors(
    rule: &mut Rule,
    fields: &Fields<'_>,
    v4: Option<bool>,
    around: Around<'_>,
) -> Result<(), String> {
    let shown = |key: &str| Ok::<_, String>(fields.text(key)?.unwrap_or_default());
    let (selector, namespaces) = (shown("selector")?, shown("namespaceSelector")?);
    let expression = Expression::read(&selector)?;
    let of_namespaces = Expression::read(&namespaces)?;
    let among = match &of_namespaces {
        Expression::Global => Among::Global,
        _ if namespaces.trim().is_empty() => match around.reach {
            Reach::Namespace(namespace) => Among::Namespace(namespace.as_deref()),
            Reach::Cluster => Among::All,
        },
        Expression::All => Among::Namespaces,
        Expression::In(key, values) if key == "projectcalico.org/name" && values.len() == 1 => {
            Among::Namespace(values.first().map(String::as_str))
        }
        _ => Among::Unknown,
    };
    // An empty selector with namespaces selects pods; sets are meant by their labels.
    let sets = if selector.trim().is_empty() {
        Vec::new()
    } else {
        matching(around.sets, &expression, among)
    };
    for set in &sets {
        match (rule.action, v4) {
            (Action::Allow, None) if set.is_written => rule.peers.push(Peer::Set(set.name.clone())),
            _ => {
                // Names do not count in rules that deny.
                for net in &set.nets {
                    rule.peers.push(restricted(net, &[], v4));
                }
            }
        }
    }
    if among == Among::Global {
        if sets.is_empty() {
            rule.peers.push(Peer::Unsupported(format!(
                "no GlobalNetworkSet among the files has labels for `{selector}`"
            )));
        }
        return Ok(());
    }
    let what = match (selector.trim().is_empty(), namespaces.trim().is_empty()) {
        (false, true) => format!("pods with `{selector}`"),
        (true, false) => format!("pods in namespaces with `{namespaces}`"),
        _ => format!("pods with `{selector}` in namespaces with `{namespaces}`"),
    };
    if !sets.is_empty() && rule.action == Action::Allow {
        rule.remarks.push(Remark::note(
            "the network sets whose labels match now; a set that is added later is not in the entry",
        ));
    }
    rule.peers.push(Peer::in_cluster(what, &rule.ports));
    Ok(())
}
