//! Telling people and the other threads what is so now.

pub(in crate::control) mod denials;
pub(in crate::control) mod events;
pub(in crate::control) mod problems;
pub(in crate::control) mod status;
