//! The connection to the API server.
//!
//! kube's own client is not used, for three reasons:
//!
//! - It uses HTTP/1.1, in which each watch is a connection of its own. This one uses HTTP/2, in which all
//!   watches share one connection, and whose pings detect a dead peer within [`PING_EVERY`] and
//!   [`PING_TIMEOUT`].
//! - It repeats failed requests for minutes without reporting that the server is away.
//! - It is created once. This one is created again from its files when the server rejects it, so that rotated
//!   credentials and authorities take effect.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use http::{Request, Response};
use hyper_rustls::{FixedServerNameResolver, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use kube::{
    Client,
    client::{Body, ConfigExt as _},
    config::{Config, KubeConfigOptions, Kubeconfig},
};
use tower::{BoxError, ServiceBuilder, timeout::TimeoutLayer};

use super::health::{Health, Watched};

/// How long a response may take to begin, including a new connection.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval of HTTP/2 pings …
const PING_EVERY: Duration = Duration::from_secs(20);
/// … and how long the reply may take.
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// The source of the credentials.
#[derive(Clone, Debug)]
enum Source {
    /// The files that Kubernetes mounts into a pod.
    Pod,
    Kubeconfig(PathBuf),
}

/// Creates clients.
#[derive(Debug)]
pub(super) struct Connection {
    source: Source,
    timing: Timing,
    current: Mutex<Current>,
}

/// How long the server may be silent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    pub(super) ping_every: Duration,
    pub(super) ping_timeout: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            ping_every: PING_EVERY,
            ping_timeout: PING_TIMEOUT,
        }
    }
}

/// Distinguishes the clients of one set of credentials from later ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Generation(u64);

struct Current {
    generation: Generation,
    client: Client,
    server: String,
    first_request: Arc<FirstRequest>,
}

/// Lets one request at a time through until one succeeds. Concurrent first requests would each open a
/// connection, before it is known that they can share one.
#[derive(Debug, Default)]
struct FirstRequest {
    is_open: AtomicBool,
    first: tokio::sync::Mutex<()>,
}

impl FirstRequest {
    async fn send(&self, client: &Client, request: Request<Body>) -> kube::Result<Response<Body>> {
        if !self.is_open.load(Relaxed) {
            let _first = self.first.lock().await;
            if !self.is_open.load(Relaxed) {
                let answer = client.send(request).await;
                self.is_open.store(answer.is_ok(), Relaxed);
                return answer;
            }
        }
        client.send(request).await
    }
}

impl std::fmt::Debug for Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Current")
            .field("generation", &self.generation)
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Reads the credentials, and sends nothing to the server yet.
    pub(super) async fn new(kubeconfig: Option<&Path>, timing: Timing) -> anyhow::Result<Self> {
        let source = kubeconfig.map_or(Source::Pod, |path| Source::Kubeconfig(path.to_owned()));
        let (client, server) = source.client(timing).await?;
        Ok(Self {
            source,
            timing,
            current: Mutex::new(Current {
                generation: Generation(0),
                client,
                server,
                first_request: Arc::default(),
            }),
        })
    }

    /// A connection of this client.
    #[cfg(test)]
    pub(super) fn with(client: Client) -> Self {
        Self {
            source: Source::Pod,
            timing: Timing::default(),
            current: Mutex::new(Current {
                generation: Generation(0),
                client,
                server: String::new(),
                first_request: Arc::default(),
            }),
        }
    }

    /// A client for requests that are not watches.
    pub(super) fn client(&self) -> (Generation, Client) {
        let current = self.current();
        (current.generation, current.client.clone())
    }

    /// The URL of the API server, for messages.
    pub(super) fn server(&self) -> String {
        self.current().server.clone()
    }

    /// Marks the connection as possibly lost.
    pub(super) fn suspect_lost(&self) {
        self.current().first_request.is_open.store(false, Relaxed);
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client for one watch, which records when the server answers and when the watch is established.
    pub(super) fn watching(&self, health: &Arc<Health>, watched: Watched) -> (Generation, Client) {
        let (generation, client, first_request) = {
            let current = self.current();
            let first_request = Arc::clone(&current.first_request);
            (current.generation, current.client.clone(), first_request)
        };
        let namespace = client.default_namespace().to_owned();
        let health = Arc::clone(health);
        let noting = tower::service_fn(move |request: Request<Body>| {
            let (client, health, first_request) = (
                client.clone(),
                Arc::clone(&health),
                Arc::clone(&first_request),
            );
            async move {
                let query = request.uri().query().unwrap_or_default();
                let is_watch = query.split('&').any(|pair| pair == "watch=true");
                let response = first_request.send(&client, request).await?;
                if !response.status().is_server_error() {
                    health.record_answer();
                }
                if is_watch && response.status().is_success() {
                    health.record_watch(watched);
                }
                Ok::<Response<Body>, kube::Error>(response)
            }
        });
        (generation, Client::new(noting, namespace))
    }

    /// Creates new clients from the current files, unless a later generation than `failed` exists already.
    pub(super) async fn renew(&self, failed: Generation) {
        if self.client().0 != failed {
            return;
        }
        match self.source.client(self.timing).await {
            Ok((client, server)) => {
                *self.current() = Current {
                    generation: Generation(failed.0 + 1),
                    client,
                    server,
                    first_request: Arc::default(),
                };
            }
            Err(error) => {
                tracing::warn!(
                    "cannot read the credentials for the API server again; the old ones stay in use: {error:#}"
                );
            }
        }
    }
}

impl Source {
    async fn client(&self, timing: Timing) -> anyhow::Result<(Client, String)> {
        let config = self.config().await?;
        let server = config.cluster_url.to_string();
        let client = client(config, timing).with_context(|| match self {
            Self::Pod => "the pod's credentials for the API server cannot be used".to_owned(),
            Self::Kubeconfig(path) => format!("{} cannot be used", path.display()),
        })?;
        Ok((client, server))
    }

    async fn config(&self) -> anyhow::Result<Config> {
        match self {
            Self::Pod => Config::incluster().context(
                "there are no credentials for a Kubernetes API server: run the agent in a cluster \
                 with a service account, or name a kubeconfig with --kubeconfig",
            ),
            Self::Kubeconfig(path) => {
                let unreadable = || format!("cannot read the kubeconfig {}", path.display());
                let kubeconfig = Kubeconfig::read_from(path).with_context(unreadable)?;
                Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                    .await
                    .with_context(unreadable)
            }
        }
    }
}

fn client(config: Config, timing: Timing) -> anyhow::Result<Client> {
    if let Some(proxy) = &config.proxy_url {
        bail!(
            "it names the proxy {proxy}: the agent connects to the API server directly; remove the proxy"
        );
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(config.connect_timeout);
    let tls = HttpsConnectorBuilder::new()
        .with_tls_config(config.rustls_client_config()?)
        .https_or_http();
    let tls = match &config.tls_server_name {
        Some(name) => {
            let name = name.clone().try_into().context("tls-server-name")?;
            tls.with_server_name_resolver(FixedServerNameResolver::new(name))
        }
        None => tls,
    };
    let connector = tls.enable_all_versions().wrap_connector(tcp);
    let http = legacy::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .http2_keep_alive_interval(timing.ping_every)
        .http2_keep_alive_timeout(timing.ping_timeout)
        .http2_keep_alive_while_idle(true)
        .build::<_, Body>(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .layer(TimeoutLayer::new(ANSWER_TIMEOUT))
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}

/// The innermost cause of an error.
pub(super) fn root(error: &kube::Error) -> String {
    let mut last: &dyn std::error::Error = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
