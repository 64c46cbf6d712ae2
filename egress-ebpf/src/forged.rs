//! Frames with another's source that a pod sends, and that a host on the node sends back to it.
//!
//! If such a frame reached the pod as a new connection, the pod could choose any host as the caller, and
//! answer to that host. In enforce mode no such frame leaves. In audit mode it does. When a pod begins to be
//! enforced, frames from before may still be on their way.

use egress_common::{flow::FORGED_NS, ids::PodId, records::Forged};

use crate::{
    flows::ANY,
    maps::FORGED,
    skb::{Skb, now_ns},
};

/// The greatest difference between the clocks of two CPUs.
const SLACK_NS: u64 = 1_000_000_000;

/// Records that a frame passes whose source is not known to be the pod's own.
#[inline(always)]
pub fn note(pod: PodId) {
    let sent_ns = now_ns();
    if let Some(forged) = FORGED.get_ptr_mut(pod.get()) {
        // SAFETY: the map is not preallocated, so the entry lives until the program ends; racing writers
        // write almost the same time.
        unsafe { (*forged).sent_ns = sent_ns };
        return;
    }
    let forged = Forged {
        sent_ns,
        unjudged_ns: 0,
    };
    // Another CPU has inserted the entry meanwhile, or the map has room: it is as large as `interfaces`.
    let _ = FORGED.insert(pod.get(), forged, ANY);
}

/// Whether a frame to the pod may be one that the pod sent itself with another's source.
///
/// The function has no branches, so that the verifier follows one path.
#[inline(always)]
pub fn may_be(skb: &Skb<'_>, pod: PodId, now_ns: u64) -> bool {
    let Some(forged) = FORGED.get_ptr(pod.get()) else {
        return false;
    };
    // SAFETY: as above.
    let forged = unsafe { *forged };
    // Another CPU may have written a later time than this one has read. A time of 0 counts as the start of
    // the machine.
    let is_recent =
        |time_ns: u64| now_ns.wrapping_sub(time_ns).wrapping_add(SLACK_NS) < FORGED_NS + SLACK_NS;
    let has_forged = is_recent(forged.sent_ns);
    // Frames that the pod sent before were not judged, but a frame that the node received on the pod's own interface
    // comes from the pod.
    let comes_back = is_recent(forged.unjudged_ns) & (skb.ingress_ifindex() == skb.ifindex());
    skb.forget_number(u32::from(has_forged | comes_back)) != 0
}
