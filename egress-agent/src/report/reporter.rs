//! The reporter thread, which folds and writes denials, and the channel to it.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use super::{
    Counter, Denied, Folder, Line, PodIdentity,
    folder::{TOO_MANY_DESTINATIONS, TOO_MANY_LINES},
};

/// Length of the channel to the thread.
const CHANNEL: usize = 16_384;
/// How many of these denials may be of one pod.
const CHANNEL_PER_POD: u32 = 512;
/// How often the thread checks for lines that are due.
const TICK: Duration = Duration::from_millis(100);
/// How often it wakes when no line is pending.
const IDLE_TICK: Duration = Duration::from_secs(1);
/// How long [`ReporterThread::close`] waits if nobody reads standard output.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// Why denials have no line of their own: the kernel has reported only their number.
pub const OVER_POD_SHARE: &str = "over_pod_share";
/// Why denials have no line of their own: they came faster than the reporter could accept them.
pub const REPORTER_BUSY: &str = "reporter_busy";
/// Why denials have no line of their own: their lines could not be written.
pub const OUTPUT_FAILED: &str = "output_failed";

/// A function that is called with each line after it is written. It must not block.
pub type Listener = Box<dyn Fn(&Line) + Send>;

/// The sender to the reporter thread. Cheap to clone; each thread that reports has one.
#[derive(Clone, Debug)]
pub struct Reporter {
    sender: SyncSender<Message>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    closing: AtomicBool,
    /// How many denials did not fit into the channel and are not reported as lost yet.
    overflow: AtomicU64,
    failed_lines: AtomicU64,
    lost: Lost,
}

/// The causes of denials without a line of their own.
const WHYS: [&str; 5] = [
    OVER_POD_SHARE,
    REPORTER_BUSY,
    TOO_MANY_DESTINATIONS,
    TOO_MANY_LINES,
    OUTPUT_FAILED,
];

/// The denials without a line of their own, by cause. They are counted when they are reported as lost.
#[derive(Debug, Default)]
pub struct Lost([Counter; WHYS.len()]);

impl Lost {
    fn add(&self, why: &str, count: u64) {
        if let Some(at) = WHYS.iter().position(|&known| known == why) {
            self.0[at].add(count);
        }
    }

    /// The number for each cause.
    pub fn by_why(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        WHYS.into_iter().zip(self.0.iter().map(Counter::get))
    }
}

#[derive(Debug)]
enum Message {
    Denied(Denied),
    Lost {
        pod: Arc<PodIdentity>,
        count: u64,
        why: &'static str,
        time: SystemTime,
    },
    Wake,
}

impl Message {
    fn pod(&self) -> Option<&Arc<PodIdentity>> {
        match self {
            Self::Denied(denied) => Some(&denied.pod),
            Self::Lost { pod, .. } => Some(pod),
            Self::Wake => None,
        }
    }
}

impl Reporter {
    /// Starts the thread that writes to `out`, and passes each line to `listener` as well.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started.
    pub fn start(
        out: impl Write + Send + 'static,
        listener: Option<Listener>,
    ) -> io::Result<(Self, ReporterThread)> {
        let (sender, messages) = mpsc::sync_channel(CHANNEL);
        let (done_sender, done) = mpsc::sync_channel(1);
        let shared = Arc::new(Shared::default());
        let output = Output {
            out,
            shared: Arc::clone(&shared),
            unwritten: None,
            listener,
        };
        thread::Builder::new()
            .name("reporter".into())
            .spawn(move || {
                run(&messages, output);
                // The receiver is gone if the time limit of `close` has passed.
                _ = done_sender.send(());
            })?;
        let reporter = Self { sender, shared };
        Ok((reporter.clone(), ReporterThread { reporter, done }))
    }

    /// Reports a denial without blocking. If it does not fit into the channel, it is counted and reported as
    /// lost.
    pub fn report(&self, denied: Denied) {
        let count = denied.count;
        let pod = Arc::clone(&denied.pod);
        pod.count(&denied);
        self.send(&pod, count, Message::Denied(denied));
    }

    /// Reports `count` denials of the pod whose details were lost, with the cause in one word, without
    /// blocking.
    pub fn unreported(&self, pod: &Arc<PodIdentity>, count: u64, why: &'static str) {
        pod.count_unreported(count);
        let message = Message::Lost {
            pod: Arc::clone(pod),
            count,
            why,
            time: SystemTime::now(),
        };
        self.send(pod, count, message);
    }

    /// The denials without a line of their own, by cause.
    pub fn lost(&self) -> &Lost {
        &self.shared.lost
    }

    /// How many lines could not be written since the start.
    pub fn failed_lines(&self) -> u64 {
        self.shared.failed_lines.load(Ordering::Relaxed)
    }

    fn send(&self, pod: &PodIdentity, count: u64, message: Message) {
        if pod.waiting.fetch_add(1, Ordering::AcqRel) >= CHANNEL_PER_POD {
            pod.overflow.fetch_add(count, Ordering::AcqRel);
            // When the thread receives one of the pod's queued messages, it reads the number above. If it has
            // just received the last one, it does not, so move the number to the shared counter.
            if pod.waiting.fetch_sub(1, Ordering::AcqRel) == 1 {
                let overflow = pod.overflow.swap(0, Ordering::AcqRel);
                self.shared.overflow.fetch_add(overflow, Ordering::Relaxed);
            }
        } else if self.sender.try_send(message).is_err() {
            pod.waiting.fetch_sub(1, Ordering::AcqRel);
            self.shared.overflow.fetch_add(count, Ordering::Relaxed);
        }
    }
}

/// The running thread.
#[derive(Debug)]
pub struct ReporterThread {
    reporter: Reporter,
    done: Receiver<()>,
}

impl ReporterThread {
    /// Writes everything that is pending, and stops the thread. Call this when no thread reports any more.
    /// Returns whether all was written before the time limit.
    pub fn close(self) -> bool {
        self.reporter.shared.closing.store(true, Ordering::Release);
        // If the channel is full, the thread is awake anyway.
        _ = self.reporter.sender.try_send(Message::Wake);
        self.done.recv_timeout(CLOSE_PATIENCE).is_ok()
    }
}

fn run(messages: &Receiver<Message>, mut output: Output<impl Write>) {
    let mut folder = Folder::default();
    let mut next_tick = Instant::now() + TICK;
    loop {
        // If nothing is pending, no line can be late.
        let wait = if folder.is_empty() {
            IDLE_TICK
        } else {
            next_tick.saturating_duration_since(Instant::now())
        };
        let received = messages.recv_timeout(wait);
        let now = Instant::now();
        let ended = matches!(received, Err(RecvTimeoutError::Disconnected));
        if let Ok(message) = received {
            fold(&mut folder, now, message);
        }
        if ended || output.shared.closing.load(Ordering::Acquire) {
            while let Ok(message) = messages.try_recv() {
                fold(&mut folder, now, message);
            }
            output.write_overflow();
            output.write(folder.flush());
            return;
        }
        if now >= next_tick {
            output.write_overflow();
            output.write(folder.due(now));
            next_tick = now + TICK;
        }
    }
}

fn fold(folder: &mut Folder, now: Instant, message: Message) {
    if let Some(pod) = message.pod() {
        pod.waiting.fetch_sub(1, Ordering::AcqRel);
        let overflow = pod.overflow.swap(0, Ordering::AcqRel);
        if overflow > 0 {
            folder.add_lost(now, SystemTime::now(), pod, overflow, REPORTER_BUSY);
        }
    }
    match message {
        Message::Denied(denied) => folder.add(now, denied),
        Message::Lost {
            pod,
            count,
            why,
            time,
        } => folder.add_lost(now, time, &pod, count, why),
        Message::Wake => {}
    }
}

/// Writes lines, and counts those that it could not write.
struct Output<W> {
    out: W,
    listener: Option<Listener>,
    shared: Arc<Shared>,
    unwritten: Option<Unwritten>,
}

/// Denials whose lines could not be written since the last successful write.
struct Unwritten {
    count: u64,
    since: SystemTime,
}

impl<W: Write> Output<W> {
    fn write_overflow(&mut self) {
        let count = self.shared.overflow.swap(0, Ordering::Relaxed);
        if count > 0 {
            let time = SystemTime::now();
            self.write(vec![Line::Lost {
                pod: None,
                count,
                why: REPORTER_BUSY,
                time,
            }]);
        }
    }

    fn write(&mut self, lines: Vec<Line>) {
        for line in lines {
            let written = self.write_unwritten().and_then(|()| self.write_line(&line));
            if let Line::Lost { count, why, .. } = &line {
                self.shared.lost.add(why, *count);
            }
            if let Err(error) = written {
                if matches!(line, Line::Denied { .. }) {
                    self.shared.lost.add(OUTPUT_FAILED, line.count());
                }
                self.failed(line.count(), &error);
            }
            if let Some(listener) = &self.listener {
                listener(&line);
            }
        }
    }

    /// Reports earlier failures first, once writing works again.
    fn write_unwritten(&mut self) -> io::Result<()> {
        let Some(Unwritten { count, since }) = &self.unwritten else {
            return Ok(());
        };
        let lost = Line::Lost {
            pod: None,
            count: *count,
            why: OUTPUT_FAILED,
            time: *since,
        };
        // The failed line may have been written in part.
        self.out.write_all(b"\n")?;
        self.write_line(&lost)?;
        self.unwritten = None;
        Ok(())
    }

    /// Writes a complete line, in one call if the system accepts it.
    fn write_line(&mut self, line: &Line) -> io::Result<()> {
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        let written = self.out.write_all(text.as_bytes());
        if let Line::Denied { first, .. } = line {
            text.pop();
            first.pod.set_last_line(text);
        }
        written?;
        self.out.flush()
    }

    fn failed(&mut self, count: u64, error: &io::Error) {
        if self.shared.failed_lines.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::error!(%error, "cannot write denial lines to standard output; they are counted as lost");
        }
        let unwritten = self.unwritten.get_or_insert_with(|| Unwritten {
            count: 0,
            since: SystemTime::now(),
        });
        unwritten.count = unwritten.count.saturating_add(count);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use serde_json::Value;

    use super::{super::line::tests::denied, *};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<(Vec<u8>, usize)>>);

    impl Sink {
        fn failing(times: usize) -> Self {
            Self(Arc::new(Mutex::new((Vec::new(), times))))
        }

        fn lines(&self) -> Vec<Value> {
            let text = String::from_utf8(self.0.lock().unwrap().0.clone()).unwrap();
            let lines = text.lines().filter(|line| !line.is_empty());
            lines
                .map(|line| serde_json::from_str(line).unwrap())
                .collect()
        }
    }

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let (written, failures) = &mut *self.0.lock().unwrap();
            if let Some(left) = failures.checked_sub(1) {
                *failures = left;
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            written.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn closing_writes_everything_that_is_pending() {
        let sink = Sink::default();
        let (reporter, thread) = Reporter::start(sink.clone(), None).unwrap();
        reporter.report(denied());
        reporter.report(denied());
        reporter.unreported(&denied().pod, 9, "ring_full");
        assert!(thread.close());

        let lines = sink.lines();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert_eq!(
            (&lines[0]["event"], &lines[0]["count"]),
            (&"denied".into(), &2.into())
        );
        assert_eq!(
            (&lines[1]["event"], &lines[1]["count"]),
            (&"denials_lost".into(), &9.into())
        );
    }

    #[test]
    fn denials_over_a_pods_share_of_the_channel_are_counted() {
        let (sender, receiver) = mpsc::sync_channel(CHANNEL);
        let reporter = Reporter {
            sender,
            shared: Arc::default(),
        };
        let loud = denied();
        let other = Denied {
            pod: Arc::new(PodIdentity::new("n", "o", "p", "q")),
            ..denied()
        };
        for _ in 0..2 * CHANNEL_PER_POD {
            reporter.report(loud.clone());
        }
        reporter.report(other);

        let sink = Sink::default();
        let shared = Arc::clone(&reporter.shared);
        shared.closing.store(true, Ordering::Release);
        run(
            &receiver,
            Output {
                out: sink.clone(),
                listener: None,
                shared,
                unwritten: None,
            },
        );
        let mut counts: Vec<_> = sink
            .lines()
            .iter()
            .map(|line| (line["event"].to_string(), line["count"].as_u64().unwrap()))
            .collect();
        counts.sort();
        let share = u64::from(CHANNEL_PER_POD);
        let expected = [
            ("\"denials_lost\"", share),
            ("\"denied\"", 1),
            ("\"denied\"", share),
        ];
        assert_eq!(
            counts,
            expected.map(|(event, count)| (event.to_owned(), count))
        );
        assert_eq!(loud.pod.waiting.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_full_channel_is_reported_without_a_pod() {
        let (sender, receiver) = mpsc::sync_channel(1);
        let reporter = Reporter {
            sender,
            shared: Arc::default(),
        };
        for _ in 0..5 {
            reporter.report(denied());
        }
        let sink = Sink::default();
        let shared = Arc::clone(&reporter.shared);
        shared.closing.store(true, Ordering::Release);
        run(
            &receiver,
            Output {
                out: sink.clone(),
                listener: None,
                shared,
                unwritten: None,
            },
        );
        let lines = sink.lines();
        let lost = lines
            .iter()
            .find(|line| line["event"] == "denials_lost")
            .unwrap();
        assert_eq!((&lost["pod"], &lost["count"]), (&Value::Null, &4.into()));
        assert_eq!(lost["why"], REPORTER_BUSY);
    }

    #[test]
    fn the_reporter_continues_after_a_failed_output_and_reports_it() {
        let sink = Sink::failing(2);
        let shared = Arc::new(Shared::default());
        let mut output = Output {
            out: sink.clone(),
            listener: None,
            shared: Arc::clone(&shared),
            unwritten: None,
        };
        let line = || Line::Denied {
            first: denied(),
            count: 3,
            connections: 1,
            last: SystemTime::UNIX_EPOCH,
        };
        output.write(vec![line(), line()]);
        assert_eq!(sink.lines().len(), 0);
        assert_eq!(shared.failed_lines.load(Ordering::Relaxed), 2);

        output.write(vec![line()]);
        let lines = sink.lines();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert_eq!(
            (&lines[0]["why"], &lines[0]["count"]),
            (&OUTPUT_FAILED.into(), &6.into())
        );
        assert_eq!(lines[1]["event"], "denied");
    }
}
