//! `ServiceEntry` and `Sidecar` of Istio (`networking.istio.io`).
//!
//! A `Sidecar` with `outboundTrafficPolicy.mode: REGISTRY_ONLY` lets its pods reach the hosts that it lists, if an entry
//! of the registry has them. So a `Sidecar` becomes an `EgressPolicy` with the hosts and ports of the `ServiceEntry`
//! objects that it lists. A `ServiceEntry` that no `Sidecar` lists becomes an `EgressSet`, which opens nothing by
//! itself.

use egress_api::Action;

use super::{Numbered, document, namespace, policy, translator};
use crate::{
    Options,
    fields::Fields,
    manifest::Manifest,
    names::Wildcards,
    object::{Document, Entries, Object, Policy, Spec, labels},
    remark::{Remark, add},
    rule::{Peer, Ports, Protocol, Rule},
};

/// A `ServiceEntry`.
struct Service {
    index: usize,
    name: String,
    namespace: Option<String>,
    hosts: Vec<String>,
    addresses: Vec<String>,
    ports: Vec<Ports>,
    is_external: bool,
    /// Fields that may restrict it, and that no entry expresses.
    conditions: Vec<String>,
    /// The namespaces that see it; `*` for all, `.` for its own.
    export_to: Vec<String>,
}

pub(super) fn import(manifests: &[Numbered<'_>], options: &Options) -> Vec<(usize, Document)> {
    let mut services = Vec::new();
    let mut documents = Vec::new();
    let mut entries = Vec::new();
    for (i, manifest) in manifests {
        if manifest.kind == "ServiceEntry" {
            match read_service(*i, manifest, options) {
                Ok(service) => {
                    services.push(service);
                    entries.push((*i, *manifest));
                }
                Err(error) => {
                    documents.push((*i, document(manifest, |_| Err(error))));
                }
            }
        }
    }
    let mut used = Vec::new();
    for (i, manifest) in manifests {
        if manifest.kind == "Sidecar" {
            let document = document(manifest, |document| {
                sidecar(document, manifest, &services, &mut used, options)
            });
            documents.push((*i, document));
        }
    }
    for (i, manifest) in entries {
        let mut document = super::start(manifest);
        for service in services.iter().filter(|service| service.index == i) {
            if used.contains(&i) {
                document.remarks.push(Remark::note(
                    "its hosts are in the EgressPolicy of each Sidecar that lists them",
                ));
            } else {
                write_set(&mut document, service, options);
            }
        }
        documents.push((i, document));
    }
    documents
}

fn read_service(index: usize, manifest: &Manifest, options: &Options) -> Result<Service, String> {
    let spec = manifest.spec()?;
    let known = [
        "hosts",
        "addresses",
        "ports",
        "location",
        "resolution",
        "endpoints",
        "workloadSelector",
        "exportTo",
        "subjectAltNames",
    ];
    let conditions = spec.others(&known).into_iter();
    let conditions = conditions
        .map(|other| format!("`{other}` of ServiceEntry {}", manifest.name))
        .collect();
    let mut ports = Vec::new();
    for port in spec.mappings("ports")? {
        let protocol = port
            .text("protocol")?
            .unwrap_or_default()
            .to_ascii_uppercase();
        let protocol = if protocol == "UDP" {
            Protocol::Udp
        } else {
            Protocol::Tcp
        };
        // The number is the one that programs use; targetPort is that of the endpoints.
        ports.push(Ports::read(protocol, Some(&port.needed("number")?), None));
    }
    Ok(Service {
        index,
        name: manifest.name.clone(),
        namespace: namespace(manifest, options),
        hosts: spec.texts("hosts")?,
        addresses: spec.texts("addresses")?,
        ports,
        // Without a location it is outside of the mesh.
        is_external: spec.text("location")?.as_deref() != Some("MESH_INTERNAL"),
        conditions,
        export_to: spec.texts("exportTo")?,
    })
}

impl Service {
    fn is_visible_in(&self, namespace: Option<&str>) -> bool {
        self.export_to.is_empty()
            || self.export_to.iter().any(|to| match to.as_str() {
                "*" => true,
                "." => self.namespace.as_deref() == namespace,
                other => Some(other) == namespace,
            })
    }

    /// The rule for those of its hosts that a host of a `Sidecar` selects.
    fn rule(&self, selected: &str) -> Option<Rule> {
        let hosts: Vec<&String> = self
            .hosts
            .iter()
            .filter(|host| selects(selected, host))
            .collect();
        if hosts.is_empty() {
            return None;
        }
        let mut rule = Rule::new(Action::Allow);
        rule.ports.clone_from(&self.ports);
        rule.conditions.clone_from(&self.conditions);
        if self.ports.is_empty() {
            rule.conditions
                .push(format!("ServiceEntry {} has no ports", self.name));
        }
        for host in hosts {
            rule.peers.push(if self.is_external {
                Peer::Name {
                    text: host.clone(),
                    wildcards: Wildcards::Labels,
                }
            } else {
                Peer::Cluster(format!("{host} (MESH_INTERNAL)"))
            });
        }
        if self.is_external {
            for address in &self.addresses {
                rule.peers.push(Peer::cidr(address, &[]));
            }
        }
        Some(rule)
    }
}

/// Whether a host of a `Sidecar`, without its namespace, selects a host of a `ServiceEntry`.
fn selects(selected: &str, host: &str) -> bool {
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

fn sidecar(
    document: &mut Document,
    manifest: &Manifest,
    services: &[Service],
    used: &mut Vec<usize>,
    options: &Options,
) -> Result<(), String> {
    let spec = manifest.spec()?;
    let namespace = namespace(manifest, options);
    if spec.has("ingress") {
        document.remarks.push(Remark::note(
            "the part about ingress stays with the original",
        ));
    }
    let mode = spec.mapping("outboundTrafficPolicy")?.text("mode")?;
    match mode.as_deref() {
        Some("REGISTRY_ONLY") => {}
        Some("ALLOW_ANY") => {
            document.remarks.push(Remark::note(
                "outboundTrafficPolicy is ALLOW_ANY, so the original closes nothing; nothing to import",
            ));
            return Ok(());
        }
        Some(other) => return Err(format!("spec.outboundTrafficPolicy.mode is `{other}`")),
        None => document.remarks.push(Remark::note(
            "it has no outboundTrafficPolicy, so the mesh's setting counts there; here the pods are closed, as with \
             REGISTRY_ONLY",
        )),
    }
    let selector = spec.mapping("workloadSelector")?;
    let others = selector.others(&["labels"]);
    if !others.is_empty() {
        return Err(format!(
            "spec.workloadSelector has unknown fields: {}",
            others.join(", ")
        ));
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
            namespace.as_deref(),
            services,
            used,
            options,
        )?;
    }
    let spec = Policy {
        pods: labels(selector.text_map("labels")?),
        allow: Some(allow),
        deny: None,
    };
    let mut object = policy(&manifest.name, namespace, spec);
    object.remarks.push(Remark::note(
        "Istio reads host names in requests (Host, SNI) and does not guard other traffic; here the addresses behind \
         the names are allowed, on the ports of the ServiceEntry objects among the files",
    ));
    document.objects.push(object);
    Ok(())
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

fn write_set(document: &mut Document, service: &Service, options: &Options) {
    if !service.is_external {
        document.remarks.push(Remark::note(
            "it is MESH_INTERNAL; traffic within the cluster needs no entry",
        ));
        return;
    }
    let Some(mut rule) = service.rule("*") else {
        document.remarks.push(Remark::note("it has no hosts"));
        return;
    };
    rule.conditions.clear();
    rule.ports = vec![Ports::read(Protocol::Tcp, None, None)];
    let (mut entries, _) = translator(options).entries(&rule);
    entries.without_suffix("/tcp");
    if !entries.has_entries() {
        for remark in entries.remarks() {
            add(&mut document.remarks, remark.clone());
        }
        return;
    }
    let name = match &service.namespace {
        Some(namespace) => format!("{namespace}-{}", service.name),
        None => service.name.clone(),
    };
    let ports: Vec<String> = service
        .ports
        .iter()
        .filter_map(|ports| match ports {
            Ports::Of {
                protocol,
                range: Some((port, _)),
            } => Some(match protocol {
                Protocol::Udp => format!("`@{name}:{port}/udp`"),
                _ => format!("`@{name}:{port}/tcp`"),
            }),
            _ => None,
        })
        .collect();
    let mut object = Object {
        name: name.clone(),
        namespace: None,
        remarks: Vec::new(),
        spec: Spec::Set(entries),
    };
    object.remarks.push(Remark::note(format!(
        "no Sidecar among the files lists it, so it is a set, which opens nothing: write {} under `allow` of the pods \
         that need it",
        ports.join(", ")
    )));
    document.objects.push(object);
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
