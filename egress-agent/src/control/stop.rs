//! Stopping: removes everything, or leaves it enforced for the next agent.

use anyhow::{Result, bail};

use super::{Options, start::Agent, state_dir::handover};
use crate::datapath;

/// Ends all threads. Without a failure, and unless everything is to stay enforced, detaches from every interface and
/// removes everything that is pinned.
///
/// # Errors
///
/// When there was a failure, a thread has panicked, or not everything can be removed.
pub(super) async fn stop(
    agent: Agent,
    options: &Options,
    failure: Option<&'static str>,
) -> Result<()> {
    let Agent {
        mut reconciler,
        source,
        threads,
        serving,
        only,
        ..
    } = agent;
    serving.stop();
    let removes = failure.is_none() && !options.keep_enforcing;
    source.close(!removes).await;
    if removes {
        reconciler.applier.detach_all();
    }
    reconciler.applier.gate().stop();
    let open_questions = threads.join();
    let bpffs = reconciler.applier.close();
    if let Some(failure) = failure {
        bail!("{failure}; enforced pods stay enforced");
    }
    let Ok(open_questions) = open_questions else {
        bail!("the gate's thread has panicked; enforced pods stay enforced");
    };
    if removes {
        datapath::cleanup(&bpffs, Some(only))?;
        tracing::info!("stopped; nothing is enforced any more");
    } else {
        handover::leave(&options.config, open_questions);
        tracing::info!("stopped; enforced pods stay enforced");
    }
    Ok(())
}
