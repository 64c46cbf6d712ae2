//! Connections that a pod had open before anybody looked at them.

use anyhow::Result;
use egress_common::protocol;

use super::{
    enforced::{PodKey, Wanted, mapped},
    reconcile::{Reconciler, title},
};
use crate::{
    datapath::{FlowMap, Seed, boottime_ns},
    host::{Direction, OpenSocket, SocketProtocol},
};

impl Reconciler {
    /// Lets the connections go on that the pod had before there was an agent: they count as admitted
    /// by its policy. What cannot be taken on is cut, which is no reason to leave the pod unenforced.
    pub(super) fn seed(&self, key: &PodKey, wanted: &Wanted, flows: &mut FlowMap, policy: u32) {
        for network in &wanted.networks {
            match self.places.sockets(network) {
                Ok(open) => {
                    if open.cut_short {
                        tracing::warn!(
                            pod = %title(key),
                            "the pod has more sockets than are looked at: not all of its open \
                             connections go on"
                        );
                    }
                    let count = open.sockets.len();
                    match write(flows, policy, &open.sockets) {
                        Ok(()) if count == 0 => {}
                        Ok(()) => tracing::info!(
                            pod = %title(key),
                            connections = count,
                            "open connections go on"
                        ),
                        Err(error) => tracing::warn!(
                            pod = %title(key),
                            error = %format!("{error:#}"),
                            "not all open connections go on"
                        ),
                    }
                }
                Err(error) => tracing::warn!(
                    pod = %title(key),
                    %error,
                    "open connections do not go on: the pod's sockets cannot be read"
                ),
            }
        }
    }
}

fn write(flows: &mut FlowMap, policy: u32, sockets: &[OpenSocket]) -> Result<()> {
    let now_ns = boottime_ns();
    for socket in sockets {
        let seed = Seed {
            protocol: match socket.protocol {
                SocketProtocol::Tcp => protocol::TCP,
                SocketProtocol::Udp => protocol::UDP,
            },
            pod: (mapped(socket.local.ip()), socket.local.port()),
            peer: (mapped(socket.remote.ip()), socket.remote.port()),
            inbound: socket.direction == Direction::Inbound,
        };
        flows.seed(&seed, policy, now_ns)?;
    }
    Ok(())
}
