//! A Kubernetes API server as a source of pods.
//!
//! ```text
//!  API server ─ connection ─▶ follow (one for each kind of object) ─▶ tables of reduced objects
//!  tables and health ─ state ─▶ Snapshot            PodEvent ─ events ─▶ API server
//!                                                NodeReport ─ reports ─▶ API server
//! ```
//!
//! A pod is never released because data is missing: no snapshot has pods before all pods and all namespaces
//! are known, a list counts only when it is complete, and while the server cannot be reached the last state
//! stays.

#[cfg(feature = "test-support")]
mod access;
mod connection;
mod definitions;
mod events;
mod facts;
mod follow;
mod health;
mod kind_states;
mod kubelet;
mod moments;
mod namespace;
mod node_report;
mod nodes;
mod passed;
mod peers;
mod pod;
mod policies;
mod reports;
mod services;
mod state;
mod table;
mod token_bucket;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::api::{core::v1, discovery::v1 as discovery, networking::v1 as networking};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Resource,
    core::{ApiResource, DynamicObject, PartialObjectMeta},
    runtime::watcher,
};
use tokio::{sync::watch, task::JoinSet, time::Instant};

use super::{Snapshot, policies::PolicyKind};
use crate::config::{Cluster as Settings, Nodes};
use connection::{Connection, Timing};
use definitions::{Definition, Signals};
use egress_policy::objects::ObjectKind;
use facts::NodeFacts;
use follow::{Shared, WatchPlan, follow, follow_either, follow_peers, follow_policies};
use kubelet::Kubelet;
use namespace::Namespace;
use peers::{PeerFacts, SlimPod};
use pod::ClusterPod;
use policies::{KeptPolicy, KeptSet};
use reports::Writer;
use services::{EndpointFacts, ServiceFacts};
use state::{API_SERVICE, State};

#[cfg(feature = "test-support")]
pub use access::{ACCESS, Access, Within};
pub use events::{EventCounters, EventSink, PodEvent};
pub use health::{Health, WatchCounters, Watched};
pub use node_report::NodeReport;
pub use reports::{ReportCounters, ReportSink};

/// How often the kubelet's file is checked.
const KUBELET_EVERY: Duration = Duration::from_secs(10);

/// How often policies get the pods of the cluster, and the endpoints of Services, that came or went.
const PEERS_EVERY: Duration = Duration::from_secs(1);

/// What to follow, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The file with the address of the API server and the credentials for it; without one, those of the
    /// agent's own pod are used.
    pub kubeconfig: Option<PathBuf>,
    /// Name of the agent's node.
    pub node: String,
    /// The objects that describe the cluster itself.
    pub cluster: Settings,
    /// After how long without any data from the server a connection counts as dead; see
    /// [`Options::new`].
    pub silence: Duration,
}

impl Options {
    /// With the default timing: a ping every 20 seconds, which the server has 10 seconds to answer.
    pub fn new(kubeconfig: Option<PathBuf>, node: String, cluster: Settings) -> Self {
        let Timing {
            ping_every,
            ping_timeout,
        } = Timing::default();
        Self {
            kubeconfig,
            node,
            cluster,
            silence: ping_every + ping_timeout,
        }
    }

    fn timing(&self) -> Timing {
        Timing {
            ping_every: self.silence * 2 / 3,
            ping_timeout: self.silence / 3,
        }
    }
}

/// A source of pods that follows a cluster.
#[derive(Debug)]
pub struct Cluster;

impl Cluster {
    /// Follows the API server in tasks of the current runtime.
    ///
    /// The receiver first has an empty snapshot that is marked as unreadable. The first snapshot with pods
    /// follows when all pods of the node and all namespaces are known, and each of the other facts is known
    /// or its watch has failed.
    ///
    /// # Errors
    ///
    /// When the credentials cannot be read. An unreachable server is not an error: the agent keeps trying.
    pub async fn watch(
        options: Options,
    ) -> anyhow::Result<(watch::Receiver<Arc<Snapshot>>, ClusterWatch)> {
        let kubeconfig = options.kubeconfig.as_deref();
        let connection = Arc::new(Connection::new(kubeconfig, options.timing()).await?);
        let health = Arc::<Health>::default();
        let kubelet = Kubelet::new(&options.cluster.kubelet_config);
        let dns = options.cluster.dns_service.clone();
        let state = State::new(&options.node, options.cluster.nodes, dns, kubelet);
        let shared = Shared {
            connection: Arc::clone(&connection),
            health: Arc::clone(&health),
            state: Arc::new(Mutex::new(state)),
            definitions: watch::Sender::new(Signals::default()),
            peers_needed: watch::Sender::new(false),
        };
        let mut tasks = JoinSet::new();
        follow_all(&shared, &options, &mut tasks);
        let (events, writer) = events::channel(Arc::clone(&connection), &options.node);
        tasks.spawn(writer.run());
        let (reports, writer) = reports::channel(connection, &options.node);
        tasks.spawn(writer.clone().run());
        let nothing = Snapshot {
            unreadable: true,
            ..Snapshot::default()
        };
        let (sender, receiver) = watch::channel(Arc::new(nothing));
        tasks.spawn(publish(shared, sender, reports.clone()));
        let watching = ClusterWatch {
            tasks,
            health,
            events,
            reports,
            last_report: writer,
        };
        Ok((receiver, watching))
    }
}

/// The tasks that follow a cluster; they end when this is dropped.
#[derive(Debug)]
pub struct ClusterWatch {
    tasks: JoinSet<()>,
    health: Arc<Health>,
    events: EventSink,
    reports: ReportSink,
    last_report: Writer,
}

impl ClusterWatch {
    /// The health of the watches.
    pub fn health(&self) -> &Arc<Health> {
        &self.health
    }

    /// The sink for Events about pods.
    pub fn events(&self) -> &EventSink {
        &self.events
    }

    /// The sink for the node's report.
    pub fn reports(&self) -> &ReportSink {
        &self.reports
    }

    /// Stops the tasks and waits for their end. If nothing is to be enforced any more, the node's report says so.
    pub async fn close(mut self, keeps_enforcing: bool) {
        self.tasks.shutdown().await;
        if !keeps_enforcing {
            self.last_report.stopped().await;
        }
    }
}

/// Publishes a snapshot whenever something has changed.
async fn publish(shared: Shared, sender: watch::Sender<Arc<Snapshot>>, reports: ReportSink) {
    let mut kubelet = tokio::time::interval(KUBELET_EVERY);
    let mut peers_renewed = Instant::now();
    loop {
        let is_changed = tokio::select! {
            () = shared.health.changed.notified() => true,
            () = changed_peers(&shared, peers_renewed) => {
                peers_renewed = Instant::now();
                let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.policies.renew_peers();
                state.services.renew();
                true
            }
            _ = kubelet.tick() => {
                let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.kubelet.read()
            }
            () = sender.closed() => return,
        };
        if !is_changed {
            continue;
        }
        let (snapshot, needs_pods, is_waiting) = {
            let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
            let snapshot = state.snapshot(&shared.health);
            reports.note_nodes(state.node.len());
            let policies = &state.policies;
            (
                snapshot,
                policies.needs_pods(),
                policies.is_waiting_for_pods(),
            )
        };
        shared.peers_needed.send_if_modified(|needed| {
            let was = std::mem::replace(needed, needs_pods);
            was != needs_pods
        });
        if is_waiting {
            // Rules about pods fail closed when the list does not arrive.
            shared.health.peers_changed.notify_one();
        }
        sender.send_if_modified(|current| {
            let is_modified = **current != snapshot;
            if is_modified {
                *current = Arc::new(snapshot);
            }
            is_modified
        });
    }
}

/// Waits until a pod of the cluster has changed that rules may name, or a Service, and at least [`PEERS_EVERY`] after
/// the last time.
async fn changed_peers(shared: &Shared, last: Instant) {
    tokio::time::sleep_until(last + PEERS_EVERY).await;
    shared.health.peers_changed.notified().await;
}

/// A list from the server's cache, as the kubelet itself requests it. A request for the latest version would
/// make each node's agent read the pods of all nodes from the store behind the server.
fn cached() -> watcher::Config {
    watcher::Config::default().any_semantic()
}

fn named(name: &str) -> watcher::Config {
    cached().fields(&format!("metadata.name={name}"))
}

fn follow_all(shared: &Shared, options: &Options, tasks: &mut JoinSet<()>) {
    let pods = WatchPlan {
        watched: Watched::Pods,
        api: Box::new(Api::<v1::Pod>::all),
        selector: cached().fields(&format!("spec.nodeName={}", options.node)),
        reduce: |read, _| ClusterPod::read(read),
        table: |state| &mut state.pods,
    };
    tasks.spawn(follow(shared.clone(), pods));
    let namespaces = WatchPlan {
        watched: Watched::Namespaces,
        api: Box::new(Api::<PartialObjectMeta<v1::Namespace>>::all),
        selector: cached(),
        reduce: |read, _| Namespace::read(read),
        table: |state| &mut state.namespaces,
    };
    tasks.spawn(follow(shared.clone(), namespaces));
    let node = WatchPlan {
        watched: Watched::Node,
        api: Box::new(Api::<v1::Node>::all),
        selector: match options.cluster.nodes {
            Nodes::All => cached(),
            Nodes::Own => named(&options.node),
        },
        reduce: |read, _| Some(NodeFacts::read(read)),
        table: |state| &mut state.node,
    };
    tasks.spawn(follow(shared.clone(), node));
    let ranges = WatchPlan {
        watched: Watched::ServiceRanges,
        api: Box::new(Api::<networking::ServiceCIDR>::all),
        selector: cached(),
        reduce: |read, _| Some(facts::of_service_range(read)),
        table: |state| &mut state.service_ranges,
    };
    tasks.spawn(follow(shared.clone(), ranges));
    follow_all_policies(shared, tasks);
    follow_all_services(shared, tasks);

    let (namespace, name) = &options.cluster.dns_service;
    let by_label = cached().labels(&format!("kubernetes.io/service-name={name}"));
    follow_service(
        shared,
        (namespace, name),
        (Watched::DnsService, |state| &mut state.dns_service),
        (Watched::DnsEndpoints, |state| &mut state.dns_endpoints),
        by_label,
        tasks,
    );
    // By its name: the API server itself owns the slice of that name, but anyone who may create slices can
    // set the label.
    follow_service(
        shared,
        API_SERVICE,
        (Watched::ApiService, |state| &mut state.api_service),
        (Watched::ApiEndpoints, |state| &mut state.api_endpoints),
        named(API_SERVICE.1),
        tasks,
    );
}

/// Follows the policy objects, their definitions, and the pods that rules name.
fn follow_all_policies(shared: &Shared, tasks: &mut JoinSet<()>) {
    let kind = PolicyKind::Policy(ObjectKind::EgressPolicy);
    let policies = WatchPlan {
        watched: Watched::EgressPolicies,
        api: objects(kind),
        selector: cached(),
        reduce: |read, former| Some(KeptPolicy::read(ObjectKind::EgressPolicy, &read, former)),
        table: |state| &mut state.policies.egress,
    };
    tasks.spawn(follow_policies(shared.clone(), policies, kind));
    let kind = PolicyKind::Policy(ObjectKind::ClusterEgressPolicy);
    let policies = WatchPlan {
        watched: Watched::ClusterEgressPolicies,
        api: objects(kind),
        selector: cached(),
        reduce: |read, former| {
            Some(KeptPolicy::read(
                ObjectKind::ClusterEgressPolicy,
                &read,
                former,
            ))
        },
        table: |state| &mut state.policies.cluster_egress,
    };
    tasks.spawn(follow_policies(shared.clone(), policies, kind));
    let kind = PolicyKind::Policy(ObjectKind::ClusterNetworkPolicy);
    let policies = WatchPlan {
        watched: Watched::ClusterNetworkPolicies,
        api: objects(kind),
        selector: cached(),
        reduce: |read, former| {
            Some(KeptPolicy::read(
                ObjectKind::ClusterNetworkPolicy,
                &read,
                former,
            ))
        },
        table: |state| &mut state.policies.network,
    };
    tasks.spawn(follow_policies(shared.clone(), policies, kind));
    let sets = WatchPlan {
        watched: Watched::EgressSets,
        api: objects(PolicyKind::Set),
        selector: cached(),
        reduce: |read, former| Some(KeptSet::read(&read, former)),
        table: |state| &mut state.policies.sets,
    };
    tasks.spawn(follow_policies(shared.clone(), sets, PolicyKind::Set));
    let definitions = WatchPlan {
        watched: Watched::Definitions,
        api: Box::new(Api::<PartialObjectMeta<CustomResourceDefinition>>::all),
        selector: cached(),
        reduce: |read, _| Definition::read(read),
        table: |state| &mut state.policies.definitions,
    };
    tasks.spawn(follow(shared.clone(), definitions));
    let peers = WatchPlan::<SlimPod, PeerFacts> {
        watched: Watched::PeerPods,
        api: Box::new(|client| Api::all_with(client, &ApiResource::erase::<v1::Pod>(&()))),
        selector: cached(),
        reduce: |read, _| PeerFacts::read(read),
        table: |state| &mut state.policies.peer_pods,
    };
    tasks.spawn(follow_peers(shared.clone(), peers));
}

/// Follows the Services of the cluster and their endpoints.
fn follow_all_services(shared: &Shared, tasks: &mut JoinSet<()>) {
    let services = WatchPlan {
        watched: Watched::Services,
        api: Box::new(Api::<v1::Service>::all),
        selector: cached(),
        reduce: |read, _| ServiceFacts::read(read),
        table: |state| &mut state.services.services,
    };
    tasks.spawn(follow(shared.clone(), services));
    let slices = WatchPlan {
        watched: Watched::ServiceEndpoints,
        api: Box::new(Api::<discovery::EndpointSlice>::all),
        selector: cached(),
        reduce: |read, _| EndpointFacts::of_slice(read),
        table: |state| &mut state.services.endpoints,
    };
    let older = WatchPlan {
        watched: Watched::ServiceEndpoints,
        api: Box::new(Api::<v1::Endpoints>::all),
        selector: cached(),
        reduce: |read, _| EndpointFacts::of_endpoints(read),
        table: |state| &mut state.services.endpoints,
    };
    tasks.spawn(follow_either(shared.clone(), slices, older));
}

/// The policy objects of a kind in all namespaces. They are read field by field, so that one object that is not of
/// the form that is known here does not hide the others.
fn objects(kind: PolicyKind) -> Box<dyn Fn(kube::Client) -> Api<DynamicObject> + Send + Sync> {
    let resource = policies::resource(kind);
    Box::new(move |client| Api::all_with(client, &resource))
}

type Addresses = fn(&mut State) -> &mut table::Table<facts::Served>;

/// Follows a Service and its endpoints: its slices, which `slices` selects, or the older object with the
/// Service's name.
fn follow_service(
    shared: &Shared,
    (namespace, name): (&str, &str),
    service: (Watched, Addresses),
    endpoints: (Watched, Addresses),
    slices: watcher::Config,
    tasks: &mut JoinSet<()>,
) {
    let (watched, table) = service;
    let plan = WatchPlan {
        watched,
        api: namespaced::<v1::Service>(namespace),
        selector: named(name),
        reduce: |read, _| Some(facts::of_service(read)),
        table,
    };
    tasks.spawn(follow(shared.clone(), plan));
    let (watched, table) = endpoints;
    let plan = WatchPlan {
        watched,
        api: namespaced::<discovery::EndpointSlice>(namespace),
        selector: slices,
        reduce: |read, _| Some(facts::of_slice(read)),
        table,
    };
    let older = WatchPlan {
        watched,
        api: namespaced::<v1::Endpoints>(namespace),
        selector: named(name),
        reduce: |read, _| Some(facts::of_endpoints(read)),
        table,
    };
    tasks.spawn(follow_either(shared.clone(), plan, older));
}

fn namespaced<K>(namespace: &str) -> Box<dyn Fn(kube::Client) -> Api<K> + Send + Sync>
where
    K: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>,
{
    let namespace = namespace.to_owned();
    Box::new(move |client| Api::namespaced(client, &namespace))
}
