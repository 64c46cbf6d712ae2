//! The end of a connection by resets.

use egress_common::packet::{Packet, TCP_ACK};

use super::{
    super::{
        decide::{Decide, Next, Step},
        frames::{Out, To, put_bare},
        segment::Segment,
    },
    ANSWERED_LIMIT, Flow, State,
};

impl Flow {
    /// Handles a reset from the resolver.
    pub(super) fn reset_by_resolver(&self, segment: &Segment<'_>, out: &mut impl Out) -> Next {
        // A reset that the pod would ignore ends nothing (RFC 9293, section 3.10.7.4).
        let believed = if matches!(self.state, State::Opening) {
            segment.has(TCP_ACK) && segment.ack == self.asked.first()
        } else {
            let position = self.answered.position(segment.seq);
            let from = self.answered.acked.cast_signed();
            (from..from.saturating_add_unsigned(ANSWERED_LIMIT as u64)).contains(&position)
        };
        if !believed {
            return Next::Keep;
        }
        if self.is_split() {
            self.reset_pod(out);
        } else {
            put_bare(segment, To::Pod, out);
        }
        Next::Forget
    }

    /// Resets both ends, outside of the decision on a segment.
    pub(in super::super) fn end(&self, out: &mut impl Out) {
        out.select_interface(self.interface);
        self.fail(out);
    }

    /// Resets both ends.
    pub(in super::super) fn fail(&self, out: &mut impl Out) -> Next {
        self.reset_resolver(out);
        self.reset_pod(out);
        Next::Forget
    }

    /// Resets the connection at the resolver.
    pub(in super::super) fn reset_resolver(&self, out: &mut impl Out) {
        let seq = match &self.state {
            State::Split(split) => split.next_seq(To::Resolver),
            _ => self.asked.sent_seq(),
        };
        self.ends.put_reset(To::Resolver, seq, None, out);
    }

    pub(super) fn reset_pod(&self, out: &mut impl Out) {
        let seq = match &self.state {
            State::Split(split) => split.next_seq(To::Pod),
            _ => self.answered.sent_seq(),
        };
        let ack = Some(self.asked.ack());
        self.ends.put_reset(To::Pod, seq, ack, out);
    }

    /// Resets both ends and reports the reason.
    pub(in super::super) fn lose<D: Decide, O: Out>(
        &self,
        packet: &Packet,
        why: &'static str,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        step.decide.lost(packet, why);
        self.fail(step.out)
    }
}
