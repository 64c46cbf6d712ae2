//! The command line.

mod ask;
mod check;
mod cleanup;
mod explain;
mod import;
mod ready;
mod run;
mod start_gate;
mod status;
mod texts;

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
    /// Enforce the policies of this machine's pods until a signal stops the agent.
    ///
    /// Writes denials to standard output, one JSON object per line, and its log to standard error. The
    /// environment variable `RUST_LOG` sets the log's level, for example `RUST_LOG=debug`.
    Run(RunArgs),
    /// Print what the pods of each workload may reach and why, or each error with its line.
    ///
    /// Reads Pods, workloads (Deployments and the like, by the template of their pods), Namespaces and policy objects,
    /// and combines all that are among the files. Prints rules in the order of evaluation, each with the object that
    /// it comes from. Prints each problem on a line of its own; below it the line of the annotation, with carets under
    /// the invalid text. Exits with 1 if there is a problem. Loads no program, and needs no privileges.
    Check(CheckArgs),
    /// Read network policies of other products, and print policy objects for this agent.
    ///
    /// Reads those of Kubernetes, Cilium, Calico, Antrea, GKE, Amazon EKS, OVN-Kubernetes and Istio, and rule files.
    /// Writes YAML to standard output, with a comment for each difference in meaning. A rule without a
    /// counterpart is left out or refused, with a line on standard error. Exits with 1 if a file cannot be read, or if
    /// there is nothing to import. docs/import.md describes how each kind is translated.
    Import(ImportArgs),
    /// Print the state of the running agent and its pods, or of one pod and the names that it has resolved.
    Status(StatusArgs),
    /// Print whether a pod may reach a destination, and which entry of which annotation decides.
    ///
    /// Asks the running agent, and sends no packet. Exits with 0 if packets pass (in audit mode too, where the
    /// answer says whether they would be denied), with 1 if they do not, and with 2 if there is no answer: the pod
    /// does not exist, it is not enforced yet, or no agent runs.
    Explain(ExplainArgs),
    /// Check whether the agent is ready: it knows this machine's pods and enforces each pod that has a policy.
    ///
    /// An agent that stands by (run --take-over) is ready if it can take over. Exits with 0 if the agent is ready.
    /// Otherwise prints what is missing, and exits with 1.
    Ready(ReadyArgs),
    /// Remove the programs, maps and pins that an agent left behind. Afterwards nothing is enforced.
    ///
    /// Use it after an agent was killed, or was stopped with --keep-enforcing. Fails while an agent runs.
    Cleanup(CleanupArgs),
    /// After a boot of the node, make pods wait until the agent enforces them.
    ///
    /// Writes a rule for systemd-tmpfiles that closes a gate at each boot. The gate is a network configuration
    /// that sorts before that of the network plugin and names a plugin that does not exist. Opens the gate when
    /// the agent on this node knows its pods. Runs until a signal stops it. See docs/installation.md.
    StartGate(StartGateArgs),
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// Directory of manifests: YAML or JSON files with v1 Pods and Namespaces. Each Pod has the name of its
    /// host-side interface in the annotation egress-agent.dev/interface, and its addresses in status.podIPs. The
    /// agent notices files that are added, changed or removed. Without this option the agent asks the cluster for
    /// the pods of this node.
    #[arg(long, value_name = "DIR")]
    pods_dir: Option<PathBuf>,
    /// Address and credentials for the cluster's API server. Without it, the agent uses those of its own pod.
    #[arg(long, value_name = "FILE", conflicts_with = "pods_dir")]
    kubeconfig: Option<PathBuf>,
    /// Configuration file, in YAML. With --pods-dir it must have at least the pods' resolvers:
    /// `dns: {resolvers: [10.96.0.10]}`. docs/configuration.md has every key. On SIGHUP the agent reads it again.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Leave everything enforced after a stop: allowed traffic stays allowed, denied traffic stays denied, and
    /// DNS queries get no response until an agent runs again.
    #[arg(long)]
    keep_enforcing: bool,
    /// If another agent runs, stand by until it ends, and then take over. Programs are loaded and pods are known
    /// by then, so that DNS is interrupted for a moment only.
    #[arg(long)]
    take_over: bool,
    /// How to attach programs to interfaces.
    #[arg(long, value_enum, default_value_t = AttachArg::Auto)]
    attach: AttachArg,
    /// Log each packet that the programs judge, on standard error. Slow.
    #[arg(long)]
    datapath_log: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum AttachArg {
    /// tcx from kernel 6.6 on, clsact on older kernels.
    Auto,
    /// tcx links (kernel 6.6 or later).
    Tcx,
    /// Filters on a clsact qdisc.
    Clsact,
}

#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// Manifests, in YAML or JSON. `-` is standard input, as in `kustomize build | egress-agent check -`. Directories
    /// are read with their subdirectories.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Exit with 1 for warnings, too.
    #[arg(long)]
    strict: bool,
    /// The format of the report. docs/check.md describes each.
    #[arg(short, long, value_enum, default_value_t = CheckOutput::Text)]
    output: CheckOutput,
    /// In text, print a line for each workload in place of its rules.
    #[arg(long)]
    summary: bool,
    /// Configuration file. Without it, every key has its default.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum CheckOutput {
    /// For people.
    Text,
    /// Workloads, rules and findings.
    Json,
    /// SARIF 2.1.0, for code scanning.
    Sarif,
    /// Workflow commands of GitHub Actions.
    Github,
}

#[derive(Debug, clap::Args)]
struct ImportArgs {
    /// Files of policies: YAML, JSON, or rule files. `-` is standard input. Directories are read with their
    /// subdirectories. Give all policies of a product in one run, since their order and their sets belong together.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The namespace of objects that do not name one.
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Write wildcards that stand for exactly one label in the original as `*.`, which is one or more labels here.
    /// Without this option they are left out, as a comment.
    #[arg(long)]
    deep_wildcards: bool,
    /// Exit with 1 if something was left out or refused.
    #[arg(long)]
    strict: bool,
}

#[derive(Debug, clap::Args)]
struct StatusArgs {
    /// A pod. Without it, all pods of the node.
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
    /// The destination, written like an entry: `example.com:443`, `192.0.2.1:53/udp`, `[2001:db8::7]:443`,
    /// `example.com/icmp`. A port without a protocol is a TCP port. Without a port, the answer lists the open
    /// ports.
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
    /// Configuration file of the agent, for its key `bpffs`. Without it, /sys/fs/bpf.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Afterwards wait for a signal, so that a pod of a `DaemonSet` is not started again.
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
    /// Directory of the network configurations of the node's container runtime.
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_dir: PathBuf,
    /// Directory of the node's rules for systemd-tmpfiles.
    #[arg(long, value_name = "DIR", default_value = "/etc/tmpfiles.d")]
    tmpfiles_dir: PathBuf,
    /// The agent's socket.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Remove the rule and open the gate, whether or not an agent runs.
    #[arg(long)]
    remove: bool,
}

impl Cli {
    /// Runs the command. Writes a failure to standard error.
    pub fn run(self) -> ExitCode {
        let log = match &self.command {
            Command::Run(_) => log::start().map(Some),
            // These commands end soon, and their output is read. They may block while they write.
            _ => Ok(None),
        };
        let log = match log {
            Ok(log) => log,
            Err(error) => {
                eprintln!("egress-agent: cannot start the thread that writes the log: {error}");
                return ExitCode::FAILURE;
            }
        };
        match log {
            Some(log) => {
                set_up_log(|| log.clone());
                // The standard library's hook writes to standard error itself, and would block where nobody reads.
                std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
            }
            None => set_up_log(std::io::stderr),
        }
        let result = match self.command {
            Command::Run(args) => run::run(args),
            Command::Check(args) => check::check(&args),
            Command::Import(args) => import::import(&args),
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
                // Where nobody reads, a write would block for ever.
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
