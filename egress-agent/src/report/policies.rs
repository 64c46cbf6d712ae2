//! Denied packets of a namespace's pods by the policies that decided.

use std::sync::OnceLock;

use super::{Counter, DecidedBy, Verdict};

/// Most policies that are counted on their own for one namespace.
const POLICIES: usize = 32;

/// The kind under which all further policies are counted.
const OTHER: &str = "other";

/// The counters. Several threads add to them without a lock; a policy keeps its place once it has one.
#[derive(Debug)]
pub struct PolicyCounts {
    known: [OnceLock<Box<PolicyCount>>; POLICIES],
    other: PolicyCount,
}

/// The counters of one policy.
#[derive(Debug)]
struct PolicyCount {
    kind: &'static str,
    name: Box<str>,
    denied: Counter,
    audited: Counter,
}

impl Default for PolicyCounts {
    fn default() -> Self {
        Self {
            known: [const { OnceLock::new() }; POLICIES],
            other: PolicyCount::new(OTHER, ""),
        }
    }
}

impl PolicyCount {
    fn new(kind: &'static str, name: &str) -> Self {
        Self {
            kind,
            name: name.into(),
            denied: Counter::default(),
            audited: Counter::default(),
        }
    }

    fn is_of(&self, kind: &str, name: &str) -> bool {
        self.kind == kind && *self.name == *name
    }
}

impl PolicyCounts {
    pub(super) fn add(&self, policy: &DecidedBy<'_>, verdict: Verdict, count: u64) {
        // Pods and Services come and go, so each kind has one counter.
        let name = if matches!(policy.kind, "Pod" | "Service") {
            ""
        } else {
            policy.name
        };
        let counters = self.of(policy.kind, name);
        match verdict {
            Verdict::Dropped | Verdict::Rejected => counters.denied.add(count),
            Verdict::Audited => counters.audited.add(count),
        }
    }

    fn of(&self, kind: &'static str, name: &str) -> &PolicyCount {
        for place in &self.known {
            // Another thread may take the place first.
            let known = place.get_or_init(|| Box::new(PolicyCount::new(kind, name)));
            if known.is_of(kind, name) {
                return known;
            }
        }
        &self.other
    }

    /// The counters of each policy that has one: kind, name, and packets that were denied and that would have been.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, &str, [u64; 2])> {
        let known = self.known.iter().filter_map(OnceLock::get).map(|of| &**of);
        known
            .chain([&self.other])
            .map(|of| (of.kind, &*of.name, [of.denied.get(), of.audited.get()]))
            .filter(|(.., counts)| *counts != [0, 0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy<'a>(kind: &'static str, name: &'a str) -> DecidedBy<'a> {
        DecidedBy {
            kind,
            namespace: None,
            name,
            rule: None,
            entry: None,
        }
    }

    #[test]
    fn denials_are_counted_by_policy_and_pods_together() {
        let counts = PolicyCounts::default();
        counts.add(&policy("EgressPolicy", "web"), Verdict::Dropped, 2);
        counts.add(&policy("EgressPolicy", "web"), Verdict::Audited, 1);
        counts.add(&policy("Pod", "cart-1"), Verdict::Rejected, 1);
        counts.add(&policy("Pod", "cart-2"), Verdict::Rejected, 1);
        let all: Vec<_> = counts.each().collect();
        assert_eq!(all, [("EgressPolicy", "web", [2, 1]), ("Pod", "", [2, 0])]);
    }

    #[test]
    fn policies_beyond_the_limit_are_counted_together() {
        let counts = PolicyCounts::default();
        for number in 0..POLICIES + 10 {
            let name = number.to_string();
            counts.add(&policy("EgressPolicy", &name), Verdict::Dropped, 1);
        }
        let all: Vec<_> = counts.each().collect();
        assert_eq!(all.len(), POLICIES + 1);
        assert_eq!(all.last(), Some(&("other", "", [10, 0])));
    }
}
