//! A pod's share of the gate's time.
//!
//! The gate is one thread. Some messages take a hundred times as long as others, and a pod that has its own
//! resolver or a colluding server can cause many of those. So the gate accounts for the time that each pod
//! takes. It decides the messages of a pod within its share as they come. The messages of a pod over its
//! share wait in its [`Backlog`]. The gate works on the backlogs when no other message waits, and begins with
//! the pod that has used least. A gate that has nothing else to do works on them all the time.
//!
//! [`Backlog`]: super::backlog::Backlog

/// A pod's share of the gate's time: one part of this many. An ordinary lookup takes about 30 µs, so a share
/// allows more than a thousand lookups a second.
const PART: u64 = 20;

/// The time that a pod may use at once after it has used less than its share for a while.
const BURST_NS: i64 = 250_000;

/// The greatest debt of a pod. It orders pods that are all over their shares, and is paid back from the pod's
/// share.
const DEBT_NS: i64 = 1_000_000_000;

/// One pod's account.
#[derive(Debug)]
pub(super) struct Share {
    balance_ns: i64,
    at_ns: u64,
}

impl Share {
    /// An account without debt.
    pub(super) fn new(now_ns: u64) -> Self {
        Self {
            balance_ns: BURST_NS,
            at_ns: now_ns,
        }
    }

    /// The time that is left; negative when the pod has a debt.
    pub(super) fn balance(&self, now_ns: u64) -> i64 {
        let earned = now_ns.saturating_sub(self.at_ns) / PART;
        let earned = i64::try_from(earned).unwrap_or(i64::MAX);
        self.balance_ns.saturating_add(earned).min(BURST_NS)
    }

    /// Whether the pod's next message may be decided at once.
    pub(super) fn is_left(&self, now_ns: u64) -> bool {
        self.balance(now_ns) > 0
    }

    /// Charges the account.
    pub(super) fn spend(&mut self, used_ns: u64, now_ns: u64) {
        let used = i64::try_from(used_ns).unwrap_or(i64::MAX);
        self.balance_ns = self.balance(now_ns).saturating_sub(used).max(-DEBT_NS);
        self.at_ns = self.at_ns.max(now_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn a_pod_has_a_twentieth_of_the_time_and_a_short_burst() {
        let mut share = Share::new(0);
        share.spend(MS / 5, 0);
        assert!(share.is_left(0));
        share.spend(MS / 2, 0);
        assert!(!share.is_left(0));
        assert!(!share.is_left(9 * MS), "0.45 ms is paid back");
        assert!(share.is_left(10 * MS));
        assert_eq!(share.balance(3600 * 1000 * MS), BURST_NS);
    }

    #[test]
    fn a_debt_is_paid_back_over_time() {
        let mut share = Share::new(0);
        share.spend(u64::MAX, MS);
        assert_eq!(share.balance(MS), -DEBT_NS);
        assert!(share.is_left(MS + PART * 1001 * MS));
    }

    #[test]
    fn a_clock_that_stands_still_earns_nothing() {
        let mut share = Share::new(5);
        for _ in 0..3 {
            share.spend(MS, 5);
        }
        let balance = BURST_NS - 3 * MS.cast_signed();
        assert_eq!(share.balance(5), balance);
        assert_eq!(share.balance(0), balance);
    }
}
