//! Fragments that come to a pod from a resolver's address.

use std::task::Poll;

use egress_common::{packet::Packet, protocol::bits};

use super::{
    super::{
        DnsSettings,
        checksum::is_right_udp,
        fragments::{self, Whole},
        judge::Judge,
        stream::Answered,
    },
    HeldFrame, Pod, Shared, udp_payload,
};

impl Pod {
    /// Adds a fragment to its datagram. If the datagram is then complete and may pass, puts back all its
    /// fragments, in the order of their offsets.
    pub(super) fn fragment(
        &mut self,
        held: &HeldFrame<'_>,
        packet: &Packet,
        shared: &mut Shared,
    ) -> Poll<()> {
        let fragment = fragments::Held {
            frame: held.frame,
            packet,
            ifindex: held.head.ifindex,
            is_taken: held.head.taken != 0,
        };
        let time_ns = held.head.time_ns;
        let Self {
            enforcement,
            learned,
            ..
        } = self;
        let mut judge = Judge::new(enforcement, learned, &shared.context, time_ns);
        // In an earlier turn this fragment has completed its datagram.
        let whole = self.unfinished.take().or_else(|| {
            self.fragments
                .add(&fragment, time_ns, &mut shared.fragments, |packet, why| {
                    judge.report_lost_fragments(packet, why);
                })
                .map(Box::new)
        });
        let Some(whole) = whole else {
            return Poll::Ready(());
        };
        let may_pass = match answer(&whole, &shared.context.dns) {
            Answer::No => true,
            Answer::Unreadable(why) => {
                judge.report_lost_fragments(&whole.packet, why);
                false
            }
            Answer::Yes(message) => match judge.answer(message, &whole.packet, &mut self.pending) {
                Poll::Ready(answered) => answered == Answered::Delivered,
                Poll::Pending => {
                    self.unfinished = Some(whole);
                    return Poll::Pending;
                }
            },
        };
        if may_pass {
            let pod = enforcement.entry.pod();
            for piece in whole.pieces.iter().filter(|piece| piece.is_taken) {
                shared
                    .frame_sender
                    .deliver((piece.ifindex, pod), &piece.frame);
            }
        }
        Poll::Ready(())
    }

    /// Gives up datagrams whose fragments do not arrive in time.
    pub(super) fn tick_fragments(&mut self, shared: &mut Shared, now_ns: u64) {
        let Self {
            enforcement,
            learned,
            ..
        } = self;
        let judge = Judge::new(enforcement, learned, &shared.context, now_ns);
        self.fragments
            .tick(now_ns, &mut shared.fragments, |packet, why| {
                judge.report_lost_fragments(packet, why);
            });
        let late = self.fragments.take_late();
        shared.context.stats.fragments_late.add(late);
        self.tallies.fragments_late.add(late);
    }
}

/// Whether a datagram is a DNS response.
enum Answer<'a> {
    No,
    Yes(&'a [u8]),
    /// With the reason.
    Unreadable(&'static str),
}

fn answer<'a>(whole: &'a Whole, dns: &DnsSettings) -> Answer<'a> {
    let packet = &whole.packet;
    match packet.bit {
        bits::UDP if dns.is_from_resolver(packet) => {}
        bits::TCP if dns.is_from_resolver(packet) => {
            return Answer::Unreadable("a segment of DNS over TCP came in fragments");
        }
        _ => return Answer::No,
    }
    // Fragments of one datagram may have arrived with the identification of another (RFC 4963).
    if !is_right_udp(&whole.frame, packet) {
        return Answer::Unreadable("the checksum over all fragments is wrong");
    }
    udp_payload(&whole.frame, packet).map_or(
        Answer::Unreadable("the datagram is shorter than its header says"),
        Answer::Yes,
    )
}
