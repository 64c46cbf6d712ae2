//! Files in `stateDir` that one agent leaves to the next.

pub(in crate::control) mod file;
pub(in crate::control) mod handover;
mod objects;
pub(in crate::control) mod saved;
pub(in crate::control) mod trust;
mod withheld;
