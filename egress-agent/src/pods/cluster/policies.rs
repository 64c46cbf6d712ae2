//! Policy objects of the cluster, as the API server sent them last, and the pods that they select.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use egress_api::{Applied, Body, Labels, Policy, Selection};
use egress_policy::objects::{ObjectKind, ObjectName, Objects};
use kube::{
    ResourceExt as _,
    core::{ApiResource, DynamicObject, GroupVersionKind},
};

use super::{
    super::{
        NamespacedName, Pod, Problem,
        policies::{
            ObjectVersion, PolicyFacts, PolicyKind, PolicyKinds, PolicyObjects, Set, Sets, applied,
        },
    },
    definitions::{Definition, Signals},
    health::{Health, Watched},
    kind_states::{self, KindState},
    peers::{ClusterPeers, PeerFacts},
    table::Table,
};

/// Most problems of policies that are listed; the rest are counted.
const PROBLEMS_MAX: usize = 100;
/// Most pods of the cluster that can be peers of rules.
const PEER_PODS_MAX: usize = 50_000;
/// How long a new rule about pods waits for the list of pods before it fails closed.
const PEERS_WAIT: Duration = Duration::from_secs(10);

/// A policy in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeptPolicy {
    uid: Option<String>,
    policy: Arc<Policy>,
    /// The versions of the present object and of `policy`.
    facts: PolicyFacts,
    /// The problem with the present object. If it cannot be read, `policy` is its last readable form.
    problem: Option<String>,
}

/// An `EgressSet` in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeptSet {
    uid: Option<String>,
    /// `None` if it has never been readable.
    destinations: Option<Vec<String>>,
    problem: Option<String>,
}

/// What follows for an object that cannot be read any more.
const KEPT: &str = "its last readable form stays in force";

impl KeptPolicy {
    /// Reads an object, of which `former` is the form in force.
    pub(super) fn read(kind: ObjectKind, object: &DynamicObject, former: Option<&Self>) -> Self {
        let spec = &object.data["spec"];
        let namespace = object.metadata.namespace.as_deref();
        let policy = Policy::read(kind, namespace, &object.name_any(), spec);
        let uid = object.metadata.uid.clone();
        let read = Arc::new(ObjectVersion {
            uid: uid.clone(),
            generation: object.metadata.generation,
        });
        let facts = PolicyFacts {
            used: Arc::clone(&read),
            read,
        };
        let problem = policy.problem();
        let former = former.filter(|former| former.uid == uid);
        if let Some(former) = former {
            if !policy.is_complete && former.policy.is_complete {
                return Self {
                    uid,
                    policy: Arc::clone(&former.policy),
                    facts: PolicyFacts {
                        used: Arc::clone(&former.facts.used),
                        ..facts
                    },
                    problem: problem.map(|what| format!("{what}: {KEPT}")),
                };
            }
            if *former.policy == policy {
                // The same object in memory selects nothing anew.
                return Self {
                    uid,
                    policy: Arc::clone(&former.policy),
                    facts,
                    problem,
                };
            }
        }
        Self {
            uid,
            policy: Arc::new(policy),
            facts,
            problem,
        }
    }
}

impl KeptSet {
    pub(super) fn read(object: &DynamicObject, former: Option<&Self>) -> Self {
        let set = Set::read(&object.name_any(), &object.data["spec"]);
        let uid = object.metadata.uid.clone();
        let former = former.filter(|former| former.uid == uid);
        let former = former.and_then(|former| former.destinations.clone());
        match set.destinations {
            Ok(destinations) => Self {
                uid,
                destinations: Some(destinations),
                problem: None,
            },
            Err(what) => Self {
                uid,
                problem: Some(match former {
                    Some(_) => format!("{what}: {KEPT}"),
                    None => format!("{what}: it does not count"),
                }),
                destinations: former,
            },
        }
    }
}

/// How the API server names a kind.
pub(super) fn resource(kind: PolicyKind) -> ApiResource {
    let gvk = GroupVersionKind::gvk(kind.group(), kind.version(), kind.name());
    ApiResource::from_gvk(&gvk)
}

/// All policy objects, and the pods that they select.
#[derive(Debug)]
pub(super) struct Policies {
    pub(super) egress: Table<KeptPolicy>,
    pub(super) cluster_egress: Table<KeptPolicy>,
    pub(super) network: Table<KeptPolicy>,
    pub(super) sets: Table<KeptSet>,
    pub(super) definitions: Table<Definition>,
    /// Which kinds have had a definition, in the order of [`PolicyKind::ALL`].
    defined: [bool; PolicyKind::ALL.len()],
    pub(super) peer_pods: Table<PeerFacts>,
    selection: Selection<NamespacedName>,
    /// The policies and sets that were given to `selection` last, and the revisions that they were made from.
    built: Option<Revisions>,
    resolved: BTreeMap<Arc<ObjectName>, Resolved>,
    objects: Arc<PolicyObjects>,
    problems: Vec<Problem>,
    /// The revision of `peer_pods` that rules are resolved with: pods come and go often.
    peers_revision: u64,
    /// Since when rules need the pods of the cluster.
    pods_needed: Option<Instant>,
}

pub(super) use super::peers::PeersOf;

/// The revisions of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Revisions {
    policies: [u64; 4],
    peers: PeerRevisions,
}

/// The revisions of the tables that peers are from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PeerRevisions {
    pub(super) nodes: u64,
    pub(super) namespaces: u64,
    pub(super) pods: u64,
    /// Whether the pods can be had.
    pub(super) has_pods: bool,
}

/// A policy in the form for the selection.
#[derive(Debug)]
struct Resolved {
    policy: Arc<Policy>,
    /// The version of `policy`.
    version: Arc<ObjectVersion>,
    peers: PeerRevisions,
    applied: Applied,
    problems: Vec<String>,
}

impl Default for Policies {
    fn default() -> Self {
        Self {
            egress: Table::remembering(),
            cluster_egress: Table::remembering(),
            network: Table::remembering(),
            sets: Table::remembering(),
            definitions: Table::default(),
            defined: [false; PolicyKind::ALL.len()],
            peer_pods: Table::limited(PEER_PODS_MAX),
            selection: Selection::default(),
            built: None,
            resolved: BTreeMap::new(),
            objects: Arc::default(),
            problems: Vec::new(),
            peers_revision: 0,
            pods_needed: None,
        }
    }
}

impl Policies {
    /// Whether no kind has to be awaited. Without the policies of a kind that the server has, pods would be open, or
    /// closed, that are not to be.
    pub(super) fn is_ready(&self, health: &Health) -> bool {
        let has_pods = self.peer_pods.is_complete() || health.is_not_offered(Watched::PeerPods);
        self.states(health)
            .all(|(_, state)| state != KindState::Awaited)
            && (has_pods || !self.needs_pods())
    }

    /// Which kinds have been listed, and which may exist and have not.
    pub(super) fn kinds(&self, health: &Health) -> PolicyKinds {
        kind_states::kinds(self.states(health))
    }

    /// The state of each kind.
    fn states(&self, health: &Health) -> impl Iterator<Item = (PolicyKind, KindState)> {
        PolicyKind::ALL.into_iter().map(|kind| {
            let is_listed = match kind {
                PolicyKind::Policy(ObjectKind::EgressPolicy) => self.egress.is_complete(),
                PolicyKind::Policy(ObjectKind::ClusterEgressPolicy) => {
                    self.cluster_egress.is_complete()
                }
                PolicyKind::Policy(ObjectKind::ClusterNetworkPolicy) => self.network.is_complete(),
                PolicyKind::Set => self.sets.is_complete(),
            };
            let state = KindState::of(kind, is_listed, &self.definitions, health);
            (kind, state)
        })
    }

    /// Whether a rule names pods or namespaces, so that the pods of the cluster must be known.
    pub(super) fn needs_pods(&self) -> bool {
        self.network.values().any(|kept| match &kept.policy.body {
            Body::Network(network) => network.needs_pods(),
            Body::Namespace(_) | Body::Tier(_) => false,
        })
    }

    /// Resolves rules with the pods that are known now.
    pub(super) fn renew_peers(&mut self) {
        self.peers_revision = self.peer_pods.revision();
    }

    /// Records which definitions exist, and tells in `signals` what the tasks that follow kinds must do. While a
    /// definition is being deleted, and after that, the kind's objects stay as they are: the API server deletes every
    /// object of a kind before it deletes the definition.
    pub(super) fn note_definitions(&mut self, signals: &mut Signals) {
        signals.changes += 1;
        if !self.definitions.is_complete() {
            return;
        }
        for (index, kind) in PolicyKind::ALL.into_iter().enumerate() {
            let is_there = Definition::is_there(&self.definitions, kind);
            self.defined[index] |= is_there;
            signals.is_undefined[index] = !is_there;
            // A kind that never had a definition here may be served without one.
            let is_removed = self.defined[index] && !is_there;
            let must_be_listed = match kind {
                PolicyKind::Policy(ObjectKind::EgressPolicy) => self.egress.freeze(is_removed),
                PolicyKind::Policy(ObjectKind::ClusterEgressPolicy) => {
                    self.cluster_egress.freeze(is_removed)
                }
                PolicyKind::Policy(ObjectKind::ClusterNetworkPolicy) => {
                    self.network.freeze(is_removed)
                }
                PolicyKind::Set => self.sets.freeze(is_removed),
            };
            signals.lists[index] += u64::from(must_be_listed);
        }
    }

    /// Brings the selection up to date with the tables.
    pub(super) fn update(&mut self, peers: PeersOf<'_>, mut peer_revisions: PeerRevisions) {
        self.note_need_of_pods();
        peer_revisions.pods = self.peers_revision;
        peer_revisions.has_pods = self.peer_pods.is_complete();
        let revisions = Revisions {
            policies: [
                self.egress.revision(),
                self.cluster_egress.revision(),
                self.network.revision(),
                self.sets.revision(),
            ],
            peers: peer_revisions,
        };
        if self.built == Some(revisions) {
            return;
        }
        let is_waiting = self.is_waiting_for_pods();
        // The end of the wait is a change, too.
        self.built = (!is_waiting).then_some(revisions);
        let mut former = std::mem::take(&mut self.resolved);
        let mut policies = BTreeMap::new();
        let mut problems = Vec::new();
        let mut objects = PolicyObjects::new();
        let tables = [&self.egress, &self.cluster_egress, &self.network];
        for kept in tables.into_iter().flat_map(Table::values) {
            let name = &kept.policy.name;
            let mut resolved = match former.remove(name) {
                Some(former) if former.is_up_to_date(&kept.policy, peer_revisions) => former,
                former if is_waiting && needs_pods(&kept.policy) => match former {
                    Some(former) => former,
                    None => continue,
                },
                former => {
                    let cluster = ClusterPeers {
                        of: peers,
                        pods: &self.peer_pods,
                    };
                    Resolved::new(kept, &cluster, peer_revisions, former)
                }
            };
            if Arc::ptr_eq(&resolved.policy, &kept.policy) {
                // An edit that changes nothing in the policy has a generation, too.
                resolved.version = Arc::clone(&kept.facts.used);
            }
            let facts = PolicyFacts {
                read: Arc::clone(&kept.facts.read),
                used: Arc::clone(&resolved.version),
            };
            objects.insert(Arc::clone(name), facts);
            problems.extend(kept.problem.iter().map(|what| problem(name, what)));
            problems.extend(resolved.problems.iter().map(|what| problem(name, what)));
            policies.insert(Arc::clone(name), resolved.applied.clone());
            self.resolved.insert(Arc::clone(name), resolved);
        }
        let mut sets = Sets::new();
        for (name, kept) in self.sets.entries() {
            problems.extend(kept.problem.iter().map(|what| Problem {
                origin: format!("EgressSet {name}"),
                message: what.clone(),
            }));
            sets.extend(kept.destinations.clone().map(|all| (name.to_owned(), all)));
        }
        self.selection.update(policies, &Arc::new(sets));
        self.problems = limited(problems);
        if *self.objects != objects {
            self.objects = Arc::new(objects);
        }
    }

    fn note_need_of_pods(&mut self) {
        if self.needs_pods() {
            self.pods_needed.get_or_insert_with(Instant::now);
        } else {
            self.pods_needed = None;
        }
    }

    /// Whether the list of the cluster's pods has been asked for and is not there yet.
    pub(super) fn is_waiting_for_pods(&self) -> bool {
        !self.peer_pods.is_complete()
            && self
                .pods_needed
                .is_some_and(|since| since.elapsed() < PEERS_WAIT)
    }

    /// The objects of a pod.
    pub(super) fn of(
        &mut self,
        pod: &Pod,
        labels: &Arc<Labels>,
        namespace_labels: &Arc<Labels>,
    ) -> Objects {
        let objects = self.selection.of(
            pod.key(),
            &pod.namespace,
            labels,
            namespace_labels,
            pod.host_network,
        );
        objects.clone()
    }

    /// The objects that count for pods of which nothing is known.
    pub(super) fn of_unknown(&mut self) -> Arc<Objects> {
        Arc::clone(self.selection.of_unknown())
    }

    /// All policy objects that are in force.
    pub(super) fn objects(&self) -> Arc<PolicyObjects> {
        Arc::clone(&self.objects)
    }

    /// Forgets pods that are gone.
    pub(super) fn retain(&mut self, pods: &BTreeMap<NamespacedName, Pod>) {
        self.selection.retain(|key| pods.contains_key(key));
    }

    /// The problems of policies.
    pub(super) fn problems(&self) -> impl Iterator<Item = Problem> {
        let frozen = [
            ("EgressPolicy", self.egress.is_frozen(), self.egress.len()),
            (
                "ClusterEgressPolicy",
                self.cluster_egress.is_frozen(),
                self.cluster_egress.len(),
            ),
            (
                "ClusterNetworkPolicy",
                self.network.is_frozen(),
                self.network.len(),
            ),
            ("EgressSet", self.sets.is_frozen(), self.sets.len()),
        ];
        let frozen = frozen
            .into_iter()
            .filter(|(_, is, count)| *is && *count > 0);
        let frozen = frozen.map(|(kind, _, count)| Problem {
            origin: "cluster".to_owned(),
            message: format!(
                "the definition of {kind} has been removed: its {count} objects stay in force as they were until it \
                 is there again, or the agent starts anew. Remove objects before their definition"
            ),
        });
        frozen.chain(self.problems.iter().cloned())
    }
}

impl Resolved {
    fn new(
        kept: &KeptPolicy,
        cluster: &ClusterPeers<'_>,
        peers: PeerRevisions,
        former: Option<Self>,
    ) -> Self {
        let (_, mut new, problems) = applied(&kept.policy, cluster);
        if let Some(former) = former.filter(|former| former.applied.says_the_same(&new)) {
            // The same object in memory changes nothing in any pod.
            new = former.applied;
        }
        Self {
            policy: Arc::clone(&kept.policy),
            version: Arc::clone(&kept.facts.used),
            peers,
            applied: new,
            problems,
        }
    }

    fn is_up_to_date(&self, policy: &Arc<Policy>, peers: PeerRevisions) -> bool {
        let depends = matches!(policy.body, Body::Network(_));
        Arc::ptr_eq(&self.policy, policy) && (!depends || self.peers == peers)
    }
}

fn needs_pods(policy: &Policy) -> bool {
    matches!(&policy.body, Body::Network(network) if network.needs_pods())
}

fn problem(name: &ObjectName, what: &str) -> Problem {
    Problem {
        origin: name.to_string(),
        message: what.to_owned(),
    }
}

/// The first problems, and one about the rest.
fn limited(mut problems: Vec<Problem>) -> Vec<Problem> {
    let more = problems.len().saturating_sub(PROBLEMS_MAX);
    if more > 0 {
        problems.truncate(PROBLEMS_MAX);
        problems.push(Problem {
            origin: "policies".to_owned(),
            message: format!("{more} more policy objects have problems, which are not listed"),
        });
    }
    problems
}

#[cfg(test)]
#[path = "policies_tests.rs"]
mod tests;
