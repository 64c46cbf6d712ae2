//! Standing by while another agent runs, and taking over when it ends.

use std::{sync::Arc, time::Duration};

use anyhow::Result;
use egress_common::limits::FlowLimits;
use tokio::{sync::watch, time::sleep};

use super::Signals;
use crate::control::{Options, state_dir::saved};
use crate::{
    config::Learn,
    datapath::{self, Datapath, Lock, TryLock},
    pods::Snapshot,
    serve::stand_by,
};

/// How often an agent that stands by checks whether the other one has ended.
const TAKE_OVER_EVERY: Duration = Duration::from_millis(10);

/// Opens the datapath and locks its pins, so that this agent is the only one. If it is to take over from another
/// agent, it waits for that; `None` when it is told to stop first.
///
/// # Errors
///
/// When another agent has the pins and this one is not to take over, or the programs cannot be loaded.
pub(in crate::control) async fn only_agent(
    options: &Options,
    snapshots: &watch::Receiver<Arc<Snapshot>>,
    signals: &mut Signals,
) -> Result<Option<(Datapath, Lock)>> {
    let config = &options.config;
    let datapath_options = datapath::Options {
        bpffs: config.bpffs.clone(),
        allow_entries: config.limits.addresses_per_pod,
        flows: FlowLimits::of(config.limits.flows_per_pod),
        udp_idle: config.limits.udp_idle,
        attach: options.attach,
        trace: options.datapath_log,
        learns: config.dns.learn == Learn::Kernel,
    };
    let mut datapath = Datapath::open(&datapath_options)?;
    if !options.take_over {
        let only = datapath.lock()?;
        return Ok(Some((datapath, only)));
    }
    if let TryLock::Locked(only) = datapath.try_lock()? {
        return Ok(Some((datapath, only)));
    }
    tracing::info!("standing by: another agent runs, and this one takes over when it ends");
    let missing = || {
        let snapshot = Arc::clone(&snapshots.borrow());
        if snapshot.unreadable {
            return vec!["which pods there are is not known yet".to_owned()];
        }
        let unlisted = saved::unlisted(config, &snapshot).into_iter();
        let missing = unlisted.map(|kind| format!("the {kind} objects could not be listed yet"));
        missing.collect()
    };
    let standing_by = stand_by(&config.serve.socket, missing);
    tokio::pin!(standing_by);
    loop {
        tokio::select! {
            () = signals.stop() => return Ok(None),
            () = &mut standing_by => {}
            () = sleep(TAKE_OVER_EVERY) => {}
        }
        match datapath.try_lock()? {
            TryLock::Locked(only) => return Ok(Some((datapath, only))),
            TryLock::AnothersLock => {}
            // The other agent removed everything when it ended.
            TryLock::Gone => datapath = Datapath::open(&datapath_options)?,
        }
    }
}
