//! The agent's health and readiness.

use std::time::Duration;

use super::Sources;
use crate::datapath::boottime_ns;

/// How long a reconcile may take; when very many pods start together it takes seconds.
const RECONCILE_PATIENCE: Duration = Duration::from_secs(30);
/// How long a thread may be busy with one task.
const THREAD_PATIENCE: Duration = Duration::from_secs(10);
/// Pods that are named; the rest are only counted.
const NAMED: usize = 20;

/// The agent's failures that a restart may repair.
pub(super) fn unwell(sources: &Sources) -> Vec<String> {
    let published = &sources.published;
    let gate_ago =
        Duration::from_nanos(boottime_ns().saturating_sub(sources.gate.stats().ticked_ns.get()));
    [
        (
            "the last reconcile ended",
            Some(published.reconciled_ago()),
            RECONCILE_PATIENCE,
        ),
        ("the gate was last active", Some(gate_ago), THREAD_PATIENCE),
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

/// The reasons why a pod that should be enforced is not.
pub(super) fn unready(sources: &Sources) -> Vec<String> {
    let published = &sources.published;
    let mut missing = Vec::new();
    if published.last_reconciled().is_none() {
        missing.push("no reconcile has ended yet".to_owned());
    }
    let node = published.snapshot();
    if node.incomplete {
        missing.push(
            "there may be more pods: the source of pods could not be read completely yet"
                .to_owned(),
        );
    }
    let withheld = node.withheld.iter();
    missing.extend(withheld.map(|kind| format!("the {kind} objects could not be listed yet")));
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
