//! Reports denied frames through the `denials` ring.

use aya_ebpf::programs::TcContext;
use egress_common::{
    limits::{DENIAL_BURST, DENIALS_PER_SECOND},
    meter::take_tokens,
    packet::{Frame as _, Packet, TCP_RST, ether_type},
    reason::Reason,
    records::{
        Denial, FROM_POD, HELD_REJECT, INTERFACE_REJECT, Interface, MODE_AUDIT, Meter, NO_CLASS,
        VERDICT_AUDITED, VERDICT_DROPPED, VERDICT_REJECTED,
    },
};

use crate::{
    DROP, PASS,
    counters::count,
    forged, held,
    maps::{DENIALS, METER},
    skb::{Skb, now_ns},
};

/// A denial and its reason.
pub struct Denied<'a> {
    pub interface: &'a Interface,
    /// `None` when the headers could not be walked.
    pub packet: Option<&'a Packet>,
    pub reason: Reason,
    pub class: u8,
    pub direction: u8,
}

impl<'a> Denied<'a> {
    /// A denial of a packet from the pod that is not due to a class.
    #[inline(always)]
    pub fn from_pod(interface: &'a Interface, packet: &'a Packet, reason: Reason) -> Self {
        Self {
            interface,
            packet: Some(packet),
            reason,
            class: NO_CLASS,
            direction: FROM_POD,
        }
    }
}

/// Counts and reports a denial. Returns the program's return value: in audit mode the packet passes anyway.
#[inline(never)]
pub fn deny(ctx: &TcContext, denied: &Denied<'_>) -> i32 {
    let skb = Skb(ctx);
    let audit = denied.interface.mode == MODE_AUDIT;
    let verdict = if audit {
        VERDICT_AUDITED
    } else if denied.interface.flags & INTERFACE_REJECT != 0 && is_rejectable(denied) {
        VERDICT_REJECTED
    } else {
        VERDICT_DROPPED
    };
    let len = skb.len();
    count(|c| {
        if audit {
            c.audited_packets += 1;
        } else {
            c.denied_packets += 1;
            c.denied_bytes += u64::from(len);
        }
    });
    record(&skb, denied, verdict);
    if audit && denied.direction == FROM_POD && is_of_unknown_source(denied.reason) {
        forged::note(denied.interface.pod());
    }
    if verdict == VERDICT_REJECTED {
        held::take(&skb, denied.interface, HELD_REJECT, true);
    }
    if audit { PASS } else { DROP }
}

/// Whether the frame may have another's source: true for all reasons except those that apply after the source
/// was found to be the pod's own.
#[inline(always)]
const fn is_of_unknown_source(reason: Reason) -> bool {
    !matches!(
        reason,
        Reason::NoRule
            | Reason::PortNotAllowed
            | Reason::Expired
            | Reason::AddressNotLearned
            | Reason::DenyRule
            | Reason::Protected
            | Reason::DnsElsewhere
            | Reason::InternalAnswer
            | Reason::PolicyUnreadable
            | Reason::UnenforcedInterface
            | Reason::DnsMalformed
            | Reason::DnsFragmented
            | Reason::DnsNotHeld
            | Reason::FragmentWithoutFirst
            | Reason::DestinationsFull
    )
}

/// Whether an honest sender expects a reply to this packet: not to a malformed or spoofed packet, a fragment
/// (RFC 1122, section 3.2.2) or a reset. A SYN that found no room gets none either, so that it is repeated.
#[inline(always)]
fn is_rejectable(denied: &Denied<'_>) -> bool {
    let Some(packet) = denied.packet else {
        return false;
    };
    denied.direction == FROM_POD
        && packet.tcp_flags & TCP_RST == 0
        && !matches!(
            denied.reason,
            Reason::SpoofedSource
                | Reason::Malformed
                | Reason::FragmentWithoutFirst
                | Reason::DestinationsFull
        )
}

#[inline(always)]
fn record(skb: &Skb<'_>, denied: &Denied<'_>, verdict: u8) {
    let now_ns = now_ns();
    let Some(meter) = METER.get_ptr_mut(denied.interface.pod().get()) else {
        return;
    };
    // SAFETY: the entry lives while the program runs; racing writers only blur the share.
    let Meter {
        denial_tokens,
        denial_refill_ns,
        denials_unreported,
        ..
    } = unsafe { &mut *meter };
    if !take_tokens(
        1,
        denial_tokens,
        denial_refill_ns,
        DENIAL_BURST,
        DENIALS_PER_SECOND,
        now_ns,
    ) {
        *denials_unreported += 1;
        count(|c| c.denials_limited += 1);
        return;
    }
    let Some(mut entry) = DENIALS.reserve(0) else {
        *denials_unreported += 1;
        count(|c| c.denials_lost += 1);
        return;
    };
    let mut denial = Denial {
        time_ns: now_ns,
        src: [0; 16],
        dst: [0; 16],
        pod: denied.interface.pod(),
        policy: denied.interface.policy(),
        ifindex: skb.ifindex(),
        len: skb.len(),
        src_port: 0,
        dst_port: 0,
        protocol: 0,
        reason: denied.reason as u8,
        icmp_type: 0,
        icmp_code: 0,
        verdict,
        class: denied.class,
        direction: denied.direction,
        walked: 0,
        ether_type: ether_type(skb),
        pad: 0,
    };
    if let Some(packet) = denied.packet {
        denial.src = packet.src;
        denial.dst = packet.dst;
        denial.src_port = packet.src_port;
        denial.dst_port = packet.dst_port;
        denial.protocol = packet.protocol;
        denial.icmp_type = packet.icmp_type;
        denial.icmp_code = packet.icmp_code;
        denial.walked = 1;
    }
    entry.write(denial);
    entry.submit(0);
}
