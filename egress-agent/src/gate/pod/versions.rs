//! Moves a pod from one version of its policy to the next, also from the version under which an earlier agent
//! left it.

use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use egress_common::records::MODE_AUDIT;
use tokio::sync::oneshot;

use super::{
    super::{
        Enforcement, backlog::Backlog, carry_over::CarryOver, fragments::Fragments, learned::Table,
        pending::Pending, share::Share, stream::Streams,
    },
    DecidedNames, InterfaceMap, LeftLifetimes, Pod, Shared, Tallies, boottime_ns,
};

/// Most names of addresses that are carried over in one turn: that takes about as long as a few messages.
const PART: usize = 64;

const CANNOT_FILL: &str = "cannot fill the allow map of the new policy";

/// Where the result of a command goes.
pub(in super::super) type Done = oneshot::Sender<Result<()>>;

/// A new version of a pod's policy whose allow map is being filled.
pub(super) struct Change {
    next: Enforcement,
    /// `None` if the allow map needs no more entries.
    carry: Option<CarryOver>,
    done: Done,
}

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
        let mut left = std::mem::take(&mut enforcement.left);
        let mut left_lifetimes = LeftLifetimes::default();
        let learned = if left.is_empty() {
            let entries = enforcement.allow.entries()?;
            Table::taken_over(entries, &kept, Some(&compiled.names))
        } else {
            let mut entries = Vec::new();
            for left in &left {
                entries.extend(left.allow.entries()?);
            }
            let alike = left.iter().all(|left| left.alike);
            let mut before = Table::taken_over(entries, &kept, alike.then_some(&compiled.names));
            // What the programs have learned of these names while no agent ran.
            for learning in left.iter_mut().filter_map(|left| left.allow.learning()) {
                let lifetimes = learning.lifetimes()?;
                left_lifetimes.add(&lifetimes);
                before.refresh(lifetimes);
            }
            let learned = before
                .carry_over(&compiled.names, alike, &mut enforcement, now_ns)
                .context(CANNOT_FILL)?;
            log_nameless(&enforcement, if alike { 0 } else { before.nameless() });
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
            change: None,
            replaced: Vec::new(),
            streams: Streams::new(),
            fragments: Fragments::new(),
            unfinished: None,
            is_deciding: false,
            share: Share::new(now_ns),
            backlog: Backlog::default(),
            tallies: Tallies::default(),
            decided: DecidedNames::default(),
            left_lifetimes,
            cleaned_ns: now_ns,
        })
    }

    /// Forgets the names that an earlier agent kept and that this table does not have. Called when the pod is
    /// under its policy.
    pub(in super::super) fn forget_stale_names(&mut self) {
        let kept = std::mem::take(&mut self.stale_names);
        self.learned
            .forget_names_not_in_table(&kept, &mut self.enforcement);
    }

    /// Begins to move the pod to a new version of its policy. [`Self::continue_change`] goes on until `done` has the
    /// result. The pod's messages wait meanwhile.
    pub(in super::super) fn change(&mut self, next: Enforcement, done: Done) {
        self.cancel_change();
        self.refresh_learned();
        let before = &self.enforcement;
        let alike = next.compiled.record.names_alike(&before.compiled.record);
        // If the version is the same, an earlier attempt failed after this step. If the map is, it has all of the
        // version's entries.
        let has_entries =
            next.entry.policy() == before.entry.policy() || next.allow.is_same(&before.allow);
        let carry = (!has_entries).then(|| {
            let rules = &next.compiled.names;
            CarryOver::begin(&self.learned, rules, alike, &next, boottime_ns())
        });
        match carry.transpose() {
            Ok(carry) => {
                self.change = Some(Box::new(Change { next, carry, done }));
            }
            Err(error) => {
                let _ = done.send(Err(error).context(CANNOT_FILL));
            }
        }
    }

    /// Whether the pod is about to be moved to a new version of its policy.
    pub(in super::super) fn is_changing(&self) -> bool {
        self.change.is_some()
    }

    /// Cancels a change that is under way, because the pod is moved, released or removed. Until then the pod stays
    /// under its earlier version.
    pub(in super::super) fn cancel_change(&mut self) {
        if let Some(change) = self.change.take() {
            self.replaced
                .extend(change.carry.map(CarryOver::into_table));
            let _ = change.done.send(Err(anyhow!(
                "the change was cancelled by a later command for the pod"
            )));
        }
    }

    /// Whether tables of earlier versions are left.
    pub(super) fn has_replaced(&self) -> bool {
        !self.replaced.is_empty()
    }

    /// Forgets a part of the entries that earlier versions had and the present one does not have. Returns whether
    /// there were any.
    pub(in super::super) fn forget_replaced(&mut self) -> bool {
        let Some(replaced) = self.replaced.last_mut() else {
            return false;
        };
        if forget_part(replaced, &mut self.learned, &mut self.enforcement) {
            self.replaced.pop();
        }
        true
    }

    /// Carries a part of the learned addresses over to the new version. When all have been carried over, puts the pod
    /// under that version.
    pub(in super::super) fn continue_change(
        &mut self,
        interfaces: &mut InterfaceMap,
        shared: &mut Shared,
    ) {
        // First, so that no name is forgotten that the new version has.
        if self.is_changing() && self.forget_replaced() {
            return;
        }
        let Some(mut change) = self.change.take() else {
            return;
        };
        let carried = change.carry.as_mut().map_or(Ok(true), |carry| {
            let (rules, now_ns) = (Arc::clone(&change.next.compiled), boottime_ns());
            let before = &self.learned;
            carry.carry_part(before, &rules.names, &mut change.next, now_ns, PART)
        });
        let result = match carried {
            Ok(false) => {
                self.change = Some(change);
                return;
            }
            Ok(true) => {
                let Change { next, carry, done } = *change;
                let result = self.put_under(next, carry, interfaces, shared);
                let _ = done.send(result);
                return;
            }
            Err(error) => Err(error).context(CANNOT_FILL),
        };
        self.replaced
            .extend(change.carry.map(CarryOver::into_table));
        let _ = change.done.send(result);
    }

    /// Puts the pod under a version whose allow map has all of its addresses. `carried` has its table, if it is not
    /// that of the version before.
    ///
    /// # Errors
    ///
    /// When the map of interfaces cannot be written; the pod then stays under its earlier version.
    fn put_under(
        &mut self,
        mut next: Enforcement,
        carried: Option<CarryOver>,
        interfaces: &mut InterfaceMap,
        shared: &mut Shared,
    ) -> Result<()> {
        if next.entry.mode == MODE_AUDIT {
            self.end_split_streams(shared);
        }
        next.start_learning();
        if let Err(error) = next.write_interfaces(interfaces, &mut shared.frame_sender) {
            self.replaced.extend(carried.map(CarryOver::into_table));
            return Err(error);
        }
        self.decided = DecidedNames::default();
        // Its classes are those of the version before.
        self.learned.insertion = None;
        if let Some(carried) = carried {
            log_nameless(&next, carried.nameless());
            let mut learned = carried.into_table();
            // Log lines that are still due are about the pod, whichever version it is under.
            learned.failures = std::mem::take(&mut self.learned.failures);
            learned.names_lost.take_from(&mut self.learned.names_lost);
            self.replaced
                .push(std::mem::replace(&mut self.learned, learned));
        }
        for ifindex in &self.enforcement.interfaces {
            if !next.interfaces.contains(ifindex) {
                shared.frame_sender.unassign(*ifindex, next.entry.pod());
                interfaces.remove(*ifindex, next.entry.pod())?;
            }
        }
        self.enforcement = next;
        self.keep_streams(shared);
        self.end_quarantine(shared);
        Ok(())
    }

    /// Sends the quarantined queries of the pod's interfaces to be judged again if the pod is known; otherwise assigns
    /// them to this pod.
    pub(in super::super) fn end_quarantine(&self, shared: &mut Shared) {
        for &ifindex in self.interfaces() {
            if self.is_known() {
                shared.judge_again(ifindex);
            } else {
                let id = self.enforcement.entry.pod();
                shared.quarantine.reassign(ifindex, id);
            }
        }
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

/// Removes the kept names of some addresses of an earlier version that the present table does not have, and forgets
/// these addresses. Returns whether none is left.
fn forget_part(replaced: &mut Table, learned: &mut Table, names: &mut Enforcement) -> bool {
    let mut done = 0;
    while done < PART {
        let Some((address, forgotten)) = replaced.addresses.pop_lru() else {
            return true;
        };
        done += 1 + forgotten.sources.len();
        learned.forget_names_of(address, &forgotten, names);
    }
    replaced.addresses.is_empty()
}

/// Logs how many addresses are not carried over because the names that allowed them are not known.
fn log_nameless(enforcement: &Enforcement, addresses: usize) {
    if addresses > 0 {
        tracing::warn!(
            pod = %enforcement.name(),
            addresses,
            "addresses that an earlier agent allowed are closed until the pod resolves them again: the policy \
             has changed, and their names were not kept"
        );
    }
}
