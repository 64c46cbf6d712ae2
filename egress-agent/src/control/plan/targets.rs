//! The decision about each pod of the source.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use egress_common::ids::{IfIndex, PodId};

use super::{
    Plan,
    pod::{Decision, decide},
    wanted::Wanted,
};
use crate::{
    control::{
        observe::{InForce, Observed, quarantine, unlocated::Absence},
        settings::Settings,
    },
    datapath::Adoptable,
    report::Subject,
};

/// The decisions about all pods.
pub(super) struct Targets<'a> {
    /// The enforced pods, without `gone`.
    pub(super) enforced: BTreeMap<&'a Subject, &'a InForce>,
    /// Enforced pods that are gone, or whose name another pod has now.
    pub(super) gone: Vec<(&'a Subject, &'a InForce)>,
    /// The pods that are to be enforced.
    pub(super) wanted: Vec<(&'a Subject, Arc<Wanted>)>,
    /// The pods that are to be free, and the interfaces in quarantine whose pods are known now.
    pub(super) freed: Vec<&'a Subject>,
    /// Interfaces that a pod is to be enforced on, whether or not it can be now.
    pub(super) claimed: HashSet<IfIndex>,
    pub(super) left: &'a BTreeMap<PodId, Adoptable>,
    /// The pods of the source that stay as an earlier agent left them.
    pub(super) kept_left: HashSet<&'a Subject>,
}

impl<'a> Targets<'a> {
    pub(super) fn decide(observed: &'a Observed<'_>, settings: &Settings, plan: &mut Plan) -> Self {
        let is_there = |subject: &Subject, in_force: &InForce| {
            let found = observed.pods.get(subject);
            found.is_some_and(|found| found.pod.uid == in_force.wanted.uid)
        };
        let (mut gone, mut freed) = (Vec::new(), Vec::new());
        let mut enforced = BTreeMap::new();
        // Pods that hold an interface keep it; only then do others get theirs.
        let mut taken: HashMap<IfIndex, Subject> = HashMap::new();
        for (subject, in_force) in &observed.enforced {
            if is_there(subject, in_force) {
                let interfaces = in_force.wanted.interfaces.iter();
                taken.extend(interfaces.map(|&ifindex| (ifindex, subject.clone())));
                enforced.insert(subject, in_force);
            } else if subject.is_interface() {
                // It leaves quarantine only when its pod has taken it over.
                enforced.insert(subject, in_force);
                freed.push(subject);
            } else {
                gone.push((subject, in_force));
            }
        }
        let mut targets = Self {
            enforced,
            gone,
            wanted: Vec::new(),
            freed,
            claimed: HashSet::new(),
            left: &observed.left,
            kept_left: HashSet::new(),
        };
        for (subject, found) in &observed.pods {
            let interfaces = found.location.interfaces();
            let why = match decide(observed, settings, subject, found, &mut taken) {
                Decision::Enforce(wanted, why) => {
                    // Also those that another pod has now: if it leaves them, they stay closed.
                    targets.claimed.extend(interfaces);
                    targets.wanted.push((subject, wanted));
                    why
                }
                Decision::Free(why) => {
                    targets.freed.push(subject);
                    if why.is_none() {
                        plan.left_alone.extend(interfaces);
                    }
                    why
                }
                Decision::Keep(why) => {
                    targets.claimed.extend(interfaces);
                    why
                }
                Decision::KeepLeft(why) => {
                    targets.kept_left.insert(subject);
                    Some(why)
                }
                Decision::Refuse(why) => {
                    targets.claimed.extend(interfaces);
                    Some(why)
                }
                Decision::KeepUnlocated(wanted, why) => {
                    targets
                        .wanted
                        .extend(wanted.map(|wanted| (subject, wanted)));
                    plan.unlocated.insert(subject.clone(), Absence::new(why));
                    None
                }
                Decision::Wait(absence) => {
                    plan.unlocated.insert(subject.clone(), absence);
                    None
                }
            };
            if subject.is_interface() {
                // Every pod begins and ends like this: it becomes a problem only if it lasts.
                let closed = quarantine::CLOSED.to_owned();
                let why = why.map_or(closed, |why| format!("{}; {why}", quarantine::CLOSED));
                plan.unlocated.insert(subject.clone(), Absence::new(why));
            } else {
                plan.problems.extend(why.map(|why| (subject.clone(), why)));
            }
        }
        targets
    }

    /// Whether an interface is, or is to be, that of another pod than this one.
    pub(super) fn is_anothers(&self, pod: Option<PodId>, ifindex: IfIndex) -> bool {
        let mut left = self.left.iter();
        let is_left = left.any(|(&id, left)| {
            let mut interfaces = left.interfaces.iter();
            Some(id) != pod && interfaces.any(|&(other, _)| other == ifindex)
        });
        let gone = self.gone.iter().map(|&(_, gone)| gone);
        let mut enforced = self.enforced.values().copied().chain(gone);
        is_left
            || enforced
                .any(|other| Some(other.pod) != pod && other.wanted.interfaces.contains(&ifindex))
    }

    /// Those of these interfaces that a pod is to be enforced on.
    pub(super) fn claimed_of(&self, interfaces: &[IfIndex]) -> Vec<IfIndex> {
        let interfaces = interfaces.iter().copied();
        interfaces
            .filter(|ifindex| self.claimed.contains(ifindex))
            .collect()
    }

    /// Whether some pod is enforced on an interface when the plan has been carried out.
    pub(super) fn will_be_judged(&self, ifindex: IfIndex) -> bool {
        let wanted = self.wanted.iter().map(|(_, wanted)| wanted);
        let enforced = self.enforced.values().map(|in_force| &in_force.wanted);
        let mut all = wanted.chain(enforced);
        all.any(|wanted| wanted.interfaces.contains(&ifindex))
    }

    /// Whether a pod, other than this subject, is enforced on an interface when the plan has been carried out.
    pub(super) fn is_taken_over(&self, subject: &Subject, ifindex: IfIndex) -> bool {
        let wanted = self.wanted.iter();
        let wanted = wanted.map(|(other, wanted)| (*other, wanted));
        let enforced = self.enforced.iter();
        let enforced = enforced.map(|(other, in_force)| (*other, &in_force.wanted));
        let mut all = wanted.chain(enforced);
        all.any(|(other, wanted)| other != subject && wanted.interfaces.contains(&ifindex))
    }

    /// The id under which a pod was left in the kernel.
    pub(super) fn left_as(&self, subject: &Subject, uid: &str) -> Option<PodId> {
        let mut left = self.left.iter();
        let left = left.find(|(_, left)| {
            (&*left.namespace, &*left.name) == subject.fields() && left.uid == uid
        });
        left.map(|(&id, _)| id)
    }
}
