//! The records for addresses on the link.

use crate::address::Address;

/// Key of `link_owners`: a link-local address in use on one of this node's links.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct LinkAddress {
    /// The address.
    pub addr: Address,
}

/// Value of `link_owners`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct LinkOwner {
    /// The pod's interface that used it first; [`NODE_OWNS`] for the node itself and the gateways that it
    /// knows.
    pub ifindex: u32,
}

/// The owner of addresses of the node: no interface has this index.
pub const NODE_OWNS: u32 = 0;

/// Value of `link_hardware`, keyed by ifindex: the only hardware address from which a port of a bridge may
/// send. Other interfaces have no entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct LinkHardware {
    /// The address.
    pub addr: [u8; 6],
    /// Bits of the `HARDWARE_*` constants.
    pub flags: u16,
}

/// The address belongs to another host: nothing may be sent from it.
pub const HARDWARE_REFUSED: u16 = 1;
/// The interface keeps this address, even if its other end gets another one later.
pub const HARDWARE_SETTLED: u16 = 1 << 1;
