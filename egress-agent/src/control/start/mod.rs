//! What happens before the first reconcile.

pub(in crate::control) mod preflight;
pub(in crate::control) mod source;
pub(in crate::control) mod takeover;
