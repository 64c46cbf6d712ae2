//! This machine: its interfaces, its addresses, and a handle for reading more.

use std::{collections::HashSet, io, net::IpAddr};

use egress_common::ids::IfIndex;

use crate::host::{self, Host, Links, Network, SocketsOf};

/// This machine as it was last seen.
pub(in crate::control) struct Machine {
    pub(in crate::control) host: Host,
    /// The interfaces of the host.
    pub(in crate::control) links: Links,
    /// The node's own addresses.
    pub(in crate::control) addresses: HashSet<IpAddr>,
    /// The addresses of the gateways in its routes.
    pub(in crate::control) gateways: HashSet<IpAddr>,
}

impl Machine {
    pub(in crate::control) fn new(host: Host) -> Self {
        Self {
            host,
            links: Links::default(),
            addresses: HashSet::new(),
            gateways: HashSet::new(),
        }
    }

    /// Reads the addresses and the gateways again. Those that cannot be read stay as they were.
    pub(super) fn look_at_addresses(&mut self) {
        match self.host.own_addresses() {
            Ok(addresses) => self.addresses = addresses.into_iter().collect(),
            Err(error) => tracing::error!(%error, "the node's addresses cannot be listed"),
        }
        match host::gateways() {
            Ok(gateways) => self.gateways = gateways,
            Err(error) => tracing::error!(%error, "the node's gateways cannot be listed"),
        }
    }

    /// The sockets in the network namespaces of a pod: in `networks`, or if these are not known, in those that
    /// its interfaces lead to.
    pub(in crate::control) fn sockets(
        &mut self,
        networks: &[Network],
        interfaces: &[IfIndex],
    ) -> Vec<io::Result<SocketsOf>> {
        if networks.is_empty() {
            let interfaces = interfaces.iter();
            return interfaces
                .map(|&ifindex| self.host.sockets_behind(ifindex))
                .collect();
        }
        let networks = networks.iter();
        networks.map(|network| self.host.sockets(network)).collect()
    }
}
