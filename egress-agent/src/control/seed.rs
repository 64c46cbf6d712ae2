//! Connections that a pod had open before anybody looked at them.

use anyhow::Result;
use egress_common::protocol;

use super::enforced::mapped;
use crate::{
    datapath::{FlowMap, Seed, boottime_ns},
    host,
};

/// Takes the connections of a pod's sockets for flows that its policy admitted, so that they go on
/// when enforcement begins. Returns how many there are.
///
/// # Errors
///
/// When the sockets cannot be read, or the pod's flow map not written.
pub(super) fn seed(flows: &mut FlowMap, policy: u32, pid: u32) -> Result<usize> {
    let sockets = host::sockets(pid)?;
    let now_ns = boottime_ns();
    for socket in &sockets {
        flows.seed(
            &Seed {
                protocol: match socket.protocol {
                    host::Transport::Tcp => protocol::TCP,
                    host::Transport::Udp => protocol::UDP,
                },
                pod: (mapped(socket.local.ip()), socket.local.port()),
                peer: (mapped(socket.remote.ip()), socket.remote.port()),
                inbound: socket.inbound,
            },
            policy,
            now_ns,
        )?;
    }
    Ok(sockets.len())
}
