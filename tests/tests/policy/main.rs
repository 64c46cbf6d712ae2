//! The meaning of a policy, and the agent's reports about it.

mod audit;
mod entries;
mod explain;
mod objects;
mod observability;
mod reports;
mod upstream;
