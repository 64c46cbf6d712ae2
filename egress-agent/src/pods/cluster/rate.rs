//! How much may be done in a while.

use std::time::{Duration, Instant};

/// Permits for something: a few at once, and one more each time a while has passed.
#[derive(Clone, Debug)]
pub(super) struct Rate {
    burst: u32,
    every: Duration,
    left: u32,
    /// Since when the next permit has been growing.
    since: Instant,
}

impl Rate {
    pub(super) fn new(burst: u32, every: Duration, now: Instant) -> Self {
        Self {
            burst,
            every,
            left: burst,
            since: now,
        }
    }

    /// Takes a permit if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        self.grow(now);
        let is_left = self.left > 0;
        self.left -= u32::from(is_left);
        is_left
    }

    /// Whether nothing has been taken that has not grown again.
    pub(super) fn is_whole(&mut self, now: Instant) -> bool {
        self.grow(now);
        self.left == self.burst
    }

    fn grow(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since);
        let grown = (passed.as_nanos() / self.every.as_nanos().max(1)) as u32;
        if grown >= self.burst - self.left {
            (self.left, self.since) = (self.burst, now);
        } else {
            self.left += grown;
            self.since += self.every * grown;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_taken_and_grow_again_up_to_the_burst() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut rate = Rate::new(2, Duration::from_secs(10), start);
        assert!(rate.is_whole(at(0)));
        assert!(rate.take(at(0)) && rate.take(at(0)) && !rate.take(at(9)));
        assert!(rate.take(at(10)) && !rate.take(at(19)));
        assert!(!rate.is_whole(at(20)));
        assert!(rate.is_whole(at(1000)));
        assert!(rate.take(at(1000)) && rate.take(at(1000)) && !rate.take(at(1000)));
    }
}
