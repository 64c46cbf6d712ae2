//! `CiliumNetworkPolicy` and `CiliumClusterwideNetworkPolicy` (`cilium.io/v2`).
//!
//! There a denial beats every permission, and permissions of all policies add up. Both hold for `EgressPolicy`, too.
//! What selects pods of several namespaces becomes `ClusterEgressPolicy` objects, denials before permissions.

mod rules;
mod selectors;

use egress_api::{Action, Tier};

use super::{
    Numbered, Reach, add_cluster, close_cluster, document, needed_namespace, policy, translator,
};
use crate::{
    Options,
    fields::Fields,
    manifest::Manifest,
    object::{Cluster, Document, Entries, Policy, Subject},
    remark::{Remark, add},
    rule::Rule,
    translate::{Barrier, Barriers, hold_back},
};
use rules::Groups;

/// Denials are evaluated before permissions.
const DENY_PRIORITY: u32 = 100;
const ALLOW_PRIORITY: u32 = 500;

/// Which policies a specification belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    Namespace,
    Cluster,
}

/// One `spec`, or one of `specs`.
struct Part {
    name: String,
    subject: Subject,
    /// Whether it closes the selected pods.
    closes: bool,
    allow: Vec<Rule>,
    deny: Vec<Rule>,
}

pub(super) fn import(manifests: &[Numbered<'_>], options: &Options) -> Vec<(usize, Document)> {
    let groups = Groups::read(manifests);
    let policies: Vec<(usize, &Manifest, Scope)> = manifests
        .iter()
        .filter_map(|(i, manifest)| {
            let scope = match manifest.kind.as_str() {
                "CiliumNetworkPolicy" => Scope::Namespace,
                "CiliumClusterwideNetworkPolicy" => Scope::Cluster,
                _ => return None,
            };
            Some((*i, *manifest, scope))
        })
        .collect();
    let parts: Vec<_> = policies
        .iter()
        .map(|(i, manifest, scope)| (*i, *manifest, *scope, read(manifest, *scope, &groups)))
        .collect();
    // A permission in the Admin tier is decided before an EgressPolicy's denials.
    let has_admin_allow = parts.iter().any(|(_, _, scope, parts)| {
        parts.as_ref().is_ok_and(|(parts, _)| {
            parts
                .iter()
                .any(|part| !part.allow.is_empty() && (*scope == Scope::Cluster || !part.closes))
        })
    });
    // A denial beats every permission, so one that cannot be written concerns all policies for the same pods.
    let mut barriers = Barriers::default();
    for (_, manifest, scope, parts) in &parts {
        for part in parts.iter().flat_map(|(parts, _)| parts) {
            let concerned = key(manifest, *scope, options);
            barriers.add(concerned.as_deref(), list(&part.deny, options).1);
        }
    }
    let mut documents: Vec<(usize, Document)> = parts
        .into_iter()
        .map(|(i, manifest, scope, parts)| {
            let document = document(manifest, |document| {
                let (parts, remarks) = parts?;
                for remark in remarks {
                    add(&mut document.remarks, remark);
                }
                let barrier = barriers.of(key(manifest, scope, options).as_deref());
                for part in parts {
                    match scope {
                        Scope::Namespace => write_namespaced(
                            document,
                            manifest,
                            &part,
                            (barrier, has_admin_allow),
                            options,
                        )?,
                        Scope::Cluster => write_cluster(document, &part, barrier, options),
                    }
                }
                Ok(())
            });
            (i, document)
        })
        .collect();
    documents.extend(groups.documents(manifests));
    documents
}

/// Whose permissions the denials of a policy concern.
fn key(manifest: &Manifest, scope: Scope, options: &Options) -> Option<String> {
    match scope {
        Scope::Namespace => super::namespace(manifest, options),
        Scope::Cluster => None,
    }
}

/// The specifications of a policy, and remarks about all of it.
fn read(
    manifest: &Manifest,
    scope: Scope,
    groups: &Groups,
) -> Result<(Vec<Part>, Vec<Remark>), String> {
    let mut remarks = Vec::new();
    let mut parts = Vec::new();
    let whole = Fields::new(&manifest.value, "the document")?;
    let mut specs = Vec::new();
    if whole.has("spec") {
        specs.push(manifest.spec()?);
    }
    specs.extend(whole.mappings("specs")?);
    let count = specs.len();
    for (i, spec) in specs.into_iter().enumerate() {
        let name = if count == 1 {
            manifest.name.clone()
        } else {
            format!("{}-{}", manifest.name, i + 1)
        };
        parts.extend(read_spec(
            name,
            &spec,
            manifest,
            scope,
            groups,
            &mut remarks,
        )?);
    }
    Ok((parts, remarks))
}

fn read_spec(
    name: String,
    spec: &Fields<'_>,
    manifest: &Manifest,
    scope: Scope,
    groups: &Groups,
    remarks: &mut Vec<Remark>,
) -> Result<Option<Part>, String> {
    if spec.has("nodeSelector") {
        return Err("it is about nodes (nodeSelector), and this project is about pods".to_owned());
    }
    let known = [
        "endpointSelector",
        "ingress",
        "ingressDeny",
        "egress",
        "egressDeny",
        "labels",
        "description",
        "enableDefaultDeny",
        "log",
    ];
    let others = spec.others(&known);
    if !others.is_empty() {
        return Err(format!(
            "{} has unknown fields: {}",
            spec.place(),
            others.join(", ")
        ));
    }
    if spec.has("ingress") || spec.has("ingressDeny") {
        add(
            remarks,
            Remark::note("the part about ingress stays with the original"),
        );
    }
    if !spec.has("egress") && !spec.has("egressDeny") {
        add(
            remarks,
            Remark::note("it does not restrict egress; nothing to import"),
        );
        return Ok(None);
    }
    let closes = spec
        .mapping("enableDefaultDeny")?
        .truth("egress")?
        .unwrap_or(true);
    if !spec.has("endpointSelector") {
        return Err(format!("{} has no endpointSelector", spec.place()));
    }
    let reach = match scope {
        Scope::Namespace => Reach::Namespace(manifest.namespace.clone()),
        Scope::Cluster => Reach::Cluster,
    };
    Ok(Some(Part {
        name,
        subject: selectors::read(&spec.mapping("endpointSelector")?, &reach)?,
        closes,
        allow: rules::read(spec, "egress", Action::Allow, groups)?,
        deny: rules::read(spec, "egressDeny", Action::Deny, groups)?,
    }))
}

fn write_namespaced(
    document: &mut Document,
    manifest: &Manifest,
    part: &Part,
    (barrier, has_admin_allow): (Barrier, bool),
    options: &Options,
) -> Result<(), String> {
    let namespace = super::namespace(manifest, options);
    let pods = part.subject.pods.clone();
    let (mut allow, _, _) = list(&part.allow, options);
    let (deny, _, any_deny) = list(&part.deny, options);
    hold_back(&mut allow, barrier);
    if has_admin_allow && deny.has_entries() {
        let namespace = needed_namespace(manifest, options)?;
        let cluster = Cluster {
            tier: Tier::Admin,
            priority: DENY_PRIORITY,
            subject: Subject::of_namespace(&namespace, pods.clone()),
            rules: translator(options).ordered(&part.deny, Barrier::None).0,
        };
        add_cluster(document, format!("{namespace}-{}-deny", part.name), cluster);
    }
    let deny = any_deny.then_some(deny);
    if part.closes {
        let object = policy(
            &part.name,
            namespace,
            Policy {
                pods,
                allow: Some(allow),
                deny,
            },
        );
        document.objects.push(object);
        return Ok(());
    }
    document.remarks.push(Remark::note(
        "enableDefaultDeny.egress is false: the policy does not close the pods",
    ));
    if let Some(deny) = deny.filter(Entries::has_entries) {
        let object = policy(
            &part.name,
            namespace,
            Policy {
                pods: pods.clone(),
                allow: None,
                deny: Some(deny),
            },
        );
        document.objects.push(object);
    }
    if !part.allow.is_empty() {
        let namespace = needed_namespace(manifest, options)?;
        let subject = Subject::of_namespace(&namespace, pods);
        add_allow(
            document,
            &format!("{namespace}-{}", part.name),
            part,
            subject,
            barrier,
            options,
        );
    }
    Ok(())
}

fn write_cluster(document: &mut Document, part: &Part, barrier: Barrier, options: &Options) {
    if !part.deny.is_empty() {
        let cluster = Cluster {
            tier: Tier::Admin,
            priority: DENY_PRIORITY,
            subject: part.subject.clone(),
            rules: translator(options).ordered(&part.deny, Barrier::None).0,
        };
        add_cluster(document, format!("{}-deny", part.name), cluster);
    }
    if !part.allow.is_empty() {
        add_allow(
            document,
            &part.name,
            part,
            part.subject.clone(),
            barrier,
            options,
        );
    }
    if part.closes {
        document.objects.push(close_cluster(
            &format!("{}-close", part.name),
            part.subject.clone(),
        ));
    } else {
        document.remarks.push(Remark::note(
            "enableDefaultDeny.egress is false: the policy does not close the pods",
        ));
    }
}

fn add_allow(
    document: &mut Document,
    name: &str,
    part: &Part,
    subject: Subject,
    barrier: Barrier,
    options: &Options,
) {
    let mut translator = translator(options);
    translator.denies_inside = part.closes;
    let (rules, _) = translator.ordered(&part.allow, barrier);
    let before = document.objects.len();
    let cluster = Cluster {
        tier: Tier::Admin,
        priority: ALLOW_PRIORITY,
        subject,
        rules,
    };
    add_cluster(document, name.to_owned(), cluster);
    if let Some(object) = document.objects.get_mut(before) {
        object.remarks.push(Remark::note(
            "a rule of this tier is decided before EgressPolicy objects: their `deny` does not take it back, while \
             egressDeny does in Cilium. Import all Cilium policies in one run, so that their denials come first",
        ));
    }
}

/// The entries of rules whose order does not matter, and whether there is any rule.
fn list(rules: &[Rule], options: &Options) -> (Entries, Barrier, bool) {
    let mut entries = Entries::default();
    let mut barrier = Barrier::None;
    for rule in rules {
        let (more, missing) = translator(options).entries(rule);
        entries.extend(more);
        barrier = barrier.max(missing);
    }
    (entries, barrier, !rules.is_empty())
}
