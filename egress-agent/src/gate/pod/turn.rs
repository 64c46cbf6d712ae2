//! When a pod's messages are decided: at once, or when it is the pod's turn.

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
    /// Judges more of the pod, which begins to be enforced.
    pub(in super::super) fn judge_more(
        &mut self,
        judged: Judged,
        interfaces: &mut InterfaceMap,
        frame_sender: &mut FrameSender,
    ) -> anyhow::Result<()> {
        self.enforcement.entry = judged.in_entry(self.enforcement.entry);
        self.enforcement.write_interfaces(interfaces, frame_sender)
    }

    /// Whether the pod's next message may be decided at once. If not it waits, so that the pod's messages
    /// stay in their order.
    pub(in super::super) fn may_go(&self, now_ns: u64) -> bool {
        self.backlog.is_empty() && self.share.is_left(now_ns)
    }

    /// What is left of the pod's share of time.
    pub(in super::super) fn balance(&self, now_ns: u64) -> i64 {
        self.share.balance(now_ns)
    }

    /// What has passed since the last look at the clock was spent on this pod.
    pub(in super::super) fn spend(&mut self, turns: &mut Turns) {
        let used_ns = turns.spent_ns();
        self.spend_ns(used_ns, turns.now_ns());
    }

    /// So much time was spent on this pod.
    pub(in super::super) fn spend_ns(&mut self, used_ns: u64, now_ns: u64) {
        self.share.spend(used_ns, now_ns);
    }

    /// Lets a message wait; false when there is no room for it, which is reported.
    pub(in super::super) fn let_wait(&mut self, held: &HeldFrame<'_>, shared: &mut Shared) -> bool {
        if self.backlog.push(held, &mut shared.backlog) {
            return true;
        }
        shared.context.stats.backlog_full.add(1);
        // A rejected packet was reported when it was denied, and what is only looked at has gone on.
        if held.head.taken == 0 || held.head.kind == HELD_REJECT {
            return false;
        }
        let mut packet = Packet::EMPTY;
        if walk(&held.frame, &mut packet) == Walked::Ip {
            let (judge, _) = self.judge(shared, boottime_ns());
            judge.not_held(&packet);
        }
        false
    }

    /// Decides the message that has waited longest; returns whether it was the last.
    pub(in super::super) fn go_on(
        &mut self,
        interfaces: &InterfaceMap,
        shared: &mut Shared,
        sent: &mut PutBackTimes,
    ) -> bool {
        if let Some(waiting) = self.backlog.pop(&mut shared.backlog) {
            self.go(&waiting.held(), interfaces, shared, sent);
        }
        self.backlog.is_empty()
    }

    /// Decides a message. What is to be sent waits in the frame sender.
    pub(in super::super) fn go(
        &mut self,
        held: &HeldFrame<'_>,
        interfaces: &InterfaceMap,
        shared: &mut Shared,
        sent: &mut PutBackTimes,
    ) {
        // The pod became known between the question and now.
        if self.has_left(&held.head, interfaces) {
            shared
                .frame_sender
                .again(held.head.ifindex, &as_sent(held.frame));
            return;
        }
        let frames = shared.frame_sender.frames();
        self.decide(held, shared);
        let is_message = held.head.taken != 0 && held.head.kind != HELD_REJECT;
        if is_message && shared.frame_sender.frames() > frames {
            sent.note(held.head.time_ns);
        }
    }
}
