//! Judging pods that may have connections from before.
//!
//! See "Connections from before the agent" in docs/pods.md for the order and the reasons.

use std::{
    io, panic,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use egress_common::ids::{PodId, PolicyId};
use tokio::task::JoinSet;

use super::{Applier, Outcome, connections, enforce::log_enforcing};
use crate::{
    control::{observe::machine::Machine, plan::wanted::Wanted},
    datapath::{FlowMap, boottime_ns},
    gate::Judged,
    host::{OpenSockets, SocketsOf},
    report::Subject,
};

/// How long only the sources of what a pod sends are judged, before flows that others open are noted. By then the node
/// has dealt with all frames that the pod sent before.
const SETTLING: Duration = Duration::from_millis(50);
/// How many pods' sockets are read at a time.
const READERS: usize = 8;
/// A pod's policy is reported as late after this time.
const LATE: Duration = Duration::from_millis(250);

impl Applier {
    /// Judges everything that the pods send that have begun with only their sources judged. A pod for which this
    /// fails is detached from again.
    ///
    /// All other pods have been dealt with by now, so a pod with many sockets delays none of them.
    pub(super) async fn settle(&mut self, machine: &mut Machine, outcome: &mut Outcome) {
        let mut pods = std::mem::take(&mut self.settling);
        if pods.is_empty() {
            return;
        }
        tokio::time::sleep(SETTLING).await;
        let mut failed = Vec::new();
        let mut noting = Vec::new();
        let begun = Instant::now();
        for subject in pods.drain(..) {
            match self.judge_more(&subject, Judged::SourcesAndInbound).await {
                Ok(()) => noting.push(subject),
                Err(error) => failed.push((subject, error)),
            }
        }
        let mut reading = JoinSet::new();
        loop {
            while reading.len() < READERS
                && let Some(subject) = noting.pop()
            {
                let wanted = self.enforced.get(&subject).map(|pod| &pod.wanted);
                let namespaces = wanted.map_or_else(Vec::new, |wanted| {
                    machine.sockets(&wanted.networks, &wanted.interfaces)
                });
                reading.spawn_blocking(move || (subject, read(namespaces)));
            }
            let Some(read) = reading.join_next().await else {
                break;
            };
            let (subject, sockets) =
                read.unwrap_or_else(|error| panic::resume_unwind(error.into_panic()));
            let count: usize = sockets
                .iter()
                .flatten()
                .map(|open| open.sockets.len())
                .sum();
            match self.judge_all(&subject, sockets).await {
                Ok(()) if begun.elapsed() >= LATE => tracing::info!(
                    pod = %subject,
                    took_ms = begun.elapsed().as_millis() as u64,
                    sockets = count,
                    "the policy is in force late: only the sources of the pod's packets were judged until the open \
                     connections of all pods that begin together were read"
                ),
                Ok(()) => {}
                Err(error) => failed.push((subject, error)),
            }
        }
        for (subject, error) in failed {
            if let Some(pod) = self.enforced.get(&subject) {
                outcome.unjudged.extend(&pod.wanted.interfaces);
                let problem = format!("not enforced yet: {error:#}");
                outcome.fail(&subject, &pod.wanted.uid, Some(problem));
            }
            self.remove(&subject).await;
        }
    }

    async fn judge_more(&self, subject: &Subject, judged: Judged) -> Result<()> {
        let pod = self.enforced.get(subject).context("the pod is gone")?.pod;
        self.gate.judge(pod, judged).await
    }

    /// Notes a pod's open connections, and judges everything from then on.
    async fn judge_all(
        &mut self,
        subject: &Subject,
        sockets: Vec<io::Result<OpenSockets>>,
    ) -> Result<()> {
        let pod = self.enforced.get(subject).context("the pod is gone")?;
        let (wanted, id, policy) = (pod.wanted.clone(), pod.pod, pod.policy);
        let mut flows = self.flows_of(id)?;
        self.connections.note(
            &self.datapath,
            subject,
            &wanted.record,
            &mut flows,
            policy,
            sockets,
        );
        self.judge_more(subject, Judged::Everything).await?;
        log_enforcing(subject, &wanted);
        Ok(())
    }

    /// Notes the connections that a pod has open on interfaces where it is about to be judged.
    pub(super) async fn seed(
        &mut self,
        subject: &Subject,
        wanted: &Wanted,
        flows: &mut FlowMap,
        policy: PolicyId,
        machine: &mut Machine,
    ) {
        let namespaces = machine.sockets(&wanted.networks, &wanted.interfaces);
        let sockets = tokio::task::spawn_blocking(move || read(namespaces)).await;
        let sockets = sockets.unwrap_or_else(|error| panic::resume_unwind(error.into_panic()));
        let record = &wanted.record;
        self.connections
            .note(&self.datapath, subject, record, flows, policy, sockets);
    }

    /// Records the connections that the pod has opened through interfaces where nobody has judged its packets, in
    /// networks whose sockets were read before.
    pub(super) async fn note_called(
        &mut self,
        subject: &Subject,
        wanted: &Wanted,
        flows: &mut FlowMap,
        machine: &mut Machine,
    ) {
        let namespaces = machine.sockets(&wanted.networks, &wanted.interfaces);
        let sockets = tokio::task::spawn_blocking(move || read(namespaces)).await;
        let sockets = sockets.unwrap_or_else(|error| panic::resume_unwind(error.into_panic()));
        let mut noted: Result<()> = Ok(());
        for open in sockets {
            let of_one = open.map_err(anyhow::Error::from);
            noted =
                noted.and(of_one.and_then(|open| connections::note_called(flows, &open.sockets)));
        }
        if let Err(error) = noted {
            tracing::warn!(
                pod = %subject,
                error = %format!("{error:#}"),
                "cannot record all connections that the pod has opened by its new interfaces: they end, but a SYN in \
                 their server's name could open them again"
            );
        }
    }

    /// Keeps the flows that others have opened towards these interfaces while they were in quarantine, and what earlier
    /// pods of the interfaces have recorded.
    pub(super) fn take_from_earlier(
        &self,
        pod: PodId,
        wanted: &Wanted,
        flows: &mut FlowMap,
    ) -> Result<()> {
        for quarantined in self.quarantined_flows(wanted) {
            flows.take_inbound(quarantined, boottime_ns())?;
        }
        self.note_from_gone(pod, wanted, flows)
    }

    /// Copies what these interfaces' flows have recorded between [`Self::take_from_earlier`] and the moment when the
    /// interfaces became the pod's.
    pub(super) fn note_from_earlier(
        &self,
        pod: PodId,
        wanted: &Wanted,
        flows: &mut FlowMap,
    ) -> Result<()> {
        for quarantined in self.quarantined_flows(wanted) {
            flows.take_noted(quarantined, boottime_ns())?;
        }
        self.note_from_gone(pod, wanted, flows)
    }

    /// Copies what pods that are gone, and still have one of these interfaces, have recorded: their processes may go on.
    fn note_from_gone(&self, pod: PodId, wanted: &Wanted, flows: &mut FlowMap) -> Result<()> {
        let gone = self.left.iter().filter(|(id, left)| {
            let mut interfaces = left.interfaces.iter();
            **id != pod && interfaces.any(|(ifindex, _)| wanted.interfaces.contains(ifindex))
        });
        for (&id, _) in gone {
            if let Some(recorded) = self.datapath.flow_map(id)? {
                flows.take_noted(&recorded, boottime_ns())?;
            }
        }
        Ok(())
    }

    /// The flow maps of these interfaces from their quarantine.
    fn quarantined_flows(&self, wanted: &Wanted) -> impl Iterator<Item = &FlowMap> {
        self.enforced
            .iter()
            .filter(|(subject, enforced)| {
                let mut interfaces = enforced.wanted.interfaces.iter();
                subject.is_interface()
                    && interfaces.any(|ifindex| wanted.interfaces.contains(ifindex))
            })
            .map(|(_, enforced)| &enforced.flows)
    }
}

fn read(namespaces: Vec<io::Result<SocketsOf>>) -> Vec<io::Result<OpenSockets>> {
    let namespaces = namespaces.into_iter();
    namespaces
        .map(|namespace| namespace.and_then(|namespace| namespace.read()))
        .collect()
}
