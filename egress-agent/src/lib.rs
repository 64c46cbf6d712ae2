//! egress-agent: enforces, per pod, which names, addresses and ports it may reach.
#![deny(unsafe_code)]

pub mod datapath;
pub mod dns;
pub mod policy;
pub mod report;
