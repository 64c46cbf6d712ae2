//! The agent's log on standard error. Logging never blocks.
//!
//! A slow reader of standard error, or none, would block the writer. So a separate thread writes, and lines
//! wait for it in a bounded queue. A line for which the queue has no room is counted. As soon as writing
//! works again, the log reports the count in a line of its own.

use std::{
    io::{self, Write},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{self, Receiver, SyncSender},
    },
    thread,
    time::{Duration, SystemTime},
};

use super::rfc3339;

/// Most lines in the queue.
const LINES: usize = 4096;
/// Most bytes in the queue.
const BYTES: usize = 1 << 20;
/// How long [`Log::close`] waits if nobody reads standard error.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// The log of this process.
static LOG: OnceLock<Log> = OnceLock::new();

/// Accepts lines without blocking. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Log {
    lines: SyncSender<Message>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Bytes of the queued lines.
    waiting: AtomicUsize,
    /// Lines that did not fit into the queue, or could not be written.
    lost: AtomicU64,
}

#[derive(Debug)]
enum Message {
    Line(Vec<u8>),
    /// A request to reply when everything before it has been written.
    End(SyncSender<()>),
}

/// Starts the log of this process, on standard error.
///
/// # Errors
///
/// When the thread cannot be started.
pub fn start() -> io::Result<&'static Log> {
    let log = Log::start(io::stderr())?;
    Ok(LOG.get_or_init(|| log))
}

/// How many log lines were lost since the start.
pub fn lost_lines() -> u64 {
    LOG.get().map_or(0, Log::lost)
}

impl Log {
    fn start(out: impl Write + Send + 'static) -> io::Result<Self> {
        let (lines, messages) = mpsc::sync_channel(LINES);
        let shared = Arc::new(Shared::default());
        let log = Self {
            lines,
            shared: Arc::clone(&shared),
        };
        thread::Builder::new()
            .name("log".into())
            .spawn(move || run(&messages, &shared, out))?;
        Ok(log)
    }

    /// Writes the queued lines. Returns whether all were written before the time limit.
    pub fn close(&self) -> bool {
        let (done, all) = mpsc::sync_channel(1);
        // If the queue is full, nobody reads standard error.
        self.lines.try_send(Message::End(done)).is_ok() && all.recv_timeout(CLOSE_PATIENCE).is_ok()
    }

    fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }

    fn take(&self, line: &[u8]) {
        let waiting = self.shared.waiting.fetch_add(line.len(), Ordering::AcqRel);
        if waiting + line.len() > BYTES || self.lines.try_send(Message::Line(line.into())).is_err()
        {
            self.shared.waiting.fetch_sub(line.len(), Ordering::AcqRel);
            self.shared.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Each write is one line.
impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.take(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn run(messages: &Receiver<Message>, shared: &Shared, mut out: impl Write) {
    let mut reported = 0;
    for message in messages {
        let lost = shared.lost.load(Ordering::Relaxed);
        if lost > reported && out.write_all(loss(lost - reported).as_bytes()).is_ok() {
            reported = lost;
        }
        match message {
            Message::Line(line) => {
                if out.write_all(&line).is_err() {
                    shared.lost.fetch_add(1, Ordering::Relaxed);
                }
                shared.waiting.fetch_sub(line.len(), Ordering::AcqRel);
            }
            Message::End(done) => {
                // The receiver is gone if the time limit has passed.
                let _ = done.try_send(());
            }
        }
    }
}

/// The log line about lost lines, in the format of the others.
fn loss(lines: u64) -> String {
    format!(
        "{}  WARN log lines were lost: standard error was not read fast enough lines={lines}\n",
        rfc3339(SystemTime::now()).unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A writer that blocks while a test holds `written`.
    #[derive(Clone, Default)]
    struct Pipe {
        written: Arc<Mutex<Vec<u8>>>,
        /// How many writes have begun.
        begun: Arc<AtomicUsize>,
    }

    impl Pipe {
        fn lines(&self) -> Vec<String> {
            let text = String::from_utf8(self.written.lock().unwrap().clone()).unwrap();
            text.lines().map(str::to_owned).collect()
        }

        fn wait_for_a_write(&self) {
            while self.begun.load(Ordering::Acquire) == 0 {
                thread::yield_now();
            }
        }
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.begun.fetch_add(1, Ordering::Release);
            self.written.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_are_written_in_order() {
        let pipe = Pipe::default();
        let mut log = Log::start(pipe.clone()).unwrap();
        for line in ["one\n", "two\n"] {
            log.write_all(line.as_bytes()).unwrap();
        }
        assert!(log.close());
        assert_eq!(pipe.lines(), ["one", "two"]);
        assert_eq!(log.lost(), 0);
    }

    #[test]
    fn lines_that_do_not_fit_are_lost_and_reported() {
        const SENT: usize = 3 * LINES;
        let pipe = Pipe::default();
        let mut log = Log::start(pipe.clone()).unwrap();
        let blocked = pipe.written.lock().unwrap();
        log.write_all(b"line\n").unwrap();
        // From now on the writer is blocked on a line, so it has not read the number of losses yet.
        pipe.wait_for_a_write();
        for _ in 1..SENT {
            log.write_all(b"line\n").unwrap();
        }
        let lost = usize::try_from(log.lost()).unwrap();
        assert!(lost >= SENT - LINES - 1, "{lost}");
        drop(blocked);
        while !log.close() {}
        let lines = pipe.lines();
        let (losses, written): (Vec<_>, Vec<_>) = lines.iter().partition(|line| *line != "line");
        assert_eq!(written.len(), SENT - lost);
        assert_eq!(losses.len(), 1, "{losses:?}");
        assert!(losses[0].ends_with(&format!(" lines={lost}")), "{losses:?}");
    }

    #[test]
    fn the_queue_is_bounded_in_bytes_too() {
        let pipe = Pipe::default();
        let mut log = Log::start(pipe.clone()).unwrap();
        let blocked = pipe.written.lock().unwrap();
        let line = vec![b'a'; BYTES / 4];
        for _ in 0..8 {
            log.write_all(&line).unwrap();
        }
        assert!(log.lost() >= 4);
        drop(blocked);
        assert!(log.close());
    }
}
