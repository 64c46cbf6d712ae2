//! How the watches do: counted for metrics, and what is wrong for people.

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

/// Consecutive failures after which a watch is no longer taken to have been merely interrupted.
const INTERRUPTED: u32 = 2;

/// What is watched.
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
}

impl Watched {
    /// Everything that is watched.
    pub const ALL: [Self; 8] = [
        Self::Pods,
        Self::Namespaces,
        Self::Node,
        Self::DnsService,
        Self::DnsEndpoints,
        Self::ApiService,
        Self::ApiEndpoints,
        Self::ServiceRanges,
    ];

    /// A name for it, as in metrics.
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
        })
    }
}

/// Why a watch does not go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The server does not answer, or not as it should; the message says how.
    Unreachable(String),
    /// The server does not accept the credentials.
    Credentials(String),
    /// The server refuses; the message is its own, and names the right that is missing.
    Refused(String),
    /// The server does not have this kind of object.
    NotServed,
    /// What is known is too old to go on from; the list that follows heals it.
    Gone,
}

/// What a watch has been through.
#[derive(Debug, Default)]
pub struct WatchCounters {
    lists: AtomicU64,
    errors: AtomicU64,
    /// Milliseconds after the start, plus one; zero is never.
    last_event: AtomicU64,
    failing: Mutex<Failing>,
}

#[derive(Debug, Default)]
struct Failing {
    consecutive: u32,
    ever: bool,
    failure: Option<Failure>,
}

/// How all watches do.
#[derive(Debug)]
pub struct Health {
    started: Instant,
    watches: [WatchCounters; Watched::ALL.len()],
    unreachable: AtomicBool,
    /// Told when a problem has come or gone, and when an object has changed.
    pub(super) changed: Notify,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            watches: Default::default(),
            unreachable: AtomicBool::new(false),
            changed: Notify::new(),
        }
    }
}

impl Health {
    /// How often a watch had to begin again with a list, as after `410 Gone`; its first list does
    /// not count.
    pub fn restarts(&self, watched: Watched) -> u64 {
        self.of(watched).lists.load(Relaxed).saturating_sub(1)
    }

    /// How often a list or watch failed.
    pub fn errors(&self, watched: Watched) -> u64 {
        self.of(watched).errors.load(Relaxed)
    }

    /// How long ago the server last told something of it.
    pub fn last_event(&self, watched: Watched) -> Option<Duration> {
        let at = self.of(watched).last_event.load(Relaxed).checked_sub(1)?;
        Some(
            self.started
                .elapsed()
                .saturating_sub(Duration::from_millis(at)),
        )
    }

    /// Whether the watch goes on as far as is known.
    pub fn is_failing(&self, watched: Watched) -> bool {
        self.failing(watched).failure.is_some()
    }

    /// Whether the API server answers as far as is known.
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

    /// Whether a list or watch has ever failed: what it would have told need not be waited for.
    pub(super) fn has_failed(&self, watched: Watched) -> bool {
        self.failing(watched).ever
    }

    pub(super) fn listing(&self, watched: Watched) {
        self.of(watched).lists.fetch_add(1, Relaxed);
    }

    pub(super) fn told(&self, watched: Watched) {
        let at = self.started.elapsed().as_millis() as u64 + 1;
        self.of(watched).last_event.store(at, Relaxed);
    }

    /// The server has answered something.
    pub(super) fn answered(&self) {
        if self.unreachable.swap(false, Relaxed) {
            tracing::info!("the API server can be reached again");
            self.changed.notify_one();
        }
    }

    /// The watch has begun, or goes on.
    pub(super) fn established(&self, watched: Watched) {
        let mut failing = self.failing(watched);
        failing.consecutive = 0;
        if let Some(failure) = failing.failure.take() {
            if !matches!(failure, Failure::Unreachable(_)) {
                tracing::info!("{watched} can be watched again");
            }
            drop(failing);
            self.changed.notify_one();
        }
    }

    /// A list or watch has failed; says how often in a row.
    pub(super) fn failed(&self, watched: Watched, failure: Failure) -> u32 {
        if failure == Failure::Gone {
            tracing::debug!("{watched} are listed again: what was known is too old to go on from");
            return 0;
        }
        self.of(watched).errors.fetch_add(1, Relaxed);
        let mut failing = self.failing(watched);
        let first = !failing.ever;
        failing.ever = true;
        failing.consecutive += 1;
        let consecutive = failing.consecutive;
        let unreachable = matches!(failure, Failure::Unreachable(_));
        if unreachable && consecutive < INTERRUPTED {
            tracing::debug!("the watch of {watched} is interrupted: {failure:?}");
        } else if failing.failure.as_ref() != Some(&failure) {
            if let Failure::Unreachable(message) = &failure {
                if !self.unreachable.swap(true, Relaxed) {
                    tracing::warn!(
                        "the API server cannot be reached; the last known state stays in force: \
                         {message}"
                    );
                }
            } else if let Some(message) = said(watched, &failure) {
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

    /// What is wrong, each thing once.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let mut messages = Vec::new();
        for watched in Watched::ALL {
            let failing = self.failing(watched);
            let Some(failure) = &failing.failure else {
                continue;
            };
            messages.extend(said(watched, failure));
        }
        messages.dedup();
        let problem = |message| Problem {
            origin: "cluster".into(),
            message,
        };
        messages.into_iter().map(problem).collect()
    }
}

/// What is to be said of a failure, if anything.
fn said(watched: Watched, failure: &Failure) -> Option<String> {
    Some(match failure {
        Failure::Unreachable(message) => format!(
            "the API server cannot be reached; the last known state stays in force: {message}"
        ),
        Failure::Credentials(message) => format!(
            "the API server does not accept the agent's credentials; the last known state stays \
             in force: {message}"
        ),
        // Old servers have none, and old roles do not allow them: the configuration names them.
        Failure::Refused(_) | Failure::NotServed if watched == Watched::ServiceRanges => {
            return None;
        }
        Failure::Refused(message) => format!(
            "{watched} cannot be watched; what was known stays in force: {message}: allow it in \
             the agent's roles"
        ),
        Failure::NotServed => format!("{watched} cannot be watched: the API server has none"),
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
    fn an_interruption_is_counted_and_not_called_a_problem() {
        let health = Health::default();
        health.failed(Watched::Pods, unreachable());
        assert!(health.problems().is_empty());
        assert!(health.is_reachable());
        assert_eq!(health.errors(Watched::Pods), 1);
    }

    #[test]
    fn a_server_that_is_away_is_one_problem_until_it_is_back() {
        let health = Health::default();
        for watched in [Watched::Pods, Watched::Pods, Watched::Node, Watched::Node] {
            health.failed(watched, unreachable());
        }
        assert!(!health.is_reachable());
        assert_eq!(health.problems().len(), 1);
        health.answered();
        for watched in Watched::ALL {
            health.established(watched);
        }
        assert!(health.is_reachable());
        assert!(health.problems().is_empty());
    }

    #[test]
    fn a_missing_right_is_a_problem_at_once() {
        let health = Health::default();
        health.failed(Watched::Namespaces, refused());
        let problems = health.problems();
        assert_eq!(problems.len(), 1);
        assert!(problems[0].message.contains("pods is forbidden"));
        health.established(Watched::Namespaces);
        assert!(health.problems().is_empty());
    }

    #[test]
    fn ranges_of_services_are_not_missed() {
        let health = Health::default();
        health.failed(Watched::ServiceRanges, refused());
        health.failed(Watched::ServiceRanges, Failure::NotServed);
        assert!(health.problems().is_empty());
        assert!(health.has_failed(Watched::ServiceRanges));
    }

    #[test]
    fn a_list_that_begins_again_is_a_restart() {
        let health = Health::default();
        health.listing(Watched::Pods);
        assert_eq!(health.restarts(Watched::Pods), 0);
        health.listing(Watched::Pods);
        assert_eq!(health.restarts(Watched::Pods), 1);
        assert_eq!(health.last_event(Watched::Pods), None);
        health.told(Watched::Pods);
        assert!(health.last_event(Watched::Pods).is_some());
    }
}
