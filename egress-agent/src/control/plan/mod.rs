//! Deciding what is to be done.

pub(in crate::control) mod own_addresses;
pub(in crate::control) mod pod;
pub(in crate::control) mod wanted;
