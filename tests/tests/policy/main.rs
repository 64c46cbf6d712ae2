//! What a policy means, and what the agent says about it.

mod audit;
mod entries;
mod explain;
mod observability;
mod reports;
