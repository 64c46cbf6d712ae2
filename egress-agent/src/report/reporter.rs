//! The thread that folds and writes, and the way to it.

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

/// Denials that may wait for the thread.
const CHANNEL: usize = 16_384;
/// Of which one pod's may be this many.
const CHANNEL_PER_POD: u32 = 512;
/// How often the thread looks for lines that are due.
const TICK: Duration = Duration::from_millis(100);
/// How often it wakes when nothing is folded.
const IDLE_TICK: Duration = Duration::from_secs(1);
/// How long [`ReporterThread::close`] waits for a reader of standard output that does not read.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// Why denials have no line: the kernel has not told more than how many there were.
pub const OVER_POD_SHARE: &str = "over_pod_share";
/// Why denials have no line: they came faster than they could be taken in.
pub const REPORTER_BUSY: &str = "reporter_busy";
/// Why denials have no line: writing their lines failed.
pub const OUTPUT_FAILED: &str = "output_failed";

/// What is told of each line besides writing it. It must not block.
pub type Listener = Box<dyn Fn(&Line) + Send>;

/// Where denials are reported. Cheap to clone; one for each thread that reports.
#[derive(Clone, Debug)]
pub struct Reporter {
    sender: SyncSender<Message>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    closing: AtomicBool,
    /// Denials that found the channel full, and have not been told about yet.
    turned_away: AtomicU64,
    failed_lines: AtomicU64,
    lost: Lost,
}

/// Why denials may have no line.
const WHYS: [&str; 5] = [
    OVER_POD_SHARE,
    REPORTER_BUSY,
    TOO_MANY_DESTINATIONS,
    TOO_MANY_LINES,
    OUTPUT_FAILED,
];

/// Denials that have no line of their own, by why. Each is counted when that is told.
#[derive(Debug, Default)]
pub struct Lost([Counter; WHYS.len()]);

impl Lost {
    fn add(&self, why: &str, count: u64) {
        if let Some(at) = WHYS.iter().position(|&known| known == why) {
            self.0[at].add(count);
        }
    }

    /// How many there have been of each kind.
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
    /// Starts the thread that writes to `out`, and gives each line to `listener` as well.
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
                // The receiver is gone only when nobody waits for the end any more.
                _ = done_sender.send(());
            })?;
        let reporter = Self { sender, shared };
        Ok((reporter.clone(), ReporterThread { reporter, done }))
    }

    /// Reports a denial. Never blocks: what finds no room is counted, and told about as a number.
    pub fn report(&self, denied: Denied) {
        let count = denied.count;
        let pod = Arc::clone(&denied.pod);
        pod.count(denied.verdict, denied.reason, count);
        self.send(&pod, count, Message::Denied(denied));
    }

    /// Reports that `count` denials of the pod are known by their number only, and why, as one
    /// word. Never blocks.
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

    /// Denials that are known by their number only, and why.
    pub fn lost(&self) -> &Lost {
        &self.shared.lost
    }

    /// Lines that could not be written since the start.
    pub fn failed_lines(&self) -> u64 {
        self.shared.failed_lines.load(Ordering::Relaxed)
    }

    fn send(&self, pod: &PodIdentity, count: u64, message: Message) {
        if pod.waiting.fetch_add(1, Ordering::AcqRel) >= CHANNEL_PER_POD {
            pod.turned_away.fetch_add(count, Ordering::AcqRel);
            // The pod's messages that are waiting bring the thread to look at the number above. If
            // the last of them went just now, nothing does.
            if pod.waiting.fetch_sub(1, Ordering::AcqRel) == 1 {
                let turned_away = pod.turned_away.swap(0, Ordering::AcqRel);
                self.shared
                    .turned_away
                    .fetch_add(turned_away, Ordering::Relaxed);
            }
        } else if self.sender.try_send(message).is_err() {
            pod.waiting.fetch_sub(1, Ordering::AcqRel);
            self.shared.turned_away.fetch_add(count, Ordering::Relaxed);
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
    /// Writes everything that waits, and ends the thread. To be called when nothing reports any
    /// more. Returns whether all was done before the patience with a blocked output ended.
    pub fn close(self) -> bool {
        self.reporter.shared.closing.store(true, Ordering::Release);
        // A full channel keeps the thread awake anyway.
        _ = self.reporter.sender.try_send(Message::Wake);
        self.done.recv_timeout(CLOSE_PATIENCE).is_ok()
    }
}

fn run(messages: &Receiver<Message>, mut output: Output<impl Write>) {
    let mut folder = Folder::default();
    let mut next_tick = Instant::now() + TICK;
    loop {
        // With nothing folded there is nothing to be late with.
        let wait = if folder.is_empty() {
            IDLE_TICK
        } else {
            next_tick.saturating_duration_since(Instant::now())
        };
        let received = messages.recv_timeout(wait);
        let now = Instant::now();
        let ended = matches!(received, Err(RecvTimeoutError::Disconnected));
        if let Ok(message) = received {
            take_in(&mut folder, now, message);
        }
        if ended || output.shared.closing.load(Ordering::Acquire) {
            while let Ok(message) = messages.try_recv() {
                take_in(&mut folder, now, message);
            }
            output.write_turned_away();
            output.write(folder.flush());
            return;
        }
        if now >= next_tick {
            output.write_turned_away();
            output.write(folder.due(now));
            next_tick = now + TICK;
        }
    }
}

fn take_in(folder: &mut Folder, now: Instant, message: Message) {
    if let Some(pod) = message.pod() {
        pod.waiting.fetch_sub(1, Ordering::AcqRel);
        let turned_away = pod.turned_away.swap(0, Ordering::AcqRel);
        if turned_away > 0 {
            folder.add_lost(now, SystemTime::now(), pod, turned_away, REPORTER_BUSY);
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

/// Writes lines, and remembers what it could not write.
struct Output<W> {
    out: W,
    listener: Option<Listener>,
    shared: Arc<Shared>,
    unwritten: Option<Unwritten>,
}

/// Denials whose lines could not be written, since the last line that could.
struct Unwritten {
    count: u64,
    since: SystemTime,
}

impl<W: Write> Output<W> {
    fn write_turned_away(&mut self) {
        let count = self.shared.turned_away.swap(0, Ordering::Relaxed);
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

    /// Tells about earlier failures first, once writing works again.
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
        // The line that failed may have been written in part.
        self.out.write_all(b"\n")?;
        self.write_line(&lost)?;
        self.unwritten = None;
        Ok(())
    }

    /// Writes a line whole, in one call where the system takes it so.
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
            tracing::error!(%error, "denial lines cannot be written to standard output");
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
    fn closing_writes_what_waits() {
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
    fn a_pod_has_a_share_of_the_channel_and_what_is_over_it_is_counted() {
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
    fn a_full_channel_is_told_about_without_a_pod() {
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
    fn a_broken_output_is_survived_and_told_about() {
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
