//! Writes the node's report: its own object, and nobody else's.
//!
//! A report is written when its content has changed, at most once in [`EVERY`]. In a cluster of many nodes it is less
//! often, so that all nodes together write at most [`WRITES_A_SECOND`]. The same report is sent again after
//! [`RESYNC`], in case somebody has deleted or edited the object. The API server stores nothing if it is unchanged.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use egress_api::EgressNodeReport;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};

use super::{
    connection::{Connection, root},
    node_report::NodeReport,
};

/// Shortest time between two writes of a node.
const EVERY: Duration = Duration::from_secs(5);
/// Most writes of all nodes in a second, when the reports of all nodes change.
const WRITES_A_SECOND: u32 = 100;
/// How long a report waits for further changes at least.
const WAIT_MIN: Duration = Duration::from_millis(500);
/// When a written report is sent again. Each node has its own time from this range.
const RESYNC: Range<Duration> = Duration::from_secs(30 * 60)..Duration::from_secs(60 * 60);
/// The longest pause after failures. The first one is [`EVERY`], and each is twice the one before.
const PAUSE_MAX: Duration = Duration::from_secs(5 * 60);
/// How long the last report of an agent may take.
const LAST: Duration = Duration::from_secs(2);

/// Counters of reports.
#[derive(Debug, Default)]
pub struct ReportCounters {
    written: AtomicU64,
    failed: AtomicU64,
}

impl ReportCounters {
    /// How often the report was written.
    pub fn written(&self) -> u64 {
        self.written.load(Relaxed)
    }

    /// How often it could not be written.
    pub fn failed(&self) -> u64 {
        self.failed.load(Relaxed)
    }
}

/// Accepts reports without blocking. The last one counts.
#[derive(Clone, Debug)]
pub struct ReportSink {
    latest: watch::Sender<Option<Arc<NodeReport>>>,
    counters: Arc<ReportCounters>,
    nodes: Arc<AtomicU32>,
}

impl ReportSink {
    /// Queues a report, which is written if it differs from the last one.
    pub fn publish(&self, report: NodeReport) {
        self.latest.send_if_modified(|latest| {
            let is_new = latest.as_deref() != Some(&report);
            if is_new {
                *latest = Some(Arc::new(report));
            }
            is_new
        });
    }

    /// Records how many nodes the cluster has.
    pub(super) fn note_nodes(&self, count: usize) {
        self.nodes
            .store(u32::try_from(count).unwrap_or(u32::MAX), Relaxed);
    }

    /// The counters of reports.
    pub fn counters(&self) -> &ReportCounters {
        &self.counters
    }
}

#[cfg(feature = "test-support")]
impl ReportSink {
    /// A sink with its writer, as the agent of this node has them, and nothing else of an agent. The writer is one of
    /// `tasks`.
    ///
    /// # Errors
    ///
    /// When the kubeconfig cannot be read.
    pub async fn alone(
        kubeconfig: &std::path::Path,
        node: &str,
        tasks: &mut tokio::task::JoinSet<()>,
    ) -> anyhow::Result<Self> {
        let timing = super::connection::Timing::default();
        let connection = Connection::new(Some(kubeconfig), timing).await?;
        let (sink, writer) = channel(Arc::new(connection), node);
        tasks.spawn(writer.run());
        Ok(sink)
    }
}

/// Creates a sink, and the writer of the reports that it accepts.
pub(super) fn channel(connection: Arc<Connection>, node: &str) -> (ReportSink, Writer) {
    let (latest, reports) = watch::channel(None);
    let counters = Arc::<ReportCounters>::default();
    let nodes = Arc::<AtomicU32>::default();
    let writer = Writer {
        connection,
        node: node.to_owned(),
        reports,
        counters: Arc::clone(&counters),
        nodes: Arc::clone(&nodes),
        is_failing: false,
    };
    let sink = ReportSink {
        latest,
        counters,
        nodes,
    };
    (sink, writer)
}

/// Writes reports.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    connection: Arc<Connection>,
    node: String,
    reports: watch::Receiver<Option<Arc<NodeReport>>>,
    counters: Arc<ReportCounters>,
    nodes: Arc<AtomicU32>,
    is_failing: bool,
}

impl Writer {
    /// Writes reports until the sink is gone.
    pub(super) async fn run(mut self) {
        let resync = self.within(RESYNC);
        // When the API server may be asked again, and when a written report is sent again.
        let mut may_write = Instant::now();
        let mut sent_again = None;
        let mut pause = EVERY;
        let mut written: Option<Arc<NodeReport>> = None;
        loop {
            let has_changed = tokio::select! {
                changed = self.reports.changed() => changed.is_ok(),
                () = sleep_until(sent_again.unwrap_or(may_write)), if sent_again.is_some() => {
                    written = None;
                    true
                }
            };
            if !has_changed {
                return;
            }
            // An edit that concerns every node does not make all of them write at once.
            let wait = self.within(WAIT_MIN..self.interval());
            sleep_until(may_write.max(Instant::now() + wait)).await;
            loop {
                let latest = self.reports.borrow_and_update().clone();
                let Some(latest) = latest.filter(|latest| written.as_ref() != Some(latest)) else {
                    break;
                };
                if self.write(&latest).await {
                    written = Some(latest);
                    pause = EVERY;
                    may_write = Instant::now() + self.interval();
                    sent_again = Some(Instant::now() + resync);
                    break;
                }
                // A write without a response may have been carried out.
                written = None;
                sleep_until(Instant::now() + pause).await;
                pause = PAUSE_MAX.min(pause * 2);
            }
        }
    }

    /// Says in the node's report that nothing is enforced any more.
    pub(super) async fn stopped(mut self) {
        let latest = self.reports.borrow_and_update().clone();
        if let Some(latest) = latest {
            let _is_in_time = timeout(LAST, self.write(&latest.stopped())).await;
        }
    }

    /// Shortest time between two writes, by the size of the cluster.
    fn interval(&self) -> Duration {
        interval(self.nodes.load(Relaxed))
    }

    /// This node's time within a range.
    fn within(&self, range: Range<Duration>) -> Duration {
        const STEPS: u32 = 1024;
        let mut hasher = DefaultHasher::new();
        self.node.hash(&mut hasher);
        let step = hasher.finish() % u64::from(STEPS);
        range.start + range.end.saturating_sub(range.start) / STEPS * step as u32
    }

    /// Writes the report, and creates the object if there is none. Returns true on success.
    async fn write(&mut self, report: &NodeReport) -> bool {
        let (generation, client) = self.connection.client();
        let api = Api::<EgressNodeReport>::all(client);
        let patch = Patch::Merge(serde_json::json!({ "status": report.status }));
        let params = PatchParams::default();
        let written = match api.patch(&self.node, &params, &patch).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {
                let (params, object) = (PostParams::default(), self.object(report));
                api.create(&params, &object).await.map(drop)
            }
            patched => patched.map(drop),
        };
        let Err(error) = written else {
            self.counters.written.fetch_add(1, Relaxed);
            if std::mem::replace(&mut self.is_failing, false) {
                tracing::info!("the node's report is written again");
            }
            return true;
        };
        self.counters.failed.fetch_add(1, Relaxed);
        // Logged once, until a write succeeds again.
        if !std::mem::replace(&mut self.is_failing, true) {
            let message = match &error {
                kube::Error::Api(status) => match status.code {
                    403 => format!("{}: allow it in the agent's roles", status.message),
                    404 => "the API server does not have the kind EgressNodeReport: install its definition, which \
                            is in the manifests"
                        .to_owned(),
                    _ => status.message.clone(),
                },
                other => root(other),
            };
            tracing::warn!(
                node = %self.node,
                "cannot write the node's EgressNodeReport; enforcement goes on, and the write is tried again: \
                 {message}"
            );
        }
        if matches!(&error, kube::Error::Api(status) if status.code == 401) {
            self.connection.renew(generation).await;
        }
        false
    }

    /// The object as it is created. The owner is set only here: to change it later, some API servers demand the right
    /// to delete the object.
    fn object(&self, report: &NodeReport) -> EgressNodeReport {
        let owner = report.node_uid.as_ref().map(|uid| OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: self.node.clone(),
            uid: uid.clone(),
            ..OwnerReference::default()
        });
        let metadata = ObjectMeta {
            name: Some(self.node.clone()),
            owner_references: owner.map(|owner| vec![owner]),
            ..ObjectMeta::default()
        };
        EgressNodeReport::new(metadata, report.status.clone())
    }
}

fn interval(nodes: u32) -> Duration {
    let all = (Duration::from_secs(1) / WRITES_A_SECOND).saturating_mul(nodes);
    all.clamp(EVERY, PAUSE_MAX)
}

#[cfg(test)]
#[path = "reports_tests.rs"]
mod tests;
