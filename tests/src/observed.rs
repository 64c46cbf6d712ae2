//! The agent's own reports: over HTTP, and through its commands.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::{Command, Output},
};

use serde_json::Value;

use crate::{Agent, DEADLINE, Lab, Pod, eventually, holds};

/// The address of the agent's HTTP server in tests that configure one.
pub const HTTP: &str = "0.0.0.0:9465";

impl Lab {
    /// The agent's socket, unless the configuration sets another one.
    pub fn socket(&self) -> PathBuf {
        self.directory().join("agent.sock")
    }

    /// A connection to the agent's HTTP server, from the node.
    #[track_caller]
    pub fn http_connection(&self) -> TcpStream {
        let to: SocketAddr = ([127, 0, 0, 1], 9465).into();
        let stream = self
            .node()
            .run(|| TcpStream::connect_timeout(&to, DEADLINE));
        let stream = stream.expect("the agent serves HTTP");
        stream
            .set_read_timeout(Some(DEADLINE))
            .expect("a time-out that is not zero");
        stream
    }

    /// Status and body of a page.
    #[track_caller]
    pub fn http(&self, path: &str) -> (u16, String) {
        let mut stream = self.http_connection();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\n\r\n").expect("send a request");
        let mut response = String::new();
        stream
            .read_to_string(&mut response)
            .expect("a response in UTF-8");
        let (head, body) = response.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        (status.expect("a status"), body.to_owned())
    }

    /// The page `/metrics`.
    #[track_caller]
    pub fn metrics(&self) -> Metrics {
        let (status, text) = self.http("/metrics");
        assert_eq!(status, 200, "{text}");
        Metrics::parse(&text)
    }

    /// Runs a command that sends a request to the running agent.
    #[track_caller]
    pub fn ask(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(Agent::program());
        command
            .args(arguments)
            .arg("--socket")
            .arg(self.socket())
            .env("NO_COLOR", "1");
        command.output().expect("the agent's program runs")
    }

    /// Runs such a command with `--json`; returns its exit status and output.
    #[track_caller]
    pub fn ask_json(&self, arguments: &[&str]) -> (Option<i32>, Value) {
        let output = self.ask(&[arguments, &["--json"]].concat());
        let printed = String::from_utf8_lossy(&output.stdout);
        let value = serde_json::from_str(&printed).unwrap_or_else(|error| {
            let wrong = String::from_utf8_lossy(&output.stderr);
            panic!("{arguments:?}: {error}: {printed}{wrong}")
        });
        (output.status.code(), value)
    }

    /// The entry of one pod in `status`.
    #[track_caller]
    pub fn status_of(&self, pod: &Pod) -> Value {
        let (code, status) = self.ask_json(&["status", &title(pod)]);
        assert_eq!(code, Some(0), "{status}");
        status["pods"][0].clone()
    }

    /// Waits until `status` has this count of a loss.
    #[track_caller]
    pub fn wait_loss_counted(&self, kind: &str, count: u64) {
        eventually("the loss is counted", || {
            let (_, status) = self.ask_json(&["status"]);
            holds(status["losses"][kind] == count)
        });
    }

    /// Exit status and output of `explain`.
    #[track_caller]
    pub fn explain(&self, pod: &Pod, target: &str) -> (i32, Value) {
        let (code, explanation) = self.ask_json(&["explain", &title(pod), target]);
        (code.expect("it was not killed"), explanation)
    }
}

/// `namespace/pod`
pub fn title(pod: &Pod) -> String {
    format!("{}/{}", pod.namespace(), pod.name())
}

/// A page in the `OpenMetrics` text format.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Values by series, written as on the page, with labels.
    series: BTreeMap<String, f64>,
    /// The types of the families.
    pub types: BTreeMap<String, String>,
    /// The help texts of the families.
    pub help: BTreeMap<String, String>,
}

impl Metrics {
    /// Parses a page and checks the format: each family is described once, before its samples; a sample's
    /// name is the family's with an ending of its type; no series is repeated; buckets ascend and the last
    /// one counts all.
    #[track_caller]
    pub fn parse(text: &str) -> Self {
        let mut page = Self::default();
        let mut family = String::new();
        let lines: Vec<&str> = text.lines().collect();
        let (last, lines) = lines.split_last().expect("a page is not empty");
        assert_eq!(*last, "# EOF");
        for line in lines {
            if let Some(rest) = line.strip_prefix("# ") {
                let mut parts = rest.splitn(3, ' ');
                let mut part = || parts.next().unwrap_or_else(|| panic!("{line}"));
                let (kind, name, value) = (part(), part(), part());
                name.clone_into(&mut family);
                let described = match kind {
                    "HELP" => page.help.insert(family.clone(), value.to_owned()),
                    "TYPE" => page.types.insert(family.clone(), value.to_owned()),
                    "UNIT" => {
                        assert!(name.ends_with(&format!("_{value}")), "{line}");
                        None
                    }
                    _ => panic!("{line}"),
                };
                assert_eq!(described, None, "described twice: {line}");
                continue;
            }
            let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
            let name = series.split('{').next().unwrap_or(series);
            let ending = name
                .strip_prefix(family.as_str())
                .unwrap_or_else(|| panic!("not of {family}: {line}"));
            let endings: &[&str] = match page.types[&family].as_str() {
                "counter" => &["_total"],
                "gauge" => &[""],
                "info" => &["_info"],
                "histogram" => &["_bucket", "_count", "_sum"],
                other => panic!("{family} is a {other}"),
            };
            assert!(endings.contains(&ending), "{line}");
            let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
            let before = page.series.insert(series.to_owned(), value);
            assert_eq!(before, None, "twice: {line}");
        }
        let described: BTreeSet<_> = page.help.keys().collect();
        assert_eq!(described, page.types.keys().collect());
        for (family, kind) in &page.types {
            if kind == "histogram" {
                page.check_buckets(family);
            }
        }
        page
    }

    fn check_buckets(&self, family: &str) {
        let begin = format!("{family}_bucket{{le=\"");
        let mut buckets: Vec<(f64, f64)> = self
            .series
            .iter()
            .filter_map(|(series, &count)| {
                let bound = series.strip_prefix(&begin)?.strip_suffix("\"}")?;
                Some((bound.parse().ok()?, count))
            })
            .collect();
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(buckets.is_sorted_by_key(|(_, count)| *count), "{buckets:?}");
        let last = buckets.last().expect("a histogram has buckets");
        assert_eq!(*last, (f64::INFINITY, self.get(&format!("{family}_count"))));
    }

    /// The value of a series, written as on the page.
    #[track_caller]
    pub fn get(&self, series: &str) -> f64 {
        let known = || self.series.keys().cloned().collect::<Vec<_>>().join("\n");
        *self
            .series
            .get(series)
            .unwrap_or_else(|| panic!("no {series} in\n{}", known()))
    }

    /// The value of a series; 0 if it does not exist.
    pub fn find(&self, series: &str) -> f64 {
        self.series.get(series).copied().unwrap_or(0.0)
    }

    /// All series, as written on the page.
    pub fn series(&self) -> impl Iterator<Item = &str> {
        self.series.keys().map(String::as_str)
    }
}
