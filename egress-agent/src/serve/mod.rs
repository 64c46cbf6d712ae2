//! What the agent answers about itself: `/healthz`, `/readyz` and `/metrics` over HTTP, and
//! `egress-agent status` and `explain` over a Unix socket.
//!
//! All of it runs on a thread of its own. It reads what control has [`Published`], what the gate
//! counts, and the kernel's maps; it asks the gate for what a pod has learned, a bounded piece at a
//! time; and nothing waits for it.

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
pub use socket::DEFAULT_PATH;
pub use standby::stand_by;

use crate::{
    config::Serve,
    datapath::{CounterMap, View},
    gate::Gate,
    report::Reporter,
};

/// How long to wait before listening is tried again.
const RETRY_EVERY: Duration = Duration::from_secs(5);
/// How long to wait for the first attempt, which takes no time unless the machine has none.
const FIRST_ATTEMPT: Duration = Duration::from_secs(5);

/// Dropped when listening has been tried once.
type Tried = mpsc::Sender<()>;

/// Where answers come from.
pub struct Sources {
    /// The node's name.
    pub node: String,
    /// How programs are attached.
    pub hook: &'static str,
    /// Most addresses in one allow map.
    pub addresses_per_pod: u32,
    /// What control knows.
    pub published: Arc<Published>,
    /// What pods have learned.
    pub gate: Gate,
    /// What could not be told.
    pub reporter: Reporter,
    /// The kernel's counters.
    pub counters: CounterMap,
    /// What verdicts are made of.
    pub view: View,
}

/// The running thread.
pub struct Serving {
    stop: oneshot::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl Serving {
    /// Starts answering. What cannot be listened on is said, and tried again and again.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started.
    pub fn start(config: &Serve, sources: Sources) -> Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the runtime that answers questions about the agent")?;
        let (http, socket) = (config.http, config.socket.clone());
        let (tried, all_tried) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("serve".into())
            .spawn(move || {
                let sources = Arc::new(sources);
                runtime.block_on(run(http, socket, sources, tried, stopped));
            })
            .context("cannot start the thread that answers questions about the agent")?;
        // Whoever is told that the agent is ready may ask it. Each sender goes with its first attempt.
        let _ = all_tried.recv_timeout(FIRST_ATTEMPT);
        Ok(Self { stop, thread })
    }

    /// Ends the thread, and removes the socket.
    pub fn stop(self) {
        let _ = self.stop.send(());
        if self.thread.join().is_err() {
            tracing::error!("the thread that answers questions about the agent has panicked");
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
        // When the sender is gone the agent is ending too.
        _ = stopped => {}
        () = answer_http => {}
        () = socket::serve(&socket, Arc::clone(&sources), tried) => {}
    }
}

/// Listens, and tries again for as long as that fails. Says when it begins and when it ends to fail.
async fn listen<T>(
    at: &str,
    what: &str,
    tried: Tried,
    mut bind: impl AsyncFnMut() -> Result<T>,
) -> T {
    let mut said = None;
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
                if said.as_ref() != Some(&error) {
                    tracing::error!(
                        %at,
                        %error,
                        "cannot serve {what}; pods are enforced all the same, and it is tried again"
                    );
                    said = Some(error);
                }
            }
        }
        tokio::time::sleep(RETRY_EVERY).await;
    }
}
