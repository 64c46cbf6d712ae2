//! What wakes the loop before its next turn.

pub(in crate::control) mod links;
pub(in crate::control) mod pace;
