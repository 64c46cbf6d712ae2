//! `egress-agent start-gate`: after a boot, no pod gets a network before the agent knows the node's pods.
//!
//! A container runtime uses the first file in its directory of network configurations. While the gate is closed,
//! this file names a plugin that does not exist. The runtime then cannot set up a pod's network; it reports the
//! error and tries again. Pods in the host's network, such as the agent's, need no plugin. The file of the
//! network plugin stays as it is.
//!
//! A rule of systemd-tmpfiles closes the gate at boot, before any runtime starts. This command opens it. It does
//! not close the gate while the node runs: the pinned programs enforce without an agent.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};

use super::{StartGateArgs, ask::ask};
use crate::serve::protocol::{Request, Response};

/// The file that closes the gate. It sorts before all others.
const CLOSED: &str = "00-egress-agent-is-not-ready.conflist";
/// The file's content. A pod's Events show the name of the plugin.
const CONTENT: &str = r#"{"cniVersion":"0.4.0","name":"egress-agent-is-not-ready","plugins":[{"type":"egress-agent-is-not-ready"}]}"#;
/// The rule that creates the file at boot.
const RULE: &str = "egress-agent-start-gate.conf";

/// How often to look for the file and to ask the agent.
const EVERY: Duration = Duration::from_secs(1);

pub(super) fn start_gate(args: &StartGateArgs) -> Result<ExitCode> {
    let gate = Gate::new(&args.cni_dir, &args.tmpfiles_dir);
    if args.remove {
        gate.remove()?;
        println!("the gate is open; it is not closed at boot any more");
        return Ok(ExitCode::SUCCESS);
    }
    gate.install()?;
    tracing::info!(rule = %gate.rule.display(), "the rule is installed: pods wait for the agent after each boot");
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(gate.keep(&args.socket))?;
    Ok(ExitCode::SUCCESS)
}

struct Gate {
    closed: PathBuf,
    rule: PathBuf,
}

impl Gate {
    fn new(cni: &Path, tmpfiles: &Path) -> Self {
        Self {
            closed: cni.join(CLOSED),
            rule: tmpfiles.join(RULE),
        }
    }

    /// The text of the rule. `f!` creates the file at boot only. Other rules are also applied when packages are
    /// installed.
    fn text(&self) -> String {
        format!(
            "# Written by egress-agent: no pod gets a network before the agent knows the pods of the node.\n\
             f! {} 0644 root root - {CONTENT}\n",
            self.closed.display()
        )
    }

    /// Writes the rule that closes the gate at each boot.
    fn install(&self) -> Result<()> {
        let text = self.text();
        if fs::read_to_string(&self.rule).is_ok_and(|there| there == text) {
            return Ok(());
        }
        let written = replace(&self.rule, &text);
        written.with_context(|| {
            format!(
                "cannot write {}: without it pods do not wait for the agent after a boot",
                self.rule.display()
            )
        })
    }

    /// Removes the rule and opens the gate.
    fn remove(&self) -> Result<()> {
        for path in [&self.rule, &self.closed] {
            gone(fs::remove_file(path))
                .with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// Opens the gate each time that it is closed and the agent knows its pods. Ends at a signal.
    async fn keep(&self, socket: &Path) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        let mut look = tokio::time::interval(EVERY);
        let mut last_problem = String::new();
        loop {
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                _ = look.tick() => {}
            }
            let outcome = self.open(socket);
            let problem = match &outcome {
                Ok(State::Open) => continue,
                Ok(State::Opened) => String::new(),
                Ok(State::Closed(why)) => why.clone(),
                Err(error) => format!("{error:#}"),
            };
            if problem.is_empty() {
                tracing::info!("opened the gate: the agent knows this node's pods");
            } else if problem != last_problem {
                tracing::warn!(why = %problem, "the gate is closed: no pod of this node gets a network");
            }
            last_problem = problem;
        }
    }

    /// Opens the gate if it is closed and the agent knows its pods.
    fn open(&self, socket: &Path) -> Result<State> {
        if !self.closed.exists() {
            return Ok(State::Open);
        }
        let status = Request::Status {
            pod: None,
            names: false,
        };
        match ask(socket, &status) {
            Ok(Response::Status(status)) if status.agent.pods_known => {}
            Ok(_) => return Ok(State::Closed("the agent does not know its pods yet".into())),
            Err(error) => return Ok(State::Closed(format!("{error:#}"))),
        }
        gone(fs::remove_file(&self.closed))
            .with_context(|| format!("cannot remove {}", self.closed.display()))?;
        Ok(State::Opened)
    }
}

/// The state of the gate.
enum State {
    /// It was open before.
    Open,
    /// This command has opened it.
    Opened,
    /// It stays closed, for this reason.
    Closed(String),
}

/// Replaces a file by rename, so that nobody reads a part of it.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)?;
    let new = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(directory)?.sync_all()
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
