//! Follows one kind of object, for ever.

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
/// How often in a row a watch may fail before it begins again with a list and new credentials.
const ATTEMPTS: u32 = 3;
/// Until a kind of object that the server does not have is looked for again.
const NOT_SERVED_PAUSE: Duration = Duration::from_secs(600);

/// What all watches share.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) connection: Arc<Connection>,
    pub(super) health: Arc<Health>,
    pub(super) state: Arc<Mutex<State>>,
}

/// One watch: what to ask for, what is needed of it, and where that goes.
pub(super) struct Plan<K, R> {
    pub(super) watched: Watched,
    pub(super) api: Box<dyn Fn(Client) -> Api<K> + Send + Sync>,
    pub(super) selector: watcher::Config,
    pub(super) reduce: fn(K) -> Option<R>,
    pub(super) table: fn(&mut State) -> &mut Table<R>,
}

/// What ends the following.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    /// The server does not have this kind of object.
    NotServed,
    /// Anything is amiss: it may be another server from now on.
    Disturbed,
}

/// Follows what a plan says. What the server does not have is looked for again from time to time.
pub(super) async fn follow<K, R>(shared: Shared, plan: Plan<K, R>)
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    R: PartialEq,
{
    let mut backoff = DefaultBackoff::default();
    loop {
        follow_until(&shared, &plan, Until::NotServed, &mut backoff).await;
        shared.health.failed(plan.watched, Failure::NotServed);
        sleep(NOT_SERVED_PAUSE).await;
    }
}

/// Follows what one plan says, or what the other says while the server does not have the first.
pub(super) async fn follow_either<K, L, R>(shared: Shared, plan: Plan<K, R>, older: Plan<L, R>)
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    L: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    R: PartialEq,
{
    let mut backoff = DefaultBackoff::default();
    loop {
        follow_until(&shared, &plan, Until::NotServed, &mut backoff).await;
        follow_until(&shared, &older, Until::Disturbed, &mut backoff).await;
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
        // One stream of events goes on through failures from where it was …
        loop {
            let next = if listing {
                timeout(LIST_TIMEOUT, events.next()).await
            } else {
                Ok(events.next().await)
            };
            let (failure, is_spoilt) = match next {
                Ok(None) => break,
                Ok(Some(Ok(event))) => {
                    match &event {
                        Event::Init => {
                            listing = true;
                            health.listing(plan.watched);
                        }
                        Event::InitDone => {
                            listing = false;
                            health.told(plan.watched);
                        }
                        _ => health.told(plan.watched),
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
                    let message = format!("{server}: a list was begun and not finished");
                    (Failure::Unreachable(message), true)
                }
            };
            // Not every server has ranges of Services, nor every role the right to see them.
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
                connection.doubt();
            }
            let is_refused = matches!(failure, Failure::Credentials(_));
            let attempts = health.failed(plan.watched, failure);
            sleep(backoff.next().unwrap_or(LIST_TIMEOUT)).await;
            if until == Until::Disturbed {
                return;
            }
            // … until that does not help, or something was lost.
            if is_refused || attempts >= ATTEMPTS {
                connection.renew(generation).await;
                break;
            }
            if is_spoilt {
                break;
            }
        }
    }
}

/// What an error means, and whether something that the server said was lost.
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
            let is_spoilt = matches!(error, kube::Error::SerdeError(_));
            let message = format!("{server}: {}", root(error));
            return (Failure::Unreachable(message), is_spoilt);
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
