//! The node's counters.

use egress_common::records::Counters;

use crate::maps::COUNTERS;

/// Changes this CPU's copy of the counters.
#[inline(always)]
pub fn count(change: impl FnOnce(&mut Counters)) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the entry belongs to this CPU, and another program of this kind does not interrupt a
        // program on the same CPU.
        change(unsafe { &mut *counters });
    }
}
