//! The connection to the API server.
//!
//! kube's own way to make a client is not used, for three reasons. It speaks HTTP/1.1, in which each
//! watch is a connection of its own; this speaks HTTP/2, in which all share one, and whose pings
//! notice within [`PING_EVERY`] and [`PING_TIMEOUT`] that the other end is gone although nothing
//! says so. It repeats failed requests by itself for minutes, in which nobody learns that the
//! server is away. And it is made once: this one is made anew from its files when the server does
//! not accept it, so that rotated credentials and authorities count.

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

/// How long an answer may take to begin, a new connection included.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How often the other end is asked whether it is there …
const PING_EVERY: Duration = Duration::from_secs(20);
/// … and how long it may take to say so.
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the credentials are.
#[derive(Clone, Debug)]
enum Source {
    /// Where Kubernetes puts them for a pod.
    Pod,
    Kubeconfig(PathBuf),
}

/// Makes clients.
#[derive(Debug)]
pub(super) struct Connection {
    source: Source,
    timing: Timing,
    current: Mutex<Current>,
}

/// How long the other end may be silent.
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

/// Tells clients that were made together from later ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Generation(u64);

struct Current {
    generation: Generation,
    client: Client,
    server: String,
    gate: Arc<Gate>,
}

/// Lets one request at a time through until one is answered. Those that come together would each
/// open a connection, before it is known that the first can be shared.
#[derive(Debug, Default)]
struct Gate {
    is_open: AtomicBool,
    first: tokio::sync::Mutex<()>,
}

impl Gate {
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
    /// Reads the credentials; nothing is asked of the server yet.
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
                gate: Arc::default(),
            }),
        })
    }

    /// A client for what is not watched.
    pub(super) fn client(&self) -> (Generation, Client) {
        let current = self.current();
        (current.generation, current.client.clone())
    }

    /// The address of the API server, for messages.
    pub(super) fn server(&self) -> String {
        self.current().server.clone()
    }

    /// Says that the connection may be lost.
    pub(super) fn doubt(&self) {
        self.current().gate.is_open.store(false, Relaxed);
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client for one watch, which notes when the server answers and when the watch has begun.
    pub(super) fn watching(&self, health: &Arc<Health>, watched: Watched) -> (Generation, Client) {
        let (generation, client, gate) = {
            let current = self.current();
            let gate = Arc::clone(&current.gate);
            (current.generation, current.client.clone(), gate)
        };
        let namespace = client.default_namespace().to_owned();
        let health = Arc::clone(health);
        let noting = tower::service_fn(move |request: Request<Body>| {
            let (client, health, gate) = (client.clone(), Arc::clone(&health), Arc::clone(&gate));
            async move {
                let query = request.uri().query().unwrap_or_default();
                let is_watch = query.split('&').any(|pair| pair == "watch=true");
                let response = gate.send(&client, request).await?;
                if !response.status().is_server_error() {
                    health.answered();
                }
                if is_watch && response.status().is_success() {
                    health.established(watched);
                }
                Ok::<Response<Body>, kube::Error>(response)
            }
        });
        (generation, Client::new(noting, namespace))
    }

    /// Makes new clients from the files as they are now, unless that has been done since `failed`
    /// was made.
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
                    gate: Arc::default(),
                };
            }
            Err(error) => {
                tracing::warn!(
                    "the credentials for the API server cannot be read again: {error:#}"
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
        bail!("it names the proxy {proxy}: the agent speaks with the API server directly");
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

/// What an error comes down to.
pub(super) fn root(error: &kube::Error) -> String {
    let mut last: &dyn std::error::Error = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
