//! Values that repeat their key.
//!
//! A program looks an entry up and then reads it. If the entry is replaced in between, the kernel may give its memory at once
//! to another key of the same map (`bpf_mem_alloc`, kernel/bpf/memalloc.c, since 6.1). So each value on which a verdict
//! depends repeats its key. The program copies the other fields first and reads the key last: if the key is another one, the
//! copy does not count.

use super::{AllowEntry, Flow, FlowKey, Interface};
use crate::{address::Address, classes::ClassSet, ids::IfIndex};

/// Value of `interfaces`: an [`Interface`] and its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct InterfaceValue {
    /// [`Interface::pod`].
    pub pod: u32,
    /// [`Interface::policy`].
    pub policy: u32,
    /// [`Interface::mode`].
    pub mode: u32,
    /// [`Interface::flags`].
    pub flags: u32,
    /// The key.
    pub ifindex: u32,
}

impl InterfaceValue {
    /// The value for an interface.
    #[must_use]
    pub const fn new(ifindex: IfIndex, interface: Interface) -> Self {
        Self {
            pod: interface.pod,
            policy: interface.policy,
            mode: interface.mode,
            flags: interface.flags,
            ifindex: ifindex.get(),
        }
    }

    /// The value without the key.
    #[must_use]
    pub const fn interface(&self) -> Interface {
        Interface {
            pod: self.pod,
            policy: self.policy,
            mode: self.mode,
            flags: self.flags,
        }
    }
}

/// Value of a pod's allow map: an [`AllowEntry`] and its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct AllowValue {
    /// [`AllowEntry::classes`].
    pub classes: ClassSet,
    /// [`AllowEntry::internal_classes`].
    pub internal_classes: ClassSet,
    /// [`AllowEntry::expires_ns`].
    pub expires_ns: u64,
    /// The key.
    pub addr: Address,
}

impl AllowValue {
    /// The value for an address.
    #[must_use]
    pub const fn new(addr: Address, entry: AllowEntry) -> Self {
        Self {
            classes: entry.classes,
            internal_classes: entry.internal_classes,
            expires_ns: entry.expires_ns,
            addr,
        }
    }

    /// The value without the key.
    #[must_use]
    pub const fn entry(&self) -> AllowEntry {
        AllowEntry {
            classes: self.classes,
            internal_classes: self.internal_classes,
            expires_ns: self.expires_ns,
        }
    }
}

/// Value of a pod's flow maps: a [`Flow`] and its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FlowValue {
    /// The flow.
    pub flow: Flow,
    /// The key.
    pub key: FlowKey,
}
