//! Limiting how often something is done that others can cause as often as they like.

use std::time::Duration;

use tokio::time::Instant;

/// Allows a number of turns at once, and after them one in a fixed time.
#[derive(Debug)]
pub(in crate::control) struct Pace {
    every: Duration,
    at_once: u32,
    left: u32,
    /// When the last turn was added to those left.
    filled: Instant,
}

impl Pace {
    pub(in crate::control) fn new(every: Duration, at_once: u32, now: Instant) -> Self {
        Self {
            every,
            at_once,
            left: at_once,
            filled: now,
        }
    }

    /// Takes a turn.
    ///
    /// # Errors
    ///
    /// When none is left: when the next one is there.
    pub(in crate::control) fn take(&mut self, now: Instant) -> Result<(), Instant> {
        let passed = now.duration_since(self.filled).as_nanos();
        let more = u32::try_from(passed / self.every.as_nanos()).unwrap_or(u32::MAX);
        if more >= self.at_once - self.left {
            (self.left, self.filled) = (self.at_once, now);
        } else {
            self.left += more;
            self.filled += self.every * more;
        }
        if self.left == 0 {
            return Err(self.filled + self.every);
        }
        self.left -= 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_come_at_a_distance_when_those_at_once_are_used() {
        const EVERY: Duration = Duration::from_millis(100);
        let start = Instant::now();
        let mut pace = Pace::new(EVERY, 2, start);
        assert_eq!(pace.take(start), Ok(()));
        assert_eq!(pace.take(start), Ok(()));
        assert_eq!(pace.take(start + EVERY / 2), Err(start + EVERY));
        assert_eq!(pace.take(start + EVERY), Ok(()));
        assert_eq!(pace.take(start + EVERY), Err(start + 2 * EVERY));
        // No more than two are ever left.
        let later = start + 50 * EVERY;
        assert_eq!(pace.take(later), Ok(()));
        assert_eq!(pace.take(later), Ok(()));
        assert_eq!(pace.take(later), Err(later + EVERY));
    }
}
