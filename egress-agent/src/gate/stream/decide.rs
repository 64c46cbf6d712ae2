//! What a connection asks of those around it.

use egress_common::packet::Packet;

use super::super::pending::Pending;
use egress_dns::Question;

/// What becomes of a question.
pub(in super::super) enum Asked {
    /// It may be asked.
    Allowed(Question),
    /// It may not; this is the answer.
    Refused(Vec<u8>),
    /// It is no question.
    Unreadable,
}

/// Who decides on messages, and reports what does not pass.
pub(in super::super) trait Decide {
    /// What becomes of a question.
    fn question(&mut self, message: &[u8], packet: &Packet) -> Asked;
    /// Notes a question that goes out.
    fn ask(&mut self, question: &Question, packet: &Packet, pending: &mut Pending);
    /// Whether an answer may be delivered; what it teaches is in the allow map then.
    fn answer(&mut self, message: &[u8], packet: &Packet, pending: &mut Pending) -> bool;
    /// Whether an answer that may be delivered may begin with these bytes.
    fn begins(&mut self, message: &[u8], packet: &Packet, pending: &Pending) -> bool;
    /// Whether a packet goes to a resolver, by the configuration as it is now.
    fn is_resolver(&self, packet: &Packet) -> bool;
    /// The connection cannot be followed.
    fn lost(&mut self, packet: &Packet, why: &'static str);
}

/// What a connection needs for a step.
pub(in super::super) struct Step<'a, D, O> {
    pub(in super::super) decide: &'a mut D,
    pub(in super::super) out: &'a mut O,
    pub(in super::super) now_ns: u64,
}

/// Whether the connection is still to be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Keep,
    Forget,
}
