//! How programs are attached to a pod's interfaces, and how the agent finds these interfaces.

mod attachment;
mod bandwidth;
mod flapping;
mod handed_over;
mod hooks;
mod node;
mod partly_enforced;
mod quarantine;
mod renamed;
