//! What is in the kernel and of no pod that is to be enforced.

use std::collections::HashSet;

use anyhow::Result;
use egress_common::records::{Interface, Policy};

use crate::control::{
    observe::locations::Pods,
    observe::unlocated::PATIENCE,
    publish::problems::{About, Problems},
    reconcile::Reconciler,
};
use crate::{datapath::Unused, pods::Facts, report::Subject};

impl Reconciler {
    /// Removes what an earlier agent left, or an earlier attempt, and the snapshot does not claim.
    pub(in crate::control) async fn drop_leftovers(
        &mut self,
        incomplete: bool,
        pods: &Pods<'_>,
        waiting: &HashSet<(Subject, String)>,
        problems: &mut Problems,
    ) {
        let left: Vec<u32> = self.adoptable.keys().copied().collect();
        let mut unclaimed = 0_usize;
        let mut remaining = Vec::new();
        for pod in left {
            let Some(left) = self.adoptable.get(&pod).cloned() else {
                continue;
            };
            let key = Subject::from_fields(&left.namespace, &left.name);
            if !pods.contains_key(&key) && incomplete && self.cluster.is_some() {
                unclaimed += 1;
                remaining.push(pod);
                continue;
            }
            if !pods.contains_key(&key) && incomplete {
                let why = "enforced as an earlier agent left it, without DNS: its manifest may be \
                           the one that cannot be read";
                problems.set(key, why);
                remaining.push(pod);
                continue;
            }
            if waiting.contains(&(key.clone(), left.uid.clone())) {
                continue;
            }
            match self.drop_leftover(pod, &left).await {
                Ok(()) => {
                    self.adoptable.remove(&pod);
                    tracing::info!(pod = %key, "removed what was left of it");
                }
                Err(error) => {
                    problems.set(key, format!("cannot remove what is left of it: {error:#}"));
                }
            }
        }
        // Without the cluster's addresses, flows to them would be denied.
        let is_known = self.cluster.is_none() || self.facts != Facts::default();
        if is_known && let Err(error) = self.judge_left_again(&remaining) {
            let about = About::node("connections of an earlier agent's pods");
            let what = format!("cannot judge all of them by the changed `ranges` yet: {error:#}");
            problems.set(about, what);
        }
        // At every start it takes a moment until the API server has said which pods there are.
        if unclaimed > 0 && self.began.elapsed() >= PATIENCE {
            let about = About::node("pods of an earlier agent");
            let what = format!(
                "{unclaimed} pods are enforced as an earlier agent left them, without DNS, until the \
                 API server says which pods there are"
            );
            problems.set(about, what);
        }
    }

    /// Puts pods that stay as an earlier agent left them under copies of their policies if `ranges` have changed
    /// since. A copy has its own number, so flows that passed under the earlier ranges are judged again.
    fn judge_left_again(&mut self, remaining: &[u32]) -> Result<()> {
        let fingerprint = self.ranges.fingerprint();
        let mut copies: Vec<(u32, u32, Policy)> = Vec::new();
        for pod in remaining {
            let left = self.adoptable.get(pod);
            let entries = left.map_or(&[][..], |left| &left.interfaces);
            let mut policies: Vec<u32> = entries.iter().map(|(_, entry)| entry.policy).collect();
            policies.sort_unstable();
            policies.dedup();
            for policy in policies {
                let record = self.datapath.policy(policy)?;
                if let Some(record) = record.filter(|record| record.ranges != fingerprint) {
                    let copy = self.next_policy;
                    self.next_policy += 1;
                    let ranges = fingerprint;
                    copies.push((policy, copy, Policy { ranges, ..record }));
                }
            }
        }
        if copies.is_empty() {
            return Ok(());
        }
        let mut interfaces = self.datapath.interfaces()?;
        let mut failure = Ok(());
        let made = self.datapath.copy_policies(&copies);
        for (&(policy, copy, _), mut done) in copies.iter().zip(made) {
            let left = self.adoptable.values_mut();
            let entries = left.flat_map(|left| &mut left.interfaces);
            for (ifindex, entry) in entries.filter(|(_, entry)| entry.policy == policy) {
                if done.is_ok() {
                    let next = Interface {
                        policy: copy,
                        ..*entry
                    };
                    done = interfaces.set(*ifindex, next).map(|()| *entry = next);
                }
            }
            match done {
                Ok(()) => self.unused.push(Unused::Policy(policy)),
                Err(error) => failure = Err(error),
            }
        }
        failure
    }

    /// Removes policies that nothing is under: their agent was killed while it changed them.
    pub(in crate::control) fn drop_orphans(&mut self) {
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
