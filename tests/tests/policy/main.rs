//! The meaning of a policy, and the agent's reports about it.

mod audit;
mod bad_objects;
mod edits;
mod entries;
mod explain;
mod objects;
mod observability;
mod reports;
mod tiers_hold;
mod unreadable_annotations;
mod upstream;
mod who_decided;
