//! Brings everything together: pods and their annotations on one side, the kernel and the gate on
//! the other.
//!
//! Whatever happens (a manifest changes, an interface appears, a second passes) leads to the same
//! step: [`reconcile`] compares what should be enforced with what is, pod by pod. Events are hints;
//! losing one delays a change until the next look.

mod apply;
mod digest;
mod observe;
mod plan;
mod publish;
mod reconcile;
mod reload;
mod start;
mod state_dir;
mod wake;

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use crate::{
    config::{self, Config},
    datapath::{self, Attach},
    gate::{DnsSettings, Gate},
    pods::Snapshot,
    report::Reporter,
};
use observe::arrivals::Arrivals;
use observe::unlocated::{RETRY_MIN, longer};
use publish::denials::DenialReader;
use reconcile::{Reconciler, Settings};
use start::source::Source;
use state_dir::saved::Saved;
use wake::links::{FilterEvents, LinkEvents, RulesetEvents};
use wake::pace::Pace;

/// How often everything is looked at, whether or not something happened.
const RECONCILE_EVERY: Duration = Duration::from_secs(1);

/// How often, at most, everything is looked at because filters have changed: whoever changes them
/// all the time must not keep the agent busy.
const HURRY_EVERY: Duration = Duration::from_millis(50);

/// How often, at most, everything is looked at because interfaces have changed: a pod changes its own as
/// often as it likes. Making a pod's network changes them a few times, and then nothing waits.
const LINKS_EVERY: Duration = Duration::from_millis(100);
const LINKS_AT_ONCE: u32 = 16;

/// How often the flows of one pod are swept, and how often the next few pods' turn comes.
const SWEEP_ROUND: Duration = Duration::from_secs(5);
const SWEEP_EVERY: Duration = Duration::from_millis(250);

/// How the agent is to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration file's content, or the defaults.
    pub config: Config,
    /// The file itself, to be read again on SIGHUP.
    pub config_file: Option<PathBuf>,
    /// Where pods come from.
    pub source: SourceOptions,
    /// Leave everything enforced when told to stop.
    pub keep_enforcing: bool,
    /// Wait until an agent that runs with the same pins has ended, and go on where it stopped.
    pub take_over: bool,
    /// How programs are attached.
    pub attach: Attach,
    /// Let the programs trace what they do.
    pub datapath_log: bool,
}

/// Where pods come from.
#[derive(Clone, Debug)]
pub enum SourceOptions {
    /// A directory of manifests.
    Directory(PathBuf),
    /// The cluster that this node is in.
    Cluster {
        /// How to reach it and as whom; without it, as a pod in it.
        kubeconfig: Option<PathBuf>,
    },
}

/// Runs until SIGTERM or SIGINT. On SIGHUP the configuration is read again.
///
/// # Errors
///
/// When the agent cannot start, or one of its threads ends. What is enforced then stays enforced.
pub async fn run(options: Options) -> Result<()> {
    start::preflight::check_privileges(&options.source)?;
    start::preflight::raise_file_limit();
    let Options {
        config: configured,
        source,
        ..
    } = &options;
    let source = Source::check(source, configured, options.config_file.as_deref())?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("cannot wait for SIGHUP")?;
    let mut links = LinkEvents::open()?;
    let mut filters = FilterEvents::open()?;

    let (mut snapshots, source) = source.watch().await?;
    let only =
        start::takeover::only_agent(&options, &snapshots, &mut terminate, &mut interrupt).await?;
    let Some((mut datapath, only)) = only else {
        source.close().await;
        return Ok(());
    };
    datapath.start_stamp_check()?;
    // After the agent's own changes: they are no reason to look at everything.
    let mut ruleset = RulesetEvents::open();
    let _log = options
        .datapath_log
        .then(|| datapath.start_log())
        .transpose()?;
    let adoptable = datapath.adoptable()?;
    let cluster = source.cluster();
    let mut saved = cluster
        .is_some()
        .then(|| Saved::open(configured, &adoptable, &datapath));
    let mut current = |snapshots: &mut watch::Receiver<Arc<Snapshot>>| {
        let snapshot = snapshots.borrow_and_update().clone();
        match &mut saved {
            Some(saved) => saved.current(snapshot),
            None => snapshot,
        }
    };
    let facts = current(&mut snapshots).facts.clone();
    let config = &apply::ranges::together(configured, &facts);
    datapath.set_tunnels(&config.tunnels())?;
    datapath.set_ranges(&config.ranges())?;
    // Before the gate starts: frames that it puts back carry marks only these programs know.
    for ifindex in datapath.attached()? {
        let mut left = adoptable.values().flat_map(|left| &left.interfaces);
        let taken = if left.any(|&(known, _)| known == ifindex) {
            datapath.attach(ifindex)
        } else {
            // The earlier agent was killed before it put a pod there, or after it took it away.
            datapath.detach(ifindex)
        };
        if let Err(error) = taken {
            tracing::warn!(ifindex, error = %format!("{error:#}"), "cannot take over an interface");
        }
    }

    let listener = cluster
        .as_ref()
        .map(|cluster| publish::events::denials(cluster.events.clone()));
    let (reporter, reporter_thread) = Reporter::start(std::io::stdout(), listener)
        .context("cannot start the reporter's thread")?;
    let (gate, gate_thread) = Gate::start(
        datapath.take_held()?,
        datapath.interfaces()?,
        datapath.marks(),
        dns_settings(config),
        reporter.clone(),
        state_dir::handover::take(configured),
    )?;
    let known: Arc<publish::denials::KnownPods> = Arc::default();
    let mut unread = Some((datapath.take_denials()?, datapath.counters()?));
    let mut denials: Option<DenialReader> = None;
    let arrivals = if datapath.needs_qdisc() {
        Some(Arrivals::new(datapath.attached()?))
    } else {
        None
    };
    let places = source.places(config, &datapath, &adoptable, arrivals)?;
    let mut reconciler = Reconciler::new(
        datapath,
        gate.clone(),
        Settings {
            configured: configured.clone(),
            together: config.clone(),
            facts,
        },
        places,
        cluster,
        Arc::clone(&known),
        adoptable,
        reporter.clone(),
    )?;
    let board = Arc::clone(&reconciler.board);
    let serving = reconciler.serve(&reporter)?;

    let mut look = interval(RECONCILE_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sweep = interval(SWEEP_EVERY);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut soon = RETRY_MIN;
    let mut hurried = Instant::now();
    let mut link_pace = Pace::new(LINKS_EVERY, LINKS_AT_ONCE, hurried);
    let mut readiness = Readiness::Begun;
    let failure = 'running: loop {
        let snapshot = current(&mut snapshots);
        reconciler.exits.note_seen(links.take_seen());
        if !reconciler.is_expecting() {
            soon = RETRY_MIN;
        }
        tokio::select! {
            biased;
            // When many pods come or go a reconcile takes seconds. What is broken off is in the
            // kernel or is not: everything is removed now, or the next agent looks at it.
            _ = terminate.recv() => break None,
            _ = interrupt.recv() => break None,
            () = reconciler.reconcile(&snapshot) => {}
        }
        if gate_thread.is_finished() {
            break Some("the gate's thread has ended");
        }
        if denials.as_ref().is_some_and(DenialReader::is_finished) {
            break Some("the denial reader's thread has ended");
        }
        // Only now: what was denied while no agent ran belongs to pods that have just become known.
        if let Some((ring, counters)) = unread.take() {
            let (known, gate, reporter) = (Arc::clone(&known), gate.clone(), reporter.clone());
            denials = Some(DenialReader::start(
                ring,
                counters,
                known,
                gate,
                reporter,
                Arc::clone(&board),
            )?);
            reconciler.drop_orphans();
        }
        readiness = readiness.next(&reconciler, &snapshot);
        let again = Instant::now() + reconciler.look_again(soon);
        // When to look because interfaces have changed.
        let mut due: Option<Instant> = None;
        loop {
            tokio::select! {
                _ = terminate.recv() => break 'running None,
                _ = interrupt.recv() => break 'running None,
                changed = snapshots.changed() => {
                    if changed.is_err() {
                        break 'running Some("the source of pods has ended");
                    }
                    soon = RETRY_MIN;
                    break;
                }
                _ = hangup.recv() => {
                    match &options.config_file {
                        Some(file) => reconciler.reload(file).await,
                        None => tracing::warn!("SIGHUP: there is no configuration file"),
                    }
                    break;
                }
                () = links.changed() => match link_pace.take(Instant::now()) {
                    Ok(()) => {
                        soon = RETRY_MIN;
                        break;
                    }
                    Err(at) => due = Some(at),
                },
                () = sleep_until(due.unwrap_or(again)), if due.is_some() => {
                    // That it is still too early only makes it the next turn's.
                    if let Err(at) = link_pace.take(Instant::now()) {
                        due = Some(at);
                        continue;
                    }
                    soon = RETRY_MIN;
                    break;
                }
                changed = filters.changed() => {
                    let concerns = reconciler.hooks.hurry(changed.as_deref());
                    if concerns && hurried.elapsed() >= HURRY_EVERY {
                        hurried = Instant::now();
                        break;
                    }
                }
                () = ruleset.changed() => {
                    reconciler.stamps.hurry();
                    if hurried.elapsed() >= HURRY_EVERY {
                        hurried = Instant::now();
                        break;
                    }
                }
                () = sleep_until(again), if reconciler.is_expecting() => {
                    soon = longer(soon);
                    break;
                }
                _ = look.tick() => break,
                _ = sweep.tick() => reconciler.sweep(SWEEP_ROUND, SWEEP_EVERY),
            }
        }
    };

    serving.stop();
    source.close().await;
    let clean = failure.is_none() && !options.keep_enforcing;
    if clean {
        reconciler.detach_all();
    }
    gate.stop();
    let gate_ended = gate_thread.join();
    if let Some(denials) = denials {
        denials.stop();
    }
    reporter_thread.close();
    let bpffs = reconciler.close();
    if let Some(failure) = failure {
        bail!("{failure}; what is enforced stays enforced");
    }
    let Ok(open_questions) = gate_ended else {
        bail!("the gate's thread has panicked; what is enforced stays enforced");
    };
    if !clean {
        state_dir::handover::leave(configured, open_questions);
    }
    if clean {
        datapath::cleanup(&bpffs, Some(only))?;
        tracing::info!("stopped; nothing is enforced any more");
    } else {
        tracing::info!("stopped; what is enforced stays enforced");
    }
    Ok(())
}

/// How far the agent has got, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Readiness {
    /// It has not looked at anything.
    Begun,
    /// It does not know yet which pods there are, and has said so.
    Waiting,
    /// It has dealt with the pods that there are, and has said so.
    Ready,
}

impl Readiness {
    /// After a reconcile with this snapshot.
    fn next(self, reconciler: &Reconciler, snapshot: &Snapshot) -> Self {
        // What of a directory cannot be read now may stay so for ever.
        let is_known = reconciler.cluster.is_none() || !snapshot.unreadable;
        match self {
            Self::Begun | Self::Waiting if is_known => {
                tracing::info!(
                    node = %reconciler.config.node,
                    pods = reconciler.enforced(),
                    resolvers = %apply::ranges::listed(&reconciler.config.dns.resolvers),
                    "ready"
                );
                Self::Ready
            }
            Self::Begun => {
                tracing::info!(
                    node = %reconciler.config.node,
                    left = reconciler.adoptable.len(),
                    "waiting for the API server to say which pods there are; those that an earlier \
                     agent left stay enforced"
                );
                Self::Waiting
            }
            Self::Waiting | Self::Ready => self,
        }
    }
}

fn dns_settings(config: &Config) -> DnsSettings {
    let policy = config.policy_settings();
    DnsSettings {
        min_ttl: config.dns.min_ttl,
        max_ttl: config.dns.max_ttl,
        grace: config.dns.grace,
        refusal: match config.dns.refusal {
            config::Refusal::NxDomain => egress_dns::Refusal::NxDomain,
            config::Refusal::Refused => egress_dns::Refusal::Refused,
        },
        protected: policy.protected,
        translators: policy.translators,
        autopath: config.dns.autopath,
        resolvers: config
            .dns
            .resolvers
            .iter()
            .map(|resolver| (plan::wanted::mapped(resolver.address), resolver.port))
            .collect(),
    }
}
