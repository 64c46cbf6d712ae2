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
use tokio::time::{sleep, timeout};

use super::{
    connection::{Connection, root},
    health::{Failure, Health, Watched},
    state::State,
    table::Table,
};

/// How long a list may take from one object to the next.
const LIST_TIMEOUT: Duration = Duration::from_secs(30);
/// How many consecutive failures a watch may have before it starts again with a list and new credentials.
const ATTEMPTS: u32 = 3;
/// How long to wait before requesting a kind of object again that the server does not have.
const NOT_SERVED_PAUSE: Duration = Duration::from_secs(600);

/// The state that all watches share.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) connection: Arc<Connection>,
    pub(super) health: Arc<Health>,
    pub(super) state: Arc<Mutex<State>>,
}

/// One watch: the request, the reduction of each object, and the table for the result.
pub(super) struct Plan<K, R> {
    pub(super) watched: Watched,
    pub(super) api: Box<dyn Fn(Client) -> Api<K> + Send + Sync>,
    pub(super) selector: watcher::Config,
    pub(super) reduce: fn(K) -> Option<R>,
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
pub(super) async fn follow<K, R>(shared: Shared, plan: Plan<K, R>)
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

/// Follows `plan`, or `older` while the server does not have the kind of the first.
pub(super) async fn follow_either<K, L, R>(shared: Shared, plan: Plan<K, R>, older: Plan<L, R>)
where
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
    plan: &Plan<K, R>,
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
                    match &event {
                        Event::Init => {
                            listing = true;
                            health.record_list(plan.watched);
                        }
                        Event::InitDone => {
                            listing = false;
                            health.record_event(plan.watched);
                        }
                        _ => health.record_event(plan.watched),
                    }
                    let changed = {
                        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                        (plan.table)(&mut state).apply(event, plan.reduce)
                    };
                    if changed {
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
