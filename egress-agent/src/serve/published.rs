//! What control publishes: a snapshot of the node's status, and a record of each pod.
//!
//! Control writes it. The threads that answer requests and the denial reader read it. The gate and the programs never
//! use it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use arc_swap::{ArcSwap, Guard};
use egress_common::ids::{IfIndex, PodId, PolicyId};

use crate::{
    datapath::boottime_ns,
    host::Exits,
    pods::{PodCounts, PolicyKind, PolicyState},
    report::{Counter, DenialCounts, Gauge, Histogram, PodIdentity, Subject},
};
use egress_policy::{Annotations, Compiled, Inputs, Mode, Objects, Resolver, Settings};

/// Bounds of the buckets of the time a reconcile takes, in nanoseconds: 1 ms to 30 s.
const RECONCILE_BOUNDS: [u64; 10] = [
    1_000_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    1_000_000_000,
    5_000_000_000,
    30_000_000_000,
];

/// How long [`Published::current`] waits at most, and how often it looks.
const PATIENCE: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// How many namespaces without pods keep their denial counters.
const NAMESPACES: usize = 1000;

/// The inputs of a policy.
#[derive(Debug, Default)]
pub struct Written {
    /// The pod's own.
    pub own: Annotations,
    /// Its namespace's.
    pub namespace: Annotations,
    /// The policy objects that selected the pod.
    pub objects: Objects,
}

impl Written {
    /// All of it.
    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            pod: &self.own,
            namespace: &self.namespace,
            objects: &self.objects,
        }
    }
}

/// The enforcement of one pod.
#[derive(Clone, Debug)]
pub struct Attached {
    /// Its id in the maps.
    pub pod: PodId,
    /// The id of its policy in the maps.
    pub policy: PolicyId,
    /// How many versions of its policy this agent has applied.
    pub version: u64,
    /// When this version was applied.
    pub since: SystemTime,
    /// Its interfaces.
    pub interfaces: Vec<IfIndex>,
    /// Whether its packets may pass unjudged although the programs are attached.
    pub bypassed: bool,
}

/// A pod, or an interface in quarantine, as one reconcile left it.
#[derive(Clone, Debug)]
pub struct PodRecord {
    /// Its UID.
    pub uid: String,
    /// The mode that applies, or should apply.
    pub mode: Mode,
    /// Whether it is in the host's network, where it is not enforced.
    pub host_network: bool,
    /// Whether this entry is for an interface whose pod is not known yet.
    pub quarantined: bool,
    /// Its identity and its denial counters; `None` for a pod that is not in the kernel.
    pub identity: Option<Arc<PodIdentity>>,
    /// How it is enforced; `None` if it is not.
    pub attached: Option<Attached>,
    /// The policy in force, or that should be; `None` if the pod's annotations were not read.
    pub compiled: Option<Arc<Compiled>>,
    /// The annotations of the policy.
    pub written: Arc<Written>,
    /// Whether its annotations cannot be read.
    pub unreadable: bool,
    /// Its interfaces that cannot be enforced, beside the enforced ones.
    pub exits: Arc<Exits>,
    /// The pod's problem, for status and readiness.
    pub problem: Option<String>,
}

impl PodRecord {
    /// Whether it should be enforced and is not.
    pub fn is_waiting(&self) -> bool {
        self.attached.is_none() && self.mode != Mode::Off && !self.host_network
    }

    /// Whether the programs are attached and its packets may still pass unjudged.
    pub fn is_bypassed(&self) -> bool {
        let attached = self.attached.as_ref();
        attached.is_some_and(|attached| attached.bypassed)
    }

    /// Whether it is not enforced because of a problem. A pod that has only just started has no problem yet.
    pub fn is_missing(&self) -> bool {
        (self.is_waiting() || self.is_bypassed()) && self.problem.is_some()
    }
}

/// How many connections from before the enforcement of their pods were kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Existing {
    /// Connections that peers had opened.
    pub inbound: u64,
    /// Connections that peers had opened according to the pod alone. They were judged.
    pub unconfirmed: u64,
    /// Connections that pods had opened, with `existingConnections: trust`.
    pub trusted: u64,
}

impl std::ops::AddAssign for Existing {
    fn add_assign(&mut self, other: Self) {
        self.inbound += other.inbound;
        self.unconfirmed += other.unconfirmed;
        self.trusted += other.trusted;
    }
}

/// The state of the connection to the API server.
#[derive(Clone, Debug)]
pub struct ClusterState {
    /// Whether the API server answers, as far as the agent knows.
    pub reachable: bool,
    /// Its watches.
    pub watches: Vec<WatchState>,
    /// How many events were written.
    pub events_sent: u64,
    /// How many events exceeded the limit or were rejected by the API server.
    pub events_lost: u64,
    /// How often the node's report was written.
    pub reports_written: u64,
    /// How often it could not be written.
    pub reports_failed: u64,
}

/// The state of one watch.
#[derive(Clone, Debug)]
pub struct WatchState {
    /// The kind of objects it follows.
    pub of: &'static str,
    /// How often it started again with a list.
    pub restarts: u64,
    /// How often a list or watch failed.
    pub errors: u64,
}

/// The status of the node after a reconcile.
#[derive(Debug, Default)]
pub struct StatusSnapshot {
    /// Its pods and its interfaces in quarantine.
    pub pods: BTreeMap<Subject, Arc<PodRecord>>,
    /// The policy objects, and how far they are in force.
    pub policies: Vec<PolicyState>,
    /// How many pods are enforced.
    pub counts: PodCounts,
    /// Its resolvers, each with the source that named it.
    pub resolvers: BTreeMap<Resolver, String>,
    /// Problems that belong to no single pod: subject and text.
    pub problems: BTreeMap<String, String>,
    /// Whether there may be more pods, because the source could not be read completely.
    pub incomplete: bool,
    /// The kinds of policy objects that an earlier agent knew and that the API server does not list.
    pub withheld: Vec<PolicyKind>,
    /// The connection to the API server; `None` without a cluster.
    pub cluster: Option<ClusterState>,
    /// How many connections from before the enforcement were kept.
    pub existing: Existing,
    /// Whether connections that pods had opened before the start of this agent were trusted.
    pub trusted: bool,
    /// The reason for `trusted`.
    pub trust: String,
    /// The settings that the policies were compiled with; `None` before the first reconcile.
    pub settings: Option<Settings>,
}

/// The pods in the kernel, by their ids in the maps.
pub type PodsById = HashMap<PodId, Arc<PodRecord>>;

/// The published state of the agent, with counters of control.
#[derive(Debug)]
pub struct Published {
    snapshot: ArcSwap<StatusSnapshot>,
    pods: ArcSwap<PodsById>,
    /// Whether pods have changed since the snapshot.
    outdated: AtomicBool,
    /// Established inbound flows that were evicted when their pod was examined.
    pub flows_evicted: Counter,
    /// Evicted destinations: addresses and ports to which a pod has connected.
    pub destinations_evicted: Counter,
    /// Durations of reconciles.
    pub reconciles: Histogram<{ RECONCILE_BOUNDS.len() }>,
    /// How often a program was moved back in front of another one.
    pub hooks_moved: Counter,
    /// How often one of the stamp check's tables was restored.
    pub stamp_tables_restored: Counter,
    /// Probes that did not reach the programs.
    pub probes_missed: Counter,
    reconciled_ns: Gauge,
    read_ns: Gauge,
    began_ns: u64,
    began: SystemTime,
    flows: Mutex<HashMap<PodId, usize>>,
    namespaces: Mutex<BTreeMap<String, Arc<DenialCounts>>>,
}

impl Default for Published {
    fn default() -> Self {
        Self {
            snapshot: ArcSwap::default(),
            pods: ArcSwap::default(),
            outdated: AtomicBool::new(false),
            flows_evicted: Counter::default(),
            destinations_evicted: Counter::default(),
            reconciles: Histogram::new(&RECONCILE_BOUNDS),
            hooks_moved: Counter::default(),
            stamp_tables_restored: Counter::default(),
            probes_missed: Counter::default(),
            reconciled_ns: Gauge::default(),
            read_ns: Gauge::default(),
            began_ns: boottime_ns(),
            began: SystemTime::now(),
            flows: Mutex::default(),
            namespaces: Mutex::default(),
        }
    }
}

impl Published {
    /// Publishes the node as it is after a reconcile. `left` are the pods that an earlier agent left in the kernel.
    pub fn publish(
        &self,
        node: StatusSnapshot,
        left: impl Iterator<Item = (PodId, Arc<PodRecord>)>,
    ) {
        let enforced = |pod: &Arc<PodRecord>| pod.attached.as_ref().map(|attached| attached.pod);
        let pods: HashSet<PodId> = node.pods.values().filter_map(enforced).collect();
        lock(&self.flows).retain(|pod, _| pods.contains(pod));
        let enforced = node.pods.values().filter_map(|pod| {
            let attached = pod.attached.as_ref()?;
            Some((attached.pod, Arc::clone(pod)))
        });
        self.pods.store(Arc::new(left.chain(enforced).collect()));
        self.snapshot.store(Arc::new(node));
        self.outdated.store(false, Ordering::Release);
    }

    /// Records that a reconcile has ended which took this long.
    pub fn reconciled(&self, took: Duration) {
        self.reconciles
            .record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        self.reconciled_ns.set(boottime_ns());
    }

    /// The node after the last reconcile.
    pub fn snapshot(&self) -> Arc<StatusSnapshot> {
        self.snapshot.load_full()
    }

    /// The node after the last reconcile. If a reconcile has changed pods and has not ended yet, waits for its end,
    /// so that an edit that the log has shown as applied is in the answer. The wait is bounded, because a reconcile
    /// of very many pods takes seconds.
    pub async fn current(&self) -> Arc<StatusSnapshot> {
        let until = Instant::now() + PATIENCE;
        while self.outdated.load(Ordering::Acquire) && Instant::now() < until {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        self.snapshot()
    }

    /// Publishes a pod between two reconciles, so that it is known before its first packet can be denied.
    pub fn add(&self, id: PodId, pod: &Arc<PodRecord>) {
        self.outdated.store(true, Ordering::Release);
        self.pods.rcu(|before| {
            let mut after = PodsById::clone(before);
            after.insert(id, Arc::clone(pod));
            after
        });
    }

    /// Whether a pod still has this version of its policy. The maps of an earlier one are removed once a later one is
    /// in force.
    pub fn is_in_force(&self, version: &Attached) -> bool {
        let pods = self.pods();
        let now = pods.get(&version.pod).and_then(|pod| pod.attached.as_ref());
        now.is_some_and(|now| now.policy == version.policy)
    }

    /// The pods in the kernel, by their ids.
    pub fn pods(&self) -> Guard<Arc<PodsById>> {
        self.pods.load()
    }

    /// When the last reconcile ended; `None` before the first one.
    pub fn last_reconciled(&self) -> Option<SystemTime> {
        let last_ns = self.reconciled_ns.get();
        (last_ns != 0)
            .then(|| SystemTime::now().checked_sub(since(last_ns)))
            .flatten()
    }

    /// How long ago the last reconcile ended, or the agent started.
    pub fn reconciled_ago(&self) -> Duration {
        since(self.reconciled_ns.get().max(self.began_ns))
    }

    /// Records that the thread that reads denials is alive.
    pub fn denials_are_read(&self) {
        self.read_ns.set(boottime_ns());
    }

    /// How long ago that thread last read denials; `None` before the first time.
    pub fn denials_read_ago(&self) -> Option<Duration> {
        let last_ns = self.read_ns.get();
        (last_ns != 0).then(|| since(last_ns))
    }

    /// When the agent started.
    pub fn began(&self) -> SystemTime {
        self.began
    }

    /// How long the agent has been running.
    pub fn uptime(&self) -> Duration {
        since(self.began_ns)
    }

    /// Sets how many flows of a pod are tracked.
    pub fn set_flows(&self, pod: PodId, flows: usize) {
        lock(&self.flows).insert(pod, flows);
    }

    /// How many flows of all pods were tracked at the last count.
    pub fn flows(&self) -> usize {
        lock(&self.flows).values().sum()
    }

    /// The denial counters of a namespace. When there are very many namespaces, those without pods are
    /// forgotten.
    pub fn denials_of(&self, namespace: &str) -> Arc<DenialCounts> {
        let mut namespaces = lock(&self.namespaces);
        if namespaces.len() >= NAMESPACES && !namespaces.contains_key(namespace) {
            namespaces.retain(|_, counts| Arc::strong_count(counts) > 1);
        }
        Arc::clone(namespaces.entry(namespace.to_owned()).or_default())
    }

    /// The denial counters of each namespace.
    pub fn namespaces(&self) -> Vec<(String, Arc<DenialCounts>)> {
        let namespaces = lock(&self.namespaces);
        namespaces
            .iter()
            .map(|(name, counts)| (name.clone(), Arc::clone(counts)))
            .collect()
    }
}

fn since(then_ns: u64) -> Duration {
    Duration::from_nanos(boottime_ns().saturating_sub(then_ns))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enforced() -> Arc<PodRecord> {
        Arc::new(PodRecord {
            uid: "u".to_owned(),
            mode: Mode::Enforce,
            host_network: false,
            quarantined: false,
            identity: None,
            attached: None,
            compiled: None,
            written: Arc::default(),
            unreadable: false,
            exits: Arc::default(),
            problem: None,
        })
    }

    #[tokio::test]
    async fn while_pods_are_changed_the_state_is_that_of_the_end_of_the_reconcile() {
        let published = Arc::new(Published::default());
        assert!(!published.current().await.incomplete);
        published.add(PodId::new(1), &enforced());
        let asking = Arc::clone(&published);
        let asked = tokio::spawn(async move { asking.current().await });
        // The task begins to wait.
        tokio::task::yield_now().await;
        let after = StatusSnapshot {
            incomplete: true,
            ..StatusSnapshot::default()
        };
        published.publish(after, std::iter::empty());
        let answer = asked.await.expect("the task does not panic");
        assert!(answer.incomplete, "the state from before the change");
    }
}
