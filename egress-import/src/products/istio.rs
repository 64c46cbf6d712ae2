//! `ServiceEntry` and `Sidecar` of Istio (`networking.istio.io`).
//!
//! A `Sidecar` with `outboundTrafficPolicy.mode: REGISTRY_ONLY` lets its pods reach the hosts that it lists, if an entry
//! of the registry has them. So a `Sidecar` becomes an `EgressPolicy` with the hosts and ports of the `ServiceEntry`
//! objects that it lists. A `ServiceEntry` that no `Sidecar` lists becomes an `EgressSet`, which opens nothing by
//! itself.

mod sidecars;

use egress_api::Action;

use super::{Numbered, document, namespace, translator};
use crate::{
    Options,
    manifest::Manifest,
    names::Wildcards,
    object::{Document, Object, Spec},
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
    documents.extend(sidecars::import(manifests, &services, &mut used, options));
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
            .filter(|host| sidecars::selects(selected, host))
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
