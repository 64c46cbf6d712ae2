//! Whether a pod is slow, and for how long.

use std::time::Duration;

/// How long a pod's frames must be quick before the gate's thread sends to it again. This is long, because
/// each slow frame that the gate's thread sends delays the DNS of all pods.
const QUIET: Duration = Duration::from_secs(600);

/// How often that time is doubled at most: up to about 21 hours.
const DOUBLINGS: u32 = 7;

/// A pod that is or was slow.
#[derive(Debug, Default)]
pub(super) struct Pace {
    is_slow: bool,
    times: u32,
}

impl Pace {
    pub(super) fn is_slow(&self) -> bool {
        self.is_slow
    }

    /// The gate's thread has sent it a slow frame.
    pub(super) fn slow_down(&mut self) {
        self.is_slow = true;
        self.times = self.times.saturating_add(1);
    }

    /// The pod has been quick for its [`Self::quiet_time`].
    pub(super) fn speed_up(&mut self) {
        self.is_slow = false;
    }

    /// Doubles each time the pod gets slow, so that a pod that is slow now and then, by intent, cannot delay
    /// the gate often.
    pub(super) fn quiet_time(&self) -> Duration {
        QUIET * (1 << self.times.saturating_sub(1).min(DOUBLINGS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_is_slow_again_and_again_stays_slow_longer() {
        let mut pace = Pace::default();
        assert!(!pace.is_slow());
        let mut times = Vec::new();
        for _ in 0..10 {
            pace.slow_down();
            assert!(pace.is_slow());
            times.push(pace.quiet_time() / 600);
            pace.speed_up();
        }
        let seconds: Vec<u64> = times.iter().map(Duration::as_secs).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 64, 128, 128, 128]);
    }
}
