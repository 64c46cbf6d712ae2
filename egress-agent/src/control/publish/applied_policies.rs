//! Which generations of policy objects are in the kernel's maps, pod by pod.
//!
//! A policy counts as in force for a pod when the pod's policy was compiled from it, and the kernel's maps have exactly
//! that compiled policy. What was read and could not be applied does not count: an object that cannot be read, a policy
//! that does not compile, a write that the kernel refused.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use egress_policy::{
    Compiled, Mode,
    objects::{ObjectKind, ObjectName, Objects},
};

use crate::{
    control::observe::Present,
    pods::{ObjectVersion, PodCounts, PolicyObjects, PolicyState},
    report::Subject,
};

/// A pod as a reconcile left it.
#[derive(Clone)]
pub(super) struct PodInForce<'a> {
    pub(super) uid: &'a str,
    /// The policy objects that select it.
    pub(super) objects: &'a Objects,
    /// Its wanted policy.
    pub(super) policy: &'a Arc<Compiled>,
    /// Which parts of `policy` are compiled from `objects`, and not from what could be read earlier.
    pub(super) present: Present,
    /// Its policy in the kernel's maps; `None` if it is not enforced.
    pub(super) in_kernel: Option<&'a Arc<Compiled>>,
    /// Whether all of its packets are judged.
    pub(super) is_whole: bool,
    /// Whether it is to be enforced or audited.
    pub(super) is_wanted: bool,
}

/// The state of a pod after the last reconcile.
struct Known {
    uid: String,
    policy: Arc<Compiled>,
    in_kernel: Option<Arc<Compiled>>,
    present: Present,
    is_whole: bool,
    is_wanted: bool,
    /// The versions that `in_kernel` is from.
    versions: BTreeMap<Arc<ObjectName>, Arc<ObjectVersion>>,
}

/// Which versions of policy objects are in force.
#[derive(Default)]
pub(super) struct AppliedPolicies {
    pods: BTreeMap<Subject, Known>,
    policies: Arc<PolicyObjects>,
    states: Vec<PolicyState>,
    counts: PodCounts,
}

impl AppliedPolicies {
    /// Records the result of a reconcile. A reconcile that changed nothing costs a few comparisons for each pod.
    pub(super) fn note<'a>(
        &mut self,
        policies: &Arc<PolicyObjects>,
        pods: &BTreeMap<&'a Subject, PodInForce<'a>>,
    ) {
        let are_same_policies = Arc::ptr_eq(&self.policies, policies);
        let is_same = are_same_policies
            && self.pods.len() == pods.len()
            && pods
                .iter()
                .all(|(subject, pod)| self.pods.get(*subject).is_some_and(|known| known.is(pod)));
        if is_same {
            return;
        }
        let mut former = std::mem::take(&mut self.pods);
        let known = pods.iter().map(|(subject, pod)| {
            let known = match former.remove(*subject) {
                Some(former) if are_same_policies && former.is(pod) => former,
                former => Known::new(pod, former, policies),
            };
            ((*subject).clone(), known)
        });
        self.pods = known.collect();
        self.policies = Arc::clone(policies);
        self.count(pods);
    }

    /// How far each policy object is in force, in the order of their names. Their problems are not known here.
    pub(super) fn states(&self) -> &[PolicyState] {
        &self.states
    }

    /// The pods.
    pub(super) fn pods(&self) -> PodCounts {
        self.counts
    }

    fn count(&mut self, pods: &BTreeMap<&Subject, PodInForce<'_>>) {
        let mut index = HashMap::with_capacity(self.policies.len());
        self.states.clear();
        for (name, facts) in self.policies.iter() {
            index.insert(&**name, (self.states.len(), facts));
            self.states.push(PolicyState {
                name: Arc::clone(name),
                generation: facts.read.generation,
                applied: None,
                selected: 0,
                enforced: 0,
                problem: None,
            });
        }
        self.counts = PodCounts::default();
        for (subject, pod) in pods {
            let Some(known) = self.pods.get(*subject) else {
                continue;
            };
            let is_enforced = known.in_kernel.is_some() && pod.is_whole;
            if pod.is_wanted {
                let is_audited = is_enforced && pod.policy.mode == Mode::Audit;
                self.counts.selected += 1;
                self.counts.enforced += u32::from(is_enforced);
                self.counts.audited += u32::from(is_audited);
            }
            // A policy that no longer selects the pod is in force for it until the kernel has the next one.
            for (name, version) in &known.versions {
                if let Some((at, facts)) = index.get(&**name)
                    && version.uid == facts.read.uid
                    && let Some(generation) = version.generation
                {
                    let applied = &mut self.states[*at].applied;
                    *applied = Some(applied.map_or(generation, |oldest| oldest.min(generation)));
                }
            }
            for name in names(pod.objects).filter(|_| pod.is_wanted) {
                let Some((at, facts)) = index.get(&**name) else {
                    continue;
                };
                let state = &mut self.states[*at];
                state.selected += 1;
                let has = known.versions.get(name) == Some(&facts.read);
                state.enforced += u32::from(is_enforced && has);
            }
        }
    }
}

impl Known {
    fn new(pod: &PodInForce<'_>, former: Option<Self>, policies: &PolicyObjects) -> Self {
        let former = former.filter(|former| former.uid == pod.uid && pod.in_kernel.is_some());
        let is_as_read = pod.in_kernel.is_some_and(|compiled| compiled == pod.policy);
        // Each part falls back on its own to what could be read earlier.
        let is_present = |name: &ObjectName| {
            is_as_read
                && match name.kind {
                    ObjectKind::EgressPolicy => pod.present.shared,
                    _ => pod.present.tiers,
                }
        };
        let kept = former.into_iter().flat_map(|former| former.versions);
        let kept = kept.filter(|(name, _)| !is_present(name));
        let used = names(pod.objects).filter(|name| is_present(name));
        let used = used.filter_map(|name| {
            let facts = policies.get(name)?;
            Some((Arc::clone(name), Arc::clone(&facts.used)))
        });
        let versions = kept.chain(used).collect();
        Self {
            uid: pod.uid.to_owned(),
            policy: Arc::clone(pod.policy),
            in_kernel: pod.in_kernel.map(Arc::clone),
            present: pod.present,
            is_whole: pod.is_whole,
            is_wanted: pod.is_wanted,
            versions,
        }
    }

    /// Whether nothing has changed. Other objects always compile to another policy in memory.
    fn is(&self, pod: &PodInForce<'_>) -> bool {
        let is_same_in_kernel = match (&self.in_kernel, pod.in_kernel) {
            (Some(known), Some(now)) => Arc::ptr_eq(known, now),
            (None, None) => true,
            _ => false,
        };
        is_same_in_kernel
            && Arc::ptr_eq(&self.policy, pod.policy)
            && self.uid == pod.uid
            && self.present == pod.present
            && self.is_whole == pod.is_whole
            && self.is_wanted == pod.is_wanted
    }
}

fn names(objects: &Objects) -> impl Iterator<Item = &Arc<ObjectName>> {
    let namespace = objects.namespace.iter().map(|policy| &policy.name);
    let tiers = objects.tiers.iter().map(|policy| &policy.name);
    namespace.chain(tiers)
}

#[cfg(test)]
#[path = "applied_policies_tests.rs"]
mod tests;
