//! Pods that are not where they should be, yet or any more.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::enforced::PodKey;
use crate::pods::Pod;

/// How long a pod takes to start or to end before it is worth a line: an image may have to be fetched, but
/// its network comes first; and a pod's network is taken down before the cluster says that the pod has ended.
/// So long it also may take until the source has said which pods there are.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// How long the control group of a pod that is said to run may be empty. A node that boots starts its pods one after
/// the other.
const PATIENCE_IF_EMPTY: Duration = Duration::from_secs(60);

/// After the first look in vain for something that is expected, the next one comes this much later …
pub(super) const RETRY_MIN: Duration = Duration::from_millis(10);
/// … and then ever later, up to this.
const RETRY_MAX: Duration = Duration::from_secs(1);

/// How long to wait for the next look after one in vain that was waited for this long. What takes a
/// while to come is noticed when an eighth of that while, at most, has passed again: nothing tells
/// when a pod's first process enters its group, and its runtime takes some 100 ms for that.
pub(super) fn longer(wait: Duration) -> Duration {
    (wait * 9 / 8).min(RETRY_MAX)
}

/// Why a pod cannot be found now.
pub(super) struct Unfound {
    pub(super) why: String,
    /// Whether it has a control group in which nothing runs, so that nobody is there who could send something.
    pub(super) is_empty: bool,
}

impl Unfound {
    pub(super) fn new(why: String) -> Self {
        Self {
            why,
            is_empty: false,
        }
    }
}

/// A pod that has been waited for.
struct Awaited {
    uid: String,
    /// Since when its control group has been empty, or has not.
    since: Instant,
    is_empty: bool,
}

/// The pods that have been waited for.
#[derive(Default)]
pub(super) struct Waiting(BTreeMap<PodKey, Awaited>);

impl Waiting {
    /// Takes note of the pods that cannot be found now, each with the reason, and returns what is
    /// worth saying.
    pub(super) fn note<'a>(
        &mut self,
        unfound: BTreeMap<PodKey, Unfound>,
        pods: &'a BTreeMap<PodKey, Pod>,
    ) -> Vec<(&'a PodKey, String)> {
        let now = Instant::now();
        let mut saying = Vec::new();
        let mut next = BTreeMap::new();
        for (key, Unfound { why, is_empty }) in unfound {
            let Some((key, pod)) = pods.get_key_value(&key) else {
                continue;
            };
            let since = match self.0.get(key) {
                Some(known) if known.uid == pod.uid && known.is_empty == is_empty => known.since,
                _ => now,
            };
            let patience = if is_empty {
                PATIENCE_IF_EMPTY
            } else {
                PATIENCE
            };
            // A pending pod has no process yet.
            if !pod.is_pending && now.duration_since(since) >= patience {
                saying.push((key, why));
            }
            let uid = pod.uid.clone();
            next.insert(
                key.clone(),
                Awaited {
                    uid,
                    since,
                    is_empty,
                },
            );
        }
        self.0 = next;
        saying
    }

    /// Whether any pod is waited for.
    pub(super) fn any(&self) -> bool {
        !self.0.is_empty()
    }
}
