//! Properties of every plan, over random histories of a node.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use egress_common::ids::IfIndex;
use proptest::{collection::vec, prelude::*};

use super::{
    Action, Plan,
    scene::{Scene, behind, subject, summary},
};
use crate::{control::observe::locations::Location, report::Subject};
use egress_policy::Mode;

const PODS: [&str; 4] = ["a", "b", "c", "d"];
const INTERFACES: u32 = 5;

/// Something that changes on the node.
#[derive(Clone, Debug)]
enum Step {
    /// The pod is there, behind these interfaces.
    Pod(usize, Vec<u32>),
    /// The pod is gone.
    Gone(usize),
    /// Another pod has its name.
    Anew(usize),
    /// It has this policy.
    Policy(usize, usize),
    /// It is not found.
    Lost(usize, u8),
    /// Whether its namespace is known, and whether it is in the host's network.
    Flags(usize, bool, bool),
    /// Whether the source can be read in full.
    Incomplete(bool),
    /// An interface has no pod that is known.
    Unknown(u32),
    /// Another agent starts.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let pod = || 0..PODS.len();
    let interfaces = vec(1..=INTERFACES, 1..3).prop_map(|mut interfaces| {
        interfaces.sort_unstable();
        interfaces.dedup();
        interfaces
    });
    prop_oneof![
        4 => (pod(), interfaces).prop_map(|(pod, at)| Step::Pod(pod, at)),
        2 => pod().prop_map(Step::Gone),
        1 => pod().prop_map(Step::Anew),
        3 => (pod(), 0..4usize).prop_map(|(pod, policy)| Step::Policy(pod, policy)),
        2 => (pod(), 0..3u8).prop_map(|(pod, how)| Step::Lost(pod, how)),
        1 => (pod(), any::<bool>(), any::<bool>()).prop_map(|(pod, a, b)| Step::Flags(pod, a, b)),
        1 => any::<bool>().prop_map(Step::Incomplete),
        3 => (1..=INTERFACES).prop_map(Step::Unknown),
        1 => Just(Step::Restart),
    ]
}

fn take(scene: &mut Scene, step: &Step) {
    match step {
        Step::Pod(pod, at) => {
            if !scene.pods.contains_key(&subject(PODS[*pod])) {
                scene.add(PODS[*pod], at[0]);
            }
            scene.get(PODS[*pod]).location = behind(at);
        }
        Step::Gone(pod) => {
            scene.pods.remove(&subject(PODS[*pod]));
        }
        Step::Anew(pod) => change(scene, *pod, |found, _| found.pod.uid.push('x')),
        Step::Policy(pod, policy) => change(scene, *pod, |found, policies| {
            found.policy = Arc::clone(&policies[*policy]);
        }),
        Step::Lost(pod, how) => change(scene, *pod, |found, _| {
            let why = "it is not there".to_owned();
            found.location = match how {
                0 => Location::NotYet(why),
                1 => Location::Nobody {
                    why,
                    has_group: true,
                },
                _ => Location::Nowhere(why),
            };
        }),
        Step::Flags(pod, known, host) => change(scene, *pod, |found, _| {
            (found.pod.namespace_known, found.pod.host_network) = (*known, *host);
        }),
        Step::Incomplete(incomplete) => scene.incomplete = *incomplete,
        Step::Unknown(ifindex) => scene.add_unknown(&format!("veth{ifindex}"), *ifindex),
        Step::Restart => scene.restart(),
    }
    identify(scene);
}

fn change(
    scene: &mut Scene,
    pod: usize,
    change: impl FnOnce(&mut super::scene::ScenePod, &[Arc<egress_policy::Compiled>; 4]),
) {
    let policies = [
        scene.policy(&[("allow", "a.test")]),
        scene.policy(&[("allow", "b.test")]),
        scene.policy(&[("allow", "a.test"), ("mode", "audit")]),
        scene.policy(&[("mode", "off")]),
    ];
    if let Some(found) = scene.pods.get_mut(&subject(PODS[pod])) {
        change(found, &policies);
    }
}

/// An observation never finds an interface both behind a pod and without one.
fn identify(scene: &mut Scene) {
    let identified: HashSet<IfIndex> = scene
        .pods
        .iter()
        .filter(|(subject, _)| !subject.is_interface())
        .flat_map(|(_, found)| found.location.interfaces().iter().copied())
        .collect();
    let held: HashSet<IfIndex> = scene
        .enforced
        .iter()
        .filter(|(subject, in_force)| {
            let found = scene.pods.get(subject);
            !subject.is_interface()
                && found.is_some_and(|found| found.pod.uid == in_force.wanted.uid)
        })
        .flat_map(|(subject, in_force)| {
            let location = &scene.pods[subject].location;
            let interfaces = in_force.wanted.interfaces.iter().copied();
            interfaces.filter(move |ifindex| {
                !matches!(location, Location::Found(_)) || location.interfaces().contains(ifindex)
            })
        })
        .collect();
    scene.pods.retain(|subject, found| {
        let mut interfaces = found.location.interfaces().iter();
        !subject.is_interface()
            || !interfaces.any(|ifindex| identified.contains(ifindex) || held.contains(ifindex))
    });
}

/// The place of an action in the order of a plan.
fn place(scene: &Scene, action: &Action) -> u8 {
    match action {
        Action::Release(_) => 0,
        Action::Retire(_) => 1,
        Action::Remove { subject, .. } if is_gone(scene, subject) => 1,
        Action::Prepare => 2,
        Action::Change { .. } | Action::Move { .. } => 3,
        Action::Begin { adopts: true, .. } => 4,
        Action::Begin { .. } => 5,
        Action::Settle => 6,
        Action::Remove { .. } => 7,
        Action::RemoveLeft { .. } => 8,
    }
}

fn is_gone(scene: &Scene, subject: &Subject) -> bool {
    let uid = scene
        .enforced
        .get(subject)
        .map(|in_force| &in_force.wanted.uid);
    let found = scene.pods.get(subject).map(|found| &found.pod.uid);
    !subject.is_interface() && found != uid
}

/// Pods of the source that are enforced and should be, as nobody else may have their interfaces.
fn protected(scene: &Scene) -> Vec<Subject> {
    let enforced = scene.enforced.keys().filter(|subject| {
        let Some(found) = scene.pods.get(subject) else {
            return false;
        };
        !is_gone(scene, subject)
            && !found.pod.host_network
            && found.policy.mode == Mode::Enforce
            && !subject.is_interface()
    });
    enforced.cloned().collect()
}

/// Whether a pod that should be enforced is behind this interface.
fn is_to_be_enforced(scene: &Scene, ifindex: IfIndex) -> bool {
    let mut pods = scene.pods.values();
    pods.any(|found| {
        found.policy.mode == Mode::Enforce
            && !found.pod.host_network
            && found.location.interfaces().contains(&ifindex)
    })
}

/// The interfaces in quarantine, and those of pods that are gone or have left them, on which somebody is to be
/// enforced: each stays closed or judged until then.
fn handed_over(scene: &Scene, wanted_on: &HashMap<IfIndex, &Subject>) -> Vec<IfIndex> {
    let enforced = scene.enforced.values();
    let leaving = enforced.flat_map(|in_force| in_force.wanted.interfaces.iter().copied());
    let left = scene.left.values().flat_map(|left| &left.interfaces);
    let all = leaving.chain(left.map(|&(ifindex, _)| ifindex));
    all.filter(|ifindex| wanted_on.contains_key(ifindex) || is_to_be_enforced(scene, *ifindex))
        .collect()
}

/// Carries out the plan. Checks the properties after each of its actions, and at its end.
fn check(scene: &mut Scene, plan: &Plan) {
    let places: Vec<u8> = plan
        .actions
        .iter()
        .map(|action| place(scene, action))
        .collect();
    assert!(places.is_sorted(), "{:?}", summary(plan));

    let released: HashSet<&Subject> = plan
        .actions
        .iter()
        .filter_map(|action| match action {
            Action::Release(subjects) => Some(subjects),
            _ => None,
        })
        .flatten()
        .collect();
    let wanted_on: HashMap<IfIndex, &Subject> = plan
        .actions
        .iter()
        .filter_map(|action| match action {
            Action::Begin {
                subject, wanted, ..
            }
            | Action::Move {
                subject, wanted, ..
            } => Some((subject, wanted)),
            _ => None,
        })
        .flat_map(|(subject, wanted)| wanted.interfaces.iter().map(move |&at| (at, subject)))
        .collect();
    for action in &plan.actions {
        let Action::Remove {
            subject,
            taken_over,
        } = action
        else {
            continue;
        };
        // A pod that is to be free is released first, if nobody else is to have its interface.
        let interfaces = scene.enforced[subject].wanted.interfaces.clone();
        let left = scene.left.values().flat_map(|left| &left.interfaces);
        let left: HashSet<IfIndex> = left.map(|&(ifindex, _)| ifindex).collect();
        let is_claimed = |ifindex: &IfIndex| {
            wanted_on.contains_key(ifindex)
                || left.contains(ifindex)
                || scene.pods.iter().any(|(other, found)| {
                    other != subject && found.location.interfaces().contains(ifindex)
                })
        };
        if !is_gone(scene, subject) && !interfaces.iter().any(is_claimed) {
            assert!(released.contains(subject), "{subject}: {:?}", summary(plan));
        }
        assert!(
            taken_over.is_empty() || !released.contains(subject),
            "{subject} is handed over, so it must not be open before"
        );
    }

    let protected = protected(scene);
    let handed_over = handed_over(scene, &wanted_on);
    scene.unjudged.leave(&plan.left_alone);
    for action in &plan.actions {
        scene.carry_out(action, plan);
        for subject in &protected {
            assert!(
                scene.enforced.contains_key(subject) && !released.contains(subject),
                "{subject} lost its enforcement: {:?}",
                summary(plan)
            );
        }
        for &ifindex in &handed_over {
            assert!(
                scene.attached.contains(&ifindex),
                "{ifindex} is free: {:?}",
                summary(plan)
            );
        }
    }

    scene.detach_vacated(plan);
    for &ifindex in &handed_over {
        assert!(
            scene.attached.contains(&ifindex),
            "{ifindex} is free: {:?}",
            summary(plan)
        );
    }

    let mut pods: BTreeMap<IfIndex, &Subject> = BTreeMap::new();
    for (subject, in_force) in &scene.enforced {
        for &ifindex in &in_force.wanted.interfaces {
            if let Some(other) = pods.insert(ifindex, subject) {
                panic!("{ifindex} has {other} and {subject}: {:?}", summary(plan));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn plans_keep_pods_enforced_and_interfaces_apart(steps in vec(step(), 1..25)) {
        let mut scene = Scene::new();
        for step in &steps {
            take(&mut scene, step);
            let first = scene.plan();
            check(&mut scene, &first);
            // Who was refused an interface may get it once its pod has left it. The same holds for the quarantine.
            let is_refused = |plan: &Plan| {
                let unlocated = plan.unlocated.values().map(|absence| &absence.why);
                let mut problems = plan.problems.values().chain(unlocated);
                problems.any(|problem| problem.contains("already that of pod"))
            };
            let mut last = first;
            for _ in 0..=2 * PODS.len() {
                let next = scene.plan();
                prop_assert!(is_refused(&last) || next.actions.is_empty(), "{:?}", summary(&next));
                check(&mut scene, &next);
                last = next;
            }
            prop_assert!(last.actions.is_empty(), "{:?}", summary(&last));
        }
    }
}
