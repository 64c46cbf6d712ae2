//! Removing maps that are not used any more.

use std::{
    panic::resume_unwind,
    sync::Arc,
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result};
use egress_common::ids::{PodId, PolicyId};

use super::{
    Datapath,
    outer::{Change, Outer, OuterMaps},
    policies::ignore_missing,
};

/// Maps that are not used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unused {
    /// The maps of a version of a policy.
    Policy(PolicyId),
    /// A pod's own maps, except its meter (see [`super::CounterMap::forget`]).
    Pod(PodId),
}

impl Unused {
    fn changes(self) -> Vec<Change> {
        match self {
            Self::Policy(id) => vec![
                Change::Remove(Outer::Allow(id)),
                Change::Remove(Outer::Cidrs(id)),
                Change::Remove(Outer::Decisions(id)),
                Change::Remove(Outer::Learned(id)),
            ],
            Self::Pod(id) => Outer::of_pod(id).map(Change::Remove).into(),
        }
    }
}

/// Maps that a thread takes out of the maps of maps, which waits for grace periods of the kernel.
pub struct Removal {
    unused: Vec<Unused>,
    thread: JoinHandle<Vec<Result<()>>>,
}

impl Removal {
    /// Whether [`Datapath::end_removal`] need not wait.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

impl Datapath {
    /// Removes maps that are not used any more, and returns the result for each. No interface may refer to
    /// them.
    pub fn remove_unused(&mut self, unused: &[Unused]) -> Vec<Result<()>> {
        let taken_out = take_out(&self.outer, unused);
        self.forget(unused, taken_out)
    }

    /// Begins to remove maps that are not used any more; [`Self::end_removal`] does the rest.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started. Nothing has been removed then.
    pub fn begin_removal(&self, unused: &[Unused]) -> Result<Removal> {
        let (outer, unused) = (Arc::clone(&self.outer), unused.to_vec());
        let removed = unused.clone();
        let thread = thread::Builder::new()
            .name("unused".into())
            .spawn(move || take_out(&outer, &removed))
            .context("cannot start a thread that removes maps")?;
        Ok(Removal { unused, thread })
    }

    /// Waits until these maps are removed; returns the result for each.
    pub fn end_removal(&mut self, removal: Removal) -> Vec<(Unused, Result<()>)> {
        let Removal { unused, thread } = removal;
        let taken_out = thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        let dropped = self.forget(&unused, taken_out);
        unused.into_iter().zip(dropped).collect()
    }

    /// Removes from the other maps what has been taken out of the maps of maps: these list everything that may be left
    /// over.
    fn forget(&mut self, unused: &[Unused], taken_out: Vec<Result<()>>) -> Vec<Result<()>> {
        let mut dropped = taken_out;
        for (&unused, dropped) in unused.iter().zip(&mut dropped) {
            if dropped.is_ok() {
                *dropped = match unused {
                    Unused::Policy(id) => ignore_missing(self.policies.remove(&id))
                        .context("cannot write the map `policies`"),
                    Unused::Pod(id) => ignore_missing(self.forged.remove(&id))
                        .context("cannot write the map `forged`")
                        .and_then(|()| {
                            ignore_missing(self.identities.remove(&id))
                                .context("cannot write the map `identities`")
                        }),
                };
            }
        }
        dropped
    }
}

/// Takes maps out of the maps of maps, all together, and returns the result for each of `unused`.
fn take_out(outer: &OuterMaps, unused: &[Unused]) -> Vec<Result<()>> {
    let mut changes = Vec::new();
    let mut owners = Vec::new();
    for (i, unused) in unused.iter().enumerate() {
        changes.extend(unused.changes());
        owners.resize(changes.len(), i);
    }
    let mut taken_out: Vec<Result<()>> = unused.iter().map(|_| Ok(())).collect();
    for (owner, result) in owners.into_iter().zip(outer.change(changes)) {
        if result.is_err() {
            taken_out[owner] = result;
        }
    }
    taken_out
}
