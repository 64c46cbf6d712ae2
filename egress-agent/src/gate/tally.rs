//! Counts frequent events and logs them rarely.

/// The shortest interval between two log lines about the same event of one pod.
const LOG_INTERVAL_NS: u64 = 10_000_000_000;

/// Counts an event that a pod, or its peer, can cause any number of times. A log line for each would flood
/// the log, so there is one at the next tick, and then at most one every ten seconds.
#[derive(Debug, Default)]
pub(super) struct Tally {
    unlogged: u64,
    /// When the next line may be logged.
    next_log_ns: u64,
}

impl Tally {
    /// Adds to the count.
    pub(super) fn add(&mut self, times: u64) {
        self.unlogged = self.unlogged.saturating_add(times);
    }

    /// The count since the last log line, if a line is due now.
    pub(super) fn due(&mut self, now_ns: u64) -> Option<u64> {
        if self.unlogged == 0 || now_ns < self.next_log_ns {
            return None;
        }
        self.next_log_ns = now_ns.saturating_add(LOG_INTERVAL_NS);
        Some(std::mem::take(&mut self.unlogged))
    }

    /// The count since the last log line, for a last line: no tick follows.
    pub(super) fn rest(&mut self) -> Option<u64> {
        let rest = std::mem::take(&mut self.unlogged);
        (rest > 0).then_some(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequent_events_are_logged_rarely_and_none_is_lost() {
        let mut tally = Tally::default();
        assert_eq!(tally.due(7), None);
        tally.add(2);
        tally.add(3);
        assert_eq!(tally.due(7), Some(5));
        tally.add(200_000);
        assert_eq!(tally.due(8), None);
        assert_eq!(tally.due(6 + LOG_INTERVAL_NS), None);
        tally.add(1);
        assert_eq!(tally.due(7 + LOG_INTERVAL_NS), Some(200_001));
        assert_eq!(tally.rest(), None);
        tally.add(4);
        assert_eq!(tally.rest(), Some(4));
    }
}
