//! Token buckets, which limit each pod's share of a ring buffer.

const SECOND_NS: u64 = 1_000_000_000;

/// Takes `cost` tokens, or none, from a bucket that holds at most `burst` tokens and refills at
/// `per_second`.
///
/// `tokens` and `refill_ns` are the bucket's state. A bucket whose `refill_ns` is zero is new and full. Two
/// CPUs that take at the same moment may spend one token twice: the share is approximate.
#[inline(always)]
pub fn take_tokens(
    cost: u64,
    tokens: &mut u64,
    refill_ns: &mut u64,
    burst: u32,
    per_second: u32,
    now_ns: u64,
) -> bool {
    let burst = u64::from(burst);
    let per_second = u64::from(per_second);
    if *refill_ns == 0 {
        *refill_ns = now_ns;
        *tokens = burst;
    }
    // A pod that was silent for long has a full bucket; the limit keeps the product in range.
    let elapsed_ns = now_ns.saturating_sub(*refill_ns).min(60 * SECOND_NS);
    let earned = elapsed_ns * per_second / SECOND_NS;
    if earned > 0 {
        *tokens = (*tokens + earned).min(burst);
        *refill_ns = now_ns;
    }
    if *tokens < cost {
        return false;
    }
    *tokens -= cost;
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let (mut tokens, mut refill_ns) = (0, 0);
        let mut take = |now_ns| take_tokens(1, &mut tokens, &mut refill_ns, 10, 5, now_ns);
        let start = 1_000 * SECOND_NS;
        assert_eq!((0..100).filter(|_| take(start)).count(), 10);
        assert_eq!((0..100).filter(|_| take(start + SECOND_NS)).count(), 5);
        assert_eq!(
            (0..100).filter(|_| take(start + 3600 * SECOND_NS)).count(),
            10
        );
    }

    #[test]
    fn of_the_same_share_there_are_more_short_messages_than_long_ones() {
        let (mut tokens, mut refill_ns) = (0, 0);
        let mut take = |cost| take_tokens(cost, &mut tokens, &mut refill_ns, 10, 5, 7);
        assert_eq!((0..100).filter(|_| take(4)).count(), 2);
        assert_eq!((0..100).filter(|_| take(1)).count(), 2);
    }
}
