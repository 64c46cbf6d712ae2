//! Starting: everything that comes before the first reconcile.
//!
//! | file | what it does |
//! |---|---|
//! | `preflight` | checks privileges and limits |
//! | `source` | watches the source of pods |
//! | `takeover` | waits until this agent is the only one with its pins |
//! | `threads` | the threads of the agent, and whether they still run |

pub(in crate::control) mod preflight;
pub(in crate::control) mod source;
pub(in crate::control) mod takeover;
mod threads;

use std::{collections::BTreeMap, sync::Arc};

use anyhow::{Context as _, Result};
use egress_common::ids::PodId;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

use super::{
    Options,
    apply::{Applier, Parts},
    dns_settings,
    inherited_ranges::Inherited,
    observe::{Observer, new_interfaces::NewInterfaces},
    publish::{Publisher, events, status},
    reconcile::Reconciler,
    settings::Settings,
    state_dir::{handover, saved::Saved},
};
use crate::{
    datapath::{Adoptable, Datapath, Lock, STAMP_TABLE, TraceLog},
    gate::Gate,
    host::{FilterEvents, LinkEvents, RulesetEvents},
    pods::Snapshot,
    report::Reporter,
    serve::{Published, Serving},
};
use egress_policy::services::Services;
use source::{Source, Watched};
use threads::{DenialThread, Threads};

/// A running agent.
pub(super) struct Agent {
    pub(super) reconciler: Reconciler,
    pub(super) snapshots: Snapshots,
    pub(super) source: Watched,
    pub(super) links: LinkEvents,
    pub(super) filters: FilterEvents,
    pub(super) ruleset: RulesetEvents,
    pub(super) threads: Threads,
    pub(super) serving: Serving,
    /// The lock on the pins.
    pub(super) only: Lock,
    /// Prints the programs' trace output, for as long as it is held.
    _trace: Option<TraceLog>,
}

/// The signals that the agent handles.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Handles them from now on.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(super) fn catch() -> Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?,
            hangup: signal(SignalKind::hangup()).context("cannot wait for SIGHUP")?,
        })
    }

    /// Waits until the agent is told to stop.
    pub(super) async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Waits for any of them.
    pub(super) async fn next(&mut self) -> SignalRequest {
        tokio::select! {
            _ = self.terminate.recv() => SignalRequest::Stop,
            _ = self.interrupt.recv() => SignalRequest::Stop,
            _ = self.hangup.recv() => SignalRequest::Reload,
        }
    }
}

/// What a signal asks the agent to do.
pub(super) enum SignalRequest {
    /// To stop.
    Stop,
    /// To read its configuration again.
    Reload,
}

/// The snapshots of the source, or the saved one until the source knows pods.
pub(super) struct Snapshots {
    source: watch::Receiver<Arc<Snapshot>>,
    saved: Option<Saved>,
}

impl Snapshots {
    /// The snapshot to reconcile with now.
    pub(super) fn current(&mut self) -> Arc<Snapshot> {
        let snapshot = self.source.borrow_and_update().clone();
        match &mut self.saved {
            Some(saved) => saved.current(snapshot),
            None => snapshot,
        }
    }

    /// The Services that an earlier agent has judged by, until others are noted.
    fn services(&self) -> Arc<Services> {
        let saved = self.saved.as_ref().map(Saved::services);
        saved.cloned().unwrap_or_default()
    }

    /// Saves the Services that policies name.
    pub(super) fn note_services(&mut self, in_force: Services) {
        if let Some(saved) = &mut self.saved {
            saved.note_services(in_force);
        }
    }

    /// Waits for the next one.
    ///
    /// # Errors
    ///
    /// When the source has ended.
    pub(super) async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        self.source.changed().await
    }
}

/// Checks what can be checked before anything is changed.
///
/// # Errors
///
/// When something is missing; the error names it.
pub(super) fn check(options: &Options) -> Result<()> {
    preflight::check_privileges(&options.source)?;
    preflight::raise_file_limit();
    Ok(())
}

/// Starts the agent; `None` when it is told to stop before it is the only one with its pins.
///
/// # Errors
///
/// When the source cannot be watched, the programs cannot be loaded, or a thread cannot be started.
pub(super) async fn start(options: &Options, signals: &mut Signals) -> Result<Option<Agent>> {
    let configured = &options.config;
    let source = Source::check(&options.source, configured, options.config_file.as_deref())?;
    let links = LinkEvents::open()?;
    let filters = FilterEvents::open()?;
    let (snapshots, source) = source.watch().await?;
    let Some((mut datapath, only)) = takeover::only_agent(options, &snapshots, signals).await?
    else {
        source.close(true).await;
        return Ok(None);
    };
    datapath.start_stamp_check()?;
    // Opened after the agent's own changes, so that these do not start a reconcile.
    let ruleset = RulesetEvents::open(STAMP_TABLE);
    let trace = options
        .datapath_log
        .then(|| datapath.start_log())
        .transpose()?;
    let left = datapath.adoptable()?;
    let cluster = source.cluster();
    let in_cluster = cluster.is_some();
    let saved = in_cluster.then(|| Saved::open(configured, &left, &datapath));
    let mut snapshots = Snapshots {
        source: snapshots,
        saved,
    };
    let first = snapshots.current();
    let inherited = if in_cluster {
        Inherited::at_start(configured, &first, &datapath.ranges()?)
    } else {
        Inherited::default()
    };
    let settings = Settings::new(configured.clone(), &first, inherited, snapshots.services());
    datapath.put_in_force(&settings.config.tunnels(), &settings.config.ranges())?;
    take_over_interfaces(&mut datapath, &left)?;

    let listener = cluster
        .as_ref()
        .map(|cluster| events::denials(cluster.events.clone()));
    let (reporter, reporter_thread) = Reporter::start(std::io::stdout(), listener)
        .context("cannot start the reporter's thread")?;
    let (gate, gate_thread) = Gate::start(
        datapath.take_held()?,
        datapath.interfaces()?,
        datapath.marks(),
        dns_settings(&settings.config, &settings.claims),
        reporter.clone(),
        handover::take(configured),
        (datapath.take_notes()?, datapath.dns_times()?),
    )?;
    let published = Arc::<Published>::default();
    let denials = DenialThread {
        ring: datapath.take_denials()?,
        counters: datapath.counters()?,
        gate: gate.clone(),
        reporter: reporter.clone(),
        published: Arc::clone(&published),
    };
    let new_interfaces = if datapath.needs_qdisc() {
        Some(NewInterfaces::new(datapath.attached()?))
    } else {
        None
    };
    let (machine, locations) =
        source.locations(&settings.config, &datapath, &left, new_interfaces)?;
    let stats = Arc::clone(gate.stats());
    let kernel_counters = datapath.counters()?;
    let parts = Parts {
        datapath,
        gate,
        left,
        published: Arc::clone(&published),
        reporter: reporter.clone(),
    };
    let applier = Applier::new(parts, &settings)?;
    let observer = Observer::new(
        in_cluster,
        locations,
        settings.config.policy_settings(),
        applier.left_judged(),
        stats,
        kernel_counters,
    )?;
    let for_serving = Arc::clone(&published);
    let serving = status::serve(&settings.config, &applier, for_serving, reporter)?;
    Ok(Some(Agent {
        reconciler: Reconciler {
            publisher: Publisher::new(&configured.node, published, applier.left(), cluster),
            settings,
            machine,
            observer,
            applier,
        },
        snapshots,
        source,
        links,
        filters,
        ruleset,
        threads: Threads::new(gate_thread, denials, reporter_thread),
        serving,
        only,
        _trace: trace,
    }))
}

/// Attaches this agent's programs in place of an earlier agent's. To be called before the gate starts: frames that
/// it puts back carry marks that only these programs know.
fn take_over_interfaces(datapath: &mut Datapath, left: &BTreeMap<PodId, Adoptable>) -> Result<()> {
    for ifindex in datapath.attached()? {
        let mut left = left.values().flat_map(|left| &left.interfaces);
        let taken = if left.any(|&(known, _)| known == ifindex) {
            datapath.attach(ifindex)
        } else {
            // The earlier agent was killed before it enforced a pod there, or after it stopped enforcing it.
            datapath.detach(ifindex)
        };
        if let Err(error) = taken {
            tracing::warn!(ifindex = ifindex.get(), error = %format!("{error:#}"), "cannot take over an interface");
        }
    }
    Ok(())
}
