//! When to look again for something that is expected and was not found.

use std::time::Duration;

/// The wait after the first look that found nothing.
pub(in crate::control) const RETRY_MIN: Duration = Duration::from_millis(10);
/// The longest wait.
const RETRY_MAX: Duration = Duration::from_secs(1);

/// The wait after another look that found nothing: 9/8 of the last wait, capped.
///
/// So something is noticed at the latest after another eighth of the time that it took to appear. The kernel sends no
/// notice when a pod's first process enters its control group, which takes a runtime about 100 ms.
pub(in crate::control) fn longer(wait: Duration) -> Duration {
    (wait * 9 / 8).min(RETRY_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_by_an_eighth_and_never_exceed_a_second() {
        assert_eq!(
            longer(Duration::from_millis(800)),
            Duration::from_millis(900)
        );
        assert_eq!(longer(RETRY_MAX), RETRY_MAX);
    }
}
