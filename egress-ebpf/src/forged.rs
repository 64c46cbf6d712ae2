//! Frames that a pod sends in another's name, and that somebody on the node sends back to it.
//!
//! A pod that gets its own frame back with the source of its choice would have been called by whom it
//! likes, and could answer. In enforce mode no such frame leaves. In audit mode it does, and when a pod
//! begins to be enforced, frames from before may still be on their way.

use egress_common::{flow::FORGED_NS, records::Forged};

use crate::{
    flows::ANY,
    maps::FORGED,
    skb::{Skb, now_ns},
};

/// How far the clocks that two CPUs have read may differ.
const SLACK_NS: u64 = 1_000_000_000;

/// Notes that a frame passes whose source is not known to be the pod's own.
#[inline(always)]
pub fn note(pod: u32) {
    let sent_ns = now_ns();
    if let Some(forged) = FORGED.get_ptr_mut(pod) {
        // SAFETY: the map is not preallocated, so the entry lives until the program ends; racing writers
        // write almost the same time.
        unsafe { (*forged).sent_ns = sent_ns };
        return;
    }
    let forged = Forged {
        sent_ns,
        unjudged_ns: 0,
    };
    // It is there by now, or the map has room: it is as large as `interfaces`.
    let _ = FORGED.insert(pod, forged, ANY);
}

/// Whether a frame on its way to the pod may be one that the pod has sent itself in another's name.
///
/// There are no branches, so that the verifier follows one way through it.
#[inline(always)]
pub fn may_be(skb: &Skb<'_>, pod: u32, now_ns: u64) -> bool {
    let Some(forged) = FORGED.get_ptr(pod) else {
        return false;
    };
    // SAFETY: as above.
    let forged = unsafe { *forged };
    // Another CPU may have written a later time than the one read here. Who has never forged did so when the
    // machine was started.
    let is_recent =
        |time_ns: u64| now_ns.wrapping_sub(time_ns).wrapping_add(SLACK_NS) < FORGED_NS + SLACK_NS;
    let has_forged = is_recent(forged.sent_ns);
    // Nobody saw what the pod sent before, but what came in by its own interface is from nobody else.
    let comes_back = is_recent(forged.unjudged_ns) & (skb.ingress_ifindex() == skb.ifindex());
    skb.forget_number(u32::from(has_forged | comes_back)) != 0
}
