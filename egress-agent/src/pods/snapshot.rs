//! The output of a source of pods.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use egress_api::{PeerPod, Peers, Selection, Selector, namespace_labels};
use serde::{Deserialize, Serialize};

use super::{
    contents::Contents,
    knowledge::{Knowledge, SourcedFacts},
    name::NamespacedName,
    object::{Namespace, Object, PodObject},
    policies::{PolicyFacts, PolicyKinds, PolicyObjects, Sets, applied},
};
use egress_policy::{Prefix, Resolver, objects::Objects, services::Services};

/// The fields of a pod that enforcement needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// `metadata.namespace`, or `default`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`, or `<namespace>/<name>`.
    pub uid: String,
    /// Its host end, if its manifest names it; otherwise the agent finds it by
    /// [`Self::cgroup_uid`].
    pub interface: Option<String>,
    /// The UID in the names of its cgroups, if a kubelet runs it: `metadata.uid`, but for a static pod the
    /// UID that the kubelet gave it, which is in an annotation of its mirror in the cluster.
    pub cgroup_uid: Option<String>,
    /// `status.podIPs`.
    pub addresses: Vec<IpAddr>,
    /// Addresses of further networks from an annotation, whose author can write any address.
    pub further: Vec<IpAddr>,
    /// Its annotations under [`super::ANNOTATION_PREFIX`], by their whole keys.
    pub annotations: BTreeMap<String, String>,
    /// Its namespace's annotations under [`super::ANNOTATION_PREFIX`], by their whole keys.
    pub namespace_annotations: BTreeMap<String, String>,
    /// Whether its namespace is known, and with it the namespace's annotations. If not, as when the cluster's
    /// two watches race, the pod must be closed until it is: an empty [`Self::namespace_annotations`] then
    /// does not mean that the namespace has no rules. Pods of a directory need no Namespace, so for them this
    /// is always true.
    pub namespace_known: bool,
    /// The policy objects that select it.
    #[serde(skip)]
    pub objects: Objects,
    /// Whether these are all. If not, the pod must be closed until they are known.
    #[serde(default)]
    pub objects_of: ObjectsOf,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// Whether no program of it runs yet, according to the kubelet: its phase is `Pending`, and it has no
    /// address. It stays so while its image or a Secret is missing, or while nobody sets up its network.
    pub is_pending: bool,
    /// `spec.nodeName`.
    pub node_name: Option<String>,
    /// Where it was read, for messages: `file:line`, or `pod namespace/name` in a cluster.
    pub origin: String,
}

/// How much is known of the policy objects that select a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ObjectsOf {
    /// All of them are known.
    #[default]
    Known,
    /// The API server does not list a kind of objects that there may be.
    Unknown,
    /// The same, and an earlier agent left the pod under a whole policy.
    UnknownButEnforced,
}

impl Pod {
    /// Whether its namespace and all policy objects that select it are known.
    pub fn is_known(&self) -> bool {
        self.namespace_known && self.objects_of == ObjectsOf::Known
    }

    /// The pod's namespace and name.
    pub fn key(&self) -> NamespacedName {
        NamespacedName::new(&*self.namespace, &*self.name)
    }
}

/// A problem of an object. It affects only the object that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The place: `file`, `file:line` or `file:line:column`; in a cluster the object, such as `pod
    /// namespace/name`, or `cluster`.
    pub origin: String,
    /// The mistake, and how to correct it.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.message)
    }
}

/// A snapshot of all pods of a source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The pods, by namespace and name.
    pub pods: BTreeMap<NamespacedName, Pod>,
    /// All policy objects. [`Pod::objects`] has those that select the pod.
    pub policies: Arc<PolicyObjects>,
    /// The policy objects for pods of which nothing is known ([`Selection::of_unknown`]). There are such pods only in a
    /// cluster.
    pub of_unknown: Arc<Objects>,
    /// The problems.
    pub problems: Vec<Problem>,
    /// Whether a part could not be read at all, so that pods may be missing.
    pub unreadable: bool,
    /// The facts about the cluster.
    pub facts: Facts,
    /// The same by their sources.
    pub sources: SourcedFacts,
    /// Which of these sources are known.
    pub knowledge: Knowledge,
    /// The UID of the node's object in the cluster.
    pub node_uid: Option<String>,
    /// Which kinds of policy objects are known.
    pub kinds: PolicyKinds,
    /// The cluster's Services; none if they are not known.
    pub services: Arc<Services>,
}

/// Facts about a cluster; empty without one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Its resolvers, each with its origin for people, for example `service
    /// kube-system/kube-dns`.
    pub resolvers: BTreeMap<Resolver, String>,
    /// Its internal prefixes (pods, services, nodes, the API server), each with its origin.
    pub internal: BTreeMap<Prefix, String>,
    /// The internal prefixes of this node's pods.
    pub pods: BTreeSet<Prefix>,
    /// The internal prefixes that are ranges of Services.
    pub services: BTreeSet<Prefix>,
}

impl Facts {
    /// Adds those of others that are missing here.
    pub fn add_missing(&mut self, others: &Self) {
        for (resolver, origin) in &others.resolvers {
            let known = self.resolvers.entry(*resolver);
            known.or_insert_with(|| origin.clone());
        }
        for (prefix, origin) in &others.internal {
            let known = self.internal.entry(*prefix);
            known.or_insert_with(|| origin.clone());
        }
        self.pods.extend(&others.pods);
        self.services.extend(&others.services);
    }
}

/// Merges the contents of files. If two contain the same object, the earlier one counts.
pub(super) fn assemble<'a>(files: impl Iterator<Item = &'a Contents>) -> Snapshot {
    let mut snapshot = Snapshot::default();
    let mut origins: BTreeMap<String, &str> = BTreeMap::new();
    let mut pods: Vec<&PodObject> = Vec::new();
    let mut namespaces: BTreeMap<&str, &Namespace> = BTreeMap::new();
    let mut policies = BTreeMap::new();
    let mut facts = PolicyObjects::new();
    let mut sets = Sets::new();
    for contents in files {
        snapshot.problems.extend(contents.problems.iter().cloned());
        snapshot.unreadable |= contents.unreadable;
        for object in &contents.objects {
            if let Some(earlier) = origins.get(&object.to_string()) {
                snapshot.problems.push(Problem {
                    origin: object.origin().to_owned(),
                    message: format!(
                        "{object} is already described at {earlier}, which counts; \
                         remove one of the two"
                    ),
                });
                continue;
            }
            origins.insert(object.to_string(), object.origin());
            match object {
                Object::Pod(pod) => pods.push(pod),
                Object::Namespace(namespace) => {
                    namespaces.insert(&namespace.name, namespace);
                }
                Object::Policy(object) => {
                    let (name, applied, problems) = applied(&object.policy, &NoCluster);
                    let problem = |message| Problem {
                        origin: object.origin.clone(),
                        message: format!("{name}: {message}"),
                    };
                    snapshot.problems.extend(problems.into_iter().map(problem));
                    let of_policy = PolicyFacts {
                        read: Arc::clone(&object.version),
                        used: Arc::clone(&object.version),
                    };
                    facts.insert(Arc::clone(&name), of_policy);
                    policies.insert(name, applied);
                }
                Object::Set(object) => {
                    // Entries that use one without destinations are then unreadable.
                    if let Ok(destinations) = &object.set.destinations {
                        sets.insert(object.set.name.clone(), destinations.clone());
                    }
                }
            }
        }
    }
    snapshot.policies = Arc::new(facts);
    let mut selection = Selection::default();
    selection.update(policies, &Arc::new(sets));
    for PodObject { pod, labels, .. } in pods {
        let mut pod = pod.clone();
        let key = pod.key();
        let namespace = namespaces.get(&*pod.namespace);
        let namespace_labels = match namespace {
            Some(namespace) => Arc::clone(&namespace.labels),
            None => Arc::new(namespace_labels(&pod.namespace, None)),
        };
        if let Some(namespace) = namespace {
            pod.namespace_annotations.clone_from(&namespace.annotations);
        }
        let objects = selection.of(
            key.clone(),
            &pod.namespace,
            labels,
            &namespace_labels,
            pod.host_network,
        );
        pod.objects.clone_from(objects);
        snapshot.pods.insert(key, pod);
    }
    snapshot
}

/// The peers of rules, without a cluster.
pub(super) struct NoCluster;

impl Peers for NoCluster {
    fn nodes(&self, _: &Selector) -> Result<Vec<IpAddr>, String> {
        Err("the addresses of nodes are known only in a cluster".to_owned())
    }

    fn pods(&self, _: &Selector, _: &Selector) -> Result<Vec<PeerPod>, String> {
        Err("the addresses of other pods are known only in a cluster".to_owned())
    }
}
