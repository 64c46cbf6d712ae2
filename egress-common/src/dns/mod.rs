//! Reads plain DNS messages, so that the programs can pass them on without the agent.
//!
//! The agent decides which names a pod may query, once for each name. What remains is mechanics: [`query`] finds the
//! name of a plain query, and [`response`] the addresses of a plain response to it. Both decline every message that
//! they do not understand completely; the agent then reads it (`egress-dns`). They may decline a message that the
//! agent would accept, and never the other way round.
//!
//! # For the verifier
//!
//! A program calls each function that has a loop as a global function: the kernel's verifier then follows the loop once,
//! and not once for each way to leave it. So these functions keep what they find in a [`Message`], and take and return
//! numbers. [`Steps`] is how the code here calls them.

pub mod message;
pub mod query;
pub mod response;
#[cfg(test)]
mod tests;

pub use message::{MESSAGE_MAX, Message};

/// The functions with loops. The programs wrap each into a global function; the agent's tests call them directly
/// ([`Direct`]).
pub trait Steps {
    /// See [`message::walk_name`].
    fn walk_name(message: &mut Message, at: u32) -> u32;
    /// See [`query::fold_name`].
    fn fold_name(message: &mut Message, name_len: u32) -> u32;
    /// See [`query::read_options`].
    fn read_options(message: &mut Message, at: u32, end: u32) -> u32;
    /// See [`response::follow_labels`].
    fn follow_name(message: &mut Message, at: u32) -> u32;
    /// See [`response::follow_label`].
    fn follow_label(message: &mut Message) -> u32;
    /// See [`response::same_bytes`].
    fn same_bytes(message: &mut Message, a: u32, b: u32, len: u32) -> u32;
    /// See [`response::read_record`].
    fn read_record(message: &mut Message, in_answer: u32) -> u32;
}

/// Calls the functions as they are.
#[derive(Clone, Copy, Debug)]
pub struct Direct;

impl Steps for Direct {
    fn walk_name(message: &mut Message, at: u32) -> u32 {
        message::walk_name(message, at)
    }
    fn fold_name(message: &mut Message, name_len: u32) -> u32 {
        query::fold_name(message, name_len)
    }
    fn read_options(message: &mut Message, at: u32, end: u32) -> u32 {
        query::read_options(message, at, end)
    }
    fn follow_name(message: &mut Message, at: u32) -> u32 {
        response::follow_labels::<Self>(message, at)
    }
    fn follow_label(message: &mut Message) -> u32 {
        response::follow_label(message)
    }
    fn same_bytes(message: &mut Message, a: u32, b: u32, len: u32) -> u32 {
        response::same_bytes(message, a, b, len)
    }
    fn read_record(message: &mut Message, in_answer: u32) -> u32 {
        response::read_record::<Self>(message, in_answer)
    }
}
