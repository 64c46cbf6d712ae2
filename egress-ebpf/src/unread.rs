//! DNS messages that pass unread because no agent runs.

use crate::{maps::DNS_TIMES, skb::now_ns};

/// Whether a message that the agent would have to read passes.
#[inline(always)]
pub fn passes() -> bool {
    DNS_TIMES
        .get(0)
        .is_some_and(|times| times.passes_undecided(now_ns()))
}
