//! Counting what happens often, and telling it seldom.

/// The same thing is told about one pod at most this often.
const TELL_EVERY_NS: u64 = 10_000_000_000;

/// Counts what a pod, or whoever talks to it, can make happen any number of times. A log line for each
/// would flood the log, so there is one at the next tick, and then at most one every ten seconds.
#[derive(Debug, Default)]
pub(super) struct Tally {
    untold: u64,
    /// When it may be told again.
    again_ns: u64,
}

impl Tally {
    /// It has happened so many times more.
    pub(super) fn add(&mut self, times: u64) {
        self.untold = self.untold.saturating_add(times);
    }

    /// How often it has happened since it was last told, if that is to be told now.
    pub(super) fn due(&mut self, now_ns: u64) -> Option<u64> {
        if self.untold == 0 || now_ns < self.again_ns {
            return None;
        }
        self.again_ns = now_ns.saturating_add(TELL_EVERY_NS);
        Some(std::mem::take(&mut self.untold))
    }

    /// How often it has happened since it was last told: for when nobody will ask again.
    pub(super) fn rest(&mut self) -> Option<u64> {
        let rest = std::mem::take(&mut self.untold);
        (rest > 0).then_some(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_often_is_told_seldom_and_whole() {
        let mut tally = Tally::default();
        assert_eq!(tally.due(7), None);
        tally.add(2);
        tally.add(3);
        assert_eq!(tally.due(7), Some(5));
        tally.add(200_000);
        assert_eq!(tally.due(8), None);
        assert_eq!(tally.due(6 + TELL_EVERY_NS), None);
        tally.add(1);
        assert_eq!(tally.due(7 + TELL_EVERY_NS), Some(200_001));
        assert_eq!(tally.rest(), None);
        tally.add(4);
        assert_eq!(tally.rest(), Some(4));
    }
}
