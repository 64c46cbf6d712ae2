//! The meaning of a policy, and the agent's reports about it.

mod audit;
mod entries;
mod explain;
mod observability;
mod reports;
