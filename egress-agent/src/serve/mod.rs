//! The agent's interfaces for operators: `/healthz`, `/readyz` and `/metrics` over HTTP, and
//! `egress-agent status` and `explain` over a Unix socket.
//!
//! They run on one thread of their own. It reads the state that control has [`Published`], the
//! gate's counters and the kernel's maps. It requests a pod's resolutions from the gate in bounded pieces.
//! Nothing waits for this thread.

mod connections;
mod explain;
mod health;
mod http;
mod metrics;
mod page;
mod process;
pub mod protocol;
mod published;
mod reach;
mod socket;
mod standby;
mod status;

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::sync::oneshot;

pub use published::{
    Attached, ClusterState, Existing, PodRecord, PodsById, Published, StatusSnapshot, WatchState,
    Written,
};
pub use standby::stand_by;

use crate::{
    config::Serve,
    datapath::{CounterMap, View},
    gate::Gate,
    report::Reporter,
};

/// How long to wait before the next attempt to listen.
const RETRY_EVERY: Duration = Duration::from_secs(5);
/// How long to wait for the first attempt to listen, which takes no time unless the machine is overloaded.
const FIRST_ATTEMPT: Duration = Duration::from_secs(5);

/// Dropped after the first attempt to listen.
type Tried = mpsc::Sender<()>;

/// The sources of all responses.
pub struct Sources {
    /// The node's name.
    pub node: String,
    /// How programs are attached.
    pub hook: &'static str,
    /// The maximum number of addresses in one allow map.
    pub addresses_per_pod: u32,
    /// The state that control publishes.
    pub published: Arc<Published>,
    /// The resolutions of pods.
    pub gate: Gate,
    /// The counters of unreported denials.
    pub reporter: Reporter,
    /// The kernel's counters.
    pub counters: CounterMap,
    /// The kernel's maps that verdicts depend on.
    pub view: View,
}

/// The running thread.
pub struct Serving {
    stop: oneshot::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl Serving {
    /// Starts serving. An address that cannot be listened on is reported and retried.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started.
    pub fn start(config: &Serve, sources: Sources) -> Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the runtime that serves status, explain and metrics")?;
        let (http, socket) = (config.http, config.socket.clone());
        let (tried, all_tried) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("serve".into())
            .spawn(move || {
                let sources = Arc::new(sources);
                runtime.block_on(run(http, socket, sources, tried, stopped));
            })
            .context("cannot start the thread that serves status, explain and metrics")?;
        // A client that learns that the agent is ready may send requests at once, so wait until listening has
        // been tried. Each sender is dropped after its first attempt.
        let _ = all_tried.recv_timeout(FIRST_ATTEMPT);
        Ok(Self { stop, thread })
    }

    /// Ends the thread, and removes the socket.
    pub fn stop(self) {
        let _ = self.stop.send(());
        if self.thread.join().is_err() {
            tracing::error!("the thread that serves status, explain and metrics has panicked");
        }
    }
}

async fn run(
    http: Option<SocketAddr>,
    socket: PathBuf,
    sources: Arc<Sources>,
    tried: Tried,
    stopped: oneshot::Receiver<()>,
) {
    let http_tried = tried.clone();
    let answer_http = async {
        match http {
            Some(address) => http::serve(address, Arc::clone(&sources), http_tried).await,
            None => {
                drop(http_tried);
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        // If the sender is dropped, the agent is ending too.
        _ = stopped => {}
        () = answer_http => {}
        () = socket::serve(&socket, Arc::clone(&sources), tried) => {}
    }
}

/// Listens, and retries until that succeeds. Logs each new failure and the success.
async fn listen<T>(
    at: &str,
    what: &str,
    tried: Tried,
    mut bind: impl AsyncFnMut() -> Result<T>,
) -> T {
    let mut last_error = None;
    let mut tried = Some(tried);
    loop {
        let bound = bind().await;
        drop(tried.take());
        match bound {
            Ok(listening) => {
                tracing::info!(%at, "serving {what}");
                return listening;
            }
            Err(error) => {
                let error = format!("{error:#}");
                if last_error.as_ref() != Some(&error) {
                    tracing::error!(
                        %at,
                        %error,
                        "cannot serve {what}; enforcement continues, and the agent tries again"
                    );
                    last_error = Some(error);
                }
            }
        }
        tokio::time::sleep(RETRY_EVERY).await;
    }
}
