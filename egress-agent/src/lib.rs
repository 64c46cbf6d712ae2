//! egress-agent: enforces, per pod, which names, addresses and ports it may reach.
//!
//! Where to find what: [`pods`] is where pods come from, [`egress_policy`] what a policy means, [`egress_dns`] what
//! a message says, [`gate`] the decision on it, [`datapath`] the kernel, [`host`] where a pod is on
//! this machine, [`report`] what people see, [`serve`] what the agent answers about itself,
//! [`control`] what brings them together, [`config`] and [`cli`] what the operator says.
//!
//! The feature `test-support` adds what the workspace's tests and benchmarks need beyond the agent.
#![deny(unsafe_code)]

pub mod cli;
pub mod config;
pub mod control;
pub mod datapath;
pub mod gate;
pub mod host;
pub mod pods;
pub mod report;
pub mod serve;
