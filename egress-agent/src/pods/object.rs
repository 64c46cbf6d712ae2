//! A Pod, Namespace or policy object in a manifest, reduced to what enforcement needs.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

use egress_api::{Labels, Policy, namespace_labels};
use egress_common::records::UID_BYTES;
use egress_policy::objects::Objects;
use k8s_openapi::{api::core::v1, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use serde::Deserialize;
use serde_json::Value;

use super::{
    ANNOTATION_PREFIX, INTERFACE_ANNOTATION, ObjectsOf, Pod, Problem,
    policies::{ObjectVersion, PolicyKind, Set},
};

/// Longest interface name in bytes (`IFNAMSIZ` less its zero byte).
const INTERFACE_NAME_MAX: usize = 15;

/// Longest name of a namespace in bytes (an RFC 1123 label, as the API server checks it).
const LABEL_MAX: usize = 63;
/// Longest name of a pod in bytes (an RFC 1123 subdomain, as the API server checks it).
const SUBDOMAIN_MAX: usize = 253;

/// An object in a manifest.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Object {
    Pod(Box<PodObject>),
    Namespace(Namespace),
    Policy(PolicyObject),
    Set(SetObject),
}

/// A policy.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PolicyObject {
    pub(super) policy: Policy,
    pub(super) version: Arc<ObjectVersion>,
    pub(super) origin: String,
}

/// An `EgressSet`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SetObject {
    pub(super) set: Set,
    pub(super) origin: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodObject {
    pub(super) pod: Pod,
    pub(super) labels: Arc<Labels>,
    /// Whether a part of it could not be read and was omitted.
    pub(super) incomplete: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Namespace {
    pub(super) name: String,
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) labels: Arc<Labels>,
    pub(super) origin: String,
}

impl Object {
    pub(super) fn origin(&self) -> &str {
        match self {
            Self::Pod(pod) => &pod.pod.origin,
            Self::Namespace(namespace) => &namespace.origin,
            Self::Policy(policy) => &policy.origin,
            Self::Set(set) => &set.origin,
        }
    }

    /// Whether a part of it could not be read, so that an earlier form of it is better.
    pub(super) fn is_incomplete(&self) -> bool {
        match self {
            Self::Pod(pod) => pod.incomplete,
            Self::Namespace(_) => false,
            Self::Policy(policy) => !policy.policy.is_complete,
            Self::Set(set) => set.set.destinations.is_err(),
        }
    }

    /// Whether both are versions of the same object.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Pod(a), Self::Pod(b)) => {
                a.pod.namespace == b.pod.namespace && a.pod.name == b.pod.name
            }
            (Self::Namespace(a), Self::Namespace(b)) => a.name == b.name,
            (Self::Policy(a), Self::Policy(b)) => a.policy.name == b.policy.name,
            (Self::Set(a), Self::Set(b)) => a.set.name == b.set.name,
            _ => false,
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(pod) => write!(f, "pod {}/{}", pod.pod.namespace, pod.pod.name),
            Self::Namespace(namespace) => write!(f, "namespace {}", namespace.name),
            Self::Policy(policy) => write!(f, "{}", policy.policy.name),
            Self::Set(set) => write!(f, "EgressSet {}", set.set.name),
        }
    }
}

impl Namespace {
    /// Reduces a manifest.
    pub(super) fn read(origin: &str, read: v1::Namespace) -> Result<Self, Problem> {
        let name = required_name(origin, read.metadata.name, LABEL_MAX)?;
        Ok(Self {
            annotations: own_annotations(read.metadata.annotations),
            labels: Arc::new(namespace_labels(&name, read.metadata.labels)),
            name,
            origin: origin.to_owned(),
        })
    }
}

/// A policy object in a manifest.
#[derive(Debug, Deserialize)]
pub(super) struct PolicyManifest {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Value,
}

impl PolicyManifest {
    /// Reduces a manifest, and returns its problem.
    pub(super) fn read(
        self,
        origin: &str,
        kind: PolicyKind,
    ) -> Result<(Object, Option<Problem>), Problem> {
        let ObjectMeta {
            name,
            namespace,
            uid,
            generation,
            ..
        } = self.metadata;
        let name = required_name(origin, name, SUBDOMAIN_MAX)?;
        let namespace = match namespace {
            None => "default".to_owned(),
            given => required_name(origin, given, LABEL_MAX)?,
        };
        let origin = origin.to_owned();
        let (object, message) = match kind {
            PolicyKind::Policy(of) => {
                let namespace = kind.is_namespaced().then_some(&*namespace);
                let policy = Policy::read(of, namespace, &name, &self.spec);
                let problem = policy.problem();
                let version = Arc::new(ObjectVersion { uid, generation });
                let object = PolicyObject {
                    policy,
                    version,
                    origin,
                };
                (Object::Policy(object), problem)
            }
            PolicyKind::Set => {
                let set = Set::read(&name, &self.spec);
                let problem = set.destinations.clone().err();
                (Object::Set(SetObject { set, origin }), problem)
            }
        };
        let problem = message.map(|message| Problem {
            origin: object.origin().to_owned(),
            message: format!("{object}: {message}"),
        });
        Ok((object, problem))
    }
}

/// The fields of a pod that every source reads in the same way.
pub(super) struct Common {
    /// The pod, without interface and cgroup. Its annotations may still contain
    /// [`INTERFACE_ANNOTATION`].
    pub(super) pod: Pod,
    pub(super) labels: Arc<Labels>,
    /// Its problems.
    pub(super) messages: Vec<String>,
    /// Whether an address could not be read and was omitted.
    pub(super) incomplete: bool,
}

impl Common {
    pub(super) fn read(origin: &str, read: v1::Pod) -> Result<Self, Problem> {
        let metadata = read.metadata;
        let name = required_name(origin, metadata.name, SUBDOMAIN_MAX)?;
        let namespace = match metadata.namespace {
            None => "default".to_owned(),
            given => required_name(origin, given, LABEL_MAX)?,
        };
        let labels = Arc::new(metadata.labels.unwrap_or_default());
        let spec = read.spec.unwrap_or_default();
        let mut messages = Vec::new();
        let uid = match metadata.uid {
            Some(uid) if (1..=UID_BYTES).contains(&uid.len()) => uid,
            given => {
                if given.is_some() {
                    messages.push(format!(
                        "pod {namespace}/{name}: metadata.uid is not 1 to {UID_BYTES} bytes long \
                         and does not count"
                    ));
                }
                format!("{namespace}/{name}")
            }
        };
        let mut pod = Pod {
            uid,
            namespace,
            name,
            interface: None,
            cgroup_uid: None,
            addresses: Vec::new(),
            further: Vec::new(),
            annotations: own_annotations(metadata.annotations),
            namespace_annotations: BTreeMap::new(),
            namespace_known: true,
            objects: Objects::default(),
            objects_of: ObjectsOf::Known,
            host_network: spec.host_network.unwrap_or(false),
            is_pending: false,
            node_name: spec.node_name,
            origin: origin.to_owned(),
        };
        let mut incomplete = false;
        for text in pod_ips(read.status) {
            if let Ok(address) = text.parse::<IpAddr>() {
                pod.addresses.push(address);
            } else {
                incomplete = true;
                messages.push(format!(
                    "pod {}/{}: {text:?} in status.podIPs is not an IP address",
                    pod.namespace, pod.name
                ));
            }
        }
        Ok(Self {
            pod,
            labels,
            messages,
            incomplete,
        })
    }
}

impl PodObject {
    /// Reduces a manifest, and returns its problems.
    pub(super) fn read(origin: &str, read: v1::Pod) -> Result<(Self, Vec<Problem>), Problem> {
        let Common {
            mut pod,
            labels,
            mut messages,
            mut incomplete,
        } = Common::read(origin, read)?;
        let subject = format!("pod {}/{}", pod.namespace, pod.name);
        match pod.annotations.remove(INTERFACE_ANNOTATION) {
            Some(interface) if is_interface_name(&interface) => pod.interface = Some(interface),
            Some(interface) => {
                incomplete = true;
                messages.push(format!(
                    "{subject}: {interface:?} in {INTERFACE_ANNOTATION} is not an interface name \
                     (1 to {INTERFACE_NAME_MAX} bytes, no '/' and no space)"
                ));
            }
            None if pod.host_network => messages.push(format!(
                "{subject} uses the host's network and has no interface of its own: there is \
                 nothing to enforce on"
            )),
            None => messages.push(format!(
                "{subject} names no interface: there is nothing to enforce on; set the annotation \
                 {INTERFACE_ANNOTATION}"
            )),
        }
        let problem = |message| Problem {
            origin: origin.to_owned(),
            message,
        };
        Ok((
            Self {
                pod,
                labels,
                incomplete,
            },
            messages.into_iter().map(problem).collect(),
        ))
    }
}

impl PodObject {
    /// Reduces the template of a workload's pods to one pod, whose name is `<kind>/<name>`.
    pub(super) fn of_template(origin: &str, kind: &str, read: v1::Pod) -> Result<Self, Problem> {
        let Common {
            mut pod, labels, ..
        } = Common::read(origin, read)?;
        pod.annotations.remove(INTERFACE_ANNOTATION);
        pod.name = format!("{kind}/{}", pod.name);
        Ok(Self {
            pod,
            labels,
            incomplete: false,
        })
    }
}

/// The agent's annotations.
pub(super) fn own_annotations(all: Option<BTreeMap<String, String>>) -> BTreeMap<String, String> {
    all.unwrap_or_default()
        .into_iter()
        .filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX))
        .collect()
}

/// `status.podIPs`, or `status.podIP` if that is empty.
fn pod_ips(status: Option<v1::PodStatus>) -> Vec<String> {
    let Some(status) = status else {
        return Vec::new();
    };
    match status.pod_ips {
        Some(ips) if !ips.is_empty() => ips.into_iter().map(|ip| ip.ip).collect(),
        _ => status.pod_ip.into_iter().collect(),
    }
}

fn is_interface_name(name: &str) -> bool {
    (1..=INTERFACE_NAME_MAX).contains(&name.len())
        && !matches!(name, "." | "..")
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/')
}

fn required_name(origin: &str, name: Option<String>, max: usize) -> Result<String, Problem> {
    let wrong = |message: String| Problem {
        origin: origin.to_owned(),
        message,
    };
    let name = name.ok_or_else(|| wrong("metadata.name is missing".into()))?;
    let is_good = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    let one_label = max == LABEL_MAX;
    if name.len() <= max && name.split('.').all(is_good) && !(one_label && name.contains('.')) {
        return Ok(name);
    }
    let dots = if one_label { "" } else { ", '.'" };
    Err(wrong(format!(
        "{name:?} is not a name: up to {max} lower-case letters, digits, '-'{dots}, beginning and \
         ending with a letter or digit"
    )))
}
