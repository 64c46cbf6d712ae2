//! The timers of a connection: the gate repeats bytes that it has acknowledged itself, and forgets
//! connections that are idle.

use super::{
    super::{
        decide::{Decide, Next, Step, Timer},
        frames::{Out, Own, To},
    },
    Flow, State,
};

/// How long the gate waits before it resends bytes that it has acknowledged in the resolver's name.
const RESEND_NS: u64 = 500_000_000;
/// Most resends; the wait doubles each time.
const RESENDS: u32 = 6;
/// A connection that was idle for this long is forgotten. If it is still alive, its next segment resets it.
const IDLE_NS: u64 = 300_000_000_000;

impl Flow {
    /// Acknowledges the held bytes of the pod's stream in the resolver's name. A sender that sent the
    /// beginning of a message alone may wait for that before it sends the rest (Nagle's algorithm, RFC 9293,
    /// section 3.7.4).
    pub(super) fn acknowledge_questions<D, O: Out>(&mut self, step: &mut Step<'_, D, O>) {
        if self.own_ack < self.asked.next() {
            self.own_ack = self.asked.next();
            self.resends = 0;
            self.resend_at_ns = step.now_ns + RESEND_NS;
        }
        let acknowledgment = Own {
            ack: Some(self.asked.seq(self.asked.next())),
            ..self.own_to_pod()
        };
        self.ends.put_own(To::Pod, &acknowledgment, step.out);
    }

    /// The periodic work, without what sends frames.
    pub(in super::super) fn tick<D: Decide, O: Out>(&mut self, step: &Step<'_, D, O>) -> Timer {
        if step.now_ns.saturating_sub(self.used_ns) > IDLE_NS {
            return Timer::Forget;
        }
        self.pending.sweep(step.now_ns);
        let must_repeat = match &self.state {
            State::Split(split) => {
                split.is_due(step.now_ns)
                    || !step.decide.is_resolver(&self.ends.packet(To::Resolver))
            }
            State::Opening | State::Open => self.owed(step.now_ns).is_some(),
        };
        if must_repeat {
            Timer::Repeat
        } else if self.keep_or_forget() == Next::Forget {
            Timer::Forget
        } else {
            Timer::Nothing
        }
    }

    /// The position up to which the gate must repeat queries itself now.
    fn owed(&self, now_ns: u64) -> Option<u64> {
        let owed = self.own_ack.min(self.asked.sent);
        (owed > self.asked.acked && now_ns >= self.resend_at_ns).then_some(owed)
    }

    /// Repeats bytes that are not acknowledged in time: at most 16 KiB.
    pub(in super::super) fn repeat<D: Decide, O: Out>(
        &mut self,
        step: &mut Step<'_, D, O>,
    ) -> Next {
        step.out.select_interface(self.interface);
        if let Some(next) = self.with_split(|split, flow| split.repeat(flow, step)) {
            return next;
        }
        if let Some(owed) = self.owed(step.now_ns) {
            if self.resends == RESENDS {
                return self.lose(
                    &self.ends.packet(To::Resolver),
                    "the resolver does not acknowledge",
                    step,
                );
            }
            self.resends += 1;
            self.resend_at_ns = step.now_ns + (RESEND_NS << self.resends);
            let payload = self.asked.slice(self.asked.acked, owed);
            let mut seq = self.asked.seq(self.asked.acked);
            for chunk in payload.chunks(self.own_size()) {
                let own = Own {
                    seq,
                    ack: Some(self.answered.seq(self.answered.acked)),
                    window: self.pod.window,
                    flags: 0,
                    timestamps: self.pod.timestamp.zip(self.resolver.timestamp),
                    payload: chunk,
                };
                self.ends.put_own(To::Resolver, &own, step.out);
                seq = seq.wrapping_add(chunk.len() as u32);
            }
        }
        self.keep_or_forget()
    }
}
