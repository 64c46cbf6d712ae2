//! Connections that a pod had open before it was enforced.
//!
//! Those that others have opened go on, if the node's connection tracking confirms it. Those that the pod
//! has opened are judged, or go on once on each node where the operator wants that ([`crate::control::state_dir::trust`]).

use std::{io, panic, time::Duration};

use anyhow::{Context as _, Result};
use egress_common::{
    protocol::{self, bits},
    records::{Policy, RANGE_INTERNAL, TunnelKey},
    verdict::{Verdict, judge, judge_answer},
};
use tokio::task::JoinSet;

use crate::control::{
    apply::enforce::say_enforcing,
    plan::wanted::{Wanted, mapped},
    reconcile::Reconciler,
};
use crate::{
    config::ExistingConnections,
    datapath::{FlowMap, Seed, SeedState, View, boottime_ns},
    gate::Judged,
    host::{Direction, OpenSocket, OpenSockets, SocketProtocol, SocketsOf},
    report::Subject,
    serve::Existing,
};

/// How long only the sources of a pod are judged before anything is noted that comes to it: by then the
/// node is done with what the pod has sent before.
const SETTLING: Duration = Duration::from_millis(50);
/// How many pods' sockets are read at a time.
const READERS: usize = 8;

impl Reconciler {
    /// Whether a pod that is about to be enforced may have connections that nobody has judged.
    pub(in crate::control) fn has_unjudged(&self, key: &Subject, wanted: &Wanted) -> bool {
        let mut interfaces = wanted.interfaces.iter();
        !key.is_interface() && interfaces.any(|&ifindex| self.unjudged.contains(ifindex))
    }

    /// Judges everything of the pods that have begun to be enforced. Returns those where that failed, which
    /// are let go of.
    ///
    /// Meanwhile all other pods have been dealt with, so a pod with many sockets delays none of them.
    pub(in crate::control) async fn settle(&mut self) -> Vec<(Subject, anyhow::Error)> {
        let mut pods = std::mem::take(&mut self.settling);
        if pods.is_empty() {
            return Vec::new();
        }
        tokio::time::sleep(SETTLING).await;
        let mut failed = Vec::new();
        let mut noting = Vec::new();
        for key in pods.drain(..) {
            match self.judge_more(&key, Judged::SourcesAndInbound).await {
                Ok(()) => noting.push(key),
                Err(error) => failed.push((key, error)),
            }
        }
        let mut reading = JoinSet::new();
        loop {
            while reading.len() < READERS
                && let Some(key) = noting.pop()
            {
                let wanted = self.enforced.get(&key).map(|pod| pod.wanted.clone());
                let namespaces = wanted.map_or_else(Vec::new, |wanted| self.namespaces_of(&wanted));
                reading.spawn_blocking(move || (key, read(namespaces)));
            }
            let Some(read) = reading.join_next().await else {
                break;
            };
            let (key, sockets) =
                read.unwrap_or_else(|error| panic::resume_unwind(error.into_panic()));
            if let Err(error) = self.judge_all(&key, sockets).await {
                failed.push((key, error));
            }
        }
        for (key, _) in &failed {
            if let Some(pod) = self.enforced.get(key) {
                self.unjudged.leave(&pod.wanted.interfaces);
            }
            self.remove(key).await;
        }
        failed
    }

    async fn judge_more(&self, key: &Subject, judged: Judged) -> Result<()> {
        let pod = self.enforced.get(key).context("the pod is gone")?.pod;
        self.gate.judge(pod, judged).await
    }

    /// Notes what a pod has open, and judges everything from then on.
    async fn judge_all(
        &mut self,
        key: &Subject,
        sockets: Vec<io::Result<OpenSockets>>,
    ) -> Result<()> {
        let pod = self.enforced.get(key).context("the pod is gone")?;
        let (wanted, id, policy) = (pod.wanted.clone(), pod.pod, pod.policy);
        let mut flows = self.flows_of(id)?;
        self.note(key, &wanted.record, &mut flows, policy, sockets);
        self.judge_more(key, Judged::Everything).await?;
        say_enforcing(key, &wanted);
        Ok(())
    }

    /// Notes the connections that a pod has open on interfaces where it is about to be judged.
    pub(in crate::control) async fn seed(
        &mut self,
        key: &Subject,
        wanted: &Wanted,
        flows: &mut FlowMap,
        policy: u32,
    ) {
        let namespaces = self.namespaces_of(wanted);
        let sockets = tokio::task::spawn_blocking(move || read(namespaces)).await;
        let sockets = sockets.unwrap_or_else(|error| panic::resume_unwind(error.into_panic()));
        self.note(key, &wanted.record, flows, policy, sockets);
    }

    /// Notes these connections. What cannot be noted is judged like any other packet, which is no reason to
    /// leave the pod unenforced.
    fn note(
        &mut self,
        key: &Subject,
        record: &Policy,
        flows: &mut FlowMap,
        policy: u32,
        sockets: Vec<io::Result<OpenSockets>>,
    ) {
        let trusted = self.trusting && self.trust.is_given();
        let mut seeding = Seeding {
            flows,
            record,
            policy,
            keeps_inbound: self.config.existing_connections != ExistingConnections::End,
            outbound: if trusted {
                SeedState::Admitted(policy)
            } else {
                SeedState::Unjudged
            },
            seeded: Existing::default(),
        };
        let mut untold = None;
        for open in sockets {
            let done = open.map_err(anyhow::Error::from).and_then(|open| {
                if open.cut_short || open.unclear > 0 {
                    tracing::warn!(
                        pod = %key,
                        cut_short = open.cut_short,
                        busy = open.unclear,
                        "not every open connection can be told: those that cannot are judged as the \
                         pod's own"
                    );
                }
                untold = open.untold.or(untold.take());
                let view = self.datapath.view()?;
                seeding.write(&view, &open.sockets)
            });
            if let Err(error) = done {
                tracing::warn!(
                    pod = %key,
                    error = %format!("{error:#}"),
                    "not all open connections are known: those that others have opened may end"
                );
            }
        }
        let seeded = seeding.seeded;
        if seeded.unconfirmed > 0 {
            tracing::warn!(
                pod = %key,
                connections = seeded.unconfirmed,
                conntrack = %untold.as_deref().unwrap_or("has no entry that says so"),
                "connections that others seem to have opened are judged as the pod's own: only the pod \
                 says so, and the node's connection tracking does not confirm it. Where they end, their \
                 clients have to connect again"
            );
        }
        if seeded.inbound > 0 || seeded.trusted > 0 {
            tracing::info!(
                pod = %key,
                inbound = seeded.inbound,
                trusted = seeded.trusted,
                "open connections go on"
            );
        }
        self.existing += seeded;
    }

    /// What others have opened towards an interface while nobody knew whose it was goes on.
    pub(in crate::control) fn take_from_quarantine(
        &self,
        wanted: &Wanted,
        flows: &mut FlowMap,
    ) -> Result<()> {
        for (key, enforced) in &self.enforced {
            let mut interfaces = enforced.wanted.interfaces.iter();
            if key.is_interface() && interfaces.any(|ifindex| wanted.interfaces.contains(ifindex)) {
                flows.take_inbound(&enforced.flows)?;
            }
        }
        Ok(())
    }

    /// The network namespaces that a pod's sockets are in.
    fn namespaces_of(&mut self, wanted: &Wanted) -> Vec<io::Result<SocketsOf>> {
        if wanted.networks.is_empty() {
            let interfaces = wanted.interfaces.iter();
            return interfaces
                .map(|&ifindex| self.places.sockets_behind(ifindex))
                .collect();
        }
        let networks = wanted.networks.iter();
        networks
            .map(|network| self.places.sockets(network))
            .collect()
    }
}

fn read(namespaces: Vec<io::Result<SocketsOf>>) -> Vec<io::Result<OpenSockets>> {
    let namespaces = namespaces.into_iter();
    namespaces
        .map(|namespace| namespace.and_then(|namespace| namespace.read()))
        .collect()
}

/// Writing a pod's connections into its flow maps.
struct Seeding<'a> {
    flows: &'a mut FlowMap,
    record: &'a Policy,
    policy: u32,
    keeps_inbound: bool,
    /// What becomes of those that the pod has opened.
    outbound: SeedState,
    seeded: Existing,
}

impl Seeding<'_> {
    fn write(&mut self, view: &View, sockets: &[OpenSocket]) -> Result<()> {
        let now_ns = boottime_ns();
        let tunnels = view.tunnels()?;
        let mut called = Ok(());
        for socket in sockets {
            let state = match (socket.protocol, socket.direction) {
                (SocketProtocol::Tcp, Direction::Inbound) if self.keeps_inbound => {
                    SeedState::Inbound
                }
                (SocketProtocol::Tcp, direction) => {
                    let is_unconfirmed = direction == Direction::Unconfirmed && self.keeps_inbound;
                    self.seeded.unconfirmed += u64::from(is_unconfirmed);
                    self.outbound
                }
                (SocketProtocol::Udp, Direction::Outbound) => self.outbound,
                // The other side's next datagram opens the flow, and nothing but that would prove it.
                (SocketProtocol::Udp, _) => continue,
            };
            let seed = Seed {
                protocol: match socket.protocol {
                    SocketProtocol::Tcp => protocol::TCP,
                    SocketProtocol::Udp => protocol::UDP,
                },
                pod: (mapped(socket.local.ip()), socket.local.port()),
                peer: (mapped(socket.remote.ip()), socket.remote.port()),
                state,
            };
            if seed.protocol == protocol::TCP && state != SeedState::Inbound {
                called = called.and(self.flows.note_called(&seed, now_ns));
                // The rules judge its next segment, and the other side's SYN opens nothing.
                if state == SeedState::Unjudged {
                    continue;
                }
            }
            if self.is_refused(view, &tunnels, &seed, now_ns)? {
                continue;
            }
            let added = u64::from(self.flows.seed(&seed, now_ns)?);
            match state {
                SeedState::Inbound => self.seeded.inbound += added,
                SeedState::Admitted(_) => self.seeded.trusted += added,
                SeedState::Unjudged => {}
            }
        }
        called
    }

    /// Whether a connection does not go on although it is from before: what the pod sends on it may be a
    /// tunnel, its address is denied, or protected and no address entry opens it. (An answer to what others
    /// have opened is judged by `from_pod`, but for tunnels.)
    fn is_refused(
        &self,
        view: &View,
        tunnels: &[TunnelKey],
        seed: &Seed,
        now_ns: u64,
    ) -> Result<bool> {
        if seed.state == SeedState::Unjudged {
            return Ok(false);
        }
        let bit = match seed.protocol {
            protocol::UDP => bits::UDP,
            _ => bits::TCP,
        };
        let (address, port) = &seed.peer;
        let policy = (self.policy, self.record);
        let (mut destination, _) = view.destination(policy, address, now_ns)?;
        let is_internal = destination.ranges & RANGE_INTERNAL != 0;
        let is_tunnel = is_internal && tunnels.contains(&TunnelKey::new(bit, *port));
        destination.tunnel = u64::from(is_tunnel);
        let is_denied = |verdict| matches!(verdict, Verdict::Deny { .. });
        if destination.needs_address_entry()
            && (is_tunnel || seed.state != SeedState::Inbound)
            && is_denied(judge(self.record, &destination, bit, *port))
        {
            return Ok(true);
        }
        Ok(is_denied(judge_answer(
            self.record,
            &destination,
            bit,
            *port,
        )))
    }
}
