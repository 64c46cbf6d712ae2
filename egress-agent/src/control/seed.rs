//! Connections that a pod had open before it was enforced.
//!
//! Those that others have opened go on. Those that the pod has opened are judged, or go on once on
//! each node where the operator wants that ([`super::trust`]).

use std::io;

use anyhow::Result;

use super::{
    enforced::{PodKey, Wanted, mapped},
    quarantine,
    reconcile::{Reconciler, title},
};
use crate::{
    datapath::{FlowMap, Seed, SeedState, boottime_ns},
    host::{Direction, OpenSocket, OpenSockets, SocketProtocol},
    serve::Existing,
};

impl Reconciler {
    /// Whether a pod that is about to be enforced may have connections that nobody has judged.
    pub(super) fn has_unjudged(&self, key: &PodKey, wanted: &Wanted) -> bool {
        let mut interfaces = wanted.interfaces.iter();
        !quarantine::is_quarantined(key)
            && interfaces.any(|&ifindex| self.unjudged.contains(ifindex))
    }

    /// Notes the connections that the pod has open. It is called before the first packet is judged, and
    /// once more when what others open is noted in the kernel: in between nothing gets lost. What
    /// cannot be noted is judged like any other packet, which is no reason to leave the pod unenforced.
    pub(super) fn seed(&mut self, key: &PodKey, wanted: &Wanted, flows: &mut FlowMap, policy: u32) {
        let trusted = self.trusting && self.trust.is_given();
        let mut seeded = Existing::default();
        for open in self.sockets_of(wanted) {
            let done = open.map_err(anyhow::Error::from).and_then(|open| {
                if open.cut_short || open.unclear > 0 {
                    tracing::warn!(
                        pod = %title(key),
                        cut_short = open.cut_short,
                        busy = open.unclear,
                        "not every open connection can be told: those that cannot are judged as the \
                         pod's own"
                    );
                }
                let outbound = if trusted {
                    SeedState::Admitted(policy)
                } else {
                    SeedState::Unjudged
                };
                write(flows, outbound, &open.sockets, &mut seeded)
            });
            if let Err(error) = done {
                tracing::warn!(
                    pod = %title(key),
                    error = %format!("{error:#}"),
                    "not all open connections are known: those that others have opened may end"
                );
            }
        }
        if seeded != Existing::default() {
            tracing::info!(
                pod = %title(key),
                inbound = seeded.inbound,
                trusted = seeded.trusted,
                "open connections go on"
            );
        }
        self.existing += seeded;
    }

    /// What others have opened towards an interface while nobody knew whose it was goes on.
    pub(super) fn take_from_quarantine(&self, wanted: &Wanted, flows: &mut FlowMap) -> Result<()> {
        for (key, enforced) in &self.enforced {
            let mut interfaces = enforced.wanted.interfaces.iter();
            if quarantine::is_quarantined(key)
                && interfaces.any(|ifindex| wanted.interfaces.contains(ifindex))
            {
                flows.take_inbound(&enforced.flows)?;
            }
        }
        Ok(())
    }

    fn sockets_of(&mut self, wanted: &Wanted) -> Vec<io::Result<OpenSockets>> {
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

fn write(
    flows: &mut FlowMap,
    outbound: SeedState,
    sockets: &[OpenSocket],
    seeded: &mut Existing,
) -> Result<()> {
    let now_ns = boottime_ns();
    for socket in sockets {
        let state = match (socket.protocol, socket.direction) {
            (SocketProtocol::Tcp, Direction::Inbound) => SeedState::Inbound,
            // The other side's next datagram opens the flow, and nothing but that would prove it.
            (SocketProtocol::Udp, Direction::Inbound) => continue,
            // The rules judge its next segment; without a SYN the other side opens nothing.
            (SocketProtocol::Tcp, Direction::Outbound) if outbound == SeedState::Unjudged => {
                continue;
            }
            (_, Direction::Outbound) => outbound,
        };
        let seed = Seed {
            protocol: match socket.protocol {
                SocketProtocol::Tcp => egress_common::protocol::TCP,
                SocketProtocol::Udp => egress_common::protocol::UDP,
            },
            pod: (mapped(socket.local.ip()), socket.local.port()),
            peer: (mapped(socket.remote.ip()), socket.remote.port()),
            state,
        };
        let added = u64::from(flows.seed(&seed, now_ns)?);
        match state {
            SeedState::Inbound => seeded.inbound += added,
            SeedState::Admitted(_) => seeded.trusted += added,
            SeedState::Unjudged => {}
        }
    }
    Ok(())
}
