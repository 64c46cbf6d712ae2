//! Distinguishes a slow receiver from a sending thread that waited for a CPU.

use std::{fs::File, os::unix::fs::FileExt as _};

/// How long the calling thread has been ready to run without running.
///
/// The clock goes on meanwhile, so that the receiver seems slow. CPU time is no alternative: many kernels do
/// not count what a thread spends in soft interrupts (`CONFIG_IRQ_TIME_ACCOUNTING`), and a frame is received
/// there.
#[derive(Debug, Default)]
pub(super) struct RunDelay {
    file: Option<File>,
    seen_ns: u64,
}

impl RunDelay {
    /// The delay since the last call; 0 where the kernel does not provide it. All calls must be from one
    /// thread.
    pub(super) fn since_last(&mut self) -> u64 {
        let Some(now_ns) = self.read() else {
            return 0;
        };
        let before = std::mem::replace(&mut self.seen_ns, now_ns);
        now_ns.saturating_sub(before)
    }

    fn read(&mut self) -> Option<u64> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(File::open("/proc/thread-self/schedstat").ok()?),
        };
        let mut text = [0; 80];
        let len = file.read_at(&mut text, 0).ok()?;
        // Time on a CPU, time in its run queue, time slices
        // (Documentation/scheduler/sched-stats.rst).
        let text = std::str::from_utf8(text.get(..len)?).ok()?;
        text.split_whitespace().nth(1)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_delay_is_returned_once() {
        let mut delay = RunDelay::default();
        assert!(delay.read().is_some(), "the kernel provides the delay");
        delay.since_last();
        let seen_ns = delay.seen_ns;
        let more_ns = delay.since_last();
        assert_eq!(delay.seen_ns, seen_ns + more_ns);
    }
}
