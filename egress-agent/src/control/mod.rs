//! The control loop: enforces the policies of the node's pods. It reads pods, annotations and policy objects, and
//! changes the kernel and the gate until they agree.
//!
//! Whatever happens (a manifest changes, an interface appears, a second passes) leads to the same
//! [reconcile](reconcile::Reconciler::reconcile), which takes four steps:
//!
//! ```text
//!  source of pods ─┐
//!  this machine ───┴▶ observe ──Observed──▶ plan ──Plan──▶ apply ──Outcome──▶ publish ─▶ log, Events, status, denials
//!                        ▲                                  │  ▲
//!                        └───────── what is enforced ───────┘  └─▶ the kernel, the gate
//! ```
//!
//! | where | what it does |
//! |---|---|
//! | [`observe`] | reads the pods, where they are, and what their annotations mean |
//! | [`plan`] | decides what is to be done; a pure function |
//! | [`apply`] | does it; only this step changes the kernel and asks the gate |
//! | [`publish`] | publishes the result to people and to the other threads |
//! | [`start`], [`stop`] | what comes before the first reconcile, and after the last |
//! | [`pace`] | limits how often events start a reconcile |
//! | [`settings`], [`reload`] | the settings of the operator and of the cluster, and changing them |
//! | [`inherited_ranges`] | ranges and resolvers that stay in force until the cluster has reported its own |
//! | [`state_dir`] | files that one agent leaves to the next |
//!
//! Events are hints: losing one delays a change until the next second.

mod apply;
mod digest;
mod inherited_ranges;
mod observe;
mod pace;
mod plan;
mod publish;
mod readiness;
mod reconcile;
mod reload;
mod settings;
mod start;
mod state_dir;
mod stop;

use std::{path::PathBuf, time::Duration};

use anyhow::Result;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::{
    config::{self, Config},
    datapath::Attach,
    gate::DnsSettings,
};
use observe::backoff::{RETRY_MIN, longer};
use pace::Pace;
use plan::wanted::mapped;
use readiness::Readiness;
use start::{Agent, SignalRequest, Signals};

/// How often the loop reconciles, whether or not anything has happened.
const RECONCILE_EVERY: Duration = Duration::from_secs(1);

/// How often, at most, changed filters start a reconcile: whoever changes them all the time must not keep the agent
/// busy.
const FILTERS_EVERY: Duration = Duration::from_millis(50);

/// How often, at most, changed interfaces start a reconcile: a pod can change its own as often as it likes. Making a
/// pod's network changes a few at once, which starts one without a wait.
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
    start::check(&options)?;
    let mut signals = Signals::catch()?;
    let Some(mut agent) = start::start(&options, &mut signals).await? else {
        return Ok(());
    };
    let failure = Box::pin(reconcile_until_stopped(&mut agent, &options, &mut signals)).await?;
    Box::pin(stop::stop(agent, &options, failure)).await
}

/// Reconciles whenever something happens, and each second. Returns why it cannot go on, or `None` when the agent is
/// told to stop.
async fn reconcile_until_stopped(
    agent: &mut Agent,
    options: &Options,
    signals: &mut Signals,
) -> Result<Option<&'static str>> {
    let mut tick = interval(RECONCILE_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sweep = interval(SWEEP_EVERY);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // How long to wait before looking again for something that is expected.
    let mut wait = RETRY_MIN;
    let mut filters_looked = Instant::now();
    let mut link_pace = Pace::new(LINKS_EVERY, LINKS_AT_ONCE, filters_looked);
    let mut readiness = Readiness::Begun;
    loop {
        let snapshot = agent.snapshots.current();
        let Agent {
            reconciler,
            snapshots,
            links,
            filters,
            ruleset,
            threads,
            ..
        } = agent;
        reconciler.observer.note_seen(links.take_seen());
        if !reconciler.observer.is_expecting() {
            wait = RETRY_MIN;
        }
        tokio::select! {
            biased;
            // When many pods come or go, a reconcile takes seconds, so it may be cancelled. Each of its changes is
            // then either in the kernel or not: now everything is removed, or the next agent finds it there.
            () = signals.stop() => return Ok(None),
            () = reconciler.reconcile(&snapshot) => {}
        }
        let claiming = reconciler.settings.claiming();
        let in_force = reconciler.observer.policies.services_in_force(claiming);
        snapshots.note_services(in_force);
        if let Some(ended) = threads.ended() {
            return Ok(Some(ended));
        }
        // Only now: what was denied while no agent ran belongs to pods that have just become known.
        if threads.read_denials()? {
            reconciler.applier.remove_orphans();
        }
        readiness = readiness.next(reconciler, &snapshot);
        let again = Instant::now() + reconciler.observer.look_again(wait);
        // When changed interfaces may start the next reconcile.
        let mut links_due: Option<Instant> = None;
        loop {
            tokio::select! {
                request = signals.next() => {
                    if let SignalRequest::Stop = request {
                        return Ok(None);
                    }
                    match &options.config_file {
                        Some(file) => reconciler.reload(file).await,
                        None => tracing::warn!("SIGHUP: there is no configuration file"),
                    }
                    break;
                }
                changed = snapshots.changed() => {
                    if changed.is_err() {
                        return Ok(Some("the source of pods has ended"));
                    }
                    wait = RETRY_MIN;
                    break;
                }
                () = links.changed() => match link_pace.take(Instant::now()) {
                    Ok(()) => {
                        wait = RETRY_MIN;
                        break;
                    }
                    Err(at) => links_due = Some(at),
                },
                () = sleep_until(links_due.unwrap_or(again)), if links_due.is_some() => {
                    // If it is still too early, wait longer.
                    if let Err(at) = link_pace.take(Instant::now()) {
                        links_due = Some(at);
                        continue;
                    }
                    wait = RETRY_MIN;
                    break;
                }
                changed = filters.changed() => {
                    let concerns = reconciler.applier.note_changed_filters(changed.as_deref());
                    if concerns && filters_looked.elapsed() >= FILTERS_EVERY {
                        filters_looked = Instant::now();
                        break;
                    }
                }
                () = ruleset.changed() => {
                    reconciler.applier.note_changed_tables();
                    if filters_looked.elapsed() >= FILTERS_EVERY {
                        filters_looked = Instant::now();
                        break;
                    }
                }
                () = sleep_until(again), if reconciler.observer.is_expecting() => {
                    wait = longer(wait);
                    break;
                }
                _ = tick.tick() => break,
                _ = sweep.tick() => reconciler.applier.sweep(SWEEP_ROUND, SWEEP_EVERY),
            }
        }
    }
}

fn dns_settings(config: &Config, claims: &settings::Claims) -> DnsSettings {
    let resolvers = |is_claimed: bool| {
        let all = config.dns.resolvers.iter();
        all.filter(move |resolver| claims.contains_key(*resolver) == is_claimed)
            .map(|resolver| (mapped(resolver.address), resolver.port))
            .collect()
    };
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
        resolve_for: config.when_agent_down.resolve_for,
        delivers_undecided: config.when_agent_down.undecided == config::Undecided::Deliver,
        resolvers: resolvers(false),
        claimed: resolvers(true),
    }
}
