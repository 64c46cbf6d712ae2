//! Whether the agent is well, and whether it is ready.

use std::time::Duration;

use super::Sources;
use crate::datapath::boottime_ns;

/// How long looking at everything once may take; when very many pods come together it takes seconds.
const RECONCILE_PATIENCE: Duration = Duration::from_secs(30);
/// How long a thread may be busy with one thing.
const THREAD_PATIENCE: Duration = Duration::from_secs(10);
/// Pods that are named; the rest are counted.
const NAMED: usize = 20;

/// What is wrong with the agent, such that starting it again may help.
pub(super) fn unwell(sources: &Sources) -> Vec<String> {
    let published = &sources.published;
    let gate_ago =
        Duration::from_nanos(boottime_ns().saturating_sub(sources.gate.stats().ticked_ns.get()));
    [
        (
            "pods were last compared with what is enforced",
            Some(published.reconciled_ago()),
            RECONCILE_PATIENCE,
        ),
        ("the gate was last at work", Some(gate_ago), THREAD_PATIENCE),
        (
            "denials were last read",
            published.denials_read_ago(),
            THREAD_PATIENCE,
        ),
    ]
    .into_iter()
    .filter_map(|(what, ago, patience)| {
        let ago = ago.filter(|ago| *ago > patience)?;
        let (ago, patience) = (ago.as_secs(), patience.as_secs());
        Some(format!("{what} {ago} s ago, more than {patience} s"))
    })
    .collect()
}

/// What is missing before every pod of the node is enforced that should be.
pub(super) fn unready(sources: &Sources) -> Vec<String> {
    let published = &sources.published;
    let mut missing = Vec::new();
    if published.last_reconciled().is_none() {
        missing.push("pods have not been looked at yet".to_owned());
    }
    let node = published.snapshot();
    if node.incomplete {
        missing.push("there may be more pods: their source cannot be read in full yet".to_owned());
    }
    let mut pods = node.pods.iter().filter(|(_, pod)| pod.is_missing());
    for (subject, pod) in pods.by_ref().take(NAMED) {
        let (namespace, name) = subject.fields();
        let why = pod.problem.as_deref().unwrap_or("not attached");
        missing.push(format!("{namespace}/{name}: {why}"));
    }
    let more = pods.count();
    if more > 0 {
        missing.push(format!("and {more} more pods"));
    }
    missing
}
