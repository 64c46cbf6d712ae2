//! The content of the node's report, within its bounds.

use std::collections::BTreeSet;

use egress_api::{
    EgressNodeReportStatus, PROBLEM_ABOUT_MAX, PROBLEM_TEXT_MAX, PolicyCounts,
    REPORTED_POLICIES_MAX, REPORTED_PROBLEMS_MAX, ReportedPods, ReportedPolicy, ReportedProblem,
};

use super::{
    super::{PodCounts, PolicyState},
    events::cut,
};

/// The report about this node to the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeReport {
    /// The UID of the Node, with which the report goes.
    pub(super) node_uid: Option<String>,
    pub(super) status: EgressNodeReportStatus,
}

impl NodeReport {
    /// A report about these policies and problems; each problem is about something, and has a text.
    pub fn new<'a>(
        node_uid: Option<&str>,
        pods: PodCounts,
        policies: &[PolicyState],
        problems: impl Iterator<Item = (String, &'a str)>,
    ) -> Self {
        // A policy whose last generation selects no pod is still in force for one while its edit is not.
        let concerns = |state: &&PolicyState| state.selected > 0 || state.applied.is_some();
        let mut listed: Vec<&PolicyState> = policies.iter().filter(concerns).collect();
        let selecting = listed.len();
        let applied = listed.iter().filter(|state| state.is_applied()).count();
        // The sort is stable, so the order among equals is that of the names.
        listed.sort_by_key(|state| (state.is_applied(), state.problem.is_none()));
        listed.truncate(REPORTED_POLICIES_MAX);
        let told: BTreeSet<String> = listed.iter().map(|state| state.name.to_string()).collect();
        let (mut problem_count, mut texts) = (0, Vec::new());
        for (about, message) in problems {
            problem_count += 1;
            if texts.len() < REPORTED_PROBLEMS_MAX && !told.contains(&about) {
                texts.push(ReportedProblem {
                    about: cut(&about, PROBLEM_ABOUT_MAX).to_owned(),
                    message: shortened(message),
                });
            }
        }
        let status = EgressNodeReportStatus {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            pods: ReportedPods {
                selected: pods.selected,
                enforced: pods.enforced,
                audited: pods.audited,
            },
            policy_counts: PolicyCounts {
                selecting: count(selecting),
                applied: count(applied),
                not_selecting: count(policies.len() - selecting),
                left_out: count(selecting - listed.len()),
            },
            policies: listed.into_iter().map(reported).collect(),
            problems: texts,
            problem_count,
        };
        let node_uid = node_uid.filter(|uid| !uid.is_empty()).map(str::to_owned);
        Self { node_uid, status }
    }

    /// The report of a node on which nothing is enforced any more.
    pub(super) fn stopped(&self) -> Self {
        let mut stopped = self.clone();
        let status = &mut stopped.status;
        status.pods.enforced = 0;
        status.pods.audited = 0;
        status.policy_counts.applied = 0;
        for policy in &mut status.policies {
            policy.applied_generation = None;
            policy.enforced = 0;
        }
        status.problems = vec![ReportedProblem {
            about: "agent".to_owned(),
            message:
                "it has been stopped and has removed its programs: nothing is enforced on this node"
                    .to_owned(),
        }];
        status.problem_count = 1;
        stopped
    }
}

fn reported(state: &PolicyState) -> ReportedPolicy {
    ReportedPolicy {
        kind: state.name.kind.as_str().to_owned(),
        namespace: state.name.namespace.clone(),
        name: state.name.name.clone(),
        generation: state.generation,
        applied_generation: state.applied,
        selected: state.selected,
        enforced: state.enforced,
        problem: state.problem.as_deref().map(shortened),
    }
}

/// A text that is cut where it is too long, with a mark.
fn shortened(text: &str) -> String {
    const MARK: &str = " …";
    if text.len() <= PROBLEM_TEXT_MAX {
        return text.to_owned();
    }
    format!("{}{MARK}", cut(text, PROBLEM_TEXT_MAX - MARK.len()))
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use egress_policy::objects::{ObjectKind, ObjectName};

    use super::*;

    fn state(number: usize, enforced: u32) -> PolicyState {
        PolicyState {
            name: Arc::new(ObjectName {
                kind: ObjectKind::EgressPolicy,
                namespace: Some("n".repeat(63)),
                name: format!("{number:0253}"),
            }),
            generation: Some(i64::MAX),
            applied: Some(i64::MAX),
            selected: 2,
            enforced,
            problem: None,
        }
    }

    #[test]
    fn a_report_lists_what_is_not_applied_first_and_counts_the_rest() {
        let mut policies: Vec<_> = (0..700).map(|number| state(number, 2)).collect();
        policies[690].enforced = 1;
        policies[0].selected = 0;
        policies[0].enforced = 0;
        policies[0].applied = None;
        let report = NodeReport::new(Some("u"), PodCounts::default(), &policies, [].into_iter());
        let status = report.status;
        let counts = status.policy_counts;
        assert_eq!(
            (
                counts.selecting,
                counts.applied,
                counts.not_selecting,
                counts.left_out
            ),
            (699, 698, 1, 199)
        );
        assert_eq!(status.policies.len(), REPORTED_POLICIES_MAX);
        assert_eq!(status.policies[0].name, policies[690].name.name);
        assert_eq!(status.policies[1].name, policies[1].name.name);
    }

    #[test]
    fn the_problem_of_a_listed_policy_is_told_once() {
        let mut policies = vec![state(1, 2), state(2, 0)];
        policies[0].problem = Some("cannot be read".to_owned());
        policies[1].selected = 0;
        policies[1].applied = None;
        let problems = [
            (policies[0].name.to_string(), "cannot be read"),
            (policies[1].name.to_string(), "cannot be read either"),
        ];
        let report = NodeReport::new(None, PodCounts::default(), &policies, problems.into_iter());
        let status = report.status;
        assert_eq!(
            status.policies[0].problem.as_deref(),
            Some("cannot be read")
        );
        assert_eq!(status.problems.len(), 1);
        assert_eq!(status.problems[0].about, policies[1].name.to_string());
        assert_eq!(status.problem_count, 2);
    }

    /// etcd takes at most 1.5 MiB for a request.
    #[test]
    fn the_largest_report_is_far_below_the_limit_of_the_store() {
        let long = "é".repeat(5000);
        let policies: Vec<_> = (0..5000)
            .map(|number| PolicyState {
                problem: Some(long.clone()),
                ..state(number, 0)
            })
            .collect();
        let problems = (0..5000).map(|number| (format!("{number}{long}"), &*long));
        let report = NodeReport::new(Some("u"), PodCounts::default(), &policies, problems);
        assert_eq!(report.status.problems.len(), REPORTED_PROBLEMS_MAX);
        assert!(report.status.problems[0].message.ends_with(" …"));
        let bytes = serde_json::to_vec(&report.status).expect("JSON").len();
        assert!(bytes < 512 * 1024, "{bytes}");
    }
}
