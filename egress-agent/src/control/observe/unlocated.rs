//! Pods that are not where they should be, yet or any more.

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

/// Since when each pod has been looked for, with its UID.
#[derive(Default)]
pub(in crate::control) struct Unlocated(BTreeMap<Subject, (String, Instant)>);

impl Unlocated {
    /// Takes note of the pods that cannot be found now, each with the reason. Returns those that have been looked
    /// for longer than [`PATIENCE`].
    pub(super) fn note(
        &mut self,
        unlocated: BTreeMap<Subject, String>,
        observed: &Observed<'_>,
        now: Instant,
    ) -> Vec<(Subject, String)> {
        let mut overdue = Vec::new();
        let mut next = BTreeMap::new();
        for (subject, why) in unlocated {
            let Some(pod) = observed.pods.get(&subject).map(|observed| &observed.pod) else {
                continue;
            };
            let since = match self.0.get(&subject) {
                Some((uid, since)) if *uid == pod.uid => *since,
                _ => now,
            };
            next.insert(subject.clone(), (pod.uid.clone(), since));
            // Nothing of a pending pod runs that could send something.
            if !pod.is_pending && now.duration_since(since) >= PATIENCE {
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
