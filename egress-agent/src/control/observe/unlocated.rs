//! Pods that are not found where they should be, yet or any more.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::Observed;
use crate::report::Subject;

/// How long a pod takes to start or to end before it is worth a problem: an image may have to be fetched, but
/// its network comes first; and a pod's network is taken down before the cluster says that the pod has ended.
/// It may also take so long until the source has said which pods there are.
pub(in crate::control) const PATIENCE: Duration = Duration::from_secs(10);

/// How long the control group of a pod may be empty that is running according to the API server, before it is worth
/// a problem. A node that boots starts its pods one after the other.
const PATIENCE_IF_EMPTY: Duration = Duration::from_secs(60);

/// Why a pod cannot be found now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::control) struct Absence {
    pub(in crate::control) why: String,
    /// Whether the pod has a control group without processes, so that nothing of it can send.
    pub(in crate::control) is_empty: bool,
}

impl Absence {
    pub(in crate::control) fn new(why: String) -> Self {
        Self {
            why,
            is_empty: false,
        }
    }
}

/// A pod that is looked for.
struct Awaited {
    uid: String,
    /// Since when its control group has been empty, or has not.
    since: Instant,
    is_empty: bool,
}

/// The pods that are looked for.
#[derive(Default)]
pub(in crate::control) struct Unlocated(BTreeMap<Subject, Awaited>);

impl Unlocated {
    /// Records the pods that cannot be found now. Returns those that have been looked for too long, each with the
    /// reason.
    pub(super) fn note(
        &mut self,
        unlocated: BTreeMap<Subject, Absence>,
        observed: &Observed<'_>,
        now: Instant,
    ) -> Vec<(Subject, String)> {
        let mut overdue = Vec::new();
        let mut next = BTreeMap::new();
        for (subject, Absence { why, is_empty }) in unlocated {
            let Some(pod) = observed.pods.get(&subject).map(|observed| &observed.pod) else {
                continue;
            };
            let since = match self.0.get(&subject) {
                Some(known) if known.uid == pod.uid && known.is_empty == is_empty => known.since,
                _ => now,
            };
            let awaited = Awaited {
                uid: pod.uid.clone(),
                since,
                is_empty,
            };
            next.insert(subject.clone(), awaited);
            let patience = if is_empty {
                PATIENCE_IF_EMPTY
            } else {
                PATIENCE
            };
            // Nothing of a pending pod runs, so nothing of it can send.
            if !pod.is_pending && now.duration_since(since) >= patience {
                overdue.push((subject, why));
            }
        }
        self.0 = next;
        overdue
    }

    /// Whether any pod is looked for.
    pub(super) fn any(&self) -> bool {
        !self.0.is_empty()
    }
}
