//! The source of this agent's pods.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use egress_common::ids::PodId;
use tokio::sync::watch;

use crate::control::{
    SourceOptions,
    observe::{
        first_addresses::FirstSights, locations::PodLocations, machine::Machine, named::Named,
        new_interfaces::NewInterfaces, on_host::OnHost,
    },
};
use crate::{
    config::Config,
    datapath::{Adoptable, Datapath},
    host::{Host, HostOptions},
    pods::{
        Directory, DirectoryThread, Snapshot,
        cluster::{self, Cluster, ClusterWatch, EventSink, Health, ReportSink},
    },
    serve::{ClusterState, WatchState},
};

/// A source that has been checked as far as it can be before anything is changed.
pub(in crate::control) enum Source {
    Directory(PathBuf),
    Cluster(cluster::Options),
}

/// What control needs of a cluster besides its snapshots.
#[derive(Clone)]
pub(in crate::control) struct ClusterSide {
    /// Where Events about pods go.
    pub(in crate::control) events: EventSink,
    /// Where the node's report goes.
    pub(in crate::control) reports: ReportSink,
    /// The state of the watches.
    pub(in crate::control) health: Arc<Health>,
}

impl ClusterSide {
    /// The state of the watches, for `status` and the metrics.
    pub(in crate::control) fn state(&self) -> ClusterState {
        let watches = cluster::Watched::ALL.into_iter().map(|watched| WatchState {
            of: watched.name(),
            restarts: self.health.restarts(watched),
            errors: self.health.errors(watched),
        });
        let events = self.events.counters();
        ClusterState {
            reachable: self.health.is_reachable(),
            watches: watches.collect(),
            events_sent: events.sent(),
            events_lost: events.dropped() + events.failed(),
            reports_written: self.reports.counters().written(),
            reports_failed: self.reports.counters().failed(),
        }
    }
}

/// A source that is being watched.
pub(in crate::control) enum Watched {
    Directory(DirectoryThread),
    Cluster(ClusterWatch),
}

impl Source {
    /// Checks that the source can be used.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or the configuration lacks a setting that it needs.
    pub(in crate::control) fn check(
        options: &SourceOptions,
        config: &Config,
        config_file: Option<&Path>,
    ) -> Result<Self> {
        match options {
            SourceOptions::Directory(path) => {
                std::fs::read_dir(path).with_context(|| {
                    format!("cannot read the directory of pods {}", path.display())
                })?;
                let checked = config.check_resolvers();
                match config_file {
                    Some(file) => checked.with_context(|| file.display().to_string())?,
                    None => checked.context("no configuration was named with --config")?,
                }
                Ok(Self::Directory(path.clone()))
            }
            SourceOptions::Cluster { kubeconfig } => Ok(Self::Cluster(cluster::Options::new(
                kubeconfig.clone(),
                config.node.clone(),
                config.cluster.clone(),
            ))),
        }
    }

    /// Starts the watch.
    ///
    /// # Errors
    ///
    /// When it cannot start. The snapshots report what cannot be read later.
    pub(in crate::control) async fn watch(
        self,
    ) -> Result<(watch::Receiver<Arc<Snapshot>>, Watched)> {
        match self {
            Self::Directory(path) => {
                let (snapshots, thread) =
                    Directory::watch(path).context("cannot watch the directory of pods")?;
                Ok((snapshots, Watched::Directory(thread)))
            }
            Self::Cluster(options) => {
                let (snapshots, watch) = Cluster::watch(options).await?;
                Ok((snapshots, Watched::Cluster(watch)))
            }
        }
    }
}

impl Watched {
    /// How the pods of this source are found on this machine. `left` is what an earlier agent left
    /// enforced; `new_interfaces` are interfaces that are to be left alone at first.
    ///
    /// # Errors
    ///
    /// When this machine cannot be looked at.
    pub(in crate::control) fn locations(
        &self,
        config: &Config,
        datapath: &Datapath,
        left: &BTreeMap<PodId, Adoptable>,
        new_interfaces: Option<NewInterfaces>,
    ) -> Result<(Machine, PodLocations)> {
        let host = Host::open(HostOptions::default());
        let host = host.context("cannot look at this machine's pods")?;
        match self {
            Self::Directory(_) => Ok((
                Machine::new(host),
                PodLocations::Named(Named::new(left.values())),
            )),
            Self::Cluster(_) => {
                let sights = FirstSights::inherit(datapath, left.values())?;
                let quarantine = config.quarantine.clone();
                let on_host = OnHost::new(quarantine, new_interfaces, sights);
                let locations = PodLocations::OnHost(Box::new(on_host));
                Ok((Machine::new(host), locations))
            }
        }
    }

    /// The cluster's handles, if the source is one.
    pub(in crate::control) fn cluster(&self) -> Option<ClusterSide> {
        match self {
            Self::Directory(_) => None,
            Self::Cluster(watch) => Some(ClusterSide {
                events: watch.events().clone(),
                reports: watch.reports().clone(),
                health: Arc::clone(watch.health()),
            }),
        }
    }

    /// Ends the watch. If nothing is to stay enforced, the cluster is told.
    pub(in crate::control) async fn close(self, keeps_enforcing: bool) {
        match self {
            Self::Directory(thread) => thread.close(),
            Self::Cluster(watch) => watch.close(keeps_enforcing).await,
        }
    }
}
