//! Waits for events, with a deadline.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

/// The time limit of anything that must happen, on a crowded machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// The time for an attempt that is expected to fail. A value that is too short can only hide a fault, never
/// report a false one; each test that relies on it also asserts the denial line.
pub const SHORT: Duration = Duration::from_millis(400);

/// Sets the flag when it is dropped, also when a test fails: a scope waits for its threads, and these for the flag.
#[derive(Debug)]
pub struct StopAtEnd<'a>(pub &'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

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

/// `Some(())` if the condition is true, for [`eventually`].
pub fn holds(condition: bool) -> Option<()> {
    condition.then_some(())
}
