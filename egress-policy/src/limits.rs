//! The limits of one pod's policy.

use std::collections::BTreeSet;

use egress_common::limits::CIDR_ENTRIES;

use super::{
    annotations::{Lists, Written},
    entry::Destination,
    error::{PREFIXES, PolicyError, Problem},
    pattern::NamePattern,
    prefix::Prefix,
    tiers::Tiers,
};

/// Most names and wildcards in one pod's policy, including those of its namespace. Kubernetes limits the
/// annotations of one object to 256 KiB, so only very short names reach this limit.
pub const NAMES: usize = 10_000;

/// Most names with `*` inside a label among them. The thread that serves all pods compares each of them with
/// every name that the pod queries.
const GLOBS: usize = 100;

/// An error if there is more of something than its limit.
///
/// # Errors
///
/// Names what there is too much of, how much, and the limit.
pub(super) fn check_limit(
    what: &'static str,
    count: usize,
    limit: usize,
) -> Result<(), PolicyError> {
    if count > limit {
        return Err(PolicyError::from_problem(Problem::limit(
            what, count, limit,
        )));
    }
    Ok(())
}

/// Counts the entries before they are compiled, so that the work is bounded.
pub(super) fn check_written(written: &[&Lists], tiers: &Tiers, problems: &mut Vec<Problem>) {
    let mut names = BTreeSet::new();
    let mut prefixes = BTreeSet::<Prefix>::new();
    let lists = written
        .iter()
        .flat_map(|lists| [&lists.allow, &lists.deny, &lists.resolve])
        .flatten()
        .flatten()
        .map(|Written { entry, .. }| &entry.destination);
    let ordered = tiers.rules().map(|(_, rule)| &rule.destination);
    for destination in lists.chain(ordered) {
        match destination {
            Destination::Any => {}
            Destination::Addresses(prefix) => {
                prefixes.insert(*prefix);
            }
            Destination::Names(pattern) => {
                names.insert(pattern);
            }
        }
    }
    let globs = names
        .iter()
        .filter(|pattern| matches!(pattern, NamePattern::Glob(_)))
        .count();
    for (what, count, limit) in [
        ("names", names.len(), NAMES),
        (
            "names with * inside a label, or as a label after the first",
            globs,
            GLOBS,
        ),
        (PREFIXES, prefixes.len(), CIDR_ENTRIES as usize),
    ] {
        if count > limit {
            problems.push(Problem::limit(what, count, limit));
        }
    }
}
