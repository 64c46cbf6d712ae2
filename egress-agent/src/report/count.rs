//! Counters, gauges and histograms that one thread writes and any other reads: no locks, no allocation.

use std::sync::atomic::{AtomicU64, Ordering};

use egress_common::reason::Reason;

use super::{PolicyCounts, Verdict};

/// A counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to the counter.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// The current value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A gauge.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Sets the gauge.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The current value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A histogram of durations, with fixed bucket bounds.
#[derive(Debug)]
pub struct Histogram<const N: usize> {
    bounds_ns: &'static [u64; N],
    buckets: [Counter; N],
    longer: Counter,
    sum_ns: Counter,
}

impl<const N: usize> Histogram<N> {
    /// An empty histogram; the bounds ascend, and each belongs to its own bucket.
    pub fn new(bounds_ns: &'static [u64; N]) -> Self {
        Self {
            bounds_ns,
            buckets: std::array::from_fn(|_| Counter::default()),
            longer: Counter::default(),
            sum_ns: Counter::default(),
        }
    }

    /// Records a duration.
    pub fn record(&self, took_ns: u64) {
        let bucket = self.bounds_ns.iter().position(|&bound| took_ns <= bound);
        bucket.map_or(&self.longer, |at| &self.buckets[at]).add(1);
        self.sum_ns.add(took_ns);
    }

    /// All buckets, each with its upper bound in nanoseconds (the last has none) and its own count.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<u64>, u64)> + '_ {
        let bounded = self.bounds_ns.iter().map(|&bound| Some(bound));
        let counts = self.buckets.iter().map(Counter::get);
        bounded.zip(counts).chain([(None, self.longer.get())])
    }

    /// The sum of all durations, in nanoseconds.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns.get()
    }
}

/// One more than the highest number of a reason.
const REASONS: usize = Reason::ALL.len() + 1;

/// Denials by reason.
#[derive(Debug)]
pub struct DenialCounts {
    denied: [Counter; REASONS],
    audited: [Counter; REASONS],
    unreported: Counter,
    /// The same packets by the policies that decided. Kept for namespaces only.
    pub policies: PolicyCounts,
}

impl Default for DenialCounts {
    fn default() -> Self {
        Self {
            denied: std::array::from_fn(|_| Counter::default()),
            audited: std::array::from_fn(|_| Counter::default()),
            unreported: Counter::default(),
            policies: PolicyCounts::default(),
        }
    }
}

impl DenialCounts {
    /// Counts packets that were denied, or would have been.
    pub fn add(&self, verdict: Verdict, reason: Reason, count: u64) {
        let counts = match verdict {
            Verdict::Dropped | Verdict::Rejected => &self.denied,
            Verdict::Audited => &self.audited,
        };
        if let Some(counter) = counts.get(reason as usize) {
            counter.add(count);
        }
    }

    /// Counts denied packets whose details were lost.
    pub fn add_unreported(&self, count: u64) {
        self.unreported.add(count);
    }

    /// Denied packets by reason, without reasons whose count is zero.
    pub fn denied(&self) -> impl Iterator<Item = (Reason, u64)> + '_ {
        by_reason(&self.denied)
    }

    /// Packets that passed and would have been denied in enforce mode, by reason.
    pub fn audited(&self) -> impl Iterator<Item = (Reason, u64)> + '_ {
        by_reason(&self.audited)
    }

    /// Denied packets whose details were lost.
    pub fn unreported(&self) -> u64 {
        self.unreported.get()
    }
}

fn by_reason(counts: &[Counter; REASONS]) -> impl Iterator<Item = (Reason, u64)> + '_ {
    Reason::ALL
        .iter()
        .map(|&reason| (reason, counts[reason as usize].get()))
        .filter(|&(_, count)| count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_counter() {
        let counts = DenialCounts::default();
        for &reason in Reason::ALL {
            counts.add(Verdict::Dropped, reason, reason as u64);
            counts.add(Verdict::Audited, reason, 1);
        }
        assert_eq!(counts.denied().count(), Reason::ALL.len());
        assert!(
            counts
                .denied()
                .all(|(reason, count)| count == reason as u64)
        );
        assert!(counts.audited().all(|(_, count)| count == 1));
    }

    #[test]
    fn a_bound_belongs_to_its_bucket_and_longer_durations_to_the_last() {
        let histogram = Histogram::new(&[10, 100]);
        for took in [0, 10, 11, 100, 101] {
            histogram.record(took);
        }
        let buckets: Vec<_> = histogram.buckets().collect();
        assert_eq!(buckets, [(Some(10), 2), (Some(100), 2), (None, 1)]);
        assert_eq!(histogram.sum_ns(), 222);
    }
}
