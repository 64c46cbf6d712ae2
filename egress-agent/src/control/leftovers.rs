//! What is in the kernel and of no pod that is to be enforced.

use std::collections::{HashMap, HashSet};

use super::{
    enforced::PodKey,
    reconcile::{Reconciler, title},
    waiting::PATIENCE,
};
use crate::{datapath::Unused, pods::Snapshot};

impl Reconciler {
    /// Removes what an earlier agent left, or an earlier attempt, and the snapshot does not claim.
    pub(super) async fn drop_leftovers(
        &mut self,
        snapshot: &Snapshot,
        waiting: &HashSet<(PodKey, String)>,
        saying: &mut HashMap<String, String>,
    ) {
        let pods: Vec<u32> = self.adoptable.keys().copied().collect();
        let mut unclaimed = 0_usize;
        for pod in pods {
            let Some(left) = self.adoptable.get(&pod).cloned() else {
                continue;
            };
            let key = (left.namespace.clone(), left.name.clone());
            let title = title(&key);
            if !snapshot.pods.contains_key(&key) && snapshot.unreadable && self.cluster.is_some() {
                unclaimed += 1;
                continue;
            }
            if !snapshot.pods.contains_key(&key) && snapshot.unreadable {
                let why = "enforced as an earlier agent left it, without DNS: its manifest may be \
                           the one that cannot be read";
                saying.insert(title, why.into());
                continue;
            }
            if waiting.contains(&(key, left.uid.clone())) {
                continue;
            }
            match self.drop_leftover(pod, &left).await {
                Ok(()) => {
                    self.adoptable.remove(&pod);
                    tracing::info!(pod = %title, "removed what was left of it");
                }
                Err(error) => {
                    saying.insert(
                        title,
                        format!("cannot remove what is left of it: {error:#}"),
                    );
                }
            }
        }
        // At every start it takes a moment until the API server has said which pods there are.
        if unclaimed > 0 && self.began.elapsed() >= PATIENCE {
            let about = "pods of an earlier agent".to_owned();
            let what = format!(
                "{unclaimed} pods are enforced as an earlier agent left them, without DNS, until the \
                 API server says which pods there are"
            );
            saying.insert(about, what);
        }
    }

    /// Removes policies that nothing is under: their agent was killed while it changed them.
    pub(super) fn drop_orphans(&mut self) {
        let used: HashSet<u32> = self
            .enforced
            .values()
            .map(|enforced| enforced.policy)
            .chain(self.adoptable.values().flat_map(|left| {
                let entries = left.interfaces.iter();
                entries.map(|(_, entry)| entry.policy)
            }))
            .collect();
        let orphans = self.datapath.policy_ids().and_then(|ids| {
            let orphans = ids.into_iter().filter(|id| !used.contains(id));
            self.unused.extend(orphans.map(Unused::Policy));
            self.drop_unused()
        });
        if let Err(error) = orphans {
            tracing::error!(error = %format!("{error:#}"), "cannot remove unused policies");
        }
    }
}
