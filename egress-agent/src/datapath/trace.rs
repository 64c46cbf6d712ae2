//! Traces of the programs, for debugging them (`--datapath-log`).

use std::{
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use aya_log::EbpfLogger;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Datapath;

/// Writes the programs' traces to the agent's log until it is dropped.
pub struct TraceLog {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Datapath {
    /// Starts writing the programs' traces to the agent's log.
    ///
    /// # Errors
    ///
    /// When the programs' log map cannot be opened or the thread cannot be started.
    pub fn start_log(&mut self) -> Result<TraceLog> {
        let mut logger =
            EbpfLogger::init(&mut self.ebpf).context("cannot open the programs' log")?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("datapath-log".into())
            .spawn(move || {
                while !stopped.load(Ordering::Acquire) {
                    let mut fds = [PollFd::new(logger.as_fd(), PollFlags::POLLIN)];
                    // An interrupted wait is treated like a completed one.
                    let _ = poll(&mut fds, PollTimeout::from(100u8));
                    logger.flush();
                }
            })
            .context("cannot start the thread of the programs' log")?;
        Ok(TraceLog {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for TraceLog {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // If the thread has panicked, the panic has been logged already.
            let _ = thread.join();
        }
    }
}
