//! A pod's connections with resolvers: DNS over TCP.

use std::task::Poll;

use egress_common::{
    ids::{IfIndex, PodId},
    packet::Packet,
    records::MODE_AUDIT,
};

use super::{
    super::{
        budget::Budget,
        frame_sender::FrameSender,
        judge::Judge,
        stream::{Out, Step, Streams, To},
    },
    HeldFrame, Pod, Shared, boottime_ns,
};

/// For timers and the like, which no segment has started: each connection selects its own interface.
const NO_SEGMENT: (IfIndex, bool) = (IfIndex::NONE, true);

/// The interface on which the segments of the pod's connections go on. No sender in audit mode: there the
/// segments have gone on already.
struct Port<'a> {
    frame_sender: Option<&'a mut FrameSender>,
    pod: PodId,
    ifindex: IfIndex,
}

impl Out for Port<'_> {
    fn put(&mut self, to: To, frame: &[u8]) {
        let Some(frame_sender) = &mut self.frame_sender else {
            return;
        };
        match to {
            To::Pod => frame_sender.deliver((self.ifindex, self.pod), frame),
            To::Resolver => frame_sender.bounce((self.ifindex, self.pod), frame),
        };
    }

    fn interface(&self) -> IfIndex {
        self.ifindex
    }

    fn select_interface(&mut self, interface: IfIndex) {
        self.ifindex = interface;
    }
}

impl Pod {
    /// A segment of a connection with a resolver.
    pub(super) fn segment(
        &mut self,
        held: &HeldFrame<'_>,
        packet: &Packet,
        to: To,
        shared: &mut Shared,
    ) -> Poll<()> {
        let port = (held.head.ifindex, held.head.taken != 0);
        self.with_streams(shared, port, held.head.time_ns, |streams, step, budget| {
            streams.segment(held.frame, packet, to, step, budget)
        })
    }

    /// Does something with the connections. `is_taken` is whether their segments wait to be put back.
    fn with_streams<T>(
        &mut self,
        shared: &mut Shared,
        (ifindex, is_taken): (IfIndex, bool),
        now_ns: u64,
        run: impl FnOnce(&mut Streams, &mut Step<'_, Judge<'_>, Port<'_>>, &mut Budget) -> T,
    ) -> T {
        let is_audit = self.enforcement.entry.mode == MODE_AUDIT;
        let pod = self.enforcement.entry.pod();
        let Self {
            enforcement,
            learned,
            ..
        } = self;
        let mut judge = Judge::new(enforcement, learned, &shared.context, now_ns);
        let mut port = Port {
            frame_sender: (is_taken && !is_audit).then_some(&mut shared.frame_sender),
            pod,
            ifindex,
        };
        let mut step = Step::new(&mut judge, &mut port, now_ns);
        run(&mut self.streams, &mut step, &mut shared.streams)
    }

    /// Resets the split connections with resolvers, which need the agent: it is about to stop following them.
    pub(in super::super) fn end_split_streams(&mut self, shared: &mut Shared) {
        self.with_streams(
            shared,
            NO_SEGMENT,
            boottime_ns(),
            |streams, step, budget| {
                streams.end_split(step, budget);
            },
        );
    }

    /// Whether connections with resolvers must repeat bytes in the pod's turn.
    pub(in super::super) fn has_repetitions(&self) -> bool {
        self.streams.has_due()
    }

    /// Repeats the bytes of one connection with a resolver.
    pub(super) fn repeat_next(&mut self, shared: &mut Shared) {
        if self.streams.has_due() {
            self.with_streams(
                shared,
                NO_SEGMENT,
                boottime_ns(),
                |streams, step, budget| {
                    streams.repeat_next(step, budget);
                },
            );
        }
    }

    /// Runs the timers of the connections with resolvers.
    pub(super) fn tick_streams(&mut self, shared: &mut Shared, now_ns: u64) {
        self.with_streams(shared, NO_SEGMENT, now_ns, |streams, step, budget| {
            streams.tick(step, budget);
        });
        let damaged = self.streams.take_damaged();
        shared.context.stats.segments_damaged.add(damaged);
        self.tallies.segments_damaged.add(damaged);
    }

    /// Ends the connections with resolvers that are not trusted any more.
    pub(in super::super) fn forget_claimed(&mut self, shared: &mut Shared) {
        let claimed = &shared.context.dns.claimed;
        self.streams.forget_with(claimed, &mut shared.streams);
    }

    /// Ends the connections on interfaces that the pod no longer has: another pod may have them by now.
    pub(in super::super) fn keep_streams(&mut self, shared: &mut Shared) {
        let interfaces = &self.enforcement.interfaces;
        self.streams.keep_on(interfaces, &mut shared.streams);
    }
}
