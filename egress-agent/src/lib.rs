//! egress-agent: enforces, per pod, which names, addresses and ports it may reach.
#![deny(unsafe_code)]

pub mod dns;
pub mod pods;
pub mod report;
