//! `Sidecar` objects.
//!
//! One `Sidecar` counts for a pod: one whose selector has labels before one that selects the whole namespace. Written
//! objects add up, so the one for the whole namespace leaves out the pods of the others.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use super::{Numbered, Service, document, namespace, translator};
use crate::{
    Options,
    fields::Fields,
    manifest::Manifest,
    object::{Document, Entries, Policy, labels, require},
    products::policy,
    remark::Remark,
};

/// The namespaces whose `Sidecar` is often the default of the whole mesh: that of an installation without further
/// settings, and that of Istio's documentation.
const ROOT_NAMESPACES: [&str; 2] = ["istio-system", "istio-config"];

/// Most objects that are written for one `Sidecar`.
const OBJECTS: usize = 64;

/// A `Sidecar`.
struct Sidecar {
    name: String,
    namespace: Option<String>,
    /// The labels of the pods; without any it is for the whole namespace.
    labels: BTreeMap<String, String>,
    /// What its pods may reach; `None` if it closes nothing.
    allow: Option<Entries>,
    remarks: Vec<Remark>,
}

pub(super) fn import(
    manifests: &[Numbered<'_>],
    services: &[Service],
    used: &mut Vec<usize>,
    options: &Options,
) -> Vec<(usize, Document)> {
    let mut read = Vec::new();
    let mut documents = Vec::new();
    for (i, manifest) in manifests {
        if manifest.kind == "Sidecar" {
            let document = document(manifest, |_| {
                read.push((*i, read_sidecar(manifest, services, used, options)?));
                Ok(())
            });
            documents.push((*i, document));
        }
    }
    for (i, document) in &mut documents {
        if let Some((_, sidecar)) = read.iter().find(|(of, _)| of == i) {
            let others = read.iter().filter(|(of, _)| of != i);
            let others: Vec<&Sidecar> = others
                .map(|(_, other)| other)
                .filter(|other| other.namespace == sidecar.namespace)
                .collect();
            write(document, sidecar, &others);
        }
    }
    documents
}

fn read_sidecar(
    manifest: &Manifest,
    services: &[Service],
    used: &mut Vec<usize>,
    options: &Options,
) -> Result<Sidecar, String> {
    let spec = manifest.spec()?;
    let namespace = namespace(manifest, options);
    let mut remarks = Vec::new();
    if spec.has("ingress") {
        remarks.push(Remark::note(
            "the part about ingress stays with the original",
        ));
    }
    let selector = spec.mapping("workloadSelector")?;
    let others = selector.others(&["labels"]);
    if !others.is_empty() {
        return Err(format!(
            "spec.workloadSelector has unknown fields: {}",
            others.join(", ")
        ));
    }
    let mut sidecar = Sidecar {
        name: manifest.name.clone(),
        namespace,
        labels: selector.text_map("labels")?,
        allow: None,
        remarks,
    };
    let mode = spec.mapping("outboundTrafficPolicy")?.text("mode")?;
    match mode.as_deref() {
        Some("REGISTRY_ONLY") => {}
        Some("ALLOW_ANY") => {
            sidecar.remarks.push(Remark::note(
                "outboundTrafficPolicy is ALLOW_ANY, so the original closes nothing; nothing to import",
            ));
            return Ok(sidecar);
        }
        Some(other) => return Err(format!("spec.outboundTrafficPolicy.mode is `{other}`")),
        None => sidecar.remarks.push(Remark::note(
            "it has no outboundTrafficPolicy, so the mesh's setting counts there; here the pods are closed, as with \
             REGISTRY_ONLY",
        )),
    }
    let mut allow = Entries::default();
    if !spec.has("egress") {
        allow.remark(Remark::left_out(
            "it lists no hosts, so the hosts of the mesh's own Sidecar count there; here nothing is allowed",
        ));
    }
    for listener in spec.mappings("egress")? {
        add_listener(
            &mut allow,
            &listener,
            sidecar.namespace.as_deref(),
            services,
            used,
            options,
        )?;
    }
    sidecar.allow = Some(allow);
    Ok(sidecar)
}

/// Writes the objects of a `Sidecar`. `others` are those of the same namespace.
fn write(document: &mut Document, sidecar: &Sidecar, others: &[&Sidecar]) {
    document.remarks.extend(sidecar.remarks.iter().cloned());
    for other in others.iter().filter(|other| sidecar.may_meet(other)) {
        document.remarks.push(Remark::refused(format!(
            "Sidecar {} may select the same pods, and Istio does not say which of them counts; the written objects \
             add up",
            other.name
        )));
    }
    if sidecar.labels.is_empty()
        && let Some(namespace) = &sidecar.namespace
        && ROOT_NAMESPACES.contains(&namespace.as_str())
    {
        document.remarks.push(Remark::refused(format!(
            "if {namespace} is the root namespace of the mesh, it is for every namespace that has no such Sidecar; \
             the written object is for {namespace} alone"
        )));
    }
    let Some(allow) = &sidecar.allow else {
        return;
    };
    let mut selectors = vec![labels(sidecar.labels.clone())];
    if sidecar.labels.is_empty() {
        let mut others: Vec<_> = others
            .iter()
            .filter(|other| !other.labels.is_empty())
            .collect();
        // What lacks one of few labels often lacks one of many.
        others.sort_by_key(|other| other.labels.len());
        for other in others {
            selectors = without(&selectors, &other.labels);
            document.remarks.push(Remark::note(format!(
                "the pods of Sidecar {} are left out: for them that one counts alone",
                other.name
            )));
        }
    }
    let mut allow = allow.clone();
    if selectors.len() > OBJECTS {
        selectors = vec![labels(sidecar.labels.clone())];
        allow = Entries::default();
        allow.remark(Remark::left_out(
            "there are too many Sidecars whose pods it would have to leave out; it closes all pods, and allows nothing",
        ));
    }
    for pods in selectors {
        let spec = Policy {
            pods,
            allow: Some(allow.clone()),
            deny: None,
        };
        let mut object = policy(&sidecar.name, sidecar.namespace.clone(), spec);
        object.remarks.push(Remark::note(
            "Istio reads host names in requests (Host, SNI) and does not guard other traffic; here the addresses behind \
             the names are allowed, on the ports of the ServiceEntry objects among the files",
        ));
        document.objects.push(object);
    }
}

impl Sidecar {
    /// Whether both may select one pod, and neither goes before the other.
    fn may_meet(&self, other: &Self) -> bool {
        let closes = self.allow.is_some() || other.allow.is_some();
        let is_apart = |(key, value): (&String, &String)| {
            other.labels.get(key).is_some_and(|theirs| theirs != value)
        };
        closes
            && self.labels.is_empty() == other.labels.is_empty()
            && !self.labels.iter().any(is_apart)
    }
}

/// Selectors that together select what `selectors` do, but for pods with all of these labels: such a pod lacks one of
/// them.
fn without(selectors: &[LabelSelector], labels: &BTreeMap<String, String>) -> Vec<LabelSelector> {
    let lacks = |selector: &LabelSelector, (key, value): (&String, &String)| {
        let mut requirements = selector.match_expressions.iter().flatten();
        requirements.any(|one| {
            one.key == *key && one.operator == "NotIn" && one.values.iter().flatten().eq([value])
        })
    };
    let lacking = |selector: &LabelSelector, (key, value): (&String, &String)| {
        let mut selector = selector.clone();
        require(&mut selector, key, "NotIn", vec![value.clone()]);
        selector
    };
    let all = selectors.iter().flat_map(|selector| {
        if labels.iter().any(|label| lacks(selector, label)) {
            return vec![selector.clone()];
        }
        labels
            .iter()
            .map(|label| lacking(selector, label))
            .collect()
    });
    // Beyond the limit none of them is written.
    all.take(OBJECTS + 1).collect()
}

fn add_listener(
    allow: &mut Entries,
    listener: &Fields<'_>,
    namespace: Option<&str>,
    services: &[Service],
    used: &mut Vec<usize>,
    options: &Options,
) -> Result<(), String> {
    let mut conditions = Vec::new();
    if listener.has("port") {
        conditions.push(format!("{} is for one port only", listener.place()));
    }
    for other in listener.others(&["port", "bind", "captureMode", "hosts"]) {
        conditions.push(format!(
            "{} has the unknown field `{other}`",
            listener.place()
        ));
    }
    for host in listener.texts("hosts")? {
        let (from, name) = host.split_once('/').ok_or_else(|| {
            format!(
                "{}.hosts has `{host}`, without a namespace",
                listener.place()
            )
        })?;
        let mut is_found = false;
        for service in services {
            let is_from = match from {
                "*" => true,
                "." => service.namespace.as_deref() == namespace,
                "~" => false,
                other => service.namespace.as_deref() == Some(other),
            };
            if !is_from || !service.is_visible_in(namespace) {
                continue;
            }
            let Some(mut rule) = service.rule(name) else {
                continue;
            };
            is_found = true;
            used.push(service.index);
            rule.conditions.extend(conditions.iter().cloned());
            allow.extend(translator(options).entries(&rule).0);
        }
        if !is_found && from != "~" {
            let remark = if name == "*" || name.ends_with(".cluster.local") {
                Remark::note(format!("{host}: Services of the cluster need no entry"))
            } else {
                Remark::left_out(format!("{host}: no ServiceEntry among the files has it"))
            };
            allow.remark(remark);
        }
    }
    Ok(())
}

/// Whether a host of a `Sidecar`, without its namespace, selects a host of a `ServiceEntry`.
pub(super) fn selects(selected: &str, host: &str) -> bool {
    let (selected, host) = (selected.to_lowercase(), host.to_lowercase());
    if selected == "*" || selected == host {
        return true;
    }
    // `*.example.com` also selects `*.a.example.com`.
    selected.strip_prefix('*').is_some_and(|end| {
        let bare = host.strip_prefix('*').unwrap_or(&host);
        bare.len() > end.len() && bare.ends_with(end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sidecar_selects_hosts_by_name_or_suffix() {
        for (selected, host, expected) in [
            ("*", "a.example.com", true),
            ("a.example.com", "a.example.com", true),
            ("*.example.com", "a.b.example.com", true),
            ("*.example.com", "*.b.example.com", true),
            ("*.example.com", "*.example.com", true),
            ("*.example.com", "example.com", false),
            ("a.example.com", "*.example.com", false),
            ("*.example.com", "badexample.com", false),
        ] {
            assert_eq!(selects(selected, host), expected, "{selected} {host}");
        }
    }
}
