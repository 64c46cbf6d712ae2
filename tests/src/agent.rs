//! The agent under test: the real program, as its user starts it.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{BufRead as _, BufReader, Read},
    net::IpAddr,
    path::PathBuf,
    process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Deserialize;
use serde_json::Value;

use crate::{Namespace, Pod, workspace};

/// The time limit of a line of the agent. A start loads the programs, which the kernel verifies: that alone may take half a
/// minute on a crowded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// The log line once the agent has the pods and serves status. Earlier lines have the word too (`/readyz`).
const LOG_READY: &str = "INFO ready ";
/// The log line, with `pod=<namespace>/<name>`, once a pod's packets are judged, in any mode.
const LOG_ENFORCING: &str = "enforcing";
/// The log line, with `pod=<namespace>/<name>`, once a changed policy is applied.
const LOG_APPLIED: &str = "policy applied";
/// The log line once the agent has reloaded its configuration.
const LOG_RELOADED: &str = "configuration read again";
/// The log line when the agent keeps its configuration.
const LOG_KEPT: &str = "the configuration stays as it was";

/// One denial line. Only some denials have the optional fields.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the documented line")]
pub struct Denial {
    pub time: String,
    pub event: String,
    pub verdict: String,
    pub reason: String,
    pub node: String,
    pub namespace: String,
    pub pod: String,
    pub uid: String,
    pub protocol: Option<String>,
    pub src_ip: Option<IpAddr>,
    pub src_port: Option<u16>,
    pub dst_ip: Option<IpAddr>,
    pub dst_port: Option<u16>,
    #[serde(default)]
    pub dst_names: Vec<String>,
    pub dns_name: Option<String>,
    pub dns_type: Option<String>,
    pub rule: Option<String>,
    pub count: u64,
    pub connections: u64,
    pub first: String,
    pub last: String,
    /// The whole line.
    #[serde(skip)]
    pub line: Value,
    /// The whole line as it was written.
    #[serde(skip)]
    pub text: String,
}

impl Denial {
    /// True if the line is about this pod.
    pub fn of(&self, pod: &Pod) -> bool {
        self.namespace == pod.namespace() && self.pod == pod.name()
    }

    /// True if the line is about this pod, reason and destination.
    pub fn is(&self, pod: &Pod, reason: &str, dst: IpAddr, port: u16) -> bool {
        self.of(pod)
            && self.reason == reason
            && self.dst_ip == Some(dst)
            && self.dst_port == Some(port)
    }

    /// True if the line is about this pod's query for this name.
    pub fn is_question(&self, pod: &Pod, name: &str) -> bool {
        self.of(pod)
            && self
                .dns_name
                .as_deref()
                .is_some_and(|n| n.trim_end_matches('.') == name)
    }
}

/// Lines of one of the agent's streams, in the order in which they arrive.
#[derive(Debug, Default)]
struct Lines {
    seen: Mutex<Vec<String>>,
    more: Condvar,
}

impl Lines {
    fn follow(self: &Arc<Self>, stream: impl Read + Send + 'static) -> JoinHandle<()> {
        let lines = Arc::clone(self);
        thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(stream.read_until(b'\n', &mut line), Ok(1..)) {
                lines
                    .lock()
                    .push(String::from_utf8_lossy(&line).trim_end().to_owned());
                lines.more.notify_all();
                line.clear();
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first result of `pick` for a line from number `from` on; `None` at the deadline.
    fn wait<T>(&self, from: usize, mut pick: impl FnMut(&str) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + PATIENCE;
        let mut next = from;
        let mut lines = self.lock();
        loop {
            while next < lines.len() {
                let picked = pick(&lines[next]);
                next += 1;
                if picked.is_some() {
                    return picked;
                }
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            lines = self
                .more
                .wait_timeout(lines, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// The agent, running in the node's namespace. It is killed when dropped. Its output is printed if the test
/// has failed.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    ended: bool,
    stdout: Arc<Lines>,
    stderr: Arc<Lines>,
    readers: Vec<JoinHandle<()>>,
    unread: Option<(ChildStdout, ChildStderr)>,
}

impl Agent {
    /// The program under test: `$EGRESS_AGENT`, or the release build of the workspace, or its
    /// debug build.
    #[track_caller]
    pub fn program() -> PathBuf {
        if let Some(path) = env::var_os("EGRESS_AGENT") {
            return path.into();
        }
        let target = workspace::target();
        ["release", "debug"]
            .map(|profile| target.join(profile).join("egress-agent"))
            .into_iter()
            .find(|path| path.exists())
            .unwrap_or_else(|| {
                panic!(
                    "no egress-agent under {}: run `cargo xtask build`, or set EGRESS_AGENT",
                    target.display()
                )
            })
    }

    /// Starts a program in the node's namespace that is the agent, or executes it.
    #[track_caller]
    pub fn start(node: &Namespace, command: Command) -> Self {
        let mut agent = Self::start_unread(node, command);
        agent.read_output();
        agent
    }

    /// Starts the agent, and reads none of its output before [`Self::read_output`].
    #[track_caller]
    pub(crate) fn start_unread(node: &Namespace, mut command: Command) -> Self {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let spawned = node.run(|| command.spawn());
        let mut child =
            spawned.unwrap_or_else(|e| panic!("start {}: {e}", command.get_program().display()));
        let unread = (
            child.stdout.take().expect("stdout is piped"),
            child.stderr.take().expect("stderr is piped"),
        );
        Self {
            child,
            ended: false,
            stdout: Arc::default(),
            stderr: Arc::default(),
            readers: Vec::new(),
            unread: Some(unread),
        }
    }

    /// Reads the agent's output from now on, including the output so far.
    pub fn read_output(&mut self) {
        if let Some((stdout, stderr)) = self.unread.take() {
            self.readers = vec![self.stdout.follow(stdout), self.stderr.follow(stderr)];
        }
    }

    /// Waits until the agent watches the manifests.
    #[track_caller]
    pub fn wait_ready(&self) {
        self.wait_log_from(0, "that it is ready", |line| line.contains(LOG_READY));
    }

    /// Waits until the agent judges this pod's packets.
    #[track_caller]
    pub fn wait_enforcing(&self, pod: &Pod) {
        self.wait_log_from(0, &format!("{LOG_ENFORCING} {}", of(pod)), |line| {
            line.contains(LOG_ENFORCING) && is_about(line, pod)
        });
    }

    /// Waits until an interface of the node is in quarantine: it is enforced, and its pod is not known.
    #[track_caller]
    pub fn wait_quarantined(&self, interface: &str) {
        self.wait_log(&format!("that {interface} is in quarantine"), |line| {
            is_quarantine_of(line, interface)
        });
    }

    /// Makes a change and waits until an interface of the node is in quarantine.
    #[track_caller]
    pub fn quarantines_after(&self, interface: &str, change: impl FnOnce()) {
        let what = format!("that {interface} is in quarantine");
        self.logs_after(&what, change, |line| is_quarantine_of(line, interface));
    }

    /// Makes a change and waits until the agent has applied the resulting policy of this pod.
    #[track_caller]
    pub fn applies_policy_after(&self, pod: &Pod, change: impl FnOnce()) {
        let from = self.stderr.lock().len();
        change();
        self.wait_log_from(from, &format!("{LOG_APPLIED} {}", of(pod)), |line| {
            line.contains(LOG_APPLIED) && is_about(line, pod)
        });
    }

    /// Makes a change and waits for a line on standard error about it.
    #[track_caller]
    pub fn logs_after(
        &self,
        what: &str,
        change: impl FnOnce(),
        is: impl FnMut(&str) -> bool,
    ) -> String {
        let from = self.stderr.lock().len();
        change();
        self.wait_log_from(from, what, is)
    }

    /// Waits for a line on standard error.
    #[track_caller]
    pub fn wait_log(&self, what: &str, is: impl FnMut(&str) -> bool) -> String {
        self.wait_log_from(0, what, is)
    }

    #[track_caller]
    fn wait_log_from(&self, from: usize, what: &str, mut is: impl FnMut(&str) -> bool) -> String {
        self.stderr
            .wait(from, |line| is(line).then(|| line.to_owned()))
            .unwrap_or_else(|| panic!("the agent did not log within {PATIENCE:?}: {what}"))
    }

    /// A field of its `/proc/<pid>/status` about memory, in KiB.
    #[track_caller]
    pub fn memory_kib(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("the agent runs");
        let mut fields = status.lines().filter_map(|line| line.split_once(':'));
        let value = fields
            .find(|(name, _)| *name == field)
            .map(|(_, value)| value);
        let number = value.and_then(|value| value.split_whitespace().next());
        number.expect("a field").parse().expect("a number")
    }

    /// All lines on standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.lock().join("\n")
    }

    /// Waits for a denial line, from the first on.
    #[track_caller]
    pub fn wait_denial(&self, what: &str, is: impl FnMut(&Denial) -> bool) -> Denial {
        self.wait_denial_from(0, what, is)
    }

    /// The number of lines on standard output so far.
    pub fn mark(&self) -> usize {
        self.stdout.lock().len()
    }

    /// Waits for a denial line that comes after a [`Self::mark`].
    #[track_caller]
    pub fn wait_denial_from(
        &self,
        mark: usize,
        what: &str,
        mut is: impl FnMut(&Denial) -> bool,
    ) -> Denial {
        self.stdout
            .wait(mark, |line| Some(parse(line)?).filter(|d| is(d)))
            .unwrap_or_else(|| {
                panic!(
                    "no such denial within {PATIENCE:?}: {what}; there were:\n{}",
                    self.stdout.lock().join("\n")
                )
            })
    }

    /// Waits for a line on standard output that is not a denial.
    #[track_caller]
    pub fn wait_event(&self, event: &str, mut is: impl FnMut(&Value) -> bool) -> Value {
        self.stdout
            .wait(0, |line| {
                let line = json_line(line);
                (line["event"] == event && is(&line)).then_some(line)
            })
            .unwrap_or_else(|| panic!("no line with event {event:?} within {PATIENCE:?}"))
    }

    /// The lines on standard output so far with this event.
    #[track_caller]
    pub fn events(&self, event: &str) -> Vec<Value> {
        let lines = self.stdout.lock();
        lines
            .iter()
            .map(|line| json_line(line))
            .filter(|line| line["event"] == event)
            .collect()
    }

    /// The denial lines so far.
    #[track_caller]
    pub fn denials(&self) -> Vec<Denial> {
        self.stdout
            .lock()
            .iter()
            .filter_map(|line| parse(line))
            .collect()
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ids of the BPF programs and maps that the agent holds open, itself or through a link.
    pub fn kernel_objects(&self) -> KernelObjects {
        let mut objects = KernelObjects::default();
        let Ok(entries) = fs::read_dir(format!("/proc/{}/fdinfo", self.pid())) else {
            return objects;
        };
        for entry in entries.flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            for line in text.lines() {
                let Some((key, value)) = line.split_once(':') else {
                    continue;
                };
                let Ok(id) = value.trim().parse() else {
                    continue;
                };
                match key {
                    "prog_id" => _ = objects.programs.insert(id),
                    "map_id" => _ = objects.maps.insert(id),
                    _ => (),
                }
            }
        }
        objects
    }

    /// Makes the agent reload its configuration (SIGHUP), and waits until the new one is applied.
    #[track_caller]
    pub fn reload(&self) {
        self.send_sighup(LOG_RELOADED);
    }

    /// Makes the agent read a configuration that it refuses; returns the log line.
    #[track_caller]
    pub fn refuses_to_reload(&self) -> String {
        self.send_sighup(LOG_KEPT)
    }

    #[track_caller]
    fn send_sighup(&self, says: &str) -> String {
        self.logs_after(
            says,
            || {
                kill(Pid::from_raw(self.pid().cast_signed()), Signal::SIGHUP)
                    .expect("kill(2) of the agent");
            },
            |line| line.contains(says),
        )
    }

    /// Terminates the agent (SIGTERM) and waits until it has ended.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        self.end(Signal::SIGTERM)
    }

    /// Kills the agent (SIGKILL).
    #[track_caller]
    pub fn kill(&mut self) -> ExitStatus {
        self.end(Signal::SIGKILL)
    }

    /// Waits until the agent ends on its own.
    #[track_caller]
    pub fn wait_end(&mut self) -> ExitStatus {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().expect("wait(2) for the agent") {
                self.ended = true;
                // The streams are complete only when their readers have reached the end of file.
                for reader in self.readers.drain(..) {
                    reader.join().expect("a reader does not panic");
                }
                return status;
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("the agent did not end within {PATIENCE:?}");
    }

    #[track_caller]
    fn end(&mut self, signal: Signal) -> ExitStatus {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).expect("kill(2) of the agent");
        self.wait_end()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if !self.ended {
            self.read_output();
            let _ = self.child.kill();
            let _ = self.child.wait();
            for reader in self.readers.drain(..) {
                let _ = reader.join();
            }
        }
        if thread::panicking() {
            eprintln!("--- the agent's standard error ---\n{}", self.stderr());
            eprintln!(
                "--- the agent's standard output ---\n{}",
                self.stdout.lock().join("\n")
            );
        }
    }
}

/// Ids of BPF objects in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelObjects {
    /// Programs.
    pub programs: BTreeSet<u32>,
    /// Maps.
    pub maps: BTreeSet<u32>,
}

fn of(pod: &Pod) -> String {
    format!("pod={}/{}", pod.namespace(), pod.name())
}

/// Whether a line says that this interface is in quarantine.
fn is_quarantine_of(line: &str, interface: &str) -> bool {
    let field = format!("pod=interface {interface} ");
    line.contains(LOG_ENFORCING) && line.contains(&field)
}

/// True if a line has this pod's field, and not that of a pod whose name merely begins with the same text.
fn is_about(line: &str, pod: &Pod) -> bool {
    let field = of(pod);
    line.match_indices(&field).any(|(at, _)| {
        !line[at + field.len()..].starts_with(|c: char| c.is_alphanumeric() || "-.".contains(c))
    })
}

#[track_caller]
fn json_line(line: &str) -> Value {
    serde_json::from_str(line)
        .unwrap_or_else(|e| panic!("standard output has a line that is not JSON: {e}: {line}"))
}

#[track_caller]
fn parse(line: &str) -> Option<Denial> {
    let value = json_line(line);
    if value["event"] != "denied" && value["event"] != "would_deny" {
        return None;
    }
    let mut denial = Denial::deserialize(&value).unwrap_or_else(|e| {
        panic!("a denial line lacks a field that every denial line has: {e}: {line}")
    });
    denial.line = value;
    line.clone_into(&mut denial.text);
    Some(denial)
}
