//! Reading what there is: the pods of the source, where they are on this machine, and what the machine has.

pub(in crate::control) mod answers;
pub(in crate::control) mod arrivals;
pub(in crate::control) mod exits;
pub(in crate::control) mod first_addresses;
pub(in crate::control) mod locations;
pub(in crate::control) mod named;
pub(in crate::control) mod policies;
pub(in crate::control) mod quarantine;
pub(in crate::control) mod taps;
pub(in crate::control) mod unlocated;
