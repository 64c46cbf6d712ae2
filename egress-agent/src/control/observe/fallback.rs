//! The policy of a pod of which a part cannot be read.
//!
//! A policy has two parts: what teams write (annotations, and policies of the namespace), and the ordered rules of the
//! cluster. Each part falls back on its own to what was last readable. Otherwise a team could keep an ordered rule from
//! its pods by an entry that cannot be read.

use std::{collections::BTreeMap, sync::Arc};

use crate::{control::digest, pods::Pod, serve::Written};
use egress_policy::{
    Annotations, Compiled, Mode, Objects, PolicyError, Settings, compile,
    objects::{NamespacePolicy, ObjectKind, TierPolicy},
    set_of_entry,
};

type Sets = Arc<BTreeMap<String, Vec<String>>>;
type Texts = BTreeMap<String, String>;

/// What teams write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Teams {
    /// The pod's annotations.
    own: Texts,
    /// Its namespace's.
    namespace: Texts,
    policies: Vec<Arc<NamespacePolicy>>,
    sets: Sets,
}

/// The objects with ordered rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tiers {
    policies: Vec<Arc<TierPolicy>>,
    sets: Sets,
}

/// Both parts of a pod's policy.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    teams: Arc<Teams>,
    tiers: Arc<Tiers>,
}

/// The last readable parts of a pod's policy.
#[derive(Clone, Debug, Default)]
pub(super) struct Good {
    teams: Option<Arc<Teams>>,
    tiers: Option<Arc<Tiers>>,
}

/// Which parts of a pod's policy are those that it has now. The others are what could be read earlier, or nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::control) struct Present {
    /// What teams write.
    pub(in crate::control) teams: bool,
    /// The objects with ordered rules.
    pub(in crate::control) tiers: bool,
}

impl Present {
    /// Both parts.
    pub(in crate::control) const WHOLE: Self = Self {
        teams: true,
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
    /// What the pod has now.
    pub(super) fn of(pod: &Pod) -> Self {
        let Objects {
            namespace,
            tiers,
            sets,
        } = &pod.objects;
        Self {
            teams: Arc::new(Teams {
                own: pod.annotations.clone(),
                namespace: pod.namespace_annotations.clone(),
                policies: namespace.clone(),
                sets: Arc::clone(sets),
            }),
            tiers: Arc::new(Tiers {
                policies: tiers.clone(),
                sets: Arc::clone(sets),
            }),
        }
    }

    /// Whether the pod still has this. `sets` are compared if an entry uses one.
    pub(super) fn are_of(&self, pod: &Pod, uses_sets: bool) -> bool {
        self.teams.own == pod.annotations
            && self.teams.namespace == pod.namespace_annotations
            && self.teams.policies == pod.objects.namespace
            && self.tiers.policies == pod.objects.tiers
            && (!uses_sets || self.teams.sets == pod.objects.sets)
    }

    /// Both together. A set that an ordered rule uses is that of the ordered rules.
    fn written(&self) -> Written {
        let Self { teams, tiers } = self;
        let sets = if teams.sets == tiers.sets {
            Arc::clone(&tiers.sets)
        } else {
            let rules = tiers.policies.iter().flat_map(|policy| &policy.rules);
            let used = rules
                .flat_map(|rule| &rule.entries)
                .filter_map(|entry| set_of_entry(entry));
            let mut sets = BTreeMap::clone(&teams.sets);
            for name in used {
                match tiers.sets.get(name) {
                    Some(set) => sets.insert(name.to_owned(), set.clone()),
                    None => sets.remove(name),
                };
            }
            Arc::new(sets)
        };
        Written {
            own: Annotations::from_map(&teams.own),
            namespace: Annotations::from_map(&teams.namespace),
            objects: Objects {
                namespace: teams.policies.clone(),
                tiers: tiers.policies.clone(),
                sets,
            },
        }
    }

    fn read(&self, settings: &Settings) -> Result<(Compiled, Written), PolicyError> {
        let written = self.written();
        let mut compiled = compile(written.inputs(), settings)?;
        compiled.record.annotations =
            digest::of_parts(&self.teams.own, &self.teams.namespace, &written.objects);
        Ok((compiled, written))
    }

    /// Whether an entry uses a set.
    pub(super) fn use_sets(&self) -> bool {
        self.written().inputs().use_sets()
    }
}

/// Reads a policy, or what takes its place.
pub(super) fn read(now: &Parts, before: Good, settings: &Settings) -> Read {
    let error = match now.read(settings) {
        Ok((compiled, written)) => {
            let warnings = &compiled.warnings;
            let problem = (!warnings.is_empty()).then(|| warnings.join("; "));
            return Read {
                good: Good {
                    teams: Some(Arc::clone(&now.teams)),
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
    let alone = |tiers: &Arc<Tiers>| {
        let parts = Parts {
            teams: Arc::default(),
            tiers: Arc::clone(tiers),
        };
        parts.read(settings).map(drop)
    };
    let read_alone = alone(&now.tiers);
    let are_tiers_readable = read_alone.is_ok();
    let tiers = match read_alone {
        Ok(()) => Some(Arc::clone(&now.tiers)),
        // The earlier addresses of peers may be those of other pods by now.
        Err(error) if error.is_over_prefixes() && now.tiers.have_peers() => None,
        Err(_) => before.tiers.clone().filter(|tiers| alone(tiers).is_ok()),
    };
    let Some(tiers) = tiers else {
        let mut compiled = egress_policy::unreadable_tiers(settings);
        compiled.closed_by = error.closers().into();
        let problem = match compiled.mode {
            Mode::Enforce => "everything is denied, internal addresses too",
            Mode::Audit | Mode::Off => {
                "everything would be denied, internal addresses too; nothing is stopped (defaultMode: audit)"
            }
        };
        return Read {
            compiled,
            good: before,
            problem: Some(format!("{error}; {problem}")),
            written: Arc::default(),
            present: Present::default(),
        };
    };
    let candidates = [
        (!are_tiers_readable).then(|| Arc::clone(&now.teams)),
        before.teams.clone(),
    ];
    for teams in candidates.into_iter().flatten() {
        let parts = Parts {
            teams: Arc::clone(&teams),
            tiers: Arc::clone(&tiers),
        };
        if let Ok((compiled, written)) = parts.read(settings) {
            let stays = if tiers.policies.is_empty() {
                "the last good policy stays"
            } else if are_tiers_readable {
                "the last good lists of the pod and its namespace stay"
            } else {
                "the last good ordered rules stay"
            };
            return Read {
                compiled,
                present: Present {
                    teams: Arc::ptr_eq(&teams, &now.teams),
                    tiers: are_tiers_readable,
                },
                good: Good {
                    teams: Some(teams),
                    tiers: Some(tiers),
                },
                problem: Some(format!("{error}; {stays}")),
                written: Arc::new(written),
            };
        }
    }
    // The lists were never readable: they count as empty.
    let own = Annotations::from_map(&now.teams.own);
    let namespace = Annotations::from_map(&now.teams.namespace);
    let parts = Parts {
        teams: Arc::default(),
        tiers: Arc::clone(&tiers),
    };
    let written = parts.written();
    let mut compiled = egress_policy::unreadable(&own, &namespace, &written.objects, settings);
    compiled.closed_by = error.closers().into();
    let problem = match (compiled.mode, tiers.policies.is_empty()) {
        (Mode::Enforce, true) => "everything external is denied",
        (Mode::Enforce, false) => "everything external is denied that ordered rules do not allow",
        (Mode::Audit | Mode::Off, _) => {
            "everything external would be denied; nothing is stopped (defaultMode: audit)"
        }
    };
    Read {
        compiled,
        good: Good {
            teams: before.teams,
            tiers: Some(tiers),
        },
        problem: Some(format!("{error}; {problem}")),
        written: Arc::new(written),
        present: Present {
            teams: false,
            tiers: are_tiers_readable,
        },
    }
}
