//! Ending early: Ctrl-C, or a closed terminal.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::sys::signal::{SigSet, Signal};

/// Whether the demonstration was asked to end.
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Waits for the terminal's signals on a thread of its own, so that everything is removed
    /// before the program ends.
    ///
    /// Threads and programs started later do not receive them: the agent goes on until it is told
    /// to end. SIGTERM is how it is told, so that one is left alone.
    pub(crate) fn on_signals() -> Self {
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGHUP] {
            signals.add(signal);
        }
        signals
            .thread_block()
            .expect("pthread_sigmask(3) with valid signals");
        let asked = Arc::new(AtomicBool::new(false));
        let waiting = Arc::clone(&asked);
        thread::spawn(move || {
            while signals.wait().is_ok() {
                waiting.store(true, Ordering::Relaxed);
            }
        });
        Self(asked)
    }

    /// Fails once the demonstration was asked to end.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.0.load(Ordering::Relaxed) {
            Err("it was interrupted".to_owned())
        } else {
            Ok(())
        }
    }
}
