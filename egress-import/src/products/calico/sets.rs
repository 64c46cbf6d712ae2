//! `NetworkSet` and `GlobalNetworkSet`, as `EgressSet` objects.

use std::collections::BTreeMap;

use egress_api::Action;

use super::language::Expression;
use crate::{
    Options,
    manifest::Manifest,
    names::Wildcards,
    object::{Document, Entries, Object, Spec},
    products::{Numbered, document, translator},
    remark::Remark,
    rule::{Peer, Ports, Protocol, Rule},
};

/// A set.
#[derive(Debug)]
pub(super) struct Set {
    /// The name of the `EgressSet`.
    pub(super) name: String,
    /// None for a `GlobalNetworkSet`.
    namespace: Option<String>,
    labels: BTreeMap<String, String>,
    pub(super) nets: Vec<String>,
    domains: Vec<String>,
    /// Whether the `EgressSet` has a destination.
    pub(super) is_written: bool,
}

/// Which sets a rule's selector is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Among<'a> {
    /// Those of one namespace.
    Namespace(Option<&'a str>),
    /// Those of any namespace.
    Namespaces,
    /// Those of the cluster.
    Global,
    /// All of them.
    All,
    /// Those of namespaces that only the cluster knows.
    Unknown,
}

/// Reads and writes all sets.
pub(super) fn import(
    manifests: &[Numbered<'_>],
    options: &Options,
) -> (Vec<Set>, Vec<(usize, Document)>) {
    let mut sets = Vec::new();
    let mut documents = Vec::new();
    for (i, manifest) in manifests {
        if !["NetworkSet", "GlobalNetworkSet"].contains(&manifest.kind.as_str()) {
            continue;
        }
        let document = document(manifest, |document| {
            let mut set = read(manifest, options)?;
            let entries = destinations(&set, options);
            set.is_written = entries.has_entries();
            if set.is_written {
                document.objects.push(Object {
                    name: set.name.clone(),
                    namespace: None,
                    remarks: Vec::new(),
                    spec: Spec::Set(entries),
                });
            } else {
                document.remarks.extend(entries.remarks().cloned());
                document
                    .remarks
                    .push(Remark::note("the set has no destinations"));
            }
            sets.push(set);
            Ok(())
        });
        documents.push((*i, document));
    }
    (sets, documents)
}

fn read(manifest: &Manifest, options: &Options) -> Result<Set, String> {
    let spec = manifest.spec()?;
    let others = spec.others(&["nets", "allowedEgressDomains"]);
    if !others.is_empty() {
        return Err(format!("spec has unknown fields: {}", others.join(", ")));
    }
    let namespace = if manifest.kind == "NetworkSet" {
        Some(crate::products::namespace(manifest, options).unwrap_or_default())
    } else {
        None
    };
    let name = match namespace.as_deref() {
        None | Some("") => manifest.name.clone(),
        Some(namespace) => format!("{namespace}-{}", manifest.name),
    };
    Ok(Set {
        name,
        namespace,
        labels: manifest.labels.clone(),
        nets: spec.texts("nets")?,
        domains: spec.texts("allowedEgressDomains")?,
        is_written: false,
    })
}

/// The destinations, without ports.
fn destinations(set: &Set, options: &Options) -> Entries {
    let mut rule = Rule::new(Action::Allow);
    // A set's destinations have no ports; this is the entry without any.
    rule.ports.push(Ports::Of {
        protocol: Protocol::Tcp,
        range: None,
    });
    let nets = set.nets.iter().map(|net| Peer::cidr(net, &[]));
    let domains = set.domains.iter().map(|text| Peer::Name {
        text: text.clone(),
        wildcards: Wildcards::Labels,
    });
    rule.peers = nets.chain(domains).collect();
    let (mut entries, _) = translator(options).entries(&rule);
    entries.without_suffix("/tcp");
    entries
}

/// The sets that a selector selects.
pub(super) fn matching<'a>(
    sets: &'a [Set],
    selector: &Expression,
    among: Among<'_>,
) -> Vec<&'a Set> {
    sets.iter()
        .filter(|set| match among {
            Among::Namespace(namespace) => {
                set.namespace.is_some()
                    && set.namespace.as_deref().filter(|name| !name.is_empty()) == namespace
            }
            Among::Namespaces => set.namespace.is_some(),
            Among::Global => set.namespace.is_none(),
            Among::All => true,
            Among::Unknown => false,
        })
        .filter(|set| selector.matches(&set.labels))
        .collect()
}
