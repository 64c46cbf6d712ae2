//! Doing it: the only step that changes the kernel or asks the gate.

pub(in crate::control) mod enforce;
pub(in crate::control) mod hardware;
pub(in crate::control) mod hooks;
pub(in crate::control) mod leftovers;
pub(in crate::control) mod node_addresses;
pub(in crate::control) mod prepare;
pub(in crate::control) mod ranges;
pub(in crate::control) mod seed;
pub(in crate::control) mod stamps;
pub(in crate::control) mod sweep;
pub(in crate::control) mod unjudged;
