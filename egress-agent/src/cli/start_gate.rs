//! `egress-agent start-gate`: no pod gets a network on a node that has just booted before its agent
//! watches over it.
//!
//! A container runtime takes the first file in its directory of network configurations. While the gate
//! is closed that is one which names a plugin that does not exist: the runtime makes no pod's network,
//! says why, and tries again. Pods in the host's network, the agent among them, need none. The file of
//! the network plugin is not touched.
//!
//! The gate is closed at boot, before any runtime starts, by a rule of systemd-tmpfiles, and opened
//! here. It is not closed while the node runs: what is pinned in the kernel holds then.

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

/// The file that closes the gate: before every other in the alphabet.
const CLOSED: &str = "00-egress-agent-is-not-ready.conflist";
/// What it says: the name of the plugin is what people read in a pod's Events.
const CONTENT: &str = r#"{"cniVersion":"0.4.0","name":"egress-agent-is-not-ready","plugins":[{"type":"egress-agent-is-not-ready"}]}"#;
/// The rule that makes it at boot.
const RULE: &str = "egress-agent-start-gate.conf";

/// How often the file is looked for, and the agent asked.
const EVERY: Duration = Duration::from_secs(1);

pub(super) fn start_gate(args: &StartGateArgs) -> Result<ExitCode> {
    let gate = Gate::new(&args.cni_dir, &args.tmpfiles_dir);
    if args.remove {
        gate.remove()?;
        println!("the gate is open, and nothing closes it at boot");
        return Ok(ExitCode::SUCCESS);
    }
    gate.install()?;
    tracing::info!(rule = %gate.rule.display(), "pods wait for the agent after each boot");
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

    /// What the rule says. `f!` makes a file, and only at boot: the rules are applied at other times,
    /// too, when packages are installed.
    fn text(&self) -> String {
        format!(
            "# Made by egress-agent: no pod gets a network before the agent watches over it.\n\
             f! {} 0644 root root - {CONTENT}\n",
            self.closed.display()
        )
    }

    /// Has the gate closed at each boot.
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

    /// Opens the gate for good.
    fn remove(&self) -> Result<()> {
        for path in [&self.rule, &self.closed] {
            gone(fs::remove_file(path))
                .with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// Opens the gate whenever it is closed and the agent watches over the node, until told to stop.
    async fn keep(&self, socket: &Path) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        let mut look = tokio::time::interval(EVERY);
        let mut said = String::new();
        loop {
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                _ = look.tick() => {}
            }
            let outcome = self.open(socket);
            let says = match &outcome {
                Ok(Look::Open) => continue,
                Ok(Look::Opened) => String::new(),
                Ok(Look::Closed(why)) => why.clone(),
                Err(error) => format!("{error:#}"),
            };
            if says.is_empty() {
                tracing::info!("the gate is open: the agent watches over this node's pods");
            } else if says != said {
                tracing::warn!(why = %says, "the gate is closed: no pod of this node gets a network");
            }
            said = says;
        }
    }

    /// Opens the gate if it is closed and the agent watches over the node.
    fn open(&self, socket: &Path) -> Result<Look> {
        if !self.closed.exists() {
            return Ok(Look::Open);
        }
        let status = Request::Status {
            pod: None,
            names: false,
        };
        match ask(socket, &status) {
            Ok(Response::Status(status)) if status.agent.pods_known => {}
            Ok(_) => return Ok(Look::Closed("the agent does not know its pods yet".into())),
            Err(error) => return Ok(Look::Closed(format!("{error:#}"))),
        }
        gone(fs::remove_file(&self.closed))
            .with_context(|| format!("cannot remove {}", self.closed.display()))?;
        Ok(Look::Opened)
    }
}

/// What became of a look at the gate.
enum Look {
    /// It was open.
    Open,
    /// It was opened.
    Opened,
    /// It stays closed; the text says why.
    Closed(String),
}

/// Puts a file in the place of another, as a whole.
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
