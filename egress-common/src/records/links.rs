//! The records about addresses on the link.

use crate::address::Address;

/// Key of `link_owners`: a link-local address that somebody on this node's links goes by.
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
    /// The pod's interface that was the first to go by it; [`NODE_OWNS`] for the node itself and the
    /// gateways it knows.
    pub ifindex: u32,
}

/// No interface has this index.
pub const NODE_OWNS: u32 = 0;

/// Value of `link_hardware`, keyed by ifindex: the one hardware address that a port of a bridge may send
/// from. Other interfaces have no entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct LinkHardware {
    /// The address.
    pub addr: [u8; 6],
    /// Bits of the `HARDWARE_*` constants.
    pub flags: u16,
}

/// The address is somebody else's: nothing may be sent from it.
pub const HARDWARE_REFUSED: u16 = 1;
/// The interface keeps this address, whatever its other end is given later.
pub const HARDWARE_SETTLED: u16 = 1 << 1;
