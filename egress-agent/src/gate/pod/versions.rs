//! Moves a pod from one version of its policy to the next, also from the version under which an earlier agent
//! left it.

use std::sync::Arc;

use anyhow::{Context as _, Result};

use super::{
    super::{
        Enforcement, backlog::Backlog, fragments::Fragments, frame_sender::FrameSender,
        learned::Table, pending::Pending, share::Share, stream::Streams,
    },
    InterfaceMap, Pod, Shared, Tallies, boottime_ns,
};

impl Pod {
    /// A pod that is new at the gate. The entries that an earlier agent left in its allow map stay. Entries
    /// under another version of the policy are carried over.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub(in super::super) fn new(mut enforcement: Enforcement, now_ns: u64) -> Result<Self> {
        let kept = enforcement.names.entries()?;
        let compiled = Arc::clone(&enforcement.compiled);
        let left = std::mem::take(&mut enforcement.left);
        let learned = if left.is_empty() {
            let entries = enforcement.allow.entries()?;
            Table::taken_over(entries, &kept, Some(&compiled.names))
        } else {
            let mut entries = Vec::new();
            for left in &left {
                entries.extend(left.allow.entries()?);
            }
            let alike = left.iter().all(|left| left.alike);
            let before = Table::taken_over(entries, &kept, alike.then_some(&compiled.names));
            let learned = before
                .carry_over(&compiled.names, alike, &mut enforcement, now_ns)
                .context("cannot fill the allow map of the new policy")?;
            log_nameless(&enforcement, &before, alike);
            // An earlier attempt to add the pod may have written more entries.
            for (address, _) in enforcement.allow.entries()? {
                if !learned.addresses.contains(&address) {
                    enforcement.allow.remove(address)?;
                }
            }
            learned
        };
        Ok(Self {
            stale_names: kept,
            enforcement,
            pending: Pending::new(),
            learned,
            streams: Streams::new(),
            fragments: Fragments::new(),
            share: Share::new(now_ns),
            backlog: Backlog::default(),
            tallies: Tallies::default(),
        })
    }

    /// Forgets the names that an earlier agent kept and that this table does not have. Called when the pod is
    /// under its policy.
    pub(in super::super) fn forget_stale_names(&mut self) {
        let kept = std::mem::take(&mut self.stale_names);
        self.learned
            .forget_names_not_in_table(&kept, &mut self.enforcement);
    }

    /// Moves the pod to a new version of its policy.
    ///
    /// # Errors
    ///
    /// When a map cannot be written; the pod then stays under its earlier version.
    pub(in super::super) fn apply(
        &mut self,
        mut next: Enforcement,
        interfaces: &mut InterfaceMap,
        frame_sender: &mut FrameSender,
    ) -> Result<()> {
        let alike = next
            .compiled
            .record
            .names_alike(&self.enforcement.compiled.record);
        // If the version is the same, an earlier attempt failed after this step. If the map is, it has all of the
        // version's entries.
        let mut learned = (next.entry.policy() != self.enforcement.entry.policy()
            && !next.allow.is_same(&self.enforcement.allow))
        .then(|| {
            let compiled = Arc::clone(&next.compiled);
            self.learned
                .carry_over(&compiled.names, alike, &mut next, boottime_ns())
        })
        .transpose()
        .context("cannot fill the allow map of the new policy")?;
        if let Some(learned) = &mut learned {
            learned.keep_names_missing_in(&self.learned, &mut next);
        }
        next.write_interfaces(interfaces, frame_sender)?;
        if let Some(mut learned) = learned {
            log_nameless(&next, &self.learned, alike);
            self.learned
                .forget_names_missing_in(&mut learned, &mut next);
            // Log lines that are still due are about the pod, whichever version it is under.
            learned.failures = std::mem::take(&mut self.learned.failures);
            learned.names_lost.take_from(&mut self.learned.names_lost);
            self.learned = learned;
        }
        for ifindex in &self.enforcement.interfaces {
            if !next.interfaces.contains(ifindex) {
                frame_sender.detach(*ifindex, next.entry.pod());
                interfaces.remove(*ifindex, next.entry.pod())?;
            }
        }
        self.enforcement = next;
        Ok(())
    }

    /// Counts names that could not be kept. Logs this once for each pod: the state lasts until addresses
    /// expire.
    pub(super) fn count_names_lost(&mut self, shared: &Shared) {
        let Some((names, error)) = self.learned.names_lost.take() else {
            return;
        };
        shared.context.stats.names_not_kept.add(names);
        if !std::mem::replace(&mut self.tallies.has_logged_names_lost, true) {
            tracing::warn!(
                pod = %self.enforcement.name(),
                %error,
                "cannot keep all names of the pod's addresses for the next agent: if the agent restarts \
                 and the pod's policy is edited before these names are resolved again, connections to \
                 their addresses end"
            );
        }
    }
}

/// Logs how many addresses are not carried over because the names that allowed them are not known.
fn log_nameless(enforcement: &Enforcement, before: &Table, alike: bool) {
    let addresses = if alike { 0 } else { before.nameless() };
    if addresses > 0 {
        tracing::warn!(
            pod = %enforcement.name(),
            addresses,
            "addresses that an earlier agent allowed are closed until the pod resolves them again: the policy \
             has changed, and their names were not kept"
        );
    }
}
