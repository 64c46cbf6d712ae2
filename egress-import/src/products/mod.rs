//! The kinds of other products.

mod antrea;
mod aws;
mod calico;
mod cilium;
mod egress_firewall;
mod gke;
mod istio;
mod network_policy;
pub(crate) mod rule_files;

use std::collections::BTreeMap;

use egress_api::{Action, Tier};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::{
    Options,
    manifest::Manifest,
    object::{Cluster, ClusterRule, Document, Entries, Line, Object, Policy, Spec, Subject},
    remark::{Remark, add},
    translate::Translator,
};

/// The highest priority number.
const LAST_PRIORITY: u32 = 1000;

/// The products, by the groups of their kinds.
const PRODUCTS: [(&str, &[&str], Import); 8] = [
    (
        "NetworkPolicy",
        &["networking.k8s.io"],
        network_policy::import,
    ),
    ("Cilium", &["cilium.io"], cilium::import),
    (
        "Calico",
        &["projectcalico.org", "crd.projectcalico.org"],
        calico::import,
    ),
    ("Antrea", &["crd.antrea.io"], antrea::import),
    ("GKE", &["networking.gke.io"], gke::import),
    ("Amazon EKS", &["networking.k8s.aws"], aws::import),
    ("EgressFirewall", &["k8s.ovn.org"], egress_firewall::import),
    ("Istio", &["networking.istio.io"], istio::import),
];

/// The objects of each manifest, in the order of the manifests.
pub(crate) fn import(manifests: &[Manifest], options: &Options) -> Vec<Document> {
    let mut documents: Vec<(usize, Document)> = Vec::new();
    for (_, groups, import) in PRODUCTS {
        let of_product: Vec<Numbered<'_>> = manifests
            .iter()
            .enumerate()
            .filter(|(_, manifest)| groups.contains(&manifest.group.as_str()))
            .collect();
        documents.extend(import(&of_product, options));
    }
    for (i, manifest) in manifests.iter().enumerate() {
        if !documents.iter().any(|(of, _)| *of == i) {
            documents.push((i, unread(manifest)));
        }
    }
    documents.sort_by_key(|(i, _)| *i);
    remark_on_others(manifests, options, &mut documents);
    documents
        .into_iter()
        .map(|(_, document)| document)
        .collect()
}

/// The products whose policies restrict what those of other products allow. All others count `NetworkPolicy` among
/// their own policies.
const APART: [&str; 2] = ["EgressFirewall", "Istio"];

/// Refuses, where such a product and another one restrict the pods of one namespace, that a packet must pass both: the
/// written objects add up.
fn remark_on_others(
    manifests: &[Manifest],
    options: &Options,
    documents: &mut [(usize, Document)],
) {
    let scope = |i: usize| {
        let manifest = &manifests[i];
        let product = PRODUCTS
            .iter()
            .find(|(_, groups, _)| groups.contains(&manifest.group.as_str()))
            .map(|(product, ..)| *product);
        (product, namespace(manifest, options))
    };
    let restricting: Vec<_> = documents
        .iter()
        .filter(|(_, document)| !document.objects.is_empty())
        .map(|(i, _)| scope(*i))
        .collect();
    for (i, document) in documents {
        let (product, namespace) = scope(*i);
        if document.objects.is_empty() {
            continue;
        }
        let other = restricting.iter().find(|(other, of)| {
            let meet = namespace.is_none() || of.is_none() || *of == namespace;
            let is_apart = |product: Option<&str>| product.is_some_and(|one| APART.contains(&one));
            *other != product && meet && (is_apart(*other) || is_apart(product))
        });
        if let Some((Some(other), _)) = other {
            document.remarks.push(Remark::refused(format!(
                "policies of {other} may restrict the same pods. A packet has to pass the policies of both products, \
                 and the written objects add up: import one product at a time, and write what both allow"
            )));
        }
    }
}

/// A manifest and its place among all of them.
type Numbered<'a> = (usize, &'a Manifest);

/// Imports the manifests of one product, each to a document with its place.
type Import = fn(&[Numbered<'_>], &Options) -> Vec<(usize, Document)>;

/// Whose pods a policy is about.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Reach {
    /// Those of a namespace. Its name is not always known.
    Namespace(Option<String>),
    /// Those of all namespaces.
    Cluster,
}

impl Reach {
    /// The name of the namespace, if it is known.
    fn namespace(&self) -> Option<&str> {
        match self {
            Self::Namespace(name) => name.as_deref(),
            Self::Cluster => None,
        }
    }
}

/// An object of a kind that is not imported.
fn unread(manifest: &Manifest) -> Document {
    let remark = match (manifest.group.as_str(), manifest.kind.as_str()) {
        ("policy.networking.k8s.io", "ClusterNetworkPolicy") => {
            Remark::note("the agent reads this kind itself; apply it as it is")
        }
        ("egress-agent.dev", _) => Remark::note("an object of this project; apply it as it is"),
        (_, kind) if kind.contains("Policy") || kind.contains("Firewall") => Remark::refused(
            format!("kind {kind} of {} is not imported", group_word(manifest)),
        ),
        (_, kind) => Remark::note(format!("kind {kind} is no policy; nothing to import")),
    };
    let mut document = start(manifest);
    document.remarks.push(remark);
    document
}

fn group_word(manifest: &Manifest) -> &str {
    if manifest.group.is_empty() {
        "v1"
    } else {
        &manifest.group
    }
}

/// The document of a manifest, without objects.
fn start(manifest: &Manifest) -> Document {
    Document {
        origin: manifest.origin.clone(),
        source: manifest.source(),
        ..Document::default()
    }
}

/// The document that `fill` makes. An error refuses the whole manifest.
fn document(
    manifest: &Manifest,
    fill: impl FnOnce(&mut Document) -> Result<(), String>,
) -> Document {
    let mut document = start(manifest);
    let filled = if manifest.name.is_empty() {
        Err("metadata.name is missing".to_owned())
    } else {
        fill(&mut document)
    };
    if let Err(error) = filled {
        document.objects.clear();
        document.remarks.push(Remark::refused(format!(
            "{error}; nothing is written for this object"
        )));
    }
    document
}

/// The namespace of a manifest: its own or that of the options.
fn namespace(manifest: &Manifest, options: &Options) -> Option<String> {
    manifest
        .namespace
        .clone()
        .or_else(|| options.namespace.clone())
}

/// As [`namespace`], where an object of the cluster has to name it.
fn needed_namespace(manifest: &Manifest, options: &Options) -> Result<String, String> {
    namespace(manifest, options).ok_or_else(|| {
        "it has no namespace, and its rules need a ClusterEgressPolicy, which selects the namespace by name: give \
         it with --namespace"
            .to_owned()
    })
}

const fn translator(options: &Options) -> Translator {
    Translator {
        deep: options.deep_wildcards,
        denies_inside: false,
    }
}

fn policy(name: &str, namespace: Option<String>, policy: Policy) -> Object {
    Object {
        name: name.to_owned(),
        namespace,
        remarks: Vec::new(),
        spec: Spec::Policy(policy),
    }
}

/// An `EgressPolicy` that closes the selected pods and allows nothing by itself.
fn closed(name: &str, namespace: Option<String>, pods: LabelSelector) -> Object {
    policy(
        name,
        namespace,
        Policy {
            pods,
            allow: Some(Entries::default()),
            deny: None,
        },
    )
}

/// A `ClusterEgressPolicy` that denies what nothing before it has allowed.
fn close_cluster(name: &str, subject: Subject) -> Object {
    let mut object = Object {
        name: name.to_owned(),
        namespace: None,
        remarks: Vec::new(),
        spec: Spec::Cluster(Cluster {
            tier: Tier::Baseline,
            priority: LAST_PRIORITY,
            subject,
            rules: vec![ClusterRule {
                name: None,
                action: Action::Deny,
                entries: Entries::everything(),
            }],
        }),
    };
    object.remarks.push(Remark::note(
        "the original denies what no rule allows. This object does so for pods that no EgressPolicy and no annotation \
         closes. It also denies traffic within the cluster, but for DNS: if these pods talk to others, put an Allow \
         rule with the cluster's ranges in front",
    ));
    object
}

/// Adds a `ClusterEgressPolicy`, or only its remarks if no rule has an entry.
fn add_cluster(document: &mut Document, name: String, cluster: Cluster) {
    if cluster.rules.iter().any(|rule| rule.entries.has_entries()) {
        document.objects.push(Object {
            name,
            namespace: None,
            remarks: Vec::new(),
            spec: Spec::Cluster(cluster),
        });
    } else {
        for line in cluster.rules.into_iter().flat_map(|rule| rule.entries.0) {
            match line {
                Line::Remark(remark) => add(&mut document.remarks, remark),
                Line::Offered(text) => {
                    add(
                        &mut document.remarks,
                        Remark::note(format!("not written: {text}")),
                    );
                }
                Line::Entry { .. } => {}
            }
        }
    }
}

/// Consecutive priority numbers for things in order, from `first` on. Equal keys get the same number.
fn ranks<K: PartialEq>(keys: &[K], first: u32, last: u32) -> Result<Vec<u32>, String> {
    let mut distinct = 0;
    let mut places = Vec::new();
    for (i, key) in keys.iter().enumerate() {
        if i > 0 && keys[i - 1] != *key {
            distinct += 1;
        }
        places.push(distinct);
    }
    let room = last - first;
    if distinct > room {
        return Err(format!(
            "there are more than {room} different priorities: import fewer files at a time"
        ));
    }
    // Room in between, for objects that are written later.
    let step = if distinct * 10 <= room { 10 } else { 1 };
    Ok(places.into_iter().map(|n| first + n * step).collect())
}

/// Gives objects of one kind and namespace different names.
pub(crate) fn make_names_unique(documents: &mut [Document]) {
    let mut seen: BTreeMap<(&'static str, Option<String>, String), u32> = BTreeMap::new();
    for object in documents
        .iter_mut()
        .flat_map(|document| &mut document.objects)
    {
        let key = (object.kind(), object.namespace.clone(), object.name.clone());
        let count = seen.entry(key).or_default();
        *count += 1;
        if *count > 1 {
            let name = format!("{}-{count}", object.name);
            object.remarks.push(Remark::note(format!(
                "another imported object is called {}",
                object.name
            )));
            object.name = name;
        }
    }
}
