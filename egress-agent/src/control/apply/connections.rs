//! Connections that pods had before they were enforced: which are kept, and which are judged.
//!
//! Connections that others opened are kept, if the node's connection tracking confirms them. Connections that the pod
//! opened are judged, or kept once on each node where the operator wants that ([`Trust`]).

use std::io;

use anyhow::Result;
use egress_common::{
    ids::PolicyId,
    protocol::{self, bits},
    records::{Policy, RANGE_INTERNAL, TunnelKey},
    verdict::{Verdict, judge, judge_answer, judge_kept},
};

use crate::{
    config::{Config, ExistingConnections},
    control::{plan::wanted::mapped, state_dir::trust::Trust},
    datapath::{Datapath, FlowMap, Seed, SeedState, View, boottime_ns},
    host::{Direction, OpenSocket, OpenSockets, SocketProtocol, Unasked},
    report::Subject,
    serve::Existing,
};

/// Why a connection is unconfirmed although the node's connection tracking was asked about it.
const UNCONFIRMED: &str = "the node's connection tracking has no entry that says so";

/// What the operator wants for connections from before, and how many were kept.
pub(in crate::control) struct Connections {
    /// `existingConnections`.
    wish: ExistingConnections,
    /// Whether connections that pods have opened are kept.
    pub(in crate::control) trust: Trust,
    /// Whether `trust` applies: only until the pods found at the start have been dealt with.
    pub(super) trusting: bool,
    /// How many connections were kept.
    pub(in crate::control) existing: Existing,
}

impl Connections {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            wish: config.existing_connections,
            trust: Trust::claim(config),
            trusting: true,
            existing: Existing::default(),
        }
    }

    /// Notes these connections. If one cannot be noted, its packets are judged like any other, and the pod is still
    /// enforced.
    pub(super) fn note(
        &mut self,
        datapath: &Datapath,
        subject: &Subject,
        record: &Policy,
        flows: &mut FlowMap,
        policy: PolicyId,
        sockets: Vec<io::Result<OpenSockets>>,
    ) {
        let trusted = self.trusting && self.trust.is_given();
        let mut seeding = Seeding {
            flows,
            record,
            policy,
            keeps_inbound: self.wish != ExistingConnections::End,
            outbound: if trusted {
                SeedState::Admitted(policy)
            } else {
                SeedState::Unjudged
            },
            seeded: Existing::default(),
        };
        let mut unasked = None;
        for open in sockets {
            let done = open.map_err(anyhow::Error::from).and_then(|open| {
                if open.cut_short || open.unclear > 0 {
                    tracing::warn!(
                        pod = %subject,
                        cut_short = open.cut_short,
                        busy = open.unclear,
                        "it is not clear who opened some connections: they are judged as if the \
                         pod had"
                    );
                }
                unasked = match open.unasked {
                    Some(why) => Some(why.and(unasked.take())),
                    None => unasked.take(),
                };
                let view = datapath.view()?;
                seeding.write(&view, &open.sockets)
            });
            if let Err(error) = done {
                tracing::warn!(
                    pod = %subject,
                    error = %format!("{error:#}"),
                    "not all open connections are known: those that others opened may break"
                );
            }
        }
        let seeded = seeding.seeded;
        if seeded.unconfirmed > 0 {
            tracing::warn!(
                pod = %subject,
                connections = seeded.unconfirmed,
                because = %unasked.as_ref().map_or_else(|| UNCONFIRMED.to_owned(), Unasked::to_string),
                "connections that others seem to have opened are judged as the pod's own, because only the pod \
                 says so. Where they end, their clients have to connect again"
            );
        }
        if seeded.inbound > 0 || seeded.trusted > 0 {
            tracing::info!(
                pod = %subject,
                inbound = seeded.inbound,
                trusted = seeded.trusted,
                "connections that were open before are kept"
            );
        }
        self.existing += seeded;
    }
}

/// Records the servers that the pod has connected to, so that none of these connections returns as one that the
/// server opened. The pod's flows record the connections that others opened.
pub(super) fn note_called(flows: &mut FlowMap, sockets: &[OpenSocket]) -> Result<()> {
    let now_ns = boottime_ns();
    let may_be_the_pods = |socket: &&OpenSocket| {
        socket.protocol == SocketProtocol::Tcp && socket.direction != Direction::Inbound
    };
    for socket in sockets.iter().filter(may_be_the_pods) {
        let seed = seed_of(socket, SeedState::Unjudged);
        if !flows.has_inbound(&seed)? {
            flows.note_called(&seed, now_ns)?;
        }
    }
    Ok(())
}

fn seed_of(socket: &OpenSocket, state: SeedState) -> Seed {
    Seed {
        protocol: match socket.protocol {
            SocketProtocol::Tcp => protocol::TCP,
            SocketProtocol::Udp => protocol::UDP,
        },
        pod: (mapped(socket.local.ip()), socket.local.port()),
        peer: (mapped(socket.remote.ip()), socket.remote.port()),
        state,
    }
}

/// Writing a pod's connections into its flow maps.
struct Seeding<'a> {
    flows: &'a mut FlowMap,
    record: &'a Policy,
    policy: PolicyId,
    keeps_inbound: bool,
    /// The state of connections that the pod has opened.
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
                // The other side's next datagram opens the flow. Nothing else would prove who opened it.
                (SocketProtocol::Udp, _) => continue,
            };
            let seed = seed_of(socket, state);
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

    /// Whether a connection from before is refused: it may be a tunnel, its address is denied, or its address is
    /// protected and no address entry allows it. (On connections that others opened, `from_pod` judges everything but
    /// tunnels.)
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
        let judge_open = if seed.state == SeedState::Inbound {
            judge_answer
        } else {
            judge_kept
        };
        Ok(is_denied(judge_open(self.record, &destination, bit, *port)))
    }
}
