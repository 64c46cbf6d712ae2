//! What control publishes: a snapshot of the node's status, and a record of each pod.
//!
//! Control writes it. The threads that answer questions read it, and so does the reader of denials. The gate and the
//! programs never look at it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use arc_swap::{ArcSwap, Guard};

use crate::{
    datapath::boottime_ns,
    host::Exits,
    report::{Counter, DenialCounts, Gauge, Histogram, PodIdentity, Subject},
};
use egress_policy::{Annotations, Compiled, Mode, Resolver, Settings};

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

/// Most namespaces whose denials are remembered after their last pod has gone.
const NAMESPACES: usize = 1000;

/// The annotations that a policy was made of.
#[derive(Debug, Default)]
pub struct Written {
    /// The pod's own.
    pub own: Annotations,
    /// Its namespace's.
    pub namespace: Annotations,
}

/// How a pod is enforced.
#[derive(Clone, Debug)]
pub struct Attached {
    /// Its id in the maps.
    pub pod: u32,
    /// The id of its policy in the maps.
    pub policy: u32,
    /// How many versions of its policy this agent has applied.
    pub version: u64,
    /// Since when this version holds.
    pub since: SystemTime,
    /// Its interfaces.
    pub interfaces: Vec<u32>,
    /// Whether what they carry may not be judged all the same.
    pub bypassed: bool,
}

/// A pod, or an interface in quarantine, as one reconcile left it.
#[derive(Clone, Debug)]
pub struct PodRecord {
    /// Its UID.
    pub uid: String,
    /// The mode it is under, or should be under.
    pub mode: Mode,
    /// Whether it is in the host's network, where it is not enforced.
    pub host_network: bool,
    /// Whether it stands for an interface whose pod is not known yet.
    pub quarantined: bool,
    /// Who it is for denial lines, and its denials; none of a pod that is not in the kernel.
    pub identity: Option<Arc<PodIdentity>>,
    /// How it is enforced, if it is.
    pub attached: Option<Attached>,
    /// The policy in force, or that should be; none of a pod whose annotations were not looked at.
    pub compiled: Option<Arc<Compiled>>,
    /// Where the policy is written.
    pub written: Arc<Written>,
    /// Whether its annotations cannot be read.
    pub unreadable: bool,
    /// Its interfaces that cannot be enforced, beside those that are.
    pub exits: Arc<Exits>,
    /// What is wrong.
    pub problem: Option<String>,
}

impl PodRecord {
    /// Whether it is to be enforced and is not.
    pub fn is_waiting(&self) -> bool {
        self.attached.is_none() && self.mode != Mode::Off && !self.host_network
    }

    /// Whether it is attached to, and its packets may pass unjudged all the same.
    pub fn is_bypassed(&self) -> bool {
        let attached = self.attached.as_ref();
        attached.is_some_and(|attached| attached.bypassed)
    }

    /// Whether something is wrong with that: a pod that has only just come is not missing yet.
    pub fn is_missing(&self) -> bool {
        (self.is_waiting() || self.is_bypassed()) && self.problem.is_some()
    }
}

/// How many connections went on that pods had open before they were enforced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Existing {
    /// Those that others had opened.
    pub inbound: u64,
    /// Those of which the pod alone says that others had opened them. They were judged.
    pub unconfirmed: u64,
    /// Those that pods had opened, with `existingConnections: trust`.
    pub trusted: u64,
}

impl std::ops::AddAssign for Existing {
    fn add_assign(&mut self, other: Self) {
        self.inbound += other.inbound;
        self.unconfirmed += other.unconfirmed;
        self.trusted += other.trusted;
    }
}

/// How following the cluster goes.
#[derive(Clone, Debug)]
pub struct ClusterState {
    /// Whether the API server answers, as far as is known.
    pub reachable: bool,
    /// Its watches.
    pub watches: Vec<WatchState>,
    /// Events that were written.
    pub events_sent: u64,
    /// Events that were too many, or that the API server did not take.
    pub events_lost: u64,
}

/// How one watch does.
#[derive(Clone, Debug)]
pub struct WatchState {
    /// What it follows.
    pub of: &'static str,
    /// How often it began again with a list.
    pub restarts: u64,
    /// How often a list or watch failed.
    pub errors: u64,
}

/// The status of the node after a reconcile.
#[derive(Debug, Default)]
pub struct StatusSnapshot {
    /// Its pods and its interfaces in quarantine.
    pub pods: BTreeMap<Subject, Arc<PodRecord>>,
    /// Its resolvers, each with where it was found.
    pub resolvers: BTreeMap<Resolver, String>,
    /// What is wrong with no single pod: where, and what.
    pub problems: BTreeMap<String, String>,
    /// Whether there may be more pods, because the source could not be read in full.
    pub incomplete: bool,
    /// How following the cluster goes; `None` without one.
    pub cluster: Option<ClusterState>,
    /// How many connections from before went on.
    pub existing: Existing,
    /// Whether those that pods had opened before this agent's start went on.
    pub trusted: bool,
    /// The reason.
    pub trust: String,
    /// What the policies were compiled with; none before the first reconcile.
    pub settings: Option<Settings>,
}

/// The pods in the kernel, by their ids in the maps.
pub type PodsById = HashMap<u32, Arc<PodRecord>>;

/// See the module.
#[derive(Debug)]
pub struct Published {
    snapshot: ArcSwap<StatusSnapshot>,
    pods: ArcSwap<PodsById>,
    /// Established flows that others opened and that had to give way at a look at their pod.
    pub flows_evicted: Counter,
    /// Addresses and ports to which a pod has connected and that gave way to others.
    pub destinations_evicted: Counter,
    /// How long reconciles took.
    pub reconciles: Histogram<{ RECONCILE_BOUNDS.len() }>,
    /// How often a program was put in front of another one again.
    pub hooks_moved: Counter,
    /// How often one of the stamp check's tables was put back.
    pub stamp_tables_restored: Counter,
    /// Probes that have not come to the programs.
    pub probes_missed: Counter,
    reconciled_ns: Gauge,
    read_ns: Gauge,
    began_ns: u64,
    began: SystemTime,
    flows: Mutex<HashMap<u32, usize>>,
    namespaces: Mutex<BTreeMap<String, Arc<DenialCounts>>>,
}

impl Default for Published {
    fn default() -> Self {
        Self {
            snapshot: ArcSwap::default(),
            pods: ArcSwap::default(),
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
    pub fn publish(&self, node: StatusSnapshot, left: impl Iterator<Item = (u32, Arc<PodRecord>)>) {
        let enforced = |pod: &Arc<PodRecord>| pod.attached.as_ref().map(|attached| attached.pod);
        let pods: HashSet<u32> = node.pods.values().filter_map(enforced).collect();
        lock(&self.flows).retain(|pod, _| pods.contains(pod));
        let enforced = node.pods.values().filter_map(|pod| {
            let attached = pod.attached.as_ref()?;
            Some((attached.pod, Arc::clone(pod)))
        });
        self.pods.store(Arc::new(left.chain(enforced).collect()));
        self.snapshot.store(Arc::new(node));
    }

    /// A reconcile has ended that took this long.
    pub fn reconciled(&self, took: Duration) {
        self.reconciles
            .record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        self.reconciled_ns.set(boottime_ns());
    }

    /// The node after the last reconcile.
    pub fn snapshot(&self) -> Arc<StatusSnapshot> {
        self.snapshot.load_full()
    }

    /// Publishes a pod between two reconciles, so that it is known before its first packet can be denied.
    pub fn add(&self, id: u32, pod: &Arc<PodRecord>) {
        self.pods.rcu(|before| {
            let mut after = PodsById::clone(before);
            after.insert(id, Arc::clone(pod));
            after
        });
    }

    /// The pods in the kernel, by their ids.
    pub fn pods(&self) -> Guard<Arc<PodsById>> {
        self.pods.load()
    }

    /// When everything was last looked at; `None` before the first time.
    pub fn last_reconciled(&self) -> Option<SystemTime> {
        let last_ns = self.reconciled_ns.get();
        (last_ns != 0)
            .then(|| SystemTime::now().checked_sub(since(last_ns)))
            .flatten()
    }

    /// How long ago everything was last looked at, or the agent began.
    pub fn reconciled_ago(&self) -> Duration {
        since(self.reconciled_ns.get().max(self.began_ns))
    }

    /// The thread that reads denials is at work.
    pub fn denials_are_read(&self) {
        self.read_ns.set(boottime_ns());
    }

    /// How long ago denials were last looked for; `None` before the first time.
    pub fn denials_read_ago(&self) -> Option<Duration> {
        let last_ns = self.read_ns.get();
        (last_ns != 0).then(|| since(last_ns))
    }

    /// When the agent began.
    pub fn began(&self) -> SystemTime {
        self.began
    }

    /// How long the agent has run.
    pub fn uptime(&self) -> Duration {
        since(self.began_ns)
    }

    /// How many flows of a pod are remembered.
    pub fn set_flows(&self, pod: u32, flows: usize) {
        lock(&self.flows).insert(pod, flows);
    }

    /// How many flows are remembered of all pods, at the last look.
    pub fn flows(&self) -> usize {
        lock(&self.flows).values().sum()
    }

    /// Where the denials of a namespace's pods are counted. Of namespaces without pods, some are
    /// forgotten when there are very many.
    pub fn denials_of(&self, namespace: &str) -> Arc<DenialCounts> {
        let mut namespaces = lock(&self.namespaces);
        if namespaces.len() >= NAMESPACES && !namespaces.contains_key(namespace) {
            namespaces.retain(|_, counts| Arc::strong_count(counts) > 1);
        }
        Arc::clone(namespaces.entry(namespace.to_owned()).or_default())
    }

    /// The denials of each namespace.
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
