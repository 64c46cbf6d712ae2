//! Pods that are not where they should be, yet or any more.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::control::observe::locations::Pods;
use crate::report::Subject;

/// How long a pod takes to start or to end before it is worth a line: an image may have to be fetched, but
/// its network comes first; and a pod's network is taken down before the cluster says that the pod has ended.
/// So long it also may take until the source has said which pods there are.
pub(in crate::control) const PATIENCE: Duration = Duration::from_secs(10);

/// After the first look in vain for something that is expected, the next one comes this much later …
pub(in crate::control) const RETRY_MIN: Duration = Duration::from_millis(10);
/// … and then ever later, up to this.
const RETRY_MAX: Duration = Duration::from_secs(1);

/// How long to wait for the next look after one in vain that was waited for this long. What takes a
/// while to come is noticed when an eighth of that while, at most, has passed again: nothing tells
/// when a pod's first process enters its group, and its runtime takes some 100 ms for that.
pub(in crate::control) fn longer(wait: Duration) -> Duration {
    (wait * 9 / 8).min(RETRY_MAX)
}

/// Since when each pod has been waited for.
#[derive(Default)]
pub(in crate::control) struct Waiting(BTreeMap<Subject, (String, Instant)>);

impl Waiting {
    /// Takes note of the pods that cannot be found now, each with the reason, and returns what is
    /// worth saying.
    pub(in crate::control) fn note<'a>(
        &mut self,
        unfound: BTreeMap<Subject, String>,
        pods: &'a Pods<'_>,
    ) -> Vec<(&'a Subject, String)> {
        let now = Instant::now();
        let mut saying = Vec::new();
        let mut next = BTreeMap::new();
        for (key, why) in unfound {
            let Some((key, pod)) = pods.get_key_value(&key) else {
                continue;
            };
            let since = match self.0.get(key) {
                Some((uid, since)) if *uid == pod.uid => *since,
                _ => now,
            };
            // Nobody is there who could send something.
            if !pod.is_pending && now.duration_since(since) >= PATIENCE {
                saying.push((key, why));
            }
            next.insert(key.clone(), (pod.uid.clone(), since));
        }
        self.0 = next;
        saying
    }

    /// Whether any pod is waited for.
    pub(in crate::control) fn any(&self) -> bool {
        !self.0.is_empty()
    }
}
