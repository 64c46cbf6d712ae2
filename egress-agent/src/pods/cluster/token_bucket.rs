//! A token bucket.

use std::time::{Duration, Instant};

/// A token bucket: `burst` tokens at most, and one more after each interval.
#[derive(Clone, Debug)]
pub(super) struct TokenBucket {
    burst: u32,
    every: Duration,
    tokens: u32,
    /// When the next token began to accumulate.
    since: Instant,
}

impl TokenBucket {
    pub(super) fn new(burst: u32, every: Duration, now: Instant) -> Self {
        Self {
            burst,
            every,
            tokens: burst,
            since: now,
        }
    }

    /// Takes a token if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        self.refill(now);
        let is_taken = self.tokens > 0;
        self.tokens -= u32::from(is_taken);
        is_taken
    }

    /// Whether the bucket is full.
    pub(super) fn is_full(&mut self, now: Instant) -> bool {
        self.refill(now);
        self.tokens == self.burst
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since);
        let added = (passed.as_nanos() / self.every.as_nanos().max(1)) as u32;
        if added >= self.burst - self.tokens {
            (self.tokens, self.since) = (self.burst, now);
        } else {
            self.tokens += added;
            self.since += self.every * added;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_taken_and_refilled_up_to_the_burst() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut bucket = TokenBucket::new(2, Duration::from_secs(10), start);
        assert!(bucket.is_full(at(0)));
        assert!(bucket.take(at(0)) && bucket.take(at(0)) && !bucket.take(at(9)));
        assert!(bucket.take(at(10)) && !bucket.take(at(19)));
        assert!(!bucket.is_full(at(20)));
        assert!(bucket.is_full(at(1000)));
        assert!(bucket.take(at(1000)) && bucket.take(at(1000)) && !bucket.take(at(1000)));
    }
}
