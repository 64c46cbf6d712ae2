//! The health of the watches: counters for metrics, and problems for people.

use std::{
    fmt,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::super::Problem;

/// Consecutive failures from which on a watch counts as failed, not only as interrupted.
const INTERRUPTED: u32 = 2;
/// The same where the server does not serve a kind yet whose definition is there: some seconds, because every kind that
/// is installed begins like this.
const UNSERVED: u32 = 6;

/// The kinds of objects that are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watched {
    /// The pods of the node.
    Pods,
    /// All namespaces.
    Namespaces,
    /// The node itself.
    Node,
    /// The Service of the cluster's DNS.
    DnsService,
    /// Its endpoints.
    DnsEndpoints,
    /// The Service of the API server.
    ApiService,
    /// Its endpoints.
    ApiEndpoints,
    /// The ranges of Services.
    ServiceRanges,
    /// All `EgressPolicy` objects.
    EgressPolicies,
    /// All `ClusterEgressPolicy` objects.
    ClusterEgressPolicies,
    /// All `ClusterNetworkPolicy` objects.
    ClusterNetworkPolicies,
    /// All `EgressSet` objects.
    EgressSets,
    /// The definitions of these kinds.
    Definitions,
    /// The pods of the cluster, while a rule of a `ClusterNetworkPolicy` names pods.
    PeerPods,
    /// All Services.
    Services,
    /// The endpoints of all Services.
    ServiceEndpoints,
}

impl Watched {
    /// All kinds.
    pub const ALL: [Self; 16] = [
        Self::Pods,
        Self::Namespaces,
        Self::Node,
        Self::DnsService,
        Self::DnsEndpoints,
        Self::ApiService,
        Self::ApiEndpoints,
        Self::ServiceRanges,
        Self::EgressPolicies,
        Self::ClusterEgressPolicies,
        Self::ClusterNetworkPolicies,
        Self::EgressSets,
        Self::Definitions,
        Self::PeerPods,
        Self::Services,
        Self::ServiceEndpoints,
    ];

    /// Whether it is a kind of policy objects, which need not be installed.
    pub(super) fn is_policy(self) -> bool {
        matches!(
            self,
            Self::EgressPolicies
                | Self::ClusterEgressPolicies
                | Self::ClusterNetworkPolicies
                | Self::EgressSets
        )
    }

    /// Whether it is about Services.
    fn is_of_services(self) -> bool {
        matches!(self, Self::Services | Self::ServiceEndpoints)
    }

    /// Whether it changes so often that changes are gathered.
    pub(super) fn is_busy(self) -> bool {
        self == Self::PeerPods || self.is_of_services()
    }

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pods => "pods",
            Self::Namespaces => "namespaces",
            Self::Node => "node",
            Self::DnsService => "dns_service",
            Self::DnsEndpoints => "dns_endpoints",
            Self::ApiService => "api_service",
            Self::ApiEndpoints => "api_endpoints",
            Self::ServiceRanges => "service_ranges",
            Self::EgressPolicies => "egress_policies",
            Self::ClusterEgressPolicies => "cluster_egress_policies",
            Self::ClusterNetworkPolicies => "cluster_network_policies",
            Self::EgressSets => "egress_sets",
            Self::Definitions => "definitions",
            Self::PeerPods => "peer_pods",
            Self::Services => "services",
            Self::ServiceEndpoints => "service_endpoints",
        }
    }
}

impl fmt::Display for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pods => "the node's pods",
            Self::Namespaces => "the namespaces",
            Self::Node => "the node",
            Self::DnsService => "the Service of the cluster's DNS",
            Self::DnsEndpoints => "the endpoints of the cluster's DNS",
            Self::ApiService => "the Service default/kubernetes",
            Self::ApiEndpoints => "the endpoints of the Service default/kubernetes",
            Self::ServiceRanges => "the ranges of Services",
            Self::EgressPolicies => "the EgressPolicy objects",
            Self::ClusterEgressPolicies => "the ClusterEgressPolicy objects",
            Self::ClusterNetworkPolicies => "the ClusterNetworkPolicy objects",
            Self::EgressSets => "the EgressSet objects",
            Self::Definitions => "the definitions of policy objects",
            Self::PeerPods => "the cluster's pods",
            Self::Services => "the cluster's Services",
            Self::ServiceEndpoints => "the endpoints of the cluster's Services",
        })
    }
}

/// Why a watch has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The server does not answer correctly; the message describes the error.
    Unreachable(String),
    /// The server does not accept the credentials.
    Credentials(String),
    /// The server denies the request; the message is the server's and names the missing right.
    Refused(String),
    /// The server does not have this kind of object.
    NotServed,
    /// The server does not have this kind of object, though its definition says that it is to serve it.
    NotServedYet,
    /// The server has this kind of object, but not in the version that the agent reads.
    OtherVersion,
    /// The last known resource version is too old to continue from. The list that follows repairs it.
    Gone,
}

/// The counters and failures of one watch.
#[derive(Debug, Default)]
pub struct WatchCounters {
    lists: AtomicU64,
    errors: AtomicU64,
    /// Milliseconds after the start, plus one; zero means never.
    last_event: AtomicU64,
    failing: Mutex<Failing>,
}

#[derive(Debug, Default)]
struct Failing {
    consecutive: u32,
    /// How many of them in a row were [`Failure::NotServedYet`].
    not_served_yet: u32,
    ever: bool,
    failure: Option<Failure>,
}

/// The health of all watches.
#[derive(Debug)]
pub struct Health {
    started: Instant,
    watches: [WatchCounters; Watched::ALL.len()],
    unreachable: AtomicBool,
    /// Notified when a problem appears or disappears, and when an object has changed.
    pub(super) changed: Notify,
    /// Notified when a pod of the cluster has changed that rules may name, or a Service or its endpoints. That can be
    /// often.
    pub(super) peers_changed: Notify,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            watches: Default::default(),
            unreachable: AtomicBool::new(false),
            changed: Notify::new(),
            peers_changed: Notify::new(),
        }
    }
}

impl Health {
    /// How often a watch had to start again with a list, as after `410 Gone`; the first list does
    /// not count.
    pub fn restarts(&self, watched: Watched) -> u64 {
        self.of(watched).lists.load(Relaxed).saturating_sub(1)
    }

    /// How often a list or watch failed.
    pub fn errors(&self, watched: Watched) -> u64 {
        self.of(watched).errors.load(Relaxed)
    }

    /// How long ago the server last sent an event of this watch.
    pub fn last_event(&self, watched: Watched) -> Option<Duration> {
        let at = self.of(watched).last_event.load(Relaxed).checked_sub(1)?;
        Some(
            self.started
                .elapsed()
                .saturating_sub(Duration::from_millis(at)),
        )
    }

    /// Whether the API server answers, as far as the agent knows.
    pub fn is_reachable(&self) -> bool {
        !self.unreachable.load(Relaxed)
    }

    fn of(&self, watched: Watched) -> &WatchCounters {
        &self.watches[watched as usize]
    }

    fn failing(&self, watched: Watched) -> MutexGuard<'_, Failing> {
        let failing = &self.of(watched).failing;
        failing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a list or watch has ever failed, so that its first list need not be awaited.
    pub(super) fn has_failed(&self, watched: Watched) -> bool {
        self.failing(watched).ever
    }

    /// Whether the server does not have this kind of object, or refuses it.
    pub(super) fn is_not_offered(&self, watched: Watched) -> bool {
        self.is_not_served(watched) || self.is_refused(watched)
    }

    /// Whether the server does not have this kind of object.
    pub(super) fn is_not_served(&self, watched: Watched) -> bool {
        self.failing(watched).failure == Some(Failure::NotServed)
    }

    /// Whether the server refuses this kind of object.
    pub(super) fn is_refused(&self, watched: Watched) -> bool {
        matches!(self.failing(watched).failure, Some(Failure::Refused(_)))
    }

    /// Whether the server has this kind of object in other versions only.
    pub(super) fn is_in_other_version(&self, watched: Watched) -> bool {
        self.failing(watched).failure == Some(Failure::OtherVersion)
    }

    pub(super) fn record_list(&self, watched: Watched) {
        self.of(watched).lists.fetch_add(1, Relaxed);
    }

    pub(super) fn record_event(&self, watched: Watched) {
        let at = self.started.elapsed().as_millis() as u64 + 1;
        self.of(watched).last_event.store(at, Relaxed);
    }

    /// Records that the server has answered a request.
    pub(super) fn record_answer(&self) {
        if self.unreachable.swap(false, Relaxed) {
            tracing::info!("the API server can be reached again");
            self.changed.notify_one();
        }
    }

    /// Records that the watch has begun or continues.
    pub(super) fn record_watch(&self, watched: Watched) {
        let mut failing = self.failing(watched);
        failing.consecutive = 0;
        failing.not_served_yet = 0;
        if let Some(failure) = failing.failure.take() {
            if !matches!(failure, Failure::Unreachable(_)) {
                tracing::info!("{watched} can be watched again");
            }
            drop(failing);
            self.changed.notify_one();
        }
    }

    /// Records that a list or watch has failed; returns how many times in a row.
    pub(super) fn record_failure(&self, watched: Watched, failure: Failure) -> u32 {
        if failure == Failure::Gone {
            tracing::debug!(
                "{watched} are listed again: the last known resource version is too old"
            );
            return 0;
        }
        let is_absent = matches!(
            failure,
            Failure::NotServed | Failure::NotServedYet | Failure::OtherVersion
        );
        if !(watched.is_policy() && is_absent) {
            self.of(watched).errors.fetch_add(1, Relaxed);
        }
        let mut failing = self.failing(watched);
        let first = !failing.ever;
        failing.ever = true;
        failing.consecutive += 1;
        let consecutive = failing.consecutive;
        failing.not_served_yet = match failure {
            Failure::NotServedYet => failing.not_served_yet + 1,
            _ => 0,
        };
        let is_interruption = match failure {
            Failure::Unreachable(_) => consecutive < INTERRUPTED,
            Failure::NotServedYet => failing.not_served_yet < UNSERVED,
            _ => false,
        };
        if is_interruption {
            tracing::debug!("the watch of {watched} is interrupted: {failure:?}");
        } else if failing.failure.as_ref() != Some(&failure) {
            if let Failure::Unreachable(message) = &failure {
                if !self.unreachable.swap(true, Relaxed) {
                    tracing::warn!(
                        "the API server cannot be reached; the last known state stays in force: \
                         {message}"
                    );
                }
            } else if let Some(message) = problem_text(watched, &failure) {
                tracing::warn!("{message}");
            }
            failing.failure = Some(failure);
            drop(failing);
            self.changed.notify_one();
        } else if first {
            drop(failing);
            self.changed.notify_one();
        }
        consecutive
    }

    /// The current problems, each once.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let mut messages = Vec::new();
        for watched in Watched::ALL {
            let failing = self.failing(watched);
            let Some(failure) = &failing.failure else {
                continue;
            };
            messages.extend(problem_text(watched, failure));
        }
        messages.dedup();
        let problem = |message| Problem {
            origin: "cluster".into(),
            message,
        };
        messages.into_iter().map(problem).collect()
    }
}

/// The text of the problem for a failure, if it is one.
fn problem_text(watched: Watched, failure: &Failure) -> Option<String> {
    Some(match failure {
        Failure::Unreachable(message) => format!(
            "the API server cannot be reached; the last known state stays in force: {message}"
        ),
        Failure::Credentials(message) => format!(
            "the API server does not accept the agent's credentials; the last known state stays \
             in force: {message}"
        ),
        // Old servers do not have them, and old roles do not allow them; then the configuration names them.
        Failure::Refused(_) | Failure::NotServed if watched == Watched::ServiceRanges => {
            return None;
        }
        Failure::NotServedYet => format!(
            "{watched} cannot be listed: their definition is there, and the API server does not serve them yet"
        ),
        Failure::OtherVersion => format!(
            "{watched} are not read: the API server has them in other versions than the agent reads"
        ),
        // Where they are not installed, nobody misses them.
        Failure::NotServed if watched.is_policy() => return None,
        Failure::Refused(message) if watched.is_of_services() => format!(
            "{watched} cannot be watched: {message}: allow it in the agent's roles. Until then the address of a Service \
             is judged without what is behind it: a Service whose endpoints were not listed leads pods to outside hosts, \
             and to pods that rules deny"
        ),
        Failure::Refused(message) => format!(
            "{watched} cannot be watched; the last known state stays in force: {message}: allow it in \
             the agent's roles"
        ),
        Failure::NotServed => {
            format!("{watched} cannot be watched: the API server does not have this kind of object")
        }
        Failure::Gone => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unreachable() -> Failure {
        Failure::Unreachable("connection refused".into())
    }

    fn refused() -> Failure {
        Failure::Refused("pods is forbidden".into())
    }

    #[test]
    fn an_interruption_is_counted_but_is_not_a_problem() {
        let health = Health::default();
        health.record_failure(Watched::Pods, unreachable());
        assert!(health.problems().is_empty());
        assert!(health.is_reachable());
        assert_eq!(health.errors(Watched::Pods), 1);
    }

    #[test]
    fn an_unreachable_server_is_one_problem_until_it_is_back() {
        let health = Health::default();
        for watched in [Watched::Pods, Watched::Pods, Watched::Node, Watched::Node] {
            health.record_failure(watched, unreachable());
        }
        assert!(!health.is_reachable());
        assert_eq!(health.problems().len(), 1);
        health.record_answer();
        for watched in Watched::ALL {
            health.record_watch(watched);
        }
        assert!(health.is_reachable());
        assert!(health.problems().is_empty());
    }

    #[test]
    fn a_missing_right_is_a_problem_at_once() {
        let health = Health::default();
        health.record_failure(Watched::Namespaces, refused());
        let problems = health.problems();
        assert_eq!(problems.len(), 1);
        assert!(problems[0].message.contains("pods is forbidden"));
        health.record_watch(Watched::Namespaces);
        assert!(health.problems().is_empty());
    }

    #[test]
    fn missing_service_ranges_are_not_a_problem() {
        let health = Health::default();
        health.record_failure(Watched::ServiceRanges, refused());
        health.record_failure(Watched::ServiceRanges, Failure::NotServed);
        assert!(health.problems().is_empty());
        assert!(health.has_failed(Watched::ServiceRanges));
    }

    #[test]
    fn a_kind_of_policies_that_is_not_installed_is_neither_an_error_nor_a_problem() {
        let health = Health::default();
        let watched = Watched::ClusterNetworkPolicies;
        health.record_failure(watched, Failure::NotServed);
        assert!(health.problems().is_empty());
        assert_eq!(health.errors(watched), 0);
        assert!(health.is_not_offered(watched));
        health.record_failure(watched, refused());
        assert_eq!((health.problems().len(), health.errors(watched)), (1, 1));
    }

    #[test]
    fn a_kind_that_is_served_soon_is_a_problem_only_if_that_lasts() {
        let health = Health::default();
        let watched = Watched::EgressPolicies;
        health.record_failure(watched, Failure::NotServed);
        for _ in 1..UNSERVED {
            health.record_failure(watched, Failure::NotServedYet);
            assert!(health.problems().is_empty());
        }
        health.record_failure(watched, Failure::NotServedYet);
        assert_eq!((health.problems().len(), health.errors(watched)), (1, 0));
        health.record_watch(watched);
        health.record_failure(watched, Failure::NotServedYet);
        assert!(health.problems().is_empty());
    }

    #[test]
    fn a_second_list_is_a_restart() {
        let health = Health::default();
        health.record_list(Watched::Pods);
        assert_eq!(health.restarts(Watched::Pods), 0);
        health.record_list(Watched::Pods);
        assert_eq!(health.restarts(Watched::Pods), 1);
        assert_eq!(health.last_event(Watched::Pods), None);
        health.record_event(Watched::Pods);
        assert!(health.last_event(Watched::Pods).is_some());
    }
}
