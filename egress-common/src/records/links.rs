//! The records for addresses on the link.

use crate::{address::Address, ids::IfIndex};

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
    /// [`IfIndex`] of the pod's interface that used it first; [`IfIndex::NONE`] for the node itself and the gateways
    /// that it knows.
    ifindex: u32,
}

impl LinkOwner {
    /// The node itself, or a gateway that it knows.
    pub const NODE: Self = Self::interface(IfIndex::NONE);

    /// The interface of a pod.
    #[must_use]
    #[inline(always)]
    pub const fn interface(ifindex: IfIndex) -> Self {
        Self {
            ifindex: ifindex.get(),
        }
    }

    /// The interface of a pod that owns the address; [`IfIndex::NONE`] if the owner is the node or a gateway.
    #[must_use]
    #[inline(always)]
    pub const fn ifindex(&self) -> IfIndex {
        IfIndex::new(self.ifindex)
    }
}

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
