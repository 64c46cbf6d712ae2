//! The policy of a pod when a part of it cannot be read.
//!
//! A policy has three parts: the pod's annotations, the lists of its namespace (annotations and policies), and the
//! ordered rules of the cluster. If a part cannot be read, its last readable version stays in force, and the current
//! versions of the other parts apply. Otherwise the author of one part could keep the others from the pod with an
//! unreadable entry.

use std::{collections::BTreeMap, sync::Arc};

use crate::{control::digest, pods::Pod, serve::Written};
use egress_policy::{
    Annotations, Compiled, Mode, Objects, PolicyError, Settings, compile,
    objects::{NamespacePolicy, ObjectKind, TierPolicy},
};

type Sets = Arc<BTreeMap<String, Vec<String>>>;
type Texts = BTreeMap<String, String>;

/// The pod's annotations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Own {
    annotations: Texts,
    sets: Sets,
}

/// The lists of the pod's namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Shared {
    annotations: Texts,
    policies: Vec<Arc<NamespacePolicy>>,
    sets: Sets,
}

/// The objects with ordered rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tiers {
    policies: Vec<Arc<TierPolicy>>,
    sets: Sets,
}

/// All parts of a pod's policy.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    own: Arc<Own>,
    shared: Arc<Shared>,
    tiers: Arc<Tiers>,
}

/// The last readable parts of a pod's policy.
#[derive(Clone, Debug, Default)]
pub(super) struct Good {
    own: Option<Arc<Own>>,
    shared: Option<Arc<Shared>>,
    tiers: Option<Arc<Tiers>>,
}

/// Which parts of a pod's policy are current. The others are the last readable version, or nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::control) struct Present {
    /// The pod's annotations.
    pub(in crate::control) own: bool,
    /// The lists of its namespace.
    pub(in crate::control) shared: bool,
    /// The objects with ordered rules.
    pub(in crate::control) tiers: bool,
}

impl Present {
    /// All parts.
    pub(in crate::control) const WHOLE: Self = Self {
        own: true,
        shared: true,
        tiers: true,
    };
}

/// A policy that was read.
pub(super) struct Read {
    pub(super) compiled: Compiled,
    pub(super) good: Good,
    /// The errors or the warnings.
    pub(super) problem: Option<String>,
    /// What the policy was read from.
    pub(super) written: Arc<Written>,
    /// The parts that can be read.
    pub(super) present: Present,
}

impl Tiers {
    /// Whether a rule may stand for addresses of pods and nodes.
    fn have_peers(&self) -> bool {
        let mut policies = self.policies.iter();
        policies.any(|policy| policy.name.kind == ObjectKind::ClusterNetworkPolicy)
    }
}

impl Parts {
    /// The pod's current parts.
    pub(super) fn of(pod: &Pod) -> Self {
        let Objects {
            namespace,
            tiers,
            sets,
        } = &pod.objects;
        Self {
            own: Arc::new(Own {
                annotations: pod.annotations.clone(),
                sets: Arc::clone(sets),
            }),
            shared: Arc::new(Shared {
                annotations: pod.namespace_annotations.clone(),
                policies: namespace.clone(),
                sets: Arc::clone(sets),
            }),
            tiers: Arc::new(Tiers {
                policies: tiers.clone(),
                sets: Arc::clone(sets),
            }),
        }
    }

    /// Whether these are still the pod's parts. `sets` are compared if an entry uses one.
    pub(super) fn are_of(&self, pod: &Pod, uses_sets: bool) -> bool {
        self.own.annotations == pod.annotations
            && self.shared.annotations == pod.namespace_annotations
            && self.shared.policies == pod.objects.namespace
            && self.tiers.policies == pod.objects.tiers
            && (!uses_sets || self.tiers.sets == pod.objects.sets)
    }

    /// All parts together. If several parts use a set, the ordered rules' version of it counts first, then the
    /// namespace's.
    fn written(&self) -> Written {
        let Self { own, shared, tiers } = self;
        let mut sets = Arc::clone(&own.sets);
        let lists = Objects {
            namespace: shared.policies.clone(),
            sets: Arc::clone(&shared.sets),
            ..Objects::default()
        };
        put_sets(&mut sets, &shared.annotations, &lists);
        let rules = Objects {
            tiers: tiers.policies.clone(),
            sets: Arc::clone(&tiers.sets),
            ..Objects::default()
        };
        put_sets(&mut sets, &Texts::new(), &rules);
        Written {
            own: Annotations::from_map(&own.annotations),
            namespace: Annotations::from_map(&shared.annotations),
            objects: Objects {
                namespace: shared.policies.clone(),
                tiers: tiers.policies.clone(),
                sets,
            },
        }
    }

    fn read(&self, settings: &Settings) -> Result<(Compiled, Written), PolicyError> {
        let written = self.written();
        let mut compiled = compile(written.inputs(), settings)?;
        compiled.record.annotations = digest::of_parts(
            &self.own.annotations,
            &self.shared.annotations,
            &written.objects,
        );
        Ok((compiled, written))
    }

    /// Which parts are the current ones.
    fn present(&self, now: &Self) -> Present {
        Present {
            own: Arc::ptr_eq(&self.own, &now.own),
            shared: Arc::ptr_eq(&self.shared, &now.shared),
            tiers: Arc::ptr_eq(&self.tiers, &now.tiers),
        }
    }

    /// Whether they can be read.
    fn is_readable(&self, settings: &Settings) -> bool {
        self.read(settings).is_ok()
    }

    /// Whether an entry uses a set.
    pub(super) fn use_sets(&self) -> bool {
        self.written().inputs().use_sets()
    }
}

/// Puts the sets that a part uses in the place of those of these names. `objects` has the part's objects and sets.
fn put_sets(sets: &mut Sets, annotations: &Texts, objects: &Objects) {
    if *sets == objects.sets {
        return;
    }
    let before = Objects {
        sets: Arc::clone(sets),
        ..objects.clone()
    };
    let used = [&before, objects].map(|of| digest::used_sets(annotations.values(), of));
    let all = Arc::make_mut(sets);
    for name in used.iter().flat_map(BTreeMap::keys) {
        match objects.sets.get(*name) {
            Some(set) => all.insert((*name).clone(), set.clone()),
            None => all.remove(*name),
        };
    }
}

/// Reads a policy, or what replaces it.
pub(super) fn read(now: &Parts, before: Good, settings: &Settings) -> Read {
    let error = match now.read(settings) {
        Ok((compiled, written)) => {
            let warnings = &compiled.warnings;
            let problem = (!warnings.is_empty()).then(|| warnings.join("; "));
            return Read {
                good: Good {
                    own: Some(Arc::clone(&now.own)),
                    shared: Some(Arc::clone(&now.shared)),
                    tiers: Some(Arc::clone(&now.tiers)),
                },
                compiled,
                problem,
                written: Arc::new(written),
                present: Present::WHOLE,
            };
        }
        Err(error) => error,
    };
    let Some(tiers) = readable_tiers(now, &before, settings) else {
        return without_tiers(&error, before, settings);
    };
    let shared = readable_shared(now, &before, &tiers, settings);
    let is_rest_present = Arc::ptr_eq(&tiers, &now.tiers)
        && shared
            .as_ref()
            .is_some_and(|shared| Arc::ptr_eq(shared, &now.shared));
    let of_own = [
        // Otherwise these are what could not be read.
        (!is_rest_present).then_some(&now.own),
        before.own.as_ref(),
    ];
    for own in of_own.into_iter().flatten() {
        let Some(shared) = &shared else {
            break;
        };
        let parts = Parts {
            own: Arc::clone(own),
            shared: Arc::clone(shared),
            tiers: Arc::clone(&tiers),
        };
        if let Ok((compiled, written)) = parts.read(settings) {
            let present = parts.present(now);
            return Read {
                compiled,
                problem: Some(format!("{error}; {}", stays(now, present))),
                good: Good {
                    own: Some(parts.own),
                    shared: Some(parts.shared),
                    tiers: Some(parts.tiers),
                },
                written: Arc::new(written),
                present,
            };
        }
    }
    // The pod's annotations, or the lists of its namespace, were never readable: what they allow counts as empty.
    let closed = Parts {
        own: Arc::default(),
        shared: shared.clone().unwrap_or_default(),
        tiers: Arc::clone(&tiers),
    };
    let denying = closed.written();
    let own = Annotations::from_map(&now.own.annotations);
    let namespace = if shared.is_some() {
        denying.namespace
    } else {
        Annotations::from_map(&now.shared.annotations)
    };
    let mut compiled = egress_policy::unreadable(&own, &namespace, &denying.objects, settings);
    compiled.closed_by = error.closers().into();
    let problem = match (compiled.mode, tiers.policies.is_empty()) {
        (Mode::Enforce, true) => "everything external is denied",
        (Mode::Enforce, false) => "everything external is denied that ordered rules do not allow",
        (Mode::Audit | Mode::Off, _) => {
            "everything external would be denied; nothing is stopped (defaultMode: audit)"
        }
    };
    // The lists of the namespace grant nothing here.
    let written = Parts {
        shared: Arc::default(),
        ..closed
    }
    .written();
    Read {
        compiled,
        present: Present {
            own: false,
            shared: false,
            tiers: Arc::ptr_eq(&tiers, &now.tiers),
        },
        good: Good {
            own: before.own,
            shared: shared.or(before.shared),
            tiers: Some(tiers),
        },
        problem: Some(format!("{error}; {problem}")),
        written: Arc::new(written),
    }
}

/// The ordered rules that count: the current ones, if they can be read, or the last readable ones.
fn readable_tiers(now: &Parts, before: &Good, settings: &Settings) -> Option<Arc<Tiers>> {
    let alone = |tiers: &Arc<Tiers>| Parts {
        own: Arc::default(),
        shared: Arc::default(),
        tiers: Arc::clone(tiers),
    };
    match alone(&now.tiers).read(settings) {
        Ok(_) => Some(Arc::clone(&now.tiers)),
        // The earlier addresses of peers may belong to other pods by now.
        Err(error) if error.is_over_prefixes() && now.tiers.have_peers() => None,
        Err(_) => {
            let tiers = before.tiers.clone();
            tiers.filter(|tiers| alone(tiers).is_readable(settings))
        }
    }
}

/// The lists of the namespace that count, under these ordered rules.
fn readable_shared(
    now: &Parts,
    before: &Good,
    tiers: &Arc<Tiers>,
    settings: &Settings,
) -> Option<Arc<Shared>> {
    let candidates = [Some(&now.shared), before.shared.as_ref()];
    let mut candidates = candidates.into_iter().flatten();
    let readable = candidates.find(|shared| {
        let parts = Parts {
            own: Arc::default(),
            shared: Arc::clone(shared),
            tiers: Arc::clone(tiers),
        };
        parts.is_readable(settings)
    });
    readable.map(Arc::clone)
}

/// The policy of a pod whose ordered rules could never be read.
fn without_tiers(error: &PolicyError, good: Good, settings: &Settings) -> Read {
    let mut compiled = egress_policy::unreadable_tiers(settings);
    compiled.closed_by = error.closers().into();
    let problem = match compiled.mode {
        Mode::Enforce => "everything is denied, internal addresses too",
        Mode::Audit | Mode::Off => {
            "everything would be denied, internal addresses too; nothing is stopped (defaultMode: audit)"
        }
    };
    Read {
        compiled,
        good,
        problem: Some(format!("{error}; {problem}")),
        written: Arc::default(),
        present: Present::default(),
    }
}

/// What stays in force in place of the current parts.
fn stays(now: &Parts, present: Present) -> String {
    let Parts { own, shared, tiers } = now;
    let is_stale_or_empty = |is_present: bool, is_empty: bool| !is_present || is_empty;
    if present.tiers
        && tiers.policies.is_empty()
        && is_stale_or_empty(present.own, own.annotations.is_empty())
        && is_stale_or_empty(
            present.shared,
            shared.annotations.is_empty() && shared.policies.is_empty(),
        )
    {
        return "the last good policy stays".to_owned();
    }
    let parts = [
        ("annotations of the pod", present.own),
        ("lists of its namespace", present.shared),
        ("ordered rules", present.tiers),
    ];
    let stale = parts.iter().filter(|(_, is_present)| !is_present);
    let stale: Vec<&str> = stale.map(|(name, _)| *name).collect();
    format!("the last good {} stay", stale.join(" and "))
}
