//! The command line.

mod ask;
mod check;
mod cleanup;
mod explain;
mod ready;
mod run;
mod start_gate;
mod status;

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand, ValueEnum};

use tracing_subscriber::fmt::MakeWriter;

use crate::{
    config::DEFAULT_SOCKET,
    report::log::{self, Log},
};

/// Enforces, per pod, which DNS names, addresses and ports it may reach.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Enforce the policies of this machine's pods until told to stop.
    ///
    /// Denials are written to standard output, one JSON object a line; everything else to standard
    /// error; the environment variable `RUST_LOG` chooses how much, for example `RUST_LOG=debug`.
    Run(RunArgs),
    /// Say what each pod of the manifests may reach, or what is wrong and where.
    ///
    /// Lists of pods and of their namespaces are put together when both are among the files. Exits
    /// with 1 when anything is wrong. Nothing is loaded, and no privileges are needed.
    Check(CheckArgs),
    /// Tell the state of the running agent and of its pods, or of one pod and what it has resolved.
    Status(StatusArgs),
    /// Say whether a pod may reach something, and by which entry of which annotation, or why not.
    ///
    /// The running agent is asked; nothing is sent. Exits with 0 when it passes (in audit mode too,
    /// where the answer says what would become of it), with 1 when it does not, with 2 when that
    /// cannot be said: there is no such pod, it is not enforced yet, or no agent answers.
    Explain(ExplainArgs),
    /// Say whether the agent is ready: it knows this machine's pods, and enforces each that it should.
    ///
    /// An agent that stands by (run --take-over) is ready when it can take over. Exits with 0 if the agent is
    /// ready. Otherwise prints what is missing, and exits with 1.
    Ready(ReadyArgs),
    /// Remove what an agent left behind: programs, maps, pins. Nothing is enforced any more then.
    ///
    /// For after an agent was killed, or stopped with --keep-enforcing. Refuses while an agent runs.
    Cleanup(CleanupArgs),
    /// Keep pods of a node that has just booted waiting until its agent watches over them.
    ///
    /// Writes a rule for systemd-tmpfiles that closes a gate at each boot: a network configuration that
    /// sorts before the network plugin's and names a plugin that does not exist. Opens the gate when the
    /// agent on this node knows its pods, and stays until told to stop. docs/installation.md says more.
    StartGate(StartGateArgs),
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// Directory of manifests: YAML or JSON files with v1 Pods and Namespaces. Each Pod names its
    /// host-side interface in the annotation egress-agent.dev/interface and its addresses in
    /// status.podIPs. Files that are added, changed or removed take effect while the agent runs.
    /// Without it, the pods are those of this node of the cluster.
    #[arg(long, value_name = "DIR")]
    pods_dir: Option<PathBuf>,
    /// How to reach the cluster's API server, and as whom. Without it, as a pod in the cluster does.
    #[arg(long, value_name = "FILE", conflicts_with = "pods_dir")]
    kubeconfig: Option<PathBuf>,
    /// Configuration file, in YAML; with --pods-dir it names at least the pods' resolvers:
    /// `dns: {resolvers: [10.96.0.10]}`. docs/configuration.md has every key. On SIGHUP it is read
    /// again.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// When told to stop, leave everything enforced: what is allowed stays allowed, what is denied
    /// stays denied, DNS questions go unanswered until an agent runs again.
    #[arg(long)]
    keep_enforcing: bool,
    /// When another agent runs, stand by until it ends, and then go on where it stopped: programs are
    /// loaded and pods are known by then, so that DNS is away for a moment only.
    #[arg(long)]
    take_over: bool,
    /// How programs are attached to interfaces.
    #[arg(long, value_enum, default_value_t = AttachArg::Auto)]
    attach: AttachArg,
    /// Trace each packet that the programs judge, on standard error. Slow.
    #[arg(long)]
    datapath_log: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum AttachArg {
    /// tcx from kernel 6.6 on, clsact below.
    Auto,
    /// tcx links (kernel 6.6).
    Tcx,
    /// filters on a clsact qdisc.
    Clsact,
}

#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// Manifests to read; of a directory, the files in it that `run --pods-dir` would read.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Configuration file; without it, every setting has its default.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct StatusArgs {
    /// A pod; without it, all of the node's.
    #[arg(value_name = "NAMESPACE/POD")]
    pod: Option<String>,
    /// Write JSON, as docs/status.md describes it.
    #[arg(long)]
    json: bool,
    /// The agent's socket.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
}

#[derive(Debug, clap::Args)]
struct ExplainArgs {
    /// The pod.
    #[arg(value_name = "NAMESPACE/POD")]
    pod: String,
    /// What it wants to reach, written as an entry is: `example.com:443`, `192.0.2.1:53/udp`,
    /// `[2001:db8::7]:443`, `example.com/icmp`. A port alone is one of TCP; without port, the answer
    /// says which are open.
    #[arg(value_name = "NAME-OR-ADDRESS[:PORT][/PROTOCOL]")]
    target: String,
    /// Write JSON, as docs/status.md describes it.
    #[arg(long)]
    json: bool,
    /// The agent's socket.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
}

#[derive(Debug, clap::Args)]
struct CleanupArgs {
    /// Configuration file of the agent, for its `bpffs`; /sys/fs/bpf without it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Then wait to be told to stop, as a pod of a `DaemonSet` has to.
    #[arg(long)]
    stay: bool,
}

#[derive(Debug, clap::Args)]
struct ReadyArgs {
    /// The agent's socket.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
}

#[derive(Debug, clap::Args)]
struct StartGateArgs {
    /// Where the node's container runtime has its network configurations.
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_dir: PathBuf,
    /// Where the node has rules of systemd-tmpfiles.
    #[arg(long, value_name = "DIR", default_value = "/etc/tmpfiles.d")]
    tmpfiles_dir: PathBuf,
    /// The agent's socket.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Remove the rule and open the gate, whatever the agent does.
    #[arg(long)]
    remove: bool,
}

impl Cli {
    /// Runs the command. What fails is said on standard error.
    pub fn run(self) -> ExitCode {
        let log = match &self.command {
            Command::Run(_) => log::start().map(Some),
            // These end soon, and who started them reads what they say.
            _ => Ok(None),
        };
        let log = match log {
            Ok(log) => log,
            Err(error) => {
                eprintln!("egress-agent: cannot start the log's thread: {error}");
                return ExitCode::FAILURE;
            }
        };
        match log {
            Some(log) => {
                set_up_log(|| log.clone());
                // The hook of the standard library writes to standard error itself, and waits for it.
                std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
            }
            None => set_up_log(std::io::stderr),
        }
        let result = match self.command {
            Command::Run(args) => run::run(args),
            Command::Check(args) => check::check(&args),
            Command::Status(args) => status::status(&args),
            Command::Explain(args) => Ok(explain::explain(&args)),
            Command::Ready(args) => ready::ready(&args),
            Command::Cleanup(args) => cleanup::cleanup(&args),
            Command::StartGate(args) => start_gate::start_gate(&args),
        };
        let is_read = log.is_none_or(Log::close);
        match result {
            Ok(code) => code,
            Err(error) => {
                // Where nobody reads, writing would not end.
                if is_read {
                    eprintln!("egress-agent: {error:#}");
                }
                ExitCode::FAILURE
            }
        }
    }
}

fn set_up_log<W>(writer: W)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing::level_filters::LevelFilter::INFO.into())
        .from_env_lossy();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}
