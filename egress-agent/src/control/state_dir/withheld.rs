//! Policy objects that an earlier agent knew, while the API server does not list their kind.
//!
//! A server that restarts may refuse a kind for a moment, and a role may have lost the right to list it. That is no
//! reason to open what these objects deny. So until this agent has listed the kind, or knows that it does not exist,
//!
//! - pods that an earlier agent left enforced keep the objects of that kind with which they are enforced;
//! - pods of which that is not known stay as that agent left them;
//! - pods that it knew and did not enforce are selected by what it saved;
//! - all others are closed.
//!
//! A kind that no earlier agent knew is not waited for: the agent's roles may never have allowed it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use anyhow::Result;
use egress_common::{ids::PodId, records::INTERFACE_SOURCES};
use egress_policy::{Annotations, Inputs, objects::Objects};

use crate::{
    control::digest,
    datapath::{Adoptable, View},
    pods::{NamespacedName, ObjectsOf, Pod, PolicyKind, Problem, Snapshot},
};

/// A pod that an earlier agent left in the kernel.
pub(super) struct LeftPod {
    name: NamespacedName,
    uid: String,
    /// For each of its interfaces, the digest of what its policy was compiled from; zero if nothing says that.
    digests: Vec<[u8; 32]>,
    /// Whether everything that it sends is judged.
    is_judged: bool,
}

impl LeftPod {
    /// Reads the digests of pods.
    ///
    /// # Errors
    ///
    /// When the kernel's map cannot be read.
    pub(super) fn read<'a>(
        left: impl Iterator<Item = (&'a PodId, &'a Adoptable)>,
        view: &View,
    ) -> Result<Vec<Self>> {
        left.map(|(_, left)| {
            let digests = left.interfaces.iter().map(|(_, entry)| {
                let record = view.policy(entry.policy())?;
                Ok(record.map_or([0; 32], |record| record.annotations))
            });
            let mut interfaces = left.interfaces.iter();
            Ok(Self {
                name: NamespacedName::new(&*left.namespace, &*left.name),
                uid: left.uid.clone(),
                digests: digests.collect::<Result<_>>()?,
                is_judged: !left.interfaces.is_empty()
                    && interfaces.all(|(_, entry)| entry.flags & INTERFACE_SOURCES == 0),
            })
        })
        .collect()
    }

    /// Whether this is the pod.
    pub(super) fn is(&self, pod: &Pod) -> bool {
        self.uid == pod.uid && self.name == pod.key()
    }

    /// Whether every interface of the pod is under a policy that was compiled from these annotations and objects. A
    /// pod without interfaces in the kernel is open, so any policy is better.
    pub(super) fn is_under(&self, pod: &Pod) -> bool {
        let digest = digest::of_pod(pod);
        pod.is_known() && self.digests.iter().all(|of_policy| *of_policy == digest)
    }

    /// Whether it is under a policy that was compiled from something else.
    fn is_under_another(&self, pod: &Pod) -> bool {
        let digest = digest::of_pod(pod);
        let mut digests = self.digests.iter();
        digests.any(|of_policy| *of_policy != digest && *of_policy != [0; 32])
    }
}

/// What an earlier agent knew of policy objects.
pub(super) struct Withheld {
    /// The kinds that it had listed and that this agent has not; `None` until the source knows pods, if there is no
    /// saved state.
    kinds: Option<BTreeSet<PolicyKind>>,
    left: Vec<LeftPod>,
    /// The UIDs of pods, and the objects that select them.
    known: BTreeMap<NamespacedName, (String, Objects)>,
}

impl Withheld {
    /// `kinds` are the kinds of the saved state. `known` are its pods that the kernel does not contradict.
    pub(super) fn new<'a>(
        kinds: Option<BTreeSet<PolicyKind>>,
        left: Vec<LeftPod>,
        known: impl Iterator<Item = &'a Pod>,
    ) -> Self {
        let known = known.map(|pod| (pod.key(), (pod.uid.clone(), pod.objects.clone())));
        Self {
            kinds,
            left,
            known: known.collect(),
        }
    }

    /// Completes a snapshot of the source, which knows pods.
    pub(super) fn complete(&mut self, snapshot: Arc<Snapshot>) -> Arc<Snapshot> {
        let unlisted = &snapshot.kinds.unlisted;
        let earlier = match self.kinds.take() {
            Some(kinds) => kinds,
            // Without saved state, only the kernel tells of objects: its policies were compiled from something else.
            None if self.is_any_under_another(&snapshot) => PolicyKind::ALL.into(),
            None => BTreeSet::new(),
        };
        let withheld: BTreeSet<PolicyKind> = earlier.intersection(unlisted).copied().collect();
        self.kinds = Some(withheld.clone());
        if withheld.is_empty() {
            return snapshot;
        }
        let mut snapshot = Snapshot::clone(&snapshot);
        for pod in snapshot.pods.values_mut() {
            self.complete_pod(pod, &withheld);
        }
        snapshot.problems.push(problem(&withheld));
        snapshot.kinds.withheld = withheld;
        Arc::new(snapshot)
    }

    fn is_any_under_another(&self, snapshot: &Snapshot) -> bool {
        self.left.iter().any(|left| {
            let pod = snapshot.pods.get(&left.name);
            pod.is_some_and(|pod| left.is(pod) && left.is_under_another(pod))
        })
    }

    fn complete_pod(&mut self, pod: &mut Pod, withheld: &BTreeSet<PolicyKind>) {
        let key = pod.key();
        let known = self.known.get(&key).filter(|(uid, _)| *uid == pod.uid);
        if let Some((_, objects)) = known {
            add(&mut pod.objects, objects, withheld);
            return;
        }
        let left = self.left.iter().find(|left| left.is(pod));
        if left.is_some_and(|left| !left.digests.is_empty() && left.is_under(pod)) {
            // The kernel confirms that no object of these kinds selects it.
            let nothing = (pod.uid.clone(), Objects::default());
            self.known.insert(key, nothing);
            return;
        }
        if withheld.iter().all(|kind| *kind == PolicyKind::Set) && !uses_sets(pod) {
            return;
        }
        pod.objects_of = match left {
            Some(left) if left.is_judged => ObjectsOf::UnknownButEnforced,
            _ => ObjectsOf::Unknown,
        };
    }
}

/// Adds the objects of these kinds.
fn add(objects: &mut Objects, earlier: &Objects, kinds: &BTreeSet<PolicyKind>) {
    for kind in kinds {
        match kind {
            PolicyKind::Policy(kind) => {
                let namespace = earlier.namespace.iter();
                let namespace = namespace.filter(|policy| policy.name.kind == *kind);
                objects.namespace.extend(namespace.cloned());
                let tiers = earlier.tiers.iter();
                let tiers = tiers.filter(|policy| policy.name.kind == *kind);
                objects.tiers.extend(tiers.cloned());
            }
            PolicyKind::Set => objects.sets = Arc::clone(&earlier.sets),
        }
    }
    // In the order in which the source has them: the digest covers it.
    objects.tiers.sort_by(|a, b| a.name.cmp(&b.name));
}

/// Whether an entry of the pod uses a set.
fn uses_sets(pod: &Pod) -> bool {
    let own = Annotations::from_map(&pod.annotations);
    let namespace = Annotations::from_map(&pod.namespace_annotations);
    let inputs = Inputs {
        pod: &own,
        namespace: &namespace,
        objects: &pod.objects,
    };
    inputs.use_sets()
}

fn problem(kinds: &BTreeSet<PolicyKind>) -> Problem {
    let kinds: Vec<String> = kinds.iter().map(ToString::to_string).collect();
    Problem {
        origin: "policy objects".to_owned(),
        message: format!(
            "the API server does not list objects of {}, which an earlier agent on this node had listed: pods that it \
             left enforced keep those that it knew, and other pods are closed until the API server lists them or has \
             no definition of them; if the agent's roles do not allow it, allow it there",
            kinds.join(", ")
        ),
    }
}

#[cfg(test)]
#[path = "withheld_tests.rs"]
mod tests;
