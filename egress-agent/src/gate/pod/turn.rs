//! When a pod's messages are decided: at once, or from its backlog.

use std::task::Poll;

use egress_common::{
    packet::{Packet, Walked, walk},
    records::HELD_REJECT,
};

use super::{
    super::{
        Judged, frame_sender::FrameSender, quarantine::as_sent, stats::PutBackTimes, turns::Turns,
    },
    HeldFrame, InterfaceMap, Pod, Shared, boottime_ns,
};

impl Pod {
    /// Moves the pod to a later stage of [`Judged`].
    pub(in super::super) fn judge_more(
        &mut self,
        judged: Judged,
        interfaces: &mut InterfaceMap,
        frame_sender: &mut FrameSender,
    ) -> anyhow::Result<()> {
        self.cancel_change();
        self.enforcement.entry = judged.in_entry(self.enforcement.entry);
        self.enforcement.start_learning();
        self.enforcement.write_interfaces(interfaces, frame_sender)
    }

    /// Whether the pod's next message may be decided at once. Otherwise it goes into the backlog, so that the
    /// pod's messages stay in their order.
    pub(in super::super) fn may_decide_now(&self, now_ns: u64) -> bool {
        self.backlog.is_empty() && !self.is_changing() && self.share.is_left(now_ns)
    }

    /// The balance of the pod's share of time.
    pub(in super::super) fn balance(&self, now_ns: u64) -> i64 {
        self.share.balance(now_ns)
    }

    /// Charges the pod for the time since the last reading of the clock.
    pub(in super::super) fn spend(&mut self, turns: &mut Turns) {
        let used_ns = turns.spent_ns();
        self.spend_ns(used_ns, turns.now_ns());
    }

    /// Charges the pod for this much time.
    pub(in super::super) fn spend_ns(&mut self, used_ns: u64, now_ns: u64) {
        self.share.spend(used_ns, now_ns);
    }

    /// Puts a message into the backlog. Returns false and reports the message when the backlog has no room.
    pub(in super::super) fn push_backlog(
        &mut self,
        held: &HeldFrame<'_>,
        shared: &mut Shared,
    ) -> bool {
        if self.backlog.push(held, &mut shared.backlog) {
            return true;
        }
        shared.context.stats.backlog_full.add(1);
        // A rejected packet was reported when it was denied, and a packet in audit mode has gone on.
        if held.head.taken == 0 || held.head.kind == HELD_REJECT {
            return false;
        }
        let mut packet = Packet::EMPTY;
        if walk(&held.frame, &mut packet) == Walked::Ip {
            let (judge, _) = self.judge(shared, boottime_ns());
            judge.report_not_held(&packet);
        }
        false
    }

    /// Whether messages wait in the backlog.
    pub(in super::super) fn has_waiting(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Whether the pod needs turns. A pod whose policy is changing needs none: its messages wait.
    pub(in super::super) fn needs_turns(&self) -> bool {
        let has_work = !self.backlog.is_empty()
            || self.has_repetitions()
            || self.has_replaced()
            || self.learned.is_evicting();
        has_work && !self.is_changing()
    }

    /// Decides the oldest message of the backlog, and repeats the bytes of one connection with a resolver; evicts a part
    /// of the addresses that were chosen for it, and forgets a part of what an earlier version of the policy had. Returns
    /// whether nothing is left to do.
    pub(in super::super) fn take_turn(
        &mut self,
        interfaces: &InterfaceMap,
        shared: &mut Shared,
        sent: &mut PutBackTimes,
    ) -> bool {
        if self.is_changing() {
            return true;
        }
        if let Some(waiting) = self.backlog.pop(&mut shared.backlog)
            && self
                .process(&waiting.held(), interfaces, shared, sent)
                .is_pending()
        {
            self.backlog.put_back(waiting, &mut shared.backlog);
        }
        let evicted = self
            .learned
            .evict_more(&mut self.enforcement, boottime_ns());
        if let Err(error) = evicted {
            self.learned.failures.add(error);
        }
        self.forget_replaced();
        self.repeat_next(shared);
        !self.needs_turns()
    }

    /// Decides a message that has just come, at once or, if that takes long, in parts. Returns whether the pod needs
    /// turns.
    pub(in super::super) fn process_first(
        &mut self,
        held: &HeldFrame<'_>,
        interfaces: &InterfaceMap,
        shared: &mut Shared,
        sent: &mut PutBackTimes,
    ) -> bool {
        while self.process(held, interfaces, shared, sent).is_pending() {
            // Without room in the backlog the other parts follow at once.
            if self.backlog.push_first(held, &mut shared.backlog) {
                return true;
            }
        }
        self.learned.is_evicting()
    }

    /// See [`Table::begin_decision`].
    ///
    /// [`Table::begin_decision`]: super::super::learned::Table::begin_decision
    pub(super) fn begin_decision(&mut self, frame_sender: &FrameSender) {
        let has_queued = frame_sender.has_queued(self.enforcement.entry.pod());
        self.learned.begin_decision(self.is_deciding, has_queued);
    }

    /// Decides a message; see [`Pod::decide`]. The frames to be sent wait in the frame sender.
    fn process(
        &mut self,
        held: &HeldFrame<'_>,
        interfaces: &InterfaceMap,
        shared: &mut Shared,
        sent: &mut PutBackTimes,
    ) -> Poll<()> {
        // The pod became known between the query and now.
        if self.has_lost_interface(&held.head, interfaces) {
            shared
                .frame_sender
                .again(held.head.ifindex, &as_sent(held.frame));
            return Poll::Ready(());
        }
        self.begin_decision(&shared.frame_sender);
        let frames = shared.frame_sender.frames();
        let decided = self.decide(held, shared);
        self.is_deciding = decided.is_pending();
        let is_message = held.head.taken != 0 && held.head.kind != HELD_REJECT;
        if is_message && shared.frame_sender.frames() > frames {
            sent.note(held.head.time_ns);
        }
        decided
    }
}
