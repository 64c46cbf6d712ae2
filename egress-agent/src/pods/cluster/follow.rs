//! Follows one kind of object, without end.

use std::{
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::StreamExt as _;
use kube::{
    Api, Client, Resource,
    runtime::watcher::{self, DefaultBackoff, Event, watcher},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    super::policies::PolicyKind,
    connection::{Connection, root},
    definitions::{Definition, Signals, why_not_served},
    health::{Failure, Health, Watched},
    peers::PeerFacts,
    state::State,
    table::Table,
};

/// How long a list may take from one object to the next.
const LIST_TIMEOUT: Duration = Duration::from_secs(30);
/// How many consecutive failures a watch may have before it starts again with a list and new credentials.
const ATTEMPTS: u32 = 3;
/// How long to wait before requesting a kind of object again that the server does not have.
const NOT_SERVED_PAUSE: Duration = Duration::from_secs(600);
/// The longest pause before a kind of policy object is requested again that may be defined …
const UNDEFINED_PAUSE: Duration = Duration::from_secs(20);
/// … and the first one: a kind is served a moment after its definition has changed.
const DEFINED_PAUSE: Duration = Duration::from_millis(200);
/// How long to wait before the pods of the cluster are requested again.
const PEERS_PAUSE: Duration = Duration::from_secs(20);

/// The state that all watches share.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) connection: Arc<Connection>,
    pub(super) health: Arc<Health>,
    pub(super) state: Arc<Mutex<State>>,
    /// The signals about the definitions of policy kinds.
    pub(super) definitions: watch::Sender<Signals>,
    /// Whether rules need the pods of the cluster.
    pub(super) peers_needed: watch::Sender<bool>,
}

impl Shared {
    /// Why the server has answered that it does not have a kind of policy objects.
    async fn why_not_served(&self, kind: PolicyKind) -> Failure {
        let is_defined = {
            let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            Definition::is_there(&state.policies.definitions, kind)
        };
        if !is_defined {
            return Failure::NotServed;
        }
        let (_, client) = self.connection.client();
        let asked = timeout(LIST_TIMEOUT, why_not_served(client, kind));
        asked.await.unwrap_or(Failure::NotServedYet)
    }
}

/// One watch: the request, the reduction of each object, and the table for the result.
pub(super) struct WatchPlan<K, R> {
    pub(super) watched: Watched,
    pub(super) api: Box<dyn Fn(Client) -> Api<K> + Send + Sync>,
    pub(super) selector: watcher::Config,
    pub(super) reduce: fn(K, Option<&R>) -> Option<R>,
    pub(super) table: fn(&mut State) -> &mut Table<R>,
}

/// When to stop following.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    /// The server does not have this kind of object.
    NotServed,
    /// Any failure: later requests may reach another server.
    AnyFailure,
}

/// Follows a plan. A kind that the server does not have is requested again from time to time.
pub(super) async fn follow<K, R>(shared: Shared, plan: WatchPlan<K, R>)
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    R: PartialEq,
{
    let mut backoff = DefaultBackoff::default();
    loop {
        follow_until(&shared, &plan, Until::NotServed, &mut backoff).await;
        shared
            .health
            .record_failure(plan.watched, Failure::NotServed);
        sleep(NOT_SERVED_PAUSE).await;
    }
}

/// Follows a kind of policy object, whose definition may come and go.
pub(super) async fn follow_policies<K, R>(shared: Shared, plan: WatchPlan<K, R>, kind: PolicyKind)
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    R: PartialEq,
{
    let index = PolicyKind::ALL.iter().position(|one| *one == kind);
    let index = index.unwrap_or_default();
    let mut signals = shared.definitions.subscribe();
    let mut backoff = DefaultBackoff::default();
    let mut pause = DEFINED_PAUSE;
    loop {
        let lists = signals.borrow_and_update().lists[index];
        let must_be_listed = |signals: &Signals| signals.lists[index] != lists;
        let mut watching = signals.clone();
        tokio::select! {
            () = follow_until(&shared, &plan, Until::NotServed, &mut backoff) => {}
            _ = watching.wait_for(must_be_listed) => continue,
        }
        let failure = shared.why_not_served(kind).await;
        let is_settled = failure == Failure::OtherVersion;
        shared.health.record_failure(plan.watched, failure);
        let is_undefined = signals.borrow().is_undefined[index]
            && !shared.health.is_not_offered(Watched::Definitions);
        let wait = if is_undefined || is_settled {
            NOT_SERVED_PAUSE
        } else {
            pause
        };
        pause = UNDEFINED_PAUSE.min(pause * 2);
        tokio::select! {
            _ = signals.changed() => {
                pause = DEFINED_PAUSE;
                sleep(pause).await;
            }
            () = sleep(wait) => {}
        }
    }
}

/// Follows the pods of the cluster while rules need them.
pub(super) async fn follow_peers<K>(shared: Shared, plan: WatchPlan<K, PeerFacts>)
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let mut needed = shared.peers_needed.subscribe();
    let mut backoff = DefaultBackoff::default();
    loop {
        if needed.wait_for(|needed| *needed).await.is_err() {
            return;
        }
        let is_served = tokio::select! {
            () = follow_until(&shared, &plan, Until::NotServed, &mut backoff) => false,
            _ = needed.wait_for(|needed| !*needed) => true,
        };
        if !is_served {
            let failure = Failure::NotServed;
            shared.health.record_failure(plan.watched, failure);
            sleep(PEERS_PAUSE).await;
            continue;
        }
        let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.policies.peer_pods.clear();
    }
}

/// Follows `plan`, or `older` while the server does not have the kind of the first.
pub(super) async fn follow_either<K, L, R>(
    shared: Shared,
    plan: WatchPlan<K, R>,
    older: WatchPlan<L, R>,
) where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    L: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    R: PartialEq,
{
    let mut backoff = DefaultBackoff::default();
    loop {
        follow_until(&shared, &plan, Until::NotServed, &mut backoff).await;
        follow_until(&shared, &older, Until::AnyFailure, &mut backoff).await;
    }
}

async fn follow_until<K, R>(
    shared: &Shared,
    plan: &WatchPlan<K, R>,
    until: Until,
    backoff: &mut DefaultBackoff,
) where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    R: PartialEq,
{
    let Shared {
        connection,
        health,
        state,
        definitions,
        ..
    } = shared;
    loop {
        let (generation, client) = connection.watching(health, plan.watched);
        let mut events = pin!(watcher((plan.api)(client), plan.selector.clone()));
        let mut listing = true;
        // One stream of events continues after failures where it was …
        loop {
            let next = if listing {
                timeout(LIST_TIMEOUT, events.next()).await
            } else {
                Ok(events.next().await)
            };
            let (failure, has_lost_event) = match next {
                Ok(None) => break,
                Ok(Some(Ok(event))) => {
                    let listed = matches!(event, Event::InitDone);
                    match &event {
                        Event::Init => {
                            listing = true;
                            if !plan.watched.is_policy() {
                                health.record_list(plan.watched);
                            }
                        }
                        Event::InitDone => {
                            listing = false;
                            if plan.watched.is_policy() {
                                // An attempt to list a kind that is not installed is no list.
                                health.record_list(plan.watched);
                            }
                            health.record_event(plan.watched);
                        }
                        _ => health.record_event(plan.watched),
                    }
                    let changed = {
                        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                        let changed = (plan.table)(&mut state).apply(event, plan.reduce);
                        if changed && plan.watched == Watched::Definitions {
                            let policies = &mut state.policies;
                            definitions.send_modify(|signals| policies.note_definitions(signals));
                        }
                        changed
                    };
                    if changed && plan.watched.is_busy() && !listed {
                        health.peers_changed.notify_one();
                    } else if changed {
                        health.changed.notify_one();
                    }
                    continue;
                }
                Ok(Some(Err(error))) => failure(&error, &connection.server()),
                Err(_) => {
                    let server = connection.server();
                    let message = format!("{server}: a list was not completed in time");
                    (Failure::Unreachable(message), true)
                }
            };
            // Old servers have no service ranges, and old roles do not allow them.
            let is_optional = plan.watched == Watched::ServiceRanges;
            let is_missing = match failure {
                Failure::NotServed => true,
                Failure::Refused(_) => is_optional,
                _ => false,
            };
            if is_missing && until == Until::NotServed {
                return;
            }
            if matches!(failure, Failure::Unreachable(_)) {
                connection.suspect_lost();
            }
            let is_refused = matches!(failure, Failure::Credentials(_));
            let attempts = health.record_failure(plan.watched, failure);
            sleep(backoff.next().unwrap_or(LIST_TIMEOUT)).await;
            if until == Until::AnyFailure {
                return;
            }
            // … until that does not help, or an event was lost.
            if is_refused || attempts >= ATTEMPTS {
                connection.renew(generation).await;
                break;
            }
            if has_lost_event {
                break;
            }
        }
    }
}

/// Classifies an error, and tells whether an event of the server was lost.
fn failure(error: &watcher::Error, server: &str) -> (Failure, bool) {
    use watcher::Error;
    let status = match error {
        Error::WatchError(status)
        | Error::InitialListFailed(kube::Error::Api(status))
        | Error::WatchStartFailed(kube::Error::Api(status))
        | Error::WatchFailed(kube::Error::Api(status)) => status,
        Error::InitialListFailed(error)
        | Error::WatchStartFailed(error)
        | Error::WatchFailed(error) => {
            let has_lost_event = matches!(error, kube::Error::SerdeError(_));
            let message = format!("{server}: {}", root(error));
            return (Failure::Unreachable(message), has_lost_event);
        }
        Error::NoResourceVersion => {
            let message = format!("{server}: an object without resourceVersion");
            return (Failure::Unreachable(message), true);
        }
    };
    let failure = match status.code {
        401 => Failure::Credentials(status.message.clone()),
        403 => Failure::Refused(status.message.clone()),
        404 => Failure::NotServed,
        410 => Failure::Gone,
        code => Failure::Unreachable(format!("{server}: {} ({code})", status.message)),
    };
    (failure, false)
}
