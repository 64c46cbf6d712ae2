//! State that an earlier agent, or a failed attempt, left in the kernel.

use std::collections::HashSet;

use anyhow::Result;
use egress_common::{
    ids::{PodId, PolicyId},
    records::Policy,
};

use super::{Applier, Outcome};
use crate::{control::plan::wanted::RangesVersion, datapath::Unused, report::Subject};

impl Applier {
    /// Removes the state of a pod that an earlier agent, or a failed attempt, left in the kernel.
    pub(super) async fn remove_left(&mut self, pod: PodId, outcome: &mut Outcome) {
        let Some(left) = self.left.get(&pod).cloned() else {
            return;
        };
        let subject = Subject::from_fields(&left.namespace, &left.name);
        // The next reconcile tries again to enforce this pod.
        if outcome.has_failed(&subject, &left.uid) {
            return;
        }
        match self.remove_state(pod, &left).await {
            Ok(()) => {
                self.left.remove(&pod);
                tracing::info!(pod = %subject, "removed its leftover state");
            }
            Err(error) => {
                let what = format!("cannot remove its leftover state: {error:#}");
                outcome.problems.set(subject, what);
            }
        }
    }

    /// Puts the pods that are kept as an earlier agent left them under copies of their policies if `ranges` have
    /// changed since. A copy has its own number, so flows that passed under the earlier ranges are judged again.
    pub(super) fn judge_left_again(&mut self, kept: &[PodId], ranges: RangesVersion) -> Result<()> {
        let fingerprint = ranges.fingerprint();
        let mut copies: Vec<(PolicyId, PolicyId, Policy)> = Vec::new();
        for pod in kept {
            let left = self.left.get(pod);
            let entries = left.map_or(&[][..], |left| &left.interfaces);
            let mut policies: Vec<PolicyId> =
                entries.iter().map(|(_, entry)| entry.policy()).collect();
            policies.sort_unstable();
            policies.dedup();
            for policy in policies {
                let record = self.datapath.policy(policy)?;
                if let Some(record) = record.filter(|record| record.ranges != fingerprint) {
                    let copy = self.ids.next_policy();
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
            let left = self.left.values_mut();
            let entries = left.flat_map(|left| &mut left.interfaces);
            for (ifindex, entry) in entries.filter(|(_, entry)| entry.policy() == policy) {
                if done.is_ok() {
                    let next = entry.under(copy);
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

    /// Removes policies that no interface is under: an agent was killed while it changed them.
    pub(in crate::control) fn remove_orphans(&mut self) {
        let used: HashSet<PolicyId> = self
            .enforced
            .values()
            .map(|enforced| enforced.policy)
            .chain(self.left.values().flat_map(|left| {
                let entries = left.interfaces.iter();
                entries.map(|(_, entry)| entry.policy())
            }))
            .collect();
        let orphans = self.datapath.policy_ids().and_then(|ids| {
            let orphans = ids.into_iter().filter(|id| !used.contains(id));
            self.unused.extend(orphans.map(Unused::Policy));
            self.remove_unused_now()
        });
        if let Err(error) = orphans {
            tracing::error!(error = %format!("{error:#}"), "cannot remove unused policies");
        }
    }
}
