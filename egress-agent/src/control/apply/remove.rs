//! Releasing pods, detaching from their interfaces, and removing their state.

use anyhow::Result;
use egress_common::ids::{IfIndex, PodId};

use super::{Applier, enforced::Enforced};
use crate::{
    datapath::{Adoptable, Unused},
    report::Subject,
};

impl Applier {
    /// Stops judging these pods at once. Detaching from their interfaces takes far longer.
    pub(super) async fn release(&mut self, subjects: &[Subject]) {
        let enforced = subjects
            .iter()
            .filter_map(|subject| self.enforced.get(subject));
        let free: Vec<PodId> = enforced.map(|enforced| enforced.pod).collect();
        let pods = free.len();
        match self.gate.release(free).await {
            Ok(()) => tracing::info!(pods, "released"),
            Err(error) => tracing::error!(
                error = %format!("{error:#}"),
                "early release failed; pods stay enforced until they are detached"
            ),
        }
    }

    /// Frees the name of a pod that is gone. Its interfaces stay as they are until they are taken over.
    pub(super) fn retire(&mut self, subject: &Subject) {
        if let Some(enforced) = self.enforced.remove(subject) {
            self.left.insert(enforced.pod, enforced.as_left(subject));
        }
    }

    /// Detaches from a pod's interfaces and removes its state. What cannot be removed now is left in the kernel, and
    /// removed by a later reconcile.
    pub(super) async fn remove(&mut self, subject: &Subject) {
        let Some(enforced) = self.enforced.remove(subject) else {
            return;
        };
        let left = enforced.as_left(subject);
        match self.remove_state(enforced.pod, &left).await {
            Ok(()) => tracing::info!(pod = %subject, "removed"),
            Err(error) => {
                tracing::error!(
                    pod = %subject,
                    error = %format!("{error:#}"),
                    "cannot remove all of a pod yet"
                );
                self.left.insert(enforced.pod, left);
            }
        }
    }

    /// Detaches from the interfaces of a pod that is not enforced, and removes its state. Its maps are removed
    /// together with all others that nobody uses any more.
    pub(super) async fn remove_state(&mut self, pod: PodId, left: &Adoptable) -> Result<()> {
        for &(ifindex, _) in &left.interfaces {
            self.detach(pod, ifindex)?;
        }
        self.gate.remove(pod).await?;
        let own = Subject::from_fields(&left.namespace, &left.name);
        // If a newer pod has this name, the pins are that pod's.
        if !self.enforced.contains_key(&own)
            && !self.left.iter().any(|(&id, other)| {
                id != pod && Subject::from_fields(&other.namespace, &other.name) == own
            })
        {
            self.datapath
                .pins_of(&left.namespace, &left.name)
                .remove()?;
        }
        let policies = left.interfaces.iter().map(|(_, entry)| entry.policy());
        self.unused.extend(policies.map(Unused::Policy));
        self.unused.push(Unused::Pod(pod));
        Ok(())
    }

    /// Detaches from an interface that a pod has left, unless another pod has it now. If another pod is to get it,
    /// the programs stay, and drop everything until then.
    pub(super) fn detach(&mut self, pod: PodId, ifindex: IfIndex) -> Result<()> {
        let is_on = |enforced: &Enforced| {
            enforced.pod == pod && enforced.wanted.interfaces.contains(&ifindex)
        };
        if self.enforced.values().any(is_on) || self.is_anothers(pod, ifindex) {
            return Ok(());
        }
        if self.claimed.contains(&ifindex) {
            self.vacated.insert(ifindex);
        } else {
            self.datapath.detach(ifindex)?;
        }
        self.datapath.interfaces()?.remove(ifindex, pod)
    }

    /// Detaches from interfaces that pods have left and that nobody is to be enforced on any more.
    pub(super) fn detach_vacated(&mut self) {
        for ifindex in std::mem::take(&mut self.vacated) {
            if self.is_somebodys(ifindex) {
                continue;
            }
            if self.claimed.contains(&ifindex) {
                self.vacated.insert(ifindex);
            } else if let Err(error) = self.datapath.detach(ifindex) {
                tracing::error!(
                    %ifindex,
                    error = %format!("{error:#}"),
                    "cannot detach from an interface that its pod has left; it stays closed"
                );
                self.vacated.insert(ifindex);
            }
        }
    }

    /// Whether other pods than this one are enforced on all of these interfaces.
    pub(super) fn are_taken_over(&self, pod: PodId, interfaces: &[IfIndex]) -> bool {
        let mut interfaces = interfaces.iter();
        interfaces.all(|&ifindex| self.is_taken_over(pod, ifindex))
    }

    /// The pods that are left in the kernel, other than this one, on any of these interfaces.
    pub(super) fn left_on(&self, pod: PodId, interfaces: &[IfIndex]) -> Vec<PodId> {
        let is_on = |left: &Adoptable| {
            let mut own = left.interfaces.iter();
            own.any(|(ifindex, _)| interfaces.contains(ifindex))
        };
        let left = self.left.iter();
        left.filter(|&(&id, left)| id != pod && is_on(left))
            .map(|(&id, _)| id)
            .collect()
    }

    /// Whether an interface is, or is to be, that of some pod.
    fn is_somebodys(&self, ifindex: IfIndex) -> bool {
        let mut left = self.left.values().flat_map(|left| &left.interfaces);
        let mut enforced = self.enforced.values();
        left.any(|&(other, _)| other == ifindex)
            || enforced.any(|pod| pod.wanted.interfaces.contains(&ifindex))
    }

    /// Whether an interface is, or is to be, that of another pod than this one.
    pub(super) fn is_anothers(&self, pod: PodId, ifindex: IfIndex) -> bool {
        let is_left = self.left.iter().any(|(&id, left)| {
            id != pod && left.interfaces.iter().any(|&(other, _)| other == ifindex)
        });
        is_left || self.is_taken_over(pod, ifindex)
    }

    /// Whether another pod than this one is enforced on an interface.
    fn is_taken_over(&self, pod: PodId, ifindex: IfIndex) -> bool {
        self.enforced
            .values()
            .any(|other| other.pod != pod && other.wanted.interfaces.contains(&ifindex))
    }
}
