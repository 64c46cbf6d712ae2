//! Holds frames for the agent: the `held` ring.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::{bpf_ringbuf_query, bpf_skb_load_bytes},
    maps::ring_buf::RingBufEntry,
};
use egress_common::{
    ids::PodId,
    limits::{HELD_BURST, HELD_FRAME_BYTES, HELD_PER_SECOND, HELD_RING_BYTES, HELD_UNIT},
    meter::take_tokens,
    packet::{ETHERNET_LEN, Frame as _},
    records::{HELD_ANSWER, HELD_QUESTION, HELD_REJECT, Held, Interface, Meter},
};

use crate::{
    counters::count,
    maps::{GATE_AWAKE, HELD, METER},
    skb::{Skb, now_ns},
};

/// Most queries and most responses are shorter than this.
const SMALL: usize = HELD_UNIT - size_of::<Held>();
/// All frames of an ordinary MTU are shorter than this.
const MEDIUM: usize = 4 * HELD_UNIT - size_of::<Held>();
/// Long responses over UDP, and the aggregate of a sender's first window over TCP, are shorter than this.
const LARGE: usize = 32 * HELD_UNIT - size_of::<Held>();
/// The longest possible IP packet.
const LARGEST: usize = HELD_FRAME_BYTES;
/// Only the headers of a rejected packet are needed.
const REJECT_BYTES: u32 = 192;

#[repr(C)]
struct HeldFrame<const N: usize> {
    head: Held,
    data: [u8; N],
}

/// Copies the frame into the `held` ring. Returns whether that succeeded; a failure is counted.
///
/// The gate decides on this copy and puts this copy back. So it does not matter if other programs change the
/// pages of the original ([`crate::skb`]).
///
/// `taken` means that the original will be dropped and the copy put back.
#[inline(always)]
pub fn take(skb: &Skb<'_>, interface: &Interface, kind: u8, taken: bool) -> bool {
    let mut len = skb.len();
    if kind == HELD_REJECT && len > REJECT_BYTES {
        len = REJECT_BYTES;
    }
    if len as usize > LARGEST {
        count(|c| c.held_too_long += 1);
        unreported(interface.pod());
        return false;
    }
    let head = Held {
        time_ns: now_ns(),
        ifindex: skb.ifindex(),
        pod: interface.pod(),
        len,
        kind,
        taken: u8::from(taken),
        l3_offset: ETHERNET_LEN as u8,
        pad: 0,
    };
    if is_crowded() && !has_share(interface.pod(), room(len), head.time_ns) {
        count(|c| {
            if kind == HELD_REJECT {
                c.rejects_lost += 1;
            } else {
                c.held_limited += 1;
            }
        });
        unreported(interface.pod());
        return false;
    }
    let copied = if len as usize <= SMALL {
        copy::<SMALL>(skb, head)
    } else if len as usize <= MEDIUM {
        copy::<MEDIUM>(skb, head)
    } else if len as usize <= LARGE {
        copy::<LARGE>(skb, head)
    } else {
        copy::<LARGEST>(skb, head)
    };
    if copied {
        count(|c| match kind {
            HELD_QUESTION => c.held_questions += 1,
            HELD_ANSWER => c.held_answers += 1,
            _ => {}
        });
    } else {
        count(|c| {
            if kind == HELD_REJECT {
                c.rejects_lost += 1;
            } else {
                c.held_lost += 1;
            }
        });
        unreported(interface.pod());
    }
    copied
}

/// The room that a frame of this length takes in the ring, in units.
#[inline(always)]
const fn room(len: u32) -> u64 {
    let len = len as usize;
    let bytes = if len <= SMALL {
        SMALL
    } else if len <= MEDIUM {
        MEDIUM
    } else if len <= LARGE {
        LARGE
    } else {
        LARGEST
    };
    (bytes + size_of::<Held>()).div_ceil(HELD_UNIT) as u64
}

#[inline(always)]
fn copy<const N: usize>(skb: &Skb<'_>, head: Held) -> bool {
    let Some(mut entry) = HELD.reserve_untyped::<HeldFrame<N>>(0) else {
        return false;
    };
    let frame = MaybeUninit::as_mut_ptr(&mut entry);
    // SAFETY: the entry is ours until it is submitted, and as long as `HeldFrame<N>`. The length is between 1
    // and `N`, so the helper stays within `data`.
    let failed = unsafe {
        (&raw mut (*frame).head).write(head);
        // The verifier must see both bounds on the register that it checks. The addition provides the lower
        // one: kernels below 6.3 do not derive it from a comparison with zero.
        let last = core::hint::black_box(head.len.wrapping_sub(1));
        if last >= N as u32 {
            -1
        } else {
            bpf_skb_load_bytes(skb.as_ptr(), 0, (&raw mut (*frame).data).cast(), last + 1)
        }
    };
    if failed != 0 {
        entry.discard(0);
        return false;
    }
    submit(entry);
    true
}

/// Gives the entry to the gate, and wakes the gate only if it sleeps: waking costs both CPUs more than the
/// message itself.
///
/// The gate announces that it is about to sleep and then reads the ring once more. The entry is in the ring
/// before the second check here (`bpf_ringbuf_commit` exchanges the entry's header, which is a full barrier).
/// So either the gate finds the entry, or the check finds that the gate sleeps, and wakes it.
#[inline(always)]
fn submit<T: 'static>(entry: RingBufEntry<T>) {
    if !is_gate_awake() {
        entry.submit(0);
        return;
    }
    entry.submit(u64::from(BPF_RB_NO_WAKEUP));
    if !is_gate_awake()
        && let Some(nothing) = HELD.reserve_untyped::<u64>(0)
    {
        nothing.discard(u64::from(BPF_RB_FORCE_WAKEUP));
    }
}

#[inline(always)]
fn is_gate_awake() -> bool {
    // SAFETY: the entry is an aligned word that lives as long as the map.
    GATE_AWAKE
        .get(0)
        .is_some_and(|awake| unsafe { core::ptr::from_ref(awake).read_volatile() } != 0)
}

/// Whether more than half of the ring is in use.
#[inline(always)]
fn is_crowded() -> bool {
    let ring = core::ptr::from_ref(&HELD).cast_mut().cast();
    // SAFETY: the map is a ring buffer.
    let waiting = unsafe { bpf_ringbuf_query(ring, u64::from(BPF_RB_AVAIL_DATA)) };
    waiting > u64::from(HELD_RING_BYTES / 2)
}

/// Whether the pod may still add to a crowded ring, so that one pod's flood does not stop the DNS of others.
#[inline(always)]
fn has_share(pod: PodId, cost: u64, now_ns: u64) -> bool {
    let Some(meter) = METER.get_ptr_mut(pod.get()) else {
        return false;
    };
    // SAFETY: the entry lives while the program runs; racing writers only blur the share.
    let Meter {
        held_tokens,
        held_refill_ns,
        ..
    } = unsafe { &mut *meter };
    take_tokens(
        cost,
        held_tokens,
        held_refill_ns,
        HELD_BURST,
        HELD_PER_SECOND,
        now_ns,
    )
}

#[inline(always)]
fn unreported(pod: PodId) {
    if let Some(meter) = METER.get_ptr_mut(pod.get()) {
        // SAFETY: as above.
        unsafe { (*meter).held_unreported += 1 };
    }
}
