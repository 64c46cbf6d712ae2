//! Notices changes in a directory, from inotify.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    io,
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::EventFd,
        inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor},
    },
};

/// How long a writer may take before its file is read as it is.
const WRITING_MAX: Duration = Duration::from_secs(2);

/// Watches one directory.
#[derive(Debug)]
pub(super) struct Watching {
    inotify: Inotify,
    watch: Option<WatchDescriptor>,
    /// Files that have been written to and are not closed yet, with the time of the first write.
    writing: BTreeMap<OsString, Instant>,
}

/// The names in the directory that have changed.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Whether any event has arrived.
    pub(super) any: bool,
    pub(super) names: Vec<OsString>,
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Woken {
    Event,
    Stop,
    Timeout,
}

impl Watching {
    pub(super) fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        Ok(Self {
            inotify,
            watch: None,
            writing: BTreeMap::new(),
        })
    }

    /// Watches the directory that the path leads to now. Call this before each reading, because it may be
    /// another directory than before.
    pub(super) fn renew(&mut self, directory: &Path) -> io::Result<()> {
        let added = self.inotify.add_watch(
            directory,
            AddWatchFlags::IN_ONLYDIR
                | AddWatchFlags::IN_CREATE
                | AddWatchFlags::IN_MODIFY
                | AddWatchFlags::IN_CLOSE_WRITE
                | AddWatchFlags::IN_ATTRIB
                | AddWatchFlags::IN_MOVED_FROM
                | AddWatchFlags::IN_MOVED_TO
                | AddWatchFlags::IN_DELETE
                | AddWatchFlags::IN_DELETE_SELF
                | AddWatchFlags::IN_MOVE_SELF,
        );
        let former = self.watch;
        self.watch = added.ok();
        if let Some(former) = former
            && self.watch != Some(former)
        {
            // The kernel has already removed the watch if the directory is gone.
            _ = self.inotify.rm_watch(former);
            self.writing.clear();
        }
        added?;
        Ok(())
    }

    /// Waits for an event, for `stop`, or until `timeout` has passed.
    pub(super) fn wait(&self, stop: &EventFd, timeout: Duration) -> io::Result<Woken> {
        let mut fds = [
            PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        // Round up, so that less than a millisecond does not become a busy loop.
        let timeout = Duration::from_millis(timeout.as_micros().div_ceil(1000) as u64);
        match poll(
            &mut fds,
            PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX),
        ) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [inotify, stop] = fds.map(|fd| fd.any().unwrap_or(false));
        Ok(match (stop, inotify) {
            (true, _) => Woken::Stop,
            (false, true) => Woken::Event,
            (false, false) => Woken::Timeout,
        })
    }

    /// Reads the queued events.
    pub(super) fn changes(&mut self, now: Instant) -> io::Result<Changes> {
        let mut changes = Changes::default();
        loop {
            match self.inotify.read_events() {
                Ok(events) => {
                    for event in events {
                        self.note(event, now, &mut changes);
                    }
                }
                Err(Errno::EAGAIN) => return Ok(changes),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn note(&mut self, event: InotifyEvent, now: Instant, changes: &mut Changes) {
        let overflow = event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
        if !overflow && Some(event.wd) != self.watch {
            // An event of the directory that was watched before.
            return;
        }
        changes.any = true;
        if overflow {
            self.writing.clear();
        }
        let Some(name) = event.name else { return };
        let finished = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE;
        if event.mask.contains(AddWatchFlags::IN_MODIFY) {
            self.writing.entry(name.clone()).or_insert(now);
        } else if event.mask.intersects(finished) {
            self.writing.remove(&name);
        }
        changes.names.push(name);
    }

    /// Names of the files that are being written, without those that take too long.
    pub(super) fn writing(&mut self, now: Instant) -> BTreeSet<OsString> {
        self.writing
            .retain(|_, since| now.saturating_duration_since(*since) < WRITING_MAX);
        self.writing.keys().cloned().collect()
    }
}
