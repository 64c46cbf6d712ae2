//! Telling a receiver that is slow from a thread that waited for a CPU.

use std::{fs::File, os::unix::fs::FileExt as _};

/// How long the calling thread has been ready to run without running.
///
/// The clock goes on meanwhile, and what was measured with it looks as if the receiver had been slow.
/// CPU time would not do instead: many kernels leave out what a thread spends in soft interrupts
/// (`CONFIG_IRQ_TIME_ACCOUNTING`), and that is where a frame is received.
#[derive(Debug, Default)]
pub(super) struct RunDelay {
    file: Option<File>,
    seen_ns: u64,
}

impl RunDelay {
    /// The delay since the last call; 0 where the kernel does not tell. Always called by one thread.
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
    fn what_was_seen_is_not_told_again() {
        let mut delay = RunDelay::default();
        assert!(delay.read().is_some(), "this kernel tells");
        delay.since_last();
        let seen_ns = delay.seen_ns;
        let more_ns = delay.since_last();
        assert_eq!(delay.seen_ns, seen_ns + more_ns);
    }
}
