//! Step 2: decides what is to be done.
//!
//! [`plan`] compares the pods that there are with what is enforced. It neither reads nor changes anything, so its rules
//! are tested without a kernel (`plan_tests.rs`, `pod_tests.rs`), and checked over random histories of a node
//! (`property_tests.rs`).
//!
//! The actions are in the order in which they are done:
//!
//! 1. **Release** the pods that are to be free: one write to a map each, and nothing of them is judged any more.
//! 2. **Remove** the pods that are gone, or **retire** them: their names are free for others, and their interfaces stay
//!    judged until those who are to be enforced there are.
//! 3. **Prepare** the maps of all new policies, for all pods together: the kernel takes as long over one as over
//!    many.
//! 4. **Change** the policies of enforced pods, and **move** pods to other interfaces: one write each.
//! 5. **Adopt** pods that an earlier agent left: the programs are attached already.
//! 6. **Begin** with new pods. Attaching takes some 30 ms for each interface.
//! 7. **Settle** those of them that may have connections from before.
//! 8. **Remove** the pods that were released, and interfaces in quarantine that their pods have taken over.
//!    Detaching takes as long as attaching.
//! 9. **Remove** retired pods, and state in the kernel that no pod claims.

mod own_addresses;
#[cfg(test)]
mod plan_tests;
mod pod;
#[cfg(test)]
mod pod_tests;
#[cfg(test)]
mod property_tests;
#[cfg(test)]
pub(in crate::control) mod scene;
mod targets;
pub(in crate::control) mod wanted;

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Instant,
};

use super::{
    observe::{
        Observed,
        unlocated::{Absence, PATIENCE},
    },
    publish::problems::{About, Problems},
    settings::Settings,
};
use crate::report::Subject;
use egress_common::ids::{IfIndex, PodId};
use targets::Targets;
use wanted::Wanted;

/// The actions to be done, and the problems that were found.
#[derive(Default)]
pub(in crate::control) struct Plan {
    /// What to do, in this order.
    pub(in crate::control) actions: Vec<Action>,
    /// Problems of pods.
    pub(in crate::control) problems: BTreeMap<Subject, String>,
    /// Problems of something else, and of pods that are not in the source.
    pub(in crate::control) other_problems: Problems,
    /// The pods that cannot be found now, each with the reason.
    pub(in crate::control) unlocated: BTreeMap<Subject, Absence>,
    /// The interfaces of pods that are left alone, so that nobody judges what they carry.
    pub(in crate::control) left_alone: Vec<IfIndex>,
    /// The pods of an earlier agent that stay in the kernel as that agent left them, by their ids.
    pub(in crate::control) kept: Vec<PodId>,
    /// The interfaces on which a pod is to be enforced, now or when another pod has left them. Until then nothing
    /// passes there: the programs stay attached.
    pub(in crate::control) claimed: HashSet<IfIndex>,
}

/// One thing to do.
#[derive(Clone, Debug)]
pub(in crate::control) enum Action {
    /// Stop judging these pods at once.
    Release(Vec<Subject>),
    /// Free the name of a pod that is gone. Its programs, its policy and its maps stay in force, as if an earlier agent
    /// had left them, until [`Self::RemoveLeft`].
    Retire(Subject),
    /// Make the maps that the later [`Self::Change`] and [`Self::Begin`] need.
    Prepare,
    /// Put an enforced pod under another version of its policy.
    Change {
        subject: Subject,
        wanted: Arc<Wanted>,
    },
    /// Enforce an enforced pod on other interfaces.
    Move {
        subject: Subject,
        wanted: Arc<Wanted>,
        /// Whether the new interfaces may carry connections that nobody has judged.
        has_unjudged: bool,
    },
    /// Enforce a pod that is not enforced.
    Begin {
        subject: Subject,
        wanted: Arc<Wanted>,
        /// Whether an earlier agent, or an earlier attempt, left this pod in the kernel.
        adopts: bool,
        before: Before,
    },
    /// Judge everything that these pods send, which have begun with [`Before::Settle`].
    Settle,
    /// Detach from a pod's interfaces and remove its state, if other pods have taken over all of these interfaces.
    Remove {
        subject: Subject,
        taken_over: Vec<IfIndex>,
    },
    /// The same for a pod that is in the kernel and not enforced.
    RemoveLeft {
        pod: PodId,
        taken_over: Vec<IfIndex>,
    },
}

/// How connections are treated that a pod had before it is enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::control) enum Before {
    /// Nothing: all of them were judged.
    Judged,
    /// Only the sources of what the pod sends are judged at first. Its connections are noted, then everything is
    /// judged ([`Action::Settle`]).
    Settle,
    /// Its connections are noted before it is put under its policy: the interface is judged already, for another
    /// pod.
    NoteNow,
}

/// Plans the actions for these pods. `now` is the time.
pub(in crate::control) fn plan(observed: &Observed<'_>, settings: &Settings, now: Instant) -> Plan {
    let mut plan = Plan::default();
    let targets = Targets::decide(observed, settings, &mut plan);
    plan.release(&targets);
    plan.remove_gone(&targets);
    plan.enforce(observed, &targets);
    plan.remove_freed(&targets);
    plan.clean_up(observed, &targets, now);
    plan.claimed = targets.claimed;
    plan
}

impl Plan {
    /// Releases at once the pods that are no longer to be enforced, except interfaces that other pods claim.
    fn release(&mut self, targets: &Targets<'_>) {
        let free = targets.freed.iter().filter(|subject| {
            targets.enforced.get(*subject).is_some_and(|in_force| {
                in_force.wanted.interfaces.iter().all(|&ifindex| {
                    !targets.claimed.contains(&ifindex)
                        && !targets.is_anothers(Some(in_force.pod), ifindex)
                })
            })
        });
        let free: Vec<Subject> = free.map(|&subject| subject.clone()).collect();
        if !free.is_empty() {
            self.actions.push(Action::Release(free));
        }
    }

    /// Frees the names of pods that are gone. Their processes may still run: an interface on which somebody else is to
    /// be enforced is not detached from before that.
    fn remove_gone(&mut self, targets: &Targets<'_>) {
        let gone = targets.gone.iter().map(|&(subject, in_force)| {
            let subject = subject.clone();
            if targets.claimed_of(&in_force.wanted.interfaces).is_empty() {
                let taken_over = Vec::new();
                Action::Remove {
                    subject,
                    taken_over,
                }
            } else {
                Action::Retire(subject)
            }
        });
        self.actions.extend(gone);
    }

    /// Changing a policy is quick, and so is adopting what is attached already. Attaching is not.
    fn enforce(&mut self, observed: &Observed<'_>, targets: &Targets<'_>) {
        let (mut changes, mut adoptions, mut beginnings) = (Vec::new(), Vec::new(), Vec::new());
        for &(subject, ref wanted) in &targets.wanted {
            let has_unjudged = |interfaces: &[IfIndex]| {
                let mut interfaces = interfaces.iter();
                !subject.is_interface()
                    && interfaces.any(|&ifindex| observed.unjudged.contains(ifindex))
            };
            let (subject, wanted) = (subject.clone(), Arc::clone(wanted));
            if let Some(in_force) = targets.enforced.get(&subject) {
                let before = &in_force.wanted;
                if !before.same_policy(&wanted) {
                    changes.push(Action::Change {
                        subject: subject.clone(),
                        wanted: Arc::clone(&wanted),
                    });
                }
                if before.interfaces != wanted.interfaces {
                    let new = before.on_new(&wanted.interfaces, &wanted.networks);
                    let has_unjudged = has_unjudged(&new.interfaces);
                    changes.push(Action::Move {
                        subject,
                        wanted,
                        has_unjudged,
                    });
                }
                continue;
            }
            let left_as = targets.left_as(&subject, &wanted.uid);
            let mut interfaces = wanted.interfaces.iter();
            let before = if !has_unjudged(&wanted.interfaces) {
                Before::Judged
            } else if interfaces.any(|&ifindex| targets.is_anothers(left_as, ifindex)) {
                Before::NoteNow
            } else {
                Before::Settle
            };
            let adopts = left_as.is_some();
            let beginning = Action::Begin {
                subject,
                wanted,
                adopts,
                before,
            };
            if adopts {
                adoptions.push(beginning);
            } else {
                beginnings.push(beginning);
            }
        }
        let actions: Vec<Action> = changes
            .into_iter()
            .chain(adoptions)
            .chain(beginnings)
            .collect();
        if actions.is_empty() {
            return;
        }
        let settles = actions.iter().any(|action| {
            let Action::Begin { before, .. } = action else {
                return false;
            };
            *before == Before::Settle
        });
        self.actions.push(Action::Prepare);
        self.actions.extend(actions);
        self.actions.extend(settles.then_some(Action::Settle));
    }

    /// Detaches from pods that are free. An interface in quarantine that a pod claims stays closed until the pod
    /// is enforced on it.
    fn remove_freed(&mut self, targets: &Targets<'_>) {
        for &subject in &targets.freed {
            let Some(in_force) = targets.enforced.get(subject) else {
                continue;
            };
            let claimed = if subject.is_interface() {
                targets.claimed_of(&in_force.wanted.interfaces)
            } else {
                Vec::new()
            };
            let mut interfaces = claimed.iter();
            if interfaces.all(|&ifindex| targets.is_taken_over(subject, ifindex)) {
                self.actions.push(Action::Remove {
                    subject: subject.clone(),
                    taken_over: claimed,
                });
            }
        }
    }

    /// Removes what an earlier agent left, or an earlier attempt, and that no pod claims. While the source cannot be
    /// read in full, its pod may be one of those that are missing.
    fn clean_up(&mut self, observed: &Observed<'_>, targets: &Targets<'_>, now: Instant) {
        let mut unclaimed = 0_usize;
        for (&id, left) in &observed.left {
            let subject = Subject::from_fields(&left.namespace, &left.name);
            if !observed.pods.contains_key(&subject) && observed.incomplete {
                self.kept.push(id);
                if observed.in_cluster {
                    unclaimed += 1;
                } else {
                    let why = "enforced as an earlier agent left it, without DNS: its manifest may be \
                               the one that cannot be read";
                    self.other_problems.set(subject, why);
                }
                continue;
            }
            let found = observed.pods.get(&subject);
            let is_same = found.is_some_and(|found| found.pod.uid == left.uid);
            if is_same && targets.kept_left.contains(&subject) {
                self.kept.push(id);
                continue;
            }
            let is_wanted = targets.wanted.iter().any(|&(wanted, _)| *wanted == subject)
                && !targets.enforced.contains_key(&subject);
            let is_adopted =
                is_wanted && targets.left_as(&subject, &left.uid) == Some(id) && is_same;
            if !is_adopted {
                let interfaces: Vec<IfIndex> = left.interfaces.iter().map(|&(at, _)| at).collect();
                self.remove_left(id, &interfaces, targets);
            }
        }
        for &(_, in_force) in &targets.gone {
            if !targets.claimed_of(&in_force.wanted.interfaces).is_empty() {
                self.remove_left(in_force.pod, &in_force.wanted.interfaces, targets);
            }
        }
        // At every start it takes a moment until the API server has said which pods there are.
        if unclaimed > 0 && now.duration_since(observed.began) >= PATIENCE {
            let what = format!(
                "{unclaimed} pods are enforced as an earlier agent left them, without DNS, until the \
                 API server says which pods there are"
            );
            self.other_problems
                .set(About::node("pods of an earlier agent"), what);
        }
    }

    /// Removes the state of a pod that is not enforced any more, once other pods are enforced on the interfaces that
    /// they claim. The state stays while no other pod can be enforced on a claimed interface.
    fn remove_left(&mut self, pod: PodId, interfaces: &[IfIndex], targets: &Targets<'_>) {
        let taken_over = targets.claimed_of(interfaces);
        let mut claimed = taken_over.iter();
        if claimed.all(|&ifindex| targets.will_be_judged(ifindex)) {
            self.actions.push(Action::RemoveLeft { pod, taken_over });
        } else {
            self.kept.push(pod);
        }
    }
}
