//! The interface between a connection and the code that decides on its messages.

use std::task::Poll;

use egress_common::packet::Packet;

use super::super::pending::Pending;
use egress_dns::Question;

/// The decision on a query.
pub(in super::super) enum Asked {
    /// The rules allow the name.
    Allowed(Question),
    /// The rules do not allow the name; this is the refusal.
    Refused(Vec<u8>),
    /// The message is no readable query.
    Unreadable,
}

/// The decision on a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Answered {
    /// It may be delivered: its allowed addresses are in the allow map.
    Delivered,
    /// It must not be delivered.
    Withheld,
}

/// Decides on messages, and reports those that do not pass.
pub(in super::super) trait Decide {
    /// Decides on a query.
    fn question(&mut self, message: &[u8], packet: &Packet) -> Asked;
    /// Records a query that goes out.
    fn ask(&mut self, question: &Question, packet: &Packet, pending: &mut Pending);
    /// Decides on a response. Pending while not all of its addresses are in the allow map: the decision is to be asked for
    /// again in a later turn of the pod.
    fn answer(&mut self, message: &[u8], packet: &Packet, pending: &mut Pending) -> Poll<Answered>;
    /// Whether these bytes may be the beginning of a response that may be delivered.
    fn may_begin(&mut self, message: &[u8], packet: &Packet, pending: &Pending) -> bool;
    /// Whether a packet goes to a resolver of the current configuration.
    fn is_resolver(&self, packet: &Packet) -> bool;
    /// Reports that the connection cannot be followed and is reset.
    fn lost(&mut self, packet: &Packet, why: &'static str);
}

/// Most messages that are decided in one turn of a pod. A segment can have a thousand, and each can insert a part of its
/// addresses.
const MESSAGES: usize = 8;

/// The context of one step of a connection.
pub(in super::super) struct Step<'a, D, O> {
    pub(in super::super) decide: &'a mut D,
    pub(in super::super) out: &'a mut O,
    pub(in super::super) now_ns: u64,
    /// How many more messages are decided in this turn.
    messages_left: usize,
}

impl<'a, D, O> Step<'a, D, O> {
    pub(in super::super) fn new(decide: &'a mut D, out: &'a mut O, now_ns: u64) -> Self {
        Self {
            decide,
            out,
            now_ns,
            messages_left: MESSAGES,
        }
    }

    /// Counts a message that is about to be decided. Returns false when it must wait for the pod's next turn.
    pub(super) fn begin_message(&mut self) -> bool {
        let has_left = self.messages_left > 0;
        self.messages_left = self.messages_left.saturating_sub(1);
        has_left
    }
}

/// Whether the gate continues to follow the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Keep,
    /// Some of the messages are not decided yet. The same segment must be handled again.
    Later,
    Forget,
}

/// The task of a connection at a tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timer {
    Nothing,
    /// It must repeat bytes, or end.
    Repeat,
    Forget,
}
