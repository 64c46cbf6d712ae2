//! One pod at the gate: how its queries and responses are decided.

mod in_fragments;
pub(super) mod learning;
mod over_tcp;
mod turn;
mod versions;

pub(super) use versions::Done;

use std::{
    collections::HashSet,
    task::{Poll, ready},
};

use anyhow::Result;
use egress_common::{
    address::Address,
    ids::{IfIndex, PodId},
    packet::{Fragment, Packet, Walked, walk},
    protocol::bits,
    reason::Reason,
    records::{HELD_ANSWER, HELD_QUESTION, HELD_REJECT, Held, POLICY_UNIDENTIFIED},
};

use learning::{DecidedNames, LeftLifetimes};

use super::{
    About, Enforcement, Resolutions,
    backlog::Backlog,
    budget::Budget,
    checksum::complete_udp,
    fragments::{Fragments, Whole},
    frame_sender::FrameSender,
    judge::{DecisionContext, Judge},
    learned::Table,
    open_questions::OpenQuestion,
    pending::Pending,
    quarantine::{Quarantine, as_sent},
    reply,
    share::Share,
    stream::{Answered, Streams, To},
    tally::Tally,
};
use crate::datapath::{HeldFrame, InterfaceMap, Kept, boottime_ns};
use egress_dns::{Question, Refusal, refuse};

/// The state that all pods at the gate share.
pub(super) struct Shared {
    pub(super) frame_sender: FrameSender,
    pub(super) context: DecisionContext,
    pub(super) streams: Budget,
    pub(super) fragments: Budget,
    pub(super) backlog: Budget,
    pub(super) quarantine: Quarantine,
}

impl Shared {
    /// Sends the quarantined queries of an interface to be judged again.
    pub(super) fn judge_again(&mut self, ifindex: IfIndex) {
        for waiting in self.quarantine.end(ifindex) {
            self.frame_sender.again(ifindex, &waiting.frame);
        }
    }
}

/// One enforced pod.
pub(super) struct Pod {
    enforcement: Enforcement,
    pending: Pending,
    learned: Table,
    /// A new version of its policy that the pod is about to be moved to.
    change: Option<Box<versions::Change>>,
    /// Tables of versions that are not in force any more. Their names are still to be forgotten.
    replaced: Vec<Table>,
    /// Names that an earlier agent kept, until the gate knows which of them are still valid.
    stale_names: Vec<Kept>,
    streams: Streams,
    fragments: Fragments,
    /// A datagram whose fragments are all there, and whose addresses are being inserted.
    unfinished: Option<Box<Whole>>,
    /// Whether the decision on the oldest message of the backlog has begun.
    is_deciding: bool,
    /// Of the gate's time.
    share: Share,
    backlog: Backlog,
    tallies: Tallies,
    /// The names that the programs know as decided.
    decided: DecidedNames,
    /// Lifetimes that the programs had learned under the versions in which an earlier agent left the pod.
    left_lifetimes: LeftLifetimes,
    /// When expired addresses were last removed from those that the programs have learned.
    cleaned_ns: u64,
}

/// The events of a pod that are logged at a limited rate.
#[derive(Default)]
struct Tallies {
    segments_damaged: Tally,
    fragments_late: Tally,
    notes_without_room: Tally,
    has_logged_names_lost: bool,
}

impl Pod {
    /// Takes over a query that an earlier agent put back.
    pub(super) fn take_over(&mut self, open: &OpenQuestion) {
        open.ask(&mut self.pending);
    }

    /// The pod's open queries over UDP. `id` is the pod's.
    pub(super) fn open_questions(
        &self,
        id: PodId,
        now_ns: u64,
    ) -> impl Iterator<Item = OpenQuestion> {
        OpenQuestion::of(id, &self.pending, now_ns)
    }

    /// Its interfaces' indexes.
    pub(super) fn interfaces(&self) -> &[IfIndex] {
        &self.enforcement.interfaces
    }

    /// Whether the pod is identified, so that its policy is known.
    pub(super) fn is_known(&self) -> bool {
        self.enforcement.compiled.record.flags & POLICY_UNIDENTIFIED == 0
    }

    /// Whether this is a query of a pod in quarantine whose interface now belongs to another pod or has been
    /// released.
    pub(super) fn has_lost_interface(&self, head: &Held, interfaces: &InterfaceMap) -> bool {
        if self.is_known() || head.kind != HELD_QUESTION {
            return false;
        }
        interfaces
            .is_of(head.ifindex, head.pod)
            .is_ok_and(|is_ours| !is_ours)
    }

    /// Puts the pod's policy on other interfaces.
    pub(super) fn move_to(
        &mut self,
        to: Vec<IfIndex>,
        interfaces: &mut InterfaceMap,
        shared: &mut Shared,
    ) -> Result<()> {
        self.cancel_change();
        let from = std::mem::replace(&mut self.enforcement.interfaces, to);
        self.enforcement
            .write_interfaces(interfaces, &mut shared.frame_sender)?;
        self.keep_streams(shared);
        for ifindex in from {
            if !self.enforcement.interfaces.contains(&ifindex) {
                shared
                    .frame_sender
                    .unassign(ifindex, self.enforcement.entry.pod());
                interfaces.remove(ifindex, self.enforcement.entry.pod())?;
            }
        }
        Ok(())
    }

    /// Drops everything that waits for the pod. Returns how many messages were in its backlog, and its interfaces.
    pub(super) fn leave(mut self, shared: &mut Shared) -> (u64, Vec<IfIndex>) {
        self.cancel_change();
        self.streams.clear(&mut shared.streams);
        self.fragments.clear(&mut shared.fragments);
        let waited = self.backlog.clear(&mut shared.backlog);
        let id = self.enforcement.entry.pod();
        for ifindex in &self.enforcement.interfaces {
            shared.frame_sender.unassign(*ifindex, id);
        }
        shared.frame_sender.forget(id);
        (waited, self.enforcement.interfaces)
    }

    /// The periodic work.
    pub(super) fn tick(&mut self, shared: &mut Shared, now_ns: u64) {
        self.pending.sweep(now_ns);
        // Entries that are being carried over must not change. The programs look at the lifetimes themselves.
        if !self.is_changing()
            && let Err(error) = self.learned.expire(&mut self.enforcement, now_ns)
        {
            self.learned.failures.add(error);
        }
        self.tick_streams(shared, now_ns);
        self.tick_fragments(shared, now_ns);
        self.count_names_lost(shared);
        self.log_tallies(now_ns);
    }

    /// See [`super::Gate::sweep`].
    pub(super) fn sweep(&mut self, open: &HashSet<Address>) {
        if self.is_changing() {
            // The next sweep does it.
            return;
        }
        let swept = self
            .learned
            .sweep(&mut self.enforcement, open, boottime_ns());
        if let Err(error) = swept {
            self.learned.failures.add(error);
        }
    }

    /// Logs what has happened since the last log line.
    fn log_tallies(&mut self, now_ns: u64) {
        let pod = self.enforcement.name();
        let tallies = &mut self.tallies;
        if let Some(segments) = tallies.segments_damaged.due(now_ns) {
            tracing::warn!(
                %pod,
                segments,
                "TCP segments of DNS dropped: unreadable, or with a wrong checksum"
            );
        }
        if let Some(fragments) = tallies.fragments_late.due(now_ns) {
            tracing::warn!(
                %pod,
                fragments,
                "fragments dropped: repeated, or with the identification of an earlier datagram"
            );
        }
        if let Some(notes) = tallies.notes_without_room.due(now_ns) {
            tracing::warn!(
                %pod,
                notes,
                "the pod's allow map has no room for addresses that the programs have learned: the pod reaches \
                 them until their names expire, or until its policy is edited"
            );
        }
        if let Some((times, error)) = self.learned.failures.due(now_ns) {
            tracing::error!(
                %pod,
                times,
                error = error.map(tracing::field::display),
                "cannot write the pod's allow map; the responses that needed it were not delivered"
            );
        }
    }

    /// Names that resolved to the address.
    pub(super) fn names_of(&self, address: &Address) -> Vec<String> {
        self.learned.names_of(address)
    }

    /// See [`super::Gate::resolutions`].
    pub(super) fn resolutions(&self, about: &About, most: usize) -> Resolutions {
        self.learned.resolutions(about, most)
    }

    /// Addresses in its allow map.
    pub(super) fn addresses(&self) -> u64 {
        self.learned.addresses.len() as u64
    }

    /// Addresses in its allow map, except those that are evicted first.
    pub(super) fn addresses_in_use(&self) -> u64 {
        self.learned.in_use() as u64
    }

    /// Decides a frame from the ring. The frames to be sent wait in the frame sender. Pending while it takes more time than
    /// one turn has: the same frame must then be decided again in the pod's next turn.
    pub(super) fn decide(&mut self, held: &HeldFrame<'_>, shared: &mut Shared) -> Poll<()> {
        let mut packet = Packet::EMPTY;
        if walk(&held.frame, &mut packet) != Walked::Ip {
            // The ring keeps only the beginning of a rejected packet, and the walk may need all of it.
            if held.head.kind == HELD_REJECT {
                self.reject_cut(held, shared);
            }
            return Poll::Ready(());
        }
        if held.head.kind == HELD_QUESTION
            && let Some(reason) = self.why_misdirected(&packet, shared)
        {
            let (judge, _) = self.judge(shared, held.head.time_ns);
            judge.report_misdirected(&packet, reason);
            return Poll::Ready(());
        }
        match held.head.kind {
            HELD_ANSWER if packet.fragment != Fragment::None => {
                return self.fragment(held, &packet, shared);
            }
            HELD_QUESTION if packet.bit == bits::TCP => {
                return self.segment(held, &packet, To::Resolver, shared);
            }
            HELD_ANSWER if packet.bit == bits::TCP => {
                return self.segment(held, &packet, To::Pod, shared);
            }
            HELD_ANSWER => return self.answer(held, &packet, shared),
            HELD_QUESTION => self.question(held, &packet, shared),
            HELD_REJECT => reject(held, &packet, shared),
            _ => {}
        }
        Poll::Ready(())
    }

    /// Why a query must not be put back: it is not one of the pod's to a resolver, and `from_pod` does not
    /// judge it again. `from_pod` accepted the query, but the configuration or the pod's addresses may have
    /// changed since.
    fn why_misdirected(&self, packet: &Packet, shared: &Shared) -> Option<Reason> {
        // The queries of an unknown pod are judged again when it is known.
        if !self.is_known() {
            return None;
        }
        if !shared.context.dns.is_to_resolver(packet) {
            return Some(Reason::DnsElsewhere);
        }
        (!self.enforcement.own.contains(&packet.src)).then_some(Reason::SpoofedSource)
    }

    fn question(&mut self, held: &HeldFrame<'_>, packet: &Packet, shared: &mut Shared) {
        let Some(message) = udp_payload(held.frame, packet) else {
            return;
        };
        if !self.is_known() {
            if !shared.quarantine.keep(&held.head, as_sent(held.frame)) {
                let (judge, _) = self.judge(shared, held.head.time_ns);
                judge.report_unknown_pod(message, packet);
            }
            return;
        }
        let (judge, _) = self.judge(shared, held.head.time_ns);
        let Some((question, is_allowed)) = judge.question(message, packet) else {
            return;
        };
        if !is_allowed && held.head.taken != 0 {
            refuse_question(held, packet, &question, shared);
            return;
        }
        let from = (held.head.ifindex, held.head.pod);
        if held.head.taken != 0 && self.decide_name(&question.name, shared) {
            let frame = shared.frame_sender.ask_again(from, held.frame);
            complete_udp(frame, packet);
            return;
        }
        let (judge, pending) = self.judge(shared, held.head.time_ns);
        judge.ask(&question, packet, pending);
        if held.head.taken != 0 {
            complete_udp(shared.frame_sender.bounce(from, held.frame), packet);
        }
    }

    /// Reports a quarantined query of the pod that is dropped.
    pub(super) fn report_dropped_query(&mut self, frame: &[u8], shared: &Shared) {
        let mut packet = Packet::EMPTY;
        if walk(&frame, &mut packet) == Walked::Ip
            && let Some(message) = udp_payload(frame, &packet)
        {
            let (judge, _) = self.judge(shared, boottime_ns());
            judge.report_unknown_pod(message, &packet);
        }
    }

    fn answer(&mut self, held: &HeldFrame<'_>, packet: &Packet, shared: &mut Shared) -> Poll<()> {
        let Some(message) = udp_payload(held.frame, packet) else {
            return Poll::Ready(());
        };
        let (mut judge, pending) = self.judge(shared, held.head.time_ns);
        let answered = ready!(judge.answer(message, packet, pending));
        if answered == Answered::Delivered && held.head.taken != 0 {
            complete_udp(
                shared
                    .frame_sender
                    .deliver((held.head.ifindex, held.head.pod), held.frame),
                packet,
            );
        }
        Poll::Ready(())
    }

    fn judge<'a>(&'a mut self, shared: &'a Shared, time_ns: u64) -> (Judge<'a>, &'a mut Pending) {
        let Self {
            enforcement,
            learned,
            ..
        } = self;
        let judge = Judge::new(enforcement, learned, &shared.context, time_ns);
        (judge, &mut self.pending)
    }

    /// Rejects a denied packet that was longer than what the ring keeps of it: only its headers are there,
    /// and its length fields point beyond them.
    fn reject_cut(&self, held: &HeldFrame<'_>, shared: &mut Shared) {
        let mut whole = held.frame.to_vec();
        whole.resize(egress_common::limits::HELD_FRAME_BYTES.max(65_550), 0);
        let mut packet = Packet::EMPTY;
        if walk(&whole.as_slice(), &mut packet) == Walked::Ip {
            reject(held, &packet, shared);
        } else {
            tracing::debug!(pod = %self.name(), "cannot reject a denied packet: cannot read its headers");
        }
    }

    fn name(&self) -> impl std::fmt::Display {
        self.enforcement.name()
    }
}

impl Enforcement {
    /// Puts the interfaces under this version of the policy from the next packet on.
    fn write_interfaces(
        &self,
        interfaces: &mut InterfaceMap,
        frame_sender: &mut FrameSender,
    ) -> Result<()> {
        for &ifindex in &self.interfaces {
            interfaces.set(ifindex, self.entry)?;
            frame_sender.assign(ifindex, self.entry.pod(), &self.identity);
        }
        Ok(())
    }
}

fn refuse_question(
    held: &HeldFrame<'_>,
    packet: &Packet,
    question: &Question,
    shared: &mut Shared,
) {
    let how: Refusal = shared.context.dns.refusal;
    let Some(frame) = reply::udp(held.frame, packet, &refuse(question, how)) else {
        return;
    };
    shared
        .frame_sender
        .deliver((held.head.ifindex, held.head.pod), &frame);
}

fn reject(held: &HeldFrame<'_>, packet: &Packet, shared: &mut Shared) {
    let Some(frame) = reply::rejection(held.frame, packet) else {
        return;
    };
    shared
        .frame_sender
        .deliver((held.head.ifindex, held.head.pod), &frame);
}

/// The payload of a UDP datagram, by its own length field.
pub(super) fn udp_payload<'a>(frame: &'a [u8], packet: &Packet) -> Option<&'a [u8]> {
    let at = packet.l4_offset as usize;
    let len = frame.get(at + 4..at + 6)?;
    let len = usize::from(u16::from_be_bytes([len[0], len[1]]));
    frame.get(at + 8..at + len)
}
