//! The maps of maps, and concurrent changes of many of their entries.
//!
//! After each change of such a map, the kernel makes the caller wait until no program can use
//! the former entry: one or two RCU grace periods of some 15 ms
//! (`maybe_wait_bpf_programs`, kernel/bpf/syscall.c). Callers that wait at the same time wait for
//! the same grace periods. So each change is made on a thread of its own, up to a limit, and a
//! hundred changes take little longer than one.

use std::{
    os::fd::AsFd as _,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use aya::maps::{HashOfMaps, Map, MapData, MapError};
use egress_common::ids::{PodId, PolicyId};

use super::policies::ignore_missing;

/// Most threads that wait at the same time. They do nothing else.
const THREADS: usize = 128;

/// Stack of such a thread: enough for a system call and an error.
const STACK: usize = 128 * 1024;

/// The place of an inner map: one of the maps of maps, and the key there.
#[derive(Clone, Copy, Debug)]
pub(super) enum Outer {
    Allow(PolicyId),
    Cidrs(PolicyId),
    Flows(PodId),
    Inbound(PodId),
    Opening(PodId),
    Called(PodId),
    OrderFromPod(PodId),
    OrderToPod(PodId),
    Decisions(PolicyId),
    Learned(PolicyId),
    Pending(PodId),
}

impl Outer {
    /// The places of the maps that a pod has of its own.
    pub(super) fn of_pod(pod: PodId) -> [Self; 6] {
        [
            Self::Flows(pod),
            Self::Inbound(pod),
            Self::Opening(pod),
            Self::Called(pod),
            Self::OrderFromPod(pod),
            Self::OrderToPod(pod),
        ]
    }

    /// The name of the map of maps.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Allow(_) => "allow",
            Self::Cidrs(_) => "cidrs",
            Self::Flows(_) => "flows",
            Self::Inbound(_) => "inbound",
            Self::Opening(_) => "opening",
            Self::Called(_) => "called",
            Self::OrderFromPod(_) => "order_from_pod",
            Self::OrderToPod(_) => "order_to_pod",
            Self::Decisions(_) => "decisions",
            Self::Learned(_) => "learned",
            Self::Pending(_) => "pending",
        }
    }

    fn key(self) -> u32 {
        match self {
            Self::Allow(policy)
            | Self::Cidrs(policy)
            | Self::Decisions(policy)
            | Self::Learned(policy) => policy.get(),
            Self::Flows(pod)
            | Self::Inbound(pod)
            | Self::Opening(pod)
            | Self::Called(pod)
            | Self::OrderFromPod(pod)
            | Self::OrderToPod(pod)
            | Self::Pending(pod) => pod.get(),
        }
    }
}

/// A change of one entry.
pub(super) enum Change {
    /// Puts an inner map at its place.
    Insert(Outer, MapData),
    /// Removes the inner map from its place; a missing entry is not an error.
    Remove(Outer),
}

/// The maps of maps.
pub(super) struct OuterMaps {
    allow: MapData,
    cidrs: MapData,
    flows: MapData,
    inbound: MapData,
    opening: MapData,
    called: MapData,
    order_from_pod: MapData,
    order_to_pod: MapData,
    decisions: MapData,
    learned: MapData,
    pending: MapData,
}

impl OuterMaps {
    /// Opens the maps; `open` opens the map of a name.
    pub(super) fn open(open: impl Fn(&str) -> Result<MapData>) -> Result<Self> {
        Ok(Self {
            allow: open("allow")?,
            cidrs: open("cidrs")?,
            flows: open("flows")?,
            inbound: open("inbound")?,
            opening: open("opening")?,
            called: open("called")?,
            order_from_pod: open("order_from_pod")?,
            order_to_pod: open("order_to_pod")?,
            decisions: open("decisions")?,
            learned: open("learned")?,
            pending: open("pending")?,
        })
    }

    /// The inner map at this place.
    pub(super) fn get(&self, outer: Outer) -> Result<Option<MapData>> {
        match self.handle(outer)?.get(&outer.key(), 0) {
            Ok(inner) => Ok(Some(inner)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => {
                Err(error).with_context(|| format!("cannot read the map `{}`", outer.name()))
            }
        }
    }

    /// Makes all changes, in any order, and returns the result of each, in the order of `changes`. When
    /// this returns, no program uses a removed map.
    pub(super) fn change(&self, changes: Vec<Change>) -> Vec<Result<()>> {
        let mut results = Vec::new();
        results.resize_with(changes.len(), || Err(anyhow!("not tried")));
        let threads = changes.len().min(THREADS);
        let results = Mutex::new(results);
        let queue = Mutex::new(changes.into_iter().enumerate());
        let work = || {
            loop {
                let next = lock(&queue).next();
                let Some((i, change)) = next else {
                    return;
                };
                let result = self.make(change);
                lock(&results)[i] = result;
            }
        };
        thread::scope(|scope| {
            for _ in 1..threads {
                let thread = thread::Builder::new().name("maps".into()).stack_size(STACK);
                // Fewer threads only take longer.
                if thread.spawn_scoped(scope, work).is_err() {
                    break;
                }
            }
            work();
        });
        results.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(&self, change: Change) -> Result<()> {
        let (outer, result) = match change {
            Change::Insert(outer, inner) => {
                (outer, self.handle(outer)?.insert(outer.key(), &inner, 0))
            }
            Change::Remove(outer) => (
                outer,
                ignore_missing(self.handle(outer)?.remove(&outer.key())),
            ),
        };
        result.with_context(|| format!("cannot write the map `{}`", outer.name()))
    }

    /// A new handle for the caller, because two threads cannot write through one of aya's.
    fn handle(&self, outer: Outer) -> Result<HashOfMaps<MapData, u32, MapData>> {
        let map = match outer {
            Outer::Allow(_) => &self.allow,
            Outer::Cidrs(_) => &self.cidrs,
            Outer::Flows(_) => &self.flows,
            Outer::Inbound(_) => &self.inbound,
            Outer::Opening(_) => &self.opening,
            Outer::Called(_) => &self.called,
            Outer::OrderFromPod(_) => &self.order_from_pod,
            Outer::OrderToPod(_) => &self.order_to_pod,
            Outer::Decisions(_) => &self.decisions,
            Outer::Learned(_) => &self.learned,
            Outer::Pending(_) => &self.pending,
        };
        Ok(HashOfMaps::try_from(Map::HashOfMaps(another(map)?))?)
    }
}

/// Another handle on the same map.
pub(super) fn another(map: &MapData) -> Result<MapData> {
    let fd = map.fd().as_fd().try_clone_to_owned();
    let map = fd
        .map(MapData::from_fd)
        .context("cannot open a map once more")?;
    Ok(map?)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
