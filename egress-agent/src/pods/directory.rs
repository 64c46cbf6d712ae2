//! A directory of manifests as a source of pods.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::watch;

use super::{
    Problem, Snapshot,
    contents::Files,
    watching::{Changes, Watching, Woken},
};

/// Changes are read after this long without an event …
const SETTLED_AFTER: Duration = Duration::from_millis(20);
/// … or at the latest this long after the first event.
const SETTLED_MAX: Duration = Duration::from_millis(100);
/// How often the directory is read without an event: the target of a symbolic link may change without one,
/// and so may files on some file systems.
const RESCAN_EVERY: Duration = Duration::from_secs(5);
/// The same, while a file is unfinished or the directory cannot be read.
const RETRY_EVERY: Duration = Duration::from_millis(100);

fn unlisted(directory: &Path, error: &io::Error) -> Problem {
    Problem {
        origin: directory.display().to_string(),
        message: format!("the directory cannot be listed: {error}"),
    }
}

/// A watched directory.
///
/// The files in it that end in `.yaml`, `.yml` or `.json` are read, except those that begin with a dot. Its
/// subdirectories are not read. A change is in the next snapshot within 200 ms. A file that is written in
/// place is read once the writer closes it, or after two seconds if it does not.
///
/// The last readable version of an object stays in force while it cannot be read, and so does everything
/// while the directory is missing. Only removing a file removes its pods.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    files: Files,
    watching: Watching,
    /// Set while the directory cannot be read.
    problem: Option<Problem>,
    /// Whether a file was skipped because its writer has not finished.
    unfinished: bool,
}

impl Directory {
    /// Reads the directory and watches it in a thread of its own.
    ///
    /// The receiver has the first snapshot at once; if the directory cannot be read, the snapshot has a
    /// problem. The thread ends when it is closed or all receivers are dropped.
    ///
    /// # Errors
    ///
    /// When the kernel does not provide an inotify instance, an eventfd or a thread.
    pub fn watch(
        path: impl Into<PathBuf>,
    ) -> io::Result<(watch::Receiver<Arc<Snapshot>>, DirectoryThread)> {
        let mut directory = Self {
            path: path.into(),
            files: Files::default(),
            watching: Watching::new()?,
            problem: None,
            unfinished: false,
        };
        directory.read();
        let stop = Arc::new(EventFd::from_flags(
            EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
        )?);
        let (sender, receiver) = watch::channel(Arc::new(directory.snapshot()));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new().name("pods".into()).spawn(move || {
            if let Err(error) = directory.run(&sender, &stopped) {
                tracing::error!(
                    %error,
                    "cannot watch the directory of pods any more; its pods stay as they are"
                );
            }
        })?;
        Ok((receiver, DirectoryThread { thread, stop }))
    }

    fn run(&mut self, sender: &watch::Sender<Arc<Snapshot>>, stop: &EventFd) -> io::Result<()> {
        loop {
            let waiting = self.unfinished || self.problem.is_some();
            let timeout = if waiting { RETRY_EVERY } else { RESCAN_EVERY };
            match self.watching.wait(stop, timeout)? {
                Woken::Stop => return Ok(()),
                Woken::Event if !self.settle(stop)? => return Ok(()),
                Woken::Event | Woken::Timeout => {}
            }
            if sender.is_closed() {
                return Ok(());
            }
            self.read();
            let snapshot = self.snapshot();
            sender.send_if_modified(|current| {
                let modified = **current != snapshot;
                if modified {
                    *current = Arc::new(snapshot);
                }
                modified
            });
        }
    }

    /// Waits until no more events arrive; returns false when the thread must stop.
    fn settle(&mut self, stop: &EventFd) -> io::Result<bool> {
        let first = Instant::now();
        loop {
            let changes = self.watching.changes(Instant::now())?;
            self.force_reread(&changes);
            let left = SETTLED_MAX.saturating_sub(first.elapsed());
            if left.is_zero() {
                return Ok(true);
            }
            match self.watching.wait(stop, SETTLED_AFTER.min(left))? {
                Woken::Stop => return Ok(false),
                Woken::Timeout => return Ok(true),
                Woken::Event => {}
            }
        }
    }

    fn force_reread(&mut self, changes: &Changes) {
        for name in &changes.names {
            self.files.force_reread(&self.path.join(name));
        }
    }

    /// Reads the changed files.
    fn read(&mut self) {
        self.problem = self.try_read().err().map(|error| {
            let mut problem = unlisted(&self.path, &error);
            problem
                .message
                .push_str("; its last readable content stays in force");
            problem
        });
    }

    fn try_read(&mut self) -> io::Result<()> {
        // Watch first, so that every later change causes an event.
        self.watching.renew(&self.path)?;
        let writing = self.watching.writing(Instant::now());
        let before = self.files.clone();
        self.files.read_directory(&self.path, &writing)?;
        // A file that was written during the reading may have been read only in part.
        let changes = self.watching.changes(Instant::now())?;
        for name in &changes.names {
            self.files.restore(&self.path.join(name), &before);
        }
        self.unfinished = changes.any || !writing.is_empty();
        Ok(())
    }

    fn snapshot(&self) -> Snapshot {
        let mut snapshot = self.files.snapshot();
        snapshot.problems.splice(0..0, self.problem.clone());
        snapshot.unreadable |= self.problem.is_some();
        snapshot
    }
}

/// The thread that watches a directory.
#[derive(Debug)]
pub struct DirectoryThread {
    thread: JoinHandle<()>,
    stop: Arc<EventFd>,
}

impl DirectoryThread {
    /// Stops the thread and waits for its end.
    pub fn close(self) {
        // This fails only if the counter is at its limit, and then the thread is already awake.
        _ = self.stop.write(1);
        if self.thread.join().is_err() {
            tracing::error!("the thread that watches the directory of pods has panicked");
        }
    }
}

#[cfg(test)]
#[path = "directory_tests.rs"]
mod tests;
