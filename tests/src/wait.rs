//! Waiting for what must happen, with a deadline.

use std::{
    thread,
    time::{Duration, Instant},
};

/// How long anything that must happen may take on a crowded machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// How long to try something that is expected to be impossible. Too short can only hide a fault,
/// never invent one; each test that relies on it also asserts the denial line.
pub const SHORT: Duration = Duration::from_millis(400);

const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Polls `probe` until it yields a value; panics after [`DEADLINE`].
#[track_caller]
pub fn eventually<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(
            start.elapsed() < DEADLINE,
            "did not happen within {DEADLINE:?}: {what}"
        );
        thread::sleep(POLL_INTERVAL);
    }
}

/// `Some(())` when the condition holds, for [`eventually`].
pub fn holds(condition: bool) -> Option<()> {
    condition.then_some(())
}
